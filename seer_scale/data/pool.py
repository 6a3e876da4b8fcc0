"""Processes that fill batches in shared memory. One that dies or hangs is replaced; no row is lost, none made twice.

Every worker makes the same rows of every batch, so that what it keeps open (a tar, a block of images read ahead) serves
the next batch too. A batch is a pure function of its key, so a worker's replacement begins with the first batch the
dead one has not reported, and what was half written is written again.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from seer_scale.errors import DataError

SUSPECT_TWICE = 2
"""Workers that one item has ended before it is refused: one may have been killed for any reason."""
GIVE_UP_AFTER = 5
"""Replacements of one worker in a row, without a batch from any of them, that end the run."""


class Guard:
    """Knows which item a worker is busy with, and which items have ended workers before."""

    def __init__(self, seat: np.ndarray, refused: Sequence[int] = ()):
        self._seat, self._refused = seat, frozenset(refused)

    def enter(self, item: int) -> None:
        """To be called before item number `item` is read. Raises DataError for one that is refused."""
        self._seat[0] += 1
        self._seat[1] = item
        if item in self._refused:
            raise DataError(f"it ended or stopped its loader {SUSPECT_TWICE} times")

    def leave(self) -> None:
        """What was entered is done."""
        self._seat[1] = -1


class Job(Protocol):
    """What the batches are. The job is copied into every worker by fork, and may keep things open there."""

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        """Shape and numpy type of each array of a batch of the largest size."""

    def rows(self, key: Any) -> int:
        """How many rows the batch of `key` has; they are shared out among the workers."""

    def fill(self, key: Any, row: int, out: Sequence[np.ndarray], guard: Guard) -> Any:
        """Write one row into the arrays of a batch; returns what goes with it (pickled, small). May raise DataError."""

    def describe(self, item: int) -> str:
        """An item's name, for the log."""


def stream(
    job: Job, keys: Sequence[Any], *, workers: int, prefetch: int = 2, pin: bool = False, timeout_s: float = 300.0
) -> Iterator[tuple[list[torch.Tensor], list[Any]]]:
    """For each key in turn the batch's arrays (of the largest size, the caller's own) and what `fill` returned by row.

    workers: processes; 0 fills here. prefetch: batches that may be ready or in the making, besides the one given out.
    timeout_s: a worker that takes longer over one item while somebody waits for it is replaced. Processes live as long
    as the iterator, and end with the thread that first asked for a batch. Raises DataError as `fill` does, or when a
    worker cannot be kept alive.
    """
    workers = min(workers, max((job.rows(k) for k in (keys[0], keys[-1])), default=0) if keys else 0)
    if not workers:
        guard = Guard(np.zeros(2, np.int64))
        for key in keys:
            out = [torch.empty(shape, dtype=_DTYPES[kind]) for shape, kind in job.buffers()]
            arrays = [o.numpy() for o in out]
            told = [job.fill(key, row, arrays, guard) for row in range(job.rows(key))]
            yield [o.pin_memory() for o in out] if pin else out, told
        return
    pool = _Pool(job, keys, workers, prefetch + 1, timeout_s)
    try:
        for n in range(len(keys)):
            told = pool.wait_for(n)
            out = [torch.empty(a.shape, dtype=_DTYPES[a.dtype.type], pin_memory=pin) for a in pool.arrays(n)]
            for to, a in zip(out, pool.arrays(n)):
                to.copy_(torch.from_numpy(a))
            pool.free(n)
            yield out, told
    finally:
        pool.close()


_DTYPES = {np.uint8: torch.uint8, np.float32: torch.float32, np.int64: torch.int64}


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    next: int
    """The first batch it has not reported."""
    progress: int = -1
    since: float = 0.0
    """When its progress was last seen to change, in seconds of waiting for it."""
    suspects: set[int] = field(default_factory=set)
    """Items at which those before it ended since the last batch of this seat."""


