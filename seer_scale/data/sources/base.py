"""What all sources share: the face, names and labels in arrays, and where an index of them is cached."""

from __future__ import annotations

import contextlib
import os
import zipfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from seer_scale.errors import DataError
from seer_scale.rng import key as hash_key

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".ppm")


class Source:
    """A fixed sequence of encoded images. Picklable, safe after fork; nothing is held open until first read.

    labels: int32 [n], each an index into `classes`, -1 where an image has none; or None. classes: the labels' names.
    """

    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """The encoded image i. Raises DataError when it cannot be read."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """What a log shows for image i: its path, or TAR::MEMBER."""
        raise NotImplementedError

    def label(self, i: int) -> int | None:
        return int(self.labels[i]) if self.labels is not None and self.labels[i] >= 0 else None

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label."""
        return self.labels is not None and bool((self.labels >= 0).all())


def subset(source: Source, indices: np.ndarray) -> Source:
    """The images `indices` (int64 [m]) of a source, in that order."""
    return _Subset(source, np.asarray(indices, np.int64))


class _Subset(Source):
    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int) -> bytes:
        return self._source.read(int(self._indices[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._indices[i]))


# ------------------------------------------------------------------------------------------- names and labels


class Names:
    """Immutable strings in two arrays: `blob` uint8, and `ends` int64 [n], where each one ends."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())


class NamesBuilder:
    def __init__(self):
        self._blob, self._ends = bytearray(), array("q")

    def add(self, name: str) -> None:
        self._blob += os.fsencode(name)
        self._ends.append(len(self._blob))

    def build(self) -> Names:
        return Names(np.frombuffer(bytes(self._blob), np.uint8), np.array(self._ends, np.int64))


class LabelsBuilder:
    """Label texts seen one by one: `codes` number them in order of appearance, -1 for none."""

    def __init__(self):
        self.codes, self.values = array("i"), {}

    def add(self, value: str | None) -> None:
        self.codes.append(-1 if value is None else self.values.setdefault(value, len(self.values)))


def number(
    codes: np.ndarray, values: Sequence[str], classes: Sequence[str], where: str
) -> tuple[np.ndarray, list[str]]:
    """Labels int32 and class names from codes into `values`: the number n is line n of classes.txt, counted from 0.

    classes: names in the order the user gave (classes.txt), or empty: then the values, in order, are the names.
    """
    if all(v.isascii() and v.isdigit() for v in values):
        numbers = [int(v) for v in values]
        if classes and max(numbers) >= len(classes):
            raise DataError(
                f"{where} has label {max(numbers)}, but classes.txt beside it names only {len(classes)} classes; "
                "complete or remove classes.txt."
            )
        names = list(classes)
        if not names:  # numbers may have gaps, or be larger than any array
            position = {n: i for i, n in enumerate(sorted(set(numbers)))}
            names, numbers = [str(n) for n in position], [position[n] for n in numbers]
    else:
        names = list(classes) if set(values) <= set(classes) else sorted(values)
        position = {name: n for n, name in enumerate(names)}
        numbers = [position[v] for v in values]
    table = np.array([*numbers, -1], np.int32)  # the code -1 picks the last entry
    return table[codes], names


def first_folder(name: str) -> str | None:
    head, slash, _ = name.removeprefix("./").partition("/")
    return head if slash else None


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


def few(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"


# ------------------------------------------------------------------------------------------------------ caching


def cached_index(path: str, version: int, build: Callable[[int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """build(size of the file), or what an earlier call for the same file has left; written beside it, or in the user's
    cache folder. Raises DataError where the file cannot be read."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    stamp = np.array([version, stat.st_size, stat.st_mtime_ns], np.int64)
    places = _index_places(path)
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as saved:
                index = dict(saved)
            if np.array_equal(index["stamp"], stamp):
                return index
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # not there, or not whole: build it again
    index = {"stamp": stamp, **build(stat.st_size)}
    for place in places:
        aside = place.with_name(f"{place.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.parent.stat().st_mode & 0o222:
                continue  # marked read-only, which would not stop root
            with open(aside, "wb") as file:
                np.savez(file, **index)
            aside.rename(place)
            break
        except OSError:  # read-only or full: the next place, or no cache at all
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
    return index


def _index_places(path: str) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seer_scale"
    return [Path(f"{path}.index.npz"), cache / f"{hash_key(0, os.path.realpath(path)):032x}.index.npz"]
