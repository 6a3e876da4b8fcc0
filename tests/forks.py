"""Children of one server that has imported what they need: a start costs a fork, and not seconds of imports.

The list stands here alone: a process has one such server, and who sets its list again takes it from all others.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping

METHOD = "forkserver"
_context = multiprocessing.get_context(METHOD)
_context.set_forkserver_preload(
    [
        "hypothesis",
        "pytest",
        "sklearn.metrics",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "seer_scale.cli",
        "seer_scale.evaluate.run",
        "seer_scale.launch.local",
        "seer_scale.methods.swav.method",
        "seer_scale.observe.report",
        "seer_scale.parallel.fsdp",
        "seer_scale.training.start",
    ]
)
Queue = _context.Queue


def fork(target: Callable, *args: object) -> multiprocessing.process.BaseProcess:
    """A child that runs target(*args), both pickled, in the environment that this process has now; not yet started."""
    return _context.Process(target=_in_environment, args=(dict(os.environ), target, args))


def _in_environment(environment: Mapping[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()  # the server's is of the moment of its start
    os.environ.update(environment)
    gc.freeze()  # a million objects of libraries, through which no collection need look
    target(*args)
