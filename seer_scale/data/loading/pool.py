"""Batches filled by processes in shared memory. A process that dies or hangs is replaced; no row is lost, none made
twice.

Every worker makes the same rows of every batch, so that what it keeps open (a tar, a block of images read ahead) serves
the next batch too. A batch is a pure function of its key, so a worker's replacement begins with the first batch the
dead one has not reported, and what was half written is written again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Any

import cloudpickle
import numpy as np

from seer_scale.cores import loads_in_processes
from seer_scale.data.loading.worker import ITEM, PID, PROGRESS, STATUS, BatchTask, ItemTracker, shared_arrays
from seer_scale.errors import NOTHING, DataError, Problem

SUSPECT_TWICE = 2
"""Workers that one item has ended before it is refused: one may have been killed for any reason."""
MAX_REPLACEMENTS = 5
"""Replacements of one worker in a row, without a batch from it or an item that is known for it, that end the run."""
MAX_REFUSED = 100
"""Items refused in a row, without a batch from their worker, that end the run: then it is not the items."""
WORKER_START_S = 120.0
"""Seconds a worker may take until it begins, for the host has to load the task before."""


def warn(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def iterate_batches(
    task: BatchTask,
    keys: Sequence[Any],
    *,
    workers: int,
    prefetch: int = 2,
    timeout_s: float = 120.0,
    log: Callable[[str], None] = warn,
) -> Generator[tuple[list[np.ndarray], list[Any]], None, None]:
    """For each key in turn the batch's arrays (of the largest size) and what `fill` returned by row.

    The arrays are the caller's until it asks for the next batch. workers: processes; 0 fills here, and so does any
    number without Linux. prefetch: batches that may be ready or in the making, besides the one given out. timeout_s: a
    worker that takes longer over one item while somebody waits for it is replaced, and `log` gets a sentence.
    Processes live as long as the iterator. Raises DataError as `fill` does, or when a worker cannot be kept alive.
    """
    workers = min(workers, max((task.rows(k) for k in (keys[0], keys[-1])), default=0) if keys else 0)
    if not workers or not loads_in_processes():
        tracker = ItemTracker(np.zeros(4, np.int64))
        arrays: list[np.ndarray] = [np.zeros(shape, kind) for shape, kind in task.buffers()]
        for key in keys:
            yield arrays, [task.fill(key, row, arrays, tracker) for row in range(task.rows(key))]
        return
    pool = _Pool(task, keys, workers, prefetch + 1, timeout_s, log)
    try:
        for n in range(len(keys)):
            results = pool.wait_for(n)
            yield pool.arrays(n), results
            pool.free(n)
    finally:
        pool.close()


@dataclass
class _Worker:
    connection: Connection
    next: int
    """The first batch it has not reported."""
    progress: int = -1
    since: float = 0.0
    """When its progress was last seen to change, in seconds of waiting for it."""
    suspects: set[int] = field(default_factory=set)
    """Items at which those before it ended since the last batch of this slot."""


class _Pool:
    def __init__(
        self,
        task: BatchTask,
        keys: Sequence[Any],
        workers: int,
        depth: int,
        timeout_s: float,
        log: Callable[[str], None],
    ):
        self.task, self.keys, self.depth, self.timeout_s, self._log = task, keys, min(depth, len(keys)), timeout_s, log
        specs = task.buffers()
        self._memory = os.memfd_create("batches")  # unlike /dev/shm, limited by memory alone
        self._slots, *arrays = shared_arrays(self._memory, [((workers, 4), np.int64), *specs * self.depth])
        self._ring = [arrays[i * len(specs) : (i + 1) * len(specs)] for i in range(self.depth)]
        self._results: dict[int, dict[int, tuple[list[Any], DataError | str | None]]] = {}
        self._freed, self._waited_s = 0, 0.0
        self._suspects: Counter[int] = Counter()
        self._failures_without_progress = [0] * (workers + 1)  # the last one is the host
        self._workers: list[_Worker] = []
        self._control = self._ask_host()
        self._workers = [self._start(slot, 0) for slot in range(workers)]

    def arrays(self, n: int) -> list[np.ndarray]:
        return self._ring[n % self.depth]

    def wait_for(self, n: int) -> list[Any]:
        """What `fill` returned for the rows of batch n, once all are written."""
        begin, before = time.monotonic(), self._waited_s
        while late := [slot for slot, worker in enumerate(self._workers) if worker.next <= n]:
            waited_for = [self._workers[s].connection for s in late]
            ready = wait([*waited_for, self._control], timeout=min(1.0, self.timeout_s / 4))
            self._waited_s = before + time.monotonic() - begin
            if self._control in ready:
                self._restart_host()
                continue
            for slot, connection in zip(late, waited_for):
                if connection in ready:
                    self._receive(slot)
                elif self._hangs(slot):
                    self._replace(slot, f"has been at it for {self.timeout_s:g} s")
        results = []
        for _, (rows, failure) in sorted(self._results.pop(n).items()):
            if isinstance(failure, DataError):
                raise failure
            if failure:
                raise RuntimeError(f"A loader process failed:\n{failure}")
            results += rows
        return results

    def free(self, n: int) -> None:
        """Batch n was copied: its memory serves batch n + depth."""
        self._freed = n + 1
        for worker in self._workers:
            with suppress(OSError):  # it died: its replacement is sent how far it may go
                worker.connection.send_bytes(b"1")

    def close(self) -> None:
        for slot, worker in enumerate(self._workers):
            self._kill(slot)
            worker.connection.close()
        with suppress(OSError):
            self._control.send(None)  # to close it is not enough where a fork of this process holds it open
        self._control.close()
        os.close(self._memory)

    # --- processes

    def _ask_host(self) -> Connection:
        ours, theirs = Pipe()
        _server.ask(theirs)
        task, folder = cloudpickle.dumps(self.task), _folder()
        with theirs, suppress(OSError):
            ours.send((sys.path, folder, dict(os.environ), task, self.keys, self.depth, len(self._slots)))
            send_handle(ours, self._memory, None)
        return ours

    def _start(self, slot: int, first: int, suspects: Iterable[int] = ()) -> _Worker:
        refused = [item for item, times in self._suspects.items() if times >= SUSPECT_TWICE]
        ours, theirs = Pipe()
        with theirs:
            self._slots[slot] = 0, -1, 0, 0
            with suppress(OSError):  # the host is gone, which whoever waits will see
                self._control.send((slot, first, self._freed + self.depth, refused))
                send_handle(self._control, theirs.fileno(), None)
        return _Worker(ours, first, since=self._waited_s, suspects=set(suspects))

    def _receive(self, slot: int) -> None:
        worker = self._workers[slot]
        try:
            n, results, failure = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(slot, self._how_it_ended(slot))
            return
        self._results.setdefault(n, {})[slot] = results, failure
        worker.next, worker.since = n + 1, self._waited_s
        self._failures_without_progress[slot] = self._failures_without_progress[-1] = 0
        for item in worker.suspects:  # they were made after all
            if self._suspects[item] < SUSPECT_TWICE:
                del self._suspects[item]
        worker.suspects = set()

    def _how_it_ended(self, slot: int) -> str:
        deadline = time.monotonic() + 5
        while (
            not (status := int(self._slots[slot, STATUS])) and time.monotonic() < deadline and not self._control.poll()
        ):
            time.sleep(0.001)
        if not status:
            return "ended with its host"
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status - 1}"

    def _hangs(self, slot: int) -> bool:
        worker, progress = self._workers[slot], int(self._slots[slot, PROGRESS])
        if progress != worker.progress:
            worker.progress, worker.since = progress, self._waited_s
        again = max(self.timeout_s / 4, min(self.timeout_s, 10.0))  # several in one batch: other ranks are waiting
        limit = (
            (again if worker.suspects else self.timeout_s)
            if self._slots[slot, PID]
            else max(WORKER_START_S, self.timeout_s)
        )
        return self._waited_s - worker.since > limit

    def _kill(self, slot: int) -> None:
        pid = int(self._slots[slot, PID])
        if pid and not self._slots[slot, STATUS]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _replace(self, slot: int, what: str) -> None:
        worker, item = self._workers[slot], int(self._slots[slot, ITEM])
        self._kill(slot)
        worker.connection.close()
        where = f" at {self.task.describe(item)}" if item >= 0 else ""
        self._suspects[item] += item >= 0
        if self._suspects[item] == SUSPECT_TWICE and len(worker.suspects | {item}) <= MAX_REFUSED:
            self._failures_without_progress[slot] = 0  # the next one passes it by
        else:
            self._count(slot, f"Loader process {slot}", f"{what}{where}")
        self._log(f"Loader process {slot} {what}{where}; another takes its place, and no image is lost or repeated.")
        self._workers[slot] = self._start(slot, worker.next, worker.suspects | ({item} - {-1}))

    def _restart_host(self) -> None:
        """The host has died, and the workers with it: another one holds the task and forks them anew."""
        try:
            raise RuntimeError(f"Loader processes cannot be started:\n{self._control.recv()}")
        except (EOFError, OSError):
            pass
        _server.raise_if_failed()
        self._count(-1, "The host of the loader processes", "was ended")
        self._log(
            "The host of the loader processes was ended; another takes its place, and no image is lost or repeated."
        )
        for worker in self._workers:
            worker.connection.close()
        self._control.close()
        self._control = self._ask_host()
        self._workers = [self._start(slot, worker.next) for slot, worker in enumerate(self._workers)]

    def _count(self, slot: int, who: str, what: str) -> None:
        self._failures_without_progress[slot] += 1
        if self._failures_without_progress[slot] > MAX_REPLACEMENTS:
            rule = f"{what}, and so did {MAX_REPLACEMENTS} before it without making a batch"
            memory = "if memory is short (signal SIGKILL), lower data.workers or data.prefetch"
            raise DataError(Problem(who, NOTHING, rule, f"{memory}; if reads hang, raise data.timeout_s"))


SERVER = """
import os, sys
sys.path[:] = {path!r}
try:
    from seer_scale.data.loading import worker
    worker.serve({fd}, {parent})
