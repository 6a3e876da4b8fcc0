"""The processes that fill batches. They import neither torch nor what the training process has grown to: numpy, the
decoders, and the source are all they need, so each takes some ten megabytes of its own.

A server, one for each training process, has imported everything; it forks a host for each stream of batches, and the
host, which holds the task, forks the workers, again when one has to be replaced. Nothing is forked from the training
process, whose threads and accelerator would not survive it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from typing import Any, Protocol

import numpy as np

from seer_scale import console
from seer_scale.data.sources import remote
from seer_scale.data.transforms.native import native
from seer_scale.errors import STOP_SIGNALS, DataError, Unreadable

PROGRESS, ITEM, PID, STATUS = range(4)
"""Columns of the slots: items entered so far; the one a worker is busy with, or -1; its process number; and how it
ended, 0 while it lives, else one more than its exit status, or minus its signal."""

Spec = tuple[tuple[int, ...], type]
"""Shape and numpy type of an array."""


class ItemTracker:
    """Tells which item a worker is busy with, and refuses those that have ended workers before."""

    def __init__(self, slot: np.ndarray, refused: Sequence[int] = ()):
        self._slot, self._refused = slot, frozenset(refused)

    def begin(self, item: int) -> None:
        """To be called before item number `item` is read. Raises Unreadable for one that is refused."""
        self._slot[PROGRESS] += 1
        self._slot[ITEM] = item
        if item in self._refused:
            raise Unreadable("it ended or stopped its loader twice")

    def heartbeat(self) -> None:
        """Still at it, and getting somewhere."""
        self._slot[PROGRESS] += 1

    def end(self) -> None:
        """What was entered is done."""
        self._slot[ITEM] = -1


class BatchTask(Protocol):
    """What the batches are. Every worker has a copy of it, made before its first row, and may keep things open."""

    def buffers(self) -> list[Spec]:
        """Shape and numpy type of each array of a batch of the largest size."""

    def rows(self, key: Any) -> int:
        """How many rows the batch of `key` has; they are shared out among the workers."""

    def fill(self, key: Any, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> Any:
        """Write one row into the arrays of a batch; returns what goes with it (pickled, small). May raise DataError."""

    def describe(self, item: int) -> str:
        """An item's name, for the log."""


def shared_arrays(fd: int, specs: Sequence[Spec]) -> list[np.ndarray]:
    """Arrays one after the other in the file `fd`, which grows to hold them; zeros where nobody has written."""
    ends = np.cumsum([0, *(-(-_nbytes(s) // 64) * 64 for s in specs)]).tolist()
    if os.fstat(fd).st_size < ends[-1]:
        os.ftruncate(fd, ends[-1])
    memory = mmap.mmap(fd, max(1, ends[-1]))
    return [np.frombuffer(memory, kind, math.prod(shape), at).reshape(shape) for (shape, kind), at in zip(specs, ends)]


def _nbytes(spec: Spec) -> int:
    return math.prod(spec[0]) * np.dtype(spec[1]).itemsize


# ------------------------------------------------------------------------------------------------------- server


def serve(fd: int, parent: int) -> None:
    """Fork a host for every socket that comes, until the training process has gone."""
    import seer_scale.data.loading.tasks  # noqa: F401  what every host needs, once

    if native() is None:
        import seer_scale.data.transforms.on_device  # noqa: F401  which does it instead

    console.install()
    _ignore_stop_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # hosts are not waited for
    try:
        gone = os.pidfd_open(parent)
    except ProcessLookupError:  # it ended while this one was loading
        return
    with socket.socket(fileno=fd) as requests:
        while gone not in wait([requests, gone]):
            message, sockets, _, _ = socket.recv_fds(requests, 1, 1)
            if not message:
                return
            if not os.fork():
                requests.close()
                host(Connection(sockets[0]), gone)
            os.close(sockets[0])


def host(control: Connection, gone: int) -> None:
    """Hold one stream's task, and fork its workers on request; never returns.

    gone: the training process as a file, which can be read once it has ended: the control's other end may be held open
    by a fork of it.
    """
    try:
        _ignore_stop_signals()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        path, folder, environment, task, keys, depth, workers = control.recv()
        sys.path[:] = path
        with suppress(OSError):  # it may have been removed
            os.chdir(folder)  # which may be another than when the server began: paths of images are relative to it
        os.environ.update(environment)
        task = pickle.loads(task)
        specs, fd = task.buffers(), recv_handle(control)
        slots, *arrays = shared_arrays(fd, [((workers, 4), np.int64), *specs * depth])
        ring = [arrays[i * len(specs) : (i + 1) * len(specs)] for i in range(depth)]
        gc.freeze()  # what workers share stays shared: a collection would write into every object
        me = os.getpid()
        alive: dict[int, tuple[int, int]] = {}  # by the file that can be read once a worker has ended: process, slot
        while True:
            for ready in wait([control, gone, *alive]):
                if ready == gone:
                    raise EOFError
                if ready is control:
                    if (request := control.recv()) is None:
                        raise EOFError
                    slot, first, upto, refused = request
                    connection = Connection(recv_handle(control))
                    if not (pid := os.fork()):
                        control.close()
                        _work(
                            task,
                            keys,
                            first,
                            upto,
                            slot,
                            ring,
                            connection,
                            ItemTracker(slots[slot], refused),
                            slots,
                            me,
                        )
                    connection.close()
                    alive[os.pidfd_open(pid)] = pid, slot
                elif isinstance(ready, int):
                    pid, slot = alive.pop(ready)
                    os.close(ready)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    if slots[slot, PID] == pid:
                        slots[slot, STATUS] = status if status < 0 else status + 1
    except (EOFError, ConnectionError):  # the iterator was closed, or its process has gone
        pass
    except BaseException:
        with suppress(OSError):
            control.send(traceback.format_exc())
    os._exit(0)  # and the workers with it


def _work(
    task: BatchTask, keys: Sequence[Any], first: int, upto: int, slot: int, ring: list[list[np.ndarray]],
    connection: Connection, tracker: ItemTracker, slots: np.ndarray, parent: int,
) -> None:  # fmt: skip
    """A worker's life: its rows of the batches from `first` on, never beyond `upto`, which each message raises by
    one."""
    slots[slot, PID] = os.getpid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
    remote.waiting = tracker.heartbeat
    if "torch" in sys.modules:  # a task of its own brought it
        sys.modules["torch"].set_num_threads(1)
    try:
        for n in range(first, len(keys)):
            while n >= upto:
                connection.recv_bytes()
                upto += 1
            rows, results = task.rows(keys[n]), []
            failure: DataError | str | None = None
            try:
                for row in range(slot * rows // len(slots), (slot + 1) * rows // len(slots)):
                    results.append(task.fill(keys[n], row, ring[n % len(ring)], tracker))
                    tracker.end()
            except DataError as error:
                failure = error
            except Exception:
                failure = traceback.format_exc()
            connection.send((n, results, failure))
            if failure:
                break
        while True:  # until the iterator is closed
            connection.recv_bytes()
    except (EOFError, OSError):  # nobody listens any more
        pass
    os._exit(0)


def _ignore_stop_signals() -> None:
    """Stop signals are the training process's to judge."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
