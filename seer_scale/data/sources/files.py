"""Images that are files below a folder."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    IMAGE_SUFFIXES,
    LabelsBuilder,
    NamesBuilder,
    Source,
    StringArray,
    first_folder,
    is_image,
    must_exist,
    unlistable,
)
from seer_scale.data.sources.left_out import (
    DANGLING_LINKS,
    EXCLUDED,
    HIDDEN,
    RUN_FOLDERS,
    SPECIAL,
    TOO_DEEP,
    UNLISTABLE,
    described,
    is_hidden,
    is_run,
    kind_of,
)
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable
from seer_scale.files import shown

MAX_FILE_BYTES = 1 << 30
FOLDER_SAMPLE = 100
"""Entries of a folder that are looked at to see whether it is one of runs: more than a run's own has."""


class Files(Source):
    """Images that are files; `names` are relative to `root`, or absolute."""

    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

    def __init__(
        self,
        root: str,
        names: StringArray,
        labels: np.ndarray | None,
        classes: Sequence[str],
        left_out: Mapping[str, int],
    ):
        self._root, self._names, self.labels, self.classes = root, names, labels, classes
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        return read_file(self._path(i))

    def name(self, i: int) -> str:
        return shown(self._path(i))

    def arrive(self) -> None:
        must_exist(self._path(0))

    def _path(self, i: int) -> str:
        return os.path.join(self._root, self._names[i])


def read_file(path: str) -> bytes:
    """The whole of a file or URL. Raises DataError."""
    if remote.is_url(path):
        return remote.read(path, max_bytes=MAX_FILE_BYTES)
    try:
        with open(path, "rb", buffering=0, opener=_at_once) as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):
                raise Unreadable("it is no regular file", shown(path))
            if size > MAX_FILE_BYTES:
                raise Unreadable(too_large(size), shown(path))
            return file.readall()
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error), shown(path)) from error


def too_large(size: int) -> str:
    """A reason."""
    return f"its {size:,} bytes are more than the {MAX_FILE_BYTES:,} that an image may have"


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file is what a clone without Git LFS leaves in its place."""
    return data.startswith(b"version https://git-lfs")


def _at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def of_paths(paths: Sequence[str]) -> Files:
    """Images at these paths or URLs, in their order, without labels. Raises DataError where there is none."""
    if not paths:
        raise DataError("There is no image: the list of paths is empty.")
    names = NamesBuilder()
    for path in paths:
        names.add(path)
    return Files("", names.build(), None, (), {})


def folder(path: str, exclude: Sequence[str] = ()) -> Files:
    """Every image below a folder, but for those in folders of runs, in sorted order. The first-level subfolders are the
    classes, where there are at least two; an image outside them has no label. Raises DataError when there is no image.

    exclude: patterns (fnmatch) of what is left out: those with a slash of paths below the folder, others of the name of
    a file or of a folder on the way to it.
    """
    if remote.is_url(path):
        rule = "is a URL, but a folder of images must be a local one"
        raise DataError(Problem(path, NOTHING, rule, "give its tars or a list of URLs"))
    must_exist(path)
    if not os.path.isdir(path):
        raise DataError(Problem("data.kind", "folder", f"{path} is not a folder", "use data.kind auto"))
    names, labels, left_out = NamesBuilder(), LabelsBuilder(), Counter[str]()
    for name in _walk(path, _Patterns(exclude), left_out):
        names.add(name)
        labels.add(first_folder(name))
    if not len(labels.codes):
        more = f"it holds {words}" if (words := described(left_out)) else ""
        rule = f"holds no image: looked in all its subfolders for {', '.join(IMAGE_SUFFIXES)}"
        raise DataError(Problem(path, NOTHING, rule, more))
    codes = np.array(labels.codes, np.int32)
    if len(labels.values) < 2:
        return Files(path, names.build(), None, (), left_out)
    classes = sorted(labels.values)  # folders called 0, 1, 10 are names, too
    place = {name: n for n, name in enumerate(classes)}
    table = np.array([*(place[v] for v in labels.values), -1], np.int32)  # the code -1 picks the last entry
    return Files(path, names.build(), table[codes], [shown(name) for name in classes], left_out)


def folders_in(path: str, exclude: Sequence[str] = ()) -> list[str]:
    """Names of the folders right below a folder in which `folder` would look for images."""
    patterns, names = _Patterns(exclude), []
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if is_folder(entry) and not is_hidden(entry.name) and not patterns.match("", entry.name):
                names.append(entry.name)
    return sorted(name for name in names if not is_of_runs(os.path.join(path, name)))


def is_of_runs(path: str) -> bool:
    """Whether a folder is that of a run, or holds such and nothing else. Only its first entries are looked at."""
    first = _first_entries(path)
    seen = [entry for name, entry in first.items() if not is_hidden(name)]
    return is_run(first) or bool(seen) and all(is_folder(e) and is_run(_first_entries(e.path)) for e in seen)


def _first_entries(path: str) -> dict[str, os.DirEntry[str]]:
    with suppress(OSError), os.scandir(path) as entries:
        return {entry.name: entry for entry in islice(entries, FOLDER_SAMPLE)}
    return {}


class _Patterns:
    """fnmatch's patterns, for a name and for the path to it."""

    def __init__(self, patterns: Sequence[str]):
        names, paths = (
            [fnmatch.translate(p.strip("/")) for p in patterns if ("/" in p.strip("/")) == has_slash]
            for has_slash in (False, True)
        )
        self._name, self._path = (re.compile("|".join(some) or r"(?!)") for some in (names, paths))

    def match(self, below: str, name: str) -> bool:
        return bool(self._name.match(name) or self._path.match(below + name))


def _walk(root: str, exclude: _Patterns, left_out: Counter[str]) -> Iterator[str]:
    """Relative paths of the images under root, sorted; links are followed, but no folder is entered twice. What is not
    an image is counted in `left_out`. A regular file costs no question to the file system where its folder has its
    type. Raises DataError where the root itself cannot be listed."""
    seen: set[tuple[int, int]] = set()
    try:
        stack = [("", iter(_listed(root, "", seen)))]  # of folders however deep
    except OSError as error:
        raise unlistable(root, error) from error
    while stack:
        entry = next(stack[-1][1], None)
        if entry is None:
            stack.pop()
            continue
        below, name = stack[-1][0], entry.name
        if exclude.match(below, name):
            left_out[EXCLUDED] += 1
        elif is_hidden(name):
            left_out[HIDDEN] += 1
        elif is_folder(entry):
            try:
                entries = _listed(root, f"{below}{name}/", seen)
            except OSError as error:
                left_out[TOO_DEEP if error.errno == errno.ENAMETOOLONG else UNLISTABLE] += 1
                continue
            if is_run([e.name for e in entries]):
                left_out[RUN_FOLDERS] += 1
            else:
                stack.append((f"{below}{name}/", iter(entries)))
        elif not is_file(entry):
            left_out[SPECIAL if os.path.exists(entry.path) else DANGLING_LINKS] += 1
        elif is_image(name):
            yield below + name
        else:
            left_out[kind_of(name)] += 1


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _listed(root: str, below: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """What lies in root/below, sorted; nothing if it was listed before. Raises OSError."""
    here = os.path.join(root, below)
    found = os.stat(here)
    if (found.st_dev, found.st_ino) in seen:
        return []
    seen.add((found.st_dev, found.st_ino))
    with os.scandir(here) as entries:
        return sorted(entries, key=lambda e: e.name)
