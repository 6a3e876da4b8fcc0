"""What processes there are below one, and what one asks of the file system."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def descendants(pid: int) -> dict[int, int]:
    """Process numbers below `pid`, zombies left out, each with its parent's."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(place.name)] = int(fields[1])
    found, level = {}, {pid}
    while level := {p for p, parent in parents.items() if parent in level and p not in found}:
        found |= {p: parents[p] for p in level}
    return found


def families(pid: int) -> list[tuple[int, int, int]]:
    """(worker, host, server) of each loader process of `pid`, seen at one moment."""
    below = descendants(pid)
    found = ((p, host, below[host]) for p, host in below.items() if host in below)
    return sorted(f for f in found if below.get(f[2]) == pid)


def workers(pid: int) -> list[int]:
    """The loader processes of `pid`: those below a host, which is below the server of the process."""
    return [worker for worker, _, _ in families(pid)]


def hear_questions(hear: Callable[[str, str], None], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on `hear(function, path)` is called as this process asks the file system for something by its path."""
    names = ((os, "stat"), (os, "lstat"), (os, "scandir"), (os, "listdir"), (os, "open"), (builtins, "open"))
    for place, name in names:

        def heard(
            path: Any = ".", *args: Any, real: Any = getattr(place, name), name: str = name, **kwargs: Any
        ) -> Any:
            if not isinstance(path, int):
                hear(name, os.fsdecode(path))
            return real(path, *args, **kwargs)

        put(place, name, heard)
