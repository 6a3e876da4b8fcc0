"""Stopping on request: signals set a flag, and all ranks agree at a step boundary.

The agreement of one step is read at the next, from an all-reduce that ran beside it on the host: no update waits.
"""

from __future__ import annotations

import math
import os
import signal
import time

import torch
import torch.distributed as dist

from seer_scale.errors import ECHO_S, STOP_SIGNALS
from seer_scale.world import World


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGUSR2 ask the run to stop; SIGINT again, a second later, ends the process, while
    the others may come as often as a queue likes.

    Enter it before ranks join: a signal that comes while they do is honoured at the first boundary. Signals that a
    launcher had blocked until now are let in.
    """

    def __init__(self):
        self._mine = 0
        self._asked_at = math.inf
        self._before: dict[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._ask) for s in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _ask(self, number: int, _) -> None:
        self._mine = number
        if number == signal.SIGINT and time.monotonic() - self._asked_at > ECHO_S:
            # not the handler before ours: submitit's would start the ranks anew
            signal.signal(number, signal.default_int_handler)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT:
            self._asked_at = min(self._asked_at, time.monotonic())

    def agreed(self, world: World) -> str | None:
        """The name of the signal some rank had got by the previous call (alone: by now); all ranks call it as often."""
        flag = torch.tensor([self._mine])
        if world.size > 1:
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=world.control, async_op=True)
            earlier, self._pending = self._pending, (work, flag)
            if earlier is None:
                return None
            earlier[0].wait()
            flag = earlier[1]
        number = int(flag)
        return signal.Signals(number).name if number else None