class _Pool:
    def __init__(self, job: Job, keys: Sequence[Any], workers: int, depth: int, timeout_s: float):
        self.job, self.keys, self.depth, self.timeout_s = job, keys, min(depth, len(keys)), timeout_s
        self._ring = [[_shared(shape, kind) for shape, kind in job.buffers()] for _ in range(self.depth)]
        self._seats = _shared((workers, 2), np.int64)
        self._told: dict[int, dict[int, tuple[list[Any], DataError | str | None]]] = {}
        self._freed = 0
        self._waited_s = 0.0
        self._suspects: Counter[int] = Counter()
        self._fruitless = [0] * workers
        self._context = multiprocessing.get_context("fork")  # workers share the index instead of copying it
        self._workers: list[_Worker] = []
        for seat in range(workers):
            self._workers.append(self._start(seat, 0))

    def arrays(self, n: int) -> list[np.ndarray]:
        return self._ring[n % self.depth]

    def wait_for(self, n: int) -> list[Any]:
        """What the rows of batch n told, once all are written."""
        begin = time.monotonic()
        before = self._waited_s
        while late := [seat for seat, w in enumerate(self._workers) if w.next <= n]:
            ready = wait([self._workers[s].connection for s in late], timeout=min(1.0, self.timeout_s / 4))
            self._waited_s = before + time.monotonic() - begin
            for seat in late:
                if self._workers[seat].connection in ready:
                    self._hear(seat)
                elif self._hangs(seat):
                    self._replace(seat, f"has been at it for {self.timeout_s:g} s")
        told = []
        for _, (rows, failure) in sorted(self._told.pop(n).items()):
            if isinstance(failure, DataError):
                raise failure
            if failure:
                raise RuntimeError(f"A loader process failed:\n{failure}")
            told += rows
        return told

    def free(self, n: int) -> None:
        """Batch n was copied: its memory serves batch n + depth."""
        self._freed = n + 1
        for w in self._workers:
            try:
                w.connection.send_bytes(b"1")
            except OSError:  # it died: its replacement is told how far it may go
                continue

    def close(self) -> None:
        for w in self._workers:
            w.process.kill()
        for w in self._workers:
            w.process.join(1.0)
            w.connection.close()

    def _start(self, seat: int, first: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        others = [w.connection for w in self._workers]
        refused = [item for item, times in self._suspects.items() if times >= SUSPECT_TWICE]
        arguments = (self.job, self.keys, first, self._freed + self.depth, seat, len(self._seats), self._ring, theirs, Guard(self._seats[seat], refused), os.getpid(), [ours, *others])
        self._seats[seat] = 0, -1
        process = self._context.Process(target=_work, args=arguments, daemon=True, name=f"loader-{seat}")
        process.start()
        theirs.close()
        return _Worker(process, ours, first, since=self._waited_s)

    def _hear(self, seat: int) -> None:
        worker = self._workers[seat]
        try:
            n, told, failure = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(5.0)
            code = worker.process.exitcode
            self._replace(seat, f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}")
            return
        self._told.setdefault(n, {})[seat] = told, failure
        worker.next, worker.since = n + 1, self._waited_s
        self._fruitless[seat] = 0
        for item in worker.suspects:  # they were made after all
            if self._suspects[item] < SUSPECT_TWICE:
                del self._suspects[item]
        worker.suspects = set()

    def _hangs(self, seat: int) -> bool:
        worker, progress = self._workers[seat], int(self._seats[seat, 0])
        if progress != worker.progress:
            worker.progress, worker.since = progress, self._waited_s
        return self._waited_s - worker.since > self.timeout_s

    def _replace(self, seat: int, what: str) -> None:
        worker, item = self._workers[seat], int(self._seats[seat, 1])
        worker.process.kill()
        worker.connection.close()
        where = f" at {self.job.describe(item)}" if item >= 0 else ""
        self._fruitless[seat] += 1
        if self._fruitless[seat] > GIVE_UP_AFTER:
            raise DataError(f"Loader process {seat} {what}{where}, and so did {GIVE_UP_AFTER} before it without making a batch: if memory is short (signal SIGKILL), lower data.workers or data.prefetch; if reads hang, raise data.timeout_s.")
        if item >= 0:
            self._suspects[item] += 1
        print(f"Loader process {seat} {what}{where}; another takes its place, and no image is lost or repeated.", file=sys.stderr, flush=True)
        self._workers[seat] = self._start(seat, worker.next)
        self._workers[seat].suspects = worker.suspects | ({item} - {-1})


def _shared(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Zeros in memory that processes forked from this one share; unlike /dev/shm, limited by memory alone."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), kind, math.prod(shape)).reshape(shape)


def _work(
    job: Job, keys: Sequence[Any], first: int, upto: int, seat: int, workers: int, ring: list[list[np.ndarray]],
    connection: Connection, guard: Guard, parent: int, foreign: list[Connection],
) -> None:  # fmt: skip
    """A worker's life: its rows of the batches from `first` on, never beyond `upto`, which each message raises by one."""
    _settle(parent)
    for c in foreign:
        c.close()
    try:
        for n in range(first, len(keys)):
            while n >= upto:
                connection.recv_bytes()
                upto += 1
            rows, told, failure = job.rows(keys[n]), [], None
            try:
                for row in range(seat * rows // workers, (seat + 1) * rows // workers):
                    told.append(job.fill(keys[n], row, ring[n % len(ring)], guard))
                    guard.leave()
            except DataError as error:
                failure = error
            except Exception:
                failure = traceback.format_exc()
            connection.send((n, told, failure))
            if failure:
                break
        while True:  # until the iterator is closed
            connection.recv_bytes()
    except (EOFError, OSError):  # nobody listens any more
        pass
    os._exit(0)


def _settle(parent: int) -> None:
    """One thread; stop signals are the main process's to judge; no worker outlives it."""
    gc.freeze()  # what is shared stays shared: a collection would write into every object
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
