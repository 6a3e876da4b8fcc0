"""What images there are is found out once for all ranks: rank 0 lists them, the others take over what it found.

The arrays of a source (names, places, labels: gigabytes for some sets) go through one file in the run's folder, which
the ranks of a node map and so share; the rest goes by the process group, so nothing read from a file is unpickled.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, StartStopped, UserError
from seer_scale.files import written_whole

T = TypeVar("T")
ALIGNMENT = 64
MAPPED_FROM = 1 << 26
"""Bytes of a listing that are mapped; fewer are read, and the file is removed at once."""
PATIENCE_S = 60.0
"""Seconds after which a file that rank 0 has written is to be seen on every node."""
_mine: set[Path] = set()
"""Files that this process has written and other ranks may have mapped: where one is removed, NFS takes it from other
nodes."""


def share(
    world: World, folder: Path, make: Callable[[], T], sources: Callable[[T], Iterable[Source]], name: str = "listing"
) -> T:
    """What `make` returns on rank 0, on all ranks, each of which checks that it can read its `sources`. Collective.

    folder: where all ranks see what rank 0 writes; name: of the file there, one that only this kind of command uses,
    for what an earlier one has left is removed. Raises UserError on all ranks where any has a reason to.
    """
    if world.size == 1:
        return make()
    made: list[T] = []  # none where it failed
    parcel: tuple[bytes, Path, list[int]] | None = None
    problem: UserError | None = None
    if world.is_main:
        try:
            made = [make()]
            parcel = _publish(folder, made[0], name)
        except UserError as error:
            problem = error
    parcel, problem = world.broadcast_object((parcel, problem))
    if problem:
        raise problem
    assert parcel is not None
    pickled, path, ends = parcel
    if not world.is_main:
        try:
            made = [_take(pickled, path, ends, make)]
            for source in sources(made[0]):
                source.arrive()
        except UserError as error:
            is_stop = isinstance(error, StartStopped)
            problem = error if is_stop else error.prefixed(f"On {socket.gethostname()}")
    problems = world.gather_objects(problem)
    if world.is_main and ends[-1] < MAPPED_FROM:
        path.unlink(missing_ok=True)
    if any(problems):
        raise next(p for p in problems if p)
    return made[0]


def _publish(folder: Path, made: object, name: str) -> tuple[bytes, Path, list[int]]:
    """(the pickle without its arrays, the file that has these one after the other, where each ends)"""
    buffers: list[pickle.PickleBuffer] = []
    pickled, ends = pickle.dumps(made, protocol=5, buffer_callback=buffers.append), [0]
    for old in folder.glob(f"{name}-*.bin"):
        if old not in _mine:  # of a start that was killed
            old.unlink(missing_ok=True)
    path = folder / f"{name}-{time.time_ns()}.bin"  # no node has asked for this name before
    try:
        with written_whole(path, durable=True) as file:
            for buffer in buffers:
                file.write(buffer.raw())
                ends.append(file.tell())
                file.write(bytes(-file.tell() % ALIGNMENT))
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        fix = "free some space, or choose another run.dir"
        raise UserError(Problem(str(folder), NOTHING, rule, fix)) from error
    _mine.add(path)
    atexit.register(_remove, path, os.getpid())
    return pickled, path, ends


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _take(pickled: bytes, path: Path, ends: list[int], make: Callable[[], T]) -> T:
    try:
        data = _read(path, ends[-1])
        starts = [0, *(-(-end // ALIGNMENT) * ALIGNMENT for end in ends[1:])]
        return pickle.loads(pickled, buffers=[data[a:b] for a, b in zip(starts, ends[1:])])
    except OSError:  # what a library has converted into the cache of one node, another has to convert itself
        return make()


def _read(path: Path, size: int) -> memoryview:
    """The file's bytes, read-only. Shared folders may take time to show it. Raises UserError where they do not."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size >= size:
                    if size >= MAPPED_FROM:
                        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                    return memoryview(file.read())
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            rule = "was written by rank 0 and is not there"
            fix = f"is {path.parent} on a file system that all nodes share?"
            raise UserError(Problem(str(path), NOTHING, rule, fix))
        time.sleep(0.1)
