"""Folders for what a killed command need not do again: each is one command's at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from pathlib import Path

from seer_scale.files import UNFINISHED

LOCK = ".lock"
STALE_S = 7 * 24 * 3600
"""After so many seconds without a change what a killed command has left is removed: nobody goes on with it."""

_taken: dict[Path, tuple[Path, int]] = {}
"""By what was asked for: the folder that this process has, and its open lock."""


def take_up(wanted: Path) -> Path:
    """`wanted`, or, where another process has that, WANTED-2, -3 ...: a folder that is this process's until it removes
    it or ends. It may hold what an ended one has left, and is made where it is not there. Raises OSError."""
    place, fd = _taken.pop(wanted, (wanted, None))
    if fd is not None and not _is(place, fd):
        os.close(fd)
        fd = None
    if fd is None:
        names = (wanted.name if i == 1 else f"{wanted.name}-{i}" for i in count(1))
        locks = ((place, _lock(place)) for place in map(wanted.with_name, names))
        place, fd = next((place, fd) for place, fd in locks if fd is not None)
    _taken[wanted] = place, fd
    os.utime(place)  # it is in use, however old it is
    return place


def remove(places: Collection[Path]) -> None:
    """But those that another process has."""
    for place in places:
        wanted = next((wanted for wanted, (taken, _) in _taken.items() if taken == place), None)
        fd = _taken.pop(wanted)[1] if wanted else _lock(place) if place.is_dir() else None
        if fd is None:
            continue
        aside = place.with_name(f".{place.name}.{os.uname().nodename}.{os.getpid()}{UNFINISHED}")
        with suppress(OSError):
            place.rename(aside)  # who waits for the lock sees that it is of nothing any more
        os.close(fd)
        shutil.rmtree(aside, ignore_errors=True)


def remove_stale(folder: Path, spare: Collection[Path] = ()) -> None:
    """Remove places in `folder` that nothing has changed for STALE_S and nobody has, but those to `spare`; and it,
    where it is empty. What is none of ours stays."""
    with suppress(OSError):  # another command may end, too
        ours = [p for p in folder.iterdir() if (p / LOCK).is_file() or p.name.endswith(UNFINISHED)]
        remove([p for p in ours if p not in spare and time.time() - last_change(p) > STALE_S])
        folder.rmdir()


def last_change(place: Path) -> float:
    """Of a folder and all that lies in it, in unix seconds. Raises OSError where something of it has just gone."""
    return max(path.lstat().st_mtime for path in (place, *place.rglob("*")))


def _lock(place: Path) -> int | None:
    """The open lock of a folder, which is made; None where another process has it. Raises OSError.

    It is a record lock: it ends with the process, also on another node of a network file system, loader workers that
    were forked do not inherit it, and a process may take it twice. Where a file system has none it is as good as alone.
    """
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            fd = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another has just removed it
            continue
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            return None
        except OSError:
            pass
        if _is(place, fd):
            return fd
        os.close(fd)


def _is(place: Path, fd: int) -> bool:
    """Whether `fd` is of the lock that lies in `place` now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(place / LOCK))
    except OSError:
        return False
