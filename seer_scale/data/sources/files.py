"""Images that are files below a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    SUFFIXES,
    LabelsBuilder,
    Names,
    NamesBuilder,
    Source,
    first_folder,
    is_image,
    must_exist,
)
from seer_scale.errors import DataError

MOST_BYTES = 1 << 30


class Files(Source):
    """Images that are files; `names` are relative to `root`, or absolute."""

    def __init__(self, root: str, names: Names, labels: np.ndarray | None, classes: Sequence[str]):
        self._root, self._names, self.labels, self.classes = root, names, labels, classes

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        return read_file(self.name(i))

    def name(self, i: int) -> str:
        return os.path.join(self._root, self._names[i])


def read_file(path: str) -> bytes:
    """The whole of a file or URL. Raises DataError."""
    if remote.is_url(path):
        return remote.read(path, most=MOST_BYTES)
    try:
        with open(path, "rb", buffering=0, opener=_at_once) as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path} cannot be read (it is no regular file).")
            if size > MOST_BYTES:
                raise DataError(f"{path} cannot be read (its {size:,} bytes are more than the {MOST_BYTES:,} that an image may have).")
            return file.readall()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def folder(path: str) -> Files:
    """Every image below a folder, in sorted order. The first-level subfolders are the classes, where there are at
    least two and no image lies outside them. Raises DataError when there is no image."""
    if remote.is_url(path):
        raise DataError(f"{path} is a URL, but a folder of images must be a local one; give its tars or a list of URLs.")
    must_exist(path)
    if not os.path.isdir(path):
        raise DataError(f"{path} is not a folder, but data.kind is folder; use data.kind auto.")
    names, labels = NamesBuilder(), LabelsBuilder()
    for name in _walk(path, "", set()):
        names.add(name)
        labels.add(first_folder(name))
    if not len(labels.codes):
        raise DataError(f"{path} holds no image: looked in all its subfolders for {', '.join(SUFFIXES)}.")
    codes = np.array(labels.codes, np.int32)
    if codes.min() < 0 or len(labels.values) < 2:
        return Files(path, names.build(), None, ())
    classes = sorted(labels.values)  # folders called 0, 1, 10 are names, too
    table = np.array([classes.index(v) for v in labels.values], np.int32)
    return Files(path, names.build(), table[codes], classes)


def _walk(root: str, below: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Relative paths of the images under root/below, sorted; links are followed, but no folder is entered twice."""
    here = os.path.join(root, below)
    try:
        stat = os.stat(here)
        entries = sorted(os.scandir(here), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{here} cannot be listed ({error.strerror}); make it readable or leave it out.") from error
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    for entry in entries:
        name = os.path.join(below, entry.name)
        if entry.is_dir():
            yield from _walk(root, name, seen)
        elif is_image(entry.name):
            yield name
