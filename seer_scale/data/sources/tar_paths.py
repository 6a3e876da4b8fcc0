"""Which tars a path means: one, a folder, a glob, a range in braces, a comma list of these, here or behind URLs."""

from __future__ import annotations

import glob
import os
import re
import stat

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import is_tar, must_exist, unlistable
from seer_scale.data.sources.left_out import is_hidden
from seer_scale.errors import NOTHING, DataError, Problem

OUTSIDE_BRACES = r",(?![^{}]*\})"
"""Commas that part one path from the next."""
MAX_IN_BRACES = 10_000_000
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def tar_paths(path: str) -> list[str]:
    """The tars that a path, URL, folder, glob, range in braces or comma list of these means, each once, in order.
    Raises DataError where it means none."""
    paths: list[str] = []
    for part in [path] if os.path.exists(path) else re.split(OUTSIDE_BRACES, path):
        part = part.strip()
        for one in _without_braces(part) if BRACES.search(part) and not os.path.exists(part) else [part]:
            found = _found(one)
            if not found:
                fix = "give a folder of tars, or a glob such as shards/*.tar"
                raise DataError(Problem(one, NOTHING, "holds no .tar file", fix))
            paths += found
    return list(dict.fromkeys(paths))


def is_several(path: str) -> bool:
    """Whether a path that does not exist as written is a glob, a range or a list."""
    has_magic = remote.has_magic(path) if remote.is_url(path) else glob.has_magic(path)
    return has_magic or "," in path or BRACES.search(path) is not None


def _found(path: str) -> list[str]:
    if remote.is_url(path):
        is_one = is_tar(path.partition("?")[0]) and not remote.has_magic(path)
        return [path] if is_one else remote.find_tars(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        if glob.has_magic(path):
            return sorted(_matches(path))
        must_exist(path)
        raise
    if not is_folder:
        return [path]
    try:
        return [os.path.join(path, name) for name in sorted(os.listdir(path)) if is_tar(name) and not is_hidden(name)]
    except OSError as error:
        raise unlistable(path, error) from error


def _matches(pattern: str) -> list[str]:
    """What a glob matches; the folders at its beginning that exist as written are meant so, brackets and all."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return glob.glob(glob.escape(folder) + pattern[len(folder) :])


def _without_braces(path: str) -> list[str]:
    """x{08..11} means x08, x09, x10, x11; x{a,b} means xa, xb."""
    if not (braces := BRACES.search(path)):
        return [path]
    first, last, words = braces.groups()
    if words is None and not 0 <= int(last) - int(first) < MAX_IN_BRACES:
        rule = f"{braces[0]} must count up, by at most {MAX_IN_BRACES:,}"
        raise DataError(Problem("data.path", path, rule))
    options = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] if words is None else words.split(",")
    rests = _without_braces(path[braces.end() :])
    return [path[: braces.start()] + option + rest for option in options for rest in rests]