except BaseException as error:
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    where = f"{{trace.tb_frame.f_code.co_filename}}, line {{trace.tb_lineno}}"
    try:
        os.write({fd}, f"{{type(error).__name__}}: {{error}} ({{where}})".encode(errors="backslashreplace"))
    except OSError:  # nobody listens
        pass
    os._exit(1)
"""
"""The server's program, which writes to its socket, and nowhere else, why it cannot serve."""


class _Server:
    """This process's server of loader processes, started when first asked, and again should it have died."""

    _process: subprocess.Popen[bytes]
    _socket: socket.socket

    def __init__(self) -> None:
        self._owner = 0  # no process's: there is no server yet

    def raise_if_failed(self) -> None:
        """Raises DataError where it has written why it could not begin to serve."""
        try:
            reason = self._socket.recv(1 << 16, socket.MSG_DONTWAIT).decode(errors="replace")
        except OSError:
            return
        if reason:
            raise DataError(Problem("The server of the loader processes", NOTHING, f"cannot be started: {reason}"))

    def ask(self, theirs: Connection) -> None:
        """Have it fork a host that listens to `theirs`."""
        if self._owner != os.getpid() or self._process.poll() is not None:
            if self._owner == os.getpid():
                self.raise_if_failed()
            self._begin()
        try:
            socket.send_fds(self._socket, [b"1"], [theirs.fileno()])
        except OSError:  # it died just now
            self._begin()
            socket.send_fds(self._socket, [b"1"], [theirs.fileno()])

    def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        here = ("", _folder())  # last: a random.py there is not the standard library's
        path = [p for p in sys.path if p not in here] + [p for p in sys.path if p in here]
        words = [sys.executable, "-P", "-c", SERVER.format(path=path, fd=theirs.fileno(), parent=os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._socket, self._owner = ours, os.getpid()


_server = _Server()


def _folder() -> str:
    """The one this process works in, to which paths of images are relative; empty where it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""
