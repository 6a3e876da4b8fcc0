"""What all sources share: the face, names and labels in arrays, and where an index of them is cached."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.left_out import is_hidden
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable, missing_path
from seer_scale.files import cache_folder, shown, written_whole
from seer_scale.formatting import counted
from seer_scale.rng import key as hash_key

HEIF = (".heic", ".heif", ".hif") if find_spec("pillow_heif") else ()
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".j2k",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm", *HEIF,
)  # fmt: skip


class Source:
    """A fixed sequence of encoded images. Picklable, safe after fork; nothing is held open until first read.

    labels: int32 [n], each an index into `classes`, -1 where an image has none; or None. classes: the labels' names.
    locality: images that lie together and are best read together (`read_run`); 1 = none. is_stream: whether images come
    in passing only, from `iterate(seed, epoch, first)`, and not by number.
    buffer: images among which a stream is mixed, 0 for a source that is none. left_out: what is there and not read, by
    kind (left_out.py).
    """

    left_out: Mapping[str, int] = MappingProxyType({})
    locality = 1
    is_stream = False
    buffer = 0

    @property
    def labels(self) -> np.ndarray | None:
        return None

    @property
    def classes(self) -> Sequence[str]:
        return ()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """The encoded image i. Raises DataError when it cannot be read."""
        raise NotImplementedError

    def read_run(self, first: int, num: int) -> list[bytes | DataError]:
        """Images first .. first + num - 1, an error in the place of one that cannot be read."""
        return [self._read_or_error(i) for i in range(first, first + num)]

    def _read_or_error(self, i: int) -> bytes | DataError:
        try:
            return self.read(i)
        except DataError as error:
            return error

    def name(self, i: int) -> str:
        """What a log shows for image i: its path, or TAR::MEMBER, as files.shown gives it. Asked for when reading has
        failed: it reads no image, and asks no server."""
        raise NotImplementedError

    def arrive(self) -> None:
        """Called on a rank that took over what another has listed: looks, at hardly any cost, whether the images are
        here, too. Raises DataError."""

    def label(self, i: int) -> int | None:
        return int(self.labels[i]) if self.labels is not None and self.labels[i] >= 0 else None

    def class_of(self, i: int) -> str | None:
        label = self.label(i)
        return None if label is None else self.classes[label]

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label."""
        return self.labels is not None and bool((self.labels >= 0).all())

    def unlabelled(self) -> str:
        """Which images have no label, as a clause; empty where all have one, or none."""
        if self.labels is None:
            return ""
        without = np.flatnonzero(self.labels < 0)
        if len(without) in (0, len(self)):
            return ""
        has = "has" if len(without) == 1 else "have"
        return f"{len(without):,} of its {counted(len(self), 'image')} {has} none ({self.name(int(without[0]))})"


@runtime_checkable
class Stream(Protocol):
    """What a source that is a stream can do besides."""

    def __len__(self) -> int: ...

    def iterate(
        self, seed: int, epoch: int, first: int, tick: Callable[[], None] = ...
    ) -> Iterator[tuple[int, bytes | DataError]]: ...


def subset(source: Source, indices: np.ndarray) -> Subset:
    """The images `indices` (int64 [m]) of a source, in that order."""
    return Subset(source, np.asarray(indices, np.int64))


class Subset(Source):
    """The images `indices` (int64 [m]) of another source, `whole`."""

    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

    def __init__(self, source: Source, indices: np.ndarray):
        self.whole, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> bytes:
        return self.whole.read(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.whole.name(int(self.indices[i]))

    def arrive(self) -> None:
        self.whole.arrive()


# ------------------------------------------------------------------------------------------- names and labels


class StringArray:
    """Immutable names in two arrays: `blob` uint8, their bytes, and `ends` int64 [n], where each one ends. They come as
    the system's calls take them (os.fsdecode), not as they may be shown."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())


class NamesBuilder:
    def __init__(self) -> None:
        self._blob, self._ends = bytearray(), array("q")

    def add(self, name: str) -> None:
        self._blob += os.fsencode(name)
        self._ends.append(len(self._blob))

    def build(self) -> StringArray:
        return StringArray(np.frombuffer(bytes(self._blob), np.uint8), np.array(self._ends, np.int64))


class LabelsBuilder:
    """Label texts seen one by one: `codes` number them in order of appearance, -1 for none."""

    def __init__(self) -> None:
        self.codes = array("i")
        self.values: dict[str, int] = {}

    def add(self, value: str | None) -> None:
        self.codes.append(-1 if value is None else self.values.setdefault(value, len(self.values)))


def encode_labels(
    codes: np.ndarray, values: Sequence[str], classes: Sequence[str], where: str
) -> tuple[np.ndarray, list[str]]:
    """Labels int32 and class names from codes into `values`: the number n is line n of classes.txt, counted from 0.

    classes: names in the order the user gave (classes.txt), or empty: then the values, in order, are the names.
    """
    if all(v.isascii() and v.isdigit() for v in values):
        numbers = [int(v) for v in values]
        if classes and max(numbers) >= len(classes):
            named = counted(len(classes), "class")
            rule = f"has label {max(numbers)}, but classes.txt beside it names only {named}"
            raise DataError(Problem(where, NOTHING, rule, "complete or remove classes.txt"))
        names = list(classes)
        if not names:  # numbers may have gaps, or be larger than any array
            places = {n: i for i, n in enumerate(sorted(set(numbers)))}
            names, numbers = [str(n) for n in places], [places[n] for n in numbers]
    else:
        names = list(classes) if set(values) <= set(classes) else sorted(values)
        position = {name: n for n, name in enumerate(names)}
        numbers = [position[v] for v in values]
    table = np.array([*numbers, -1], np.int32)  # the code -1 picks the last entry
    return table[codes], [shown(name) for name in names]


def first_folder(name: str) -> str | None:
    head, slash, _ = name.partition("/")
    return head if slash else None


def is_image(name: str) -> bool:
    """By its name: the suffix is one of images, and the file is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name.rpartition("/")[2])


def is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def shorten(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"


def must_exist(path: str) -> None:
    if not os.path.exists(path):
        raise DataError(missing_path(path))


def unlistable(path: str, error: OSError) -> DataError:
    """Of a folder whose entries cannot be had."""
    rule = f"cannot be listed ({error.strerror})"
    return DataError(Problem(path, NOTHING, rule, "make it readable, or give another folder"))


def changed(path: str) -> Problem:
    """Of a file that is not what was indexed."""
    return Problem(path, NOTHING, "changed after it was indexed", "start again")


def another_than_on_rank_0(path: str) -> Problem:
    return Problem(path, NOTHING, "is another here than on rank 0", "bring the same to every node")


def unreadable_line(name: str, error: DataError | MemoryError) -> str:
    """The line "name: reason" of an image that cannot be read."""
    if isinstance(error, Unreadable) and error.name in ("", name):
        return f"{name}: {error.reason}"
    return f"{name}: {'there is no memory for it' if isinstance(error, MemoryError) else error}"


# ------------------------------------------------------------------------------------------------------ caching


def file_version(path: str) -> tuple[int, int]:
    """(size in bytes, a number that changes with the content) of a file or URL. Raises DataError."""
    if remote.is_url(path):
        size, stamp = remote.stat(path)
        return size, digest(stamp) >> 65
    try:
        stat = os.stat(path)
    except OSError as error:
        raise Unreadable(error.strerror or str(error), path) from error
    return stat.st_size, stat.st_mtime_ns


def cached_index(
    path: str, version: int, build: Callable[[int], dict[str, np.ndarray]], stamp: tuple[int, int] | None = None,
    only: Sequence[str] = (), is_stale: Callable[[dict[str, np.ndarray]], bool] = lambda index: False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """build(size of the file), or what an earlier call for the same file or URL has left; written beside a file, or in
    the user's cache folder. stamp: the file's, where it is known. only: the arrays that are needed, where not all are.
    is_stale: whether another must be built although the file is the same.
    Raises DataError where the file cannot be read."""
    size, mark = stamp or file_version(path)
    wanted = np.array([version, size, mark], np.int64)
    is_url = remote.is_url(path)
    places: list[Callable[[], Path]] = [] if is_url else [lambda: Path(f"{path}.index.npz")]
    # looked for only where it is not beside the file: to resolve a path takes a question for each folder on the way
    places.append(lambda: cache_place(path if is_url else os.path.realpath(path), suffix=".index.npz"))
    for place in places:
        index = load_arrays(place(), only and (*only, "stamp"))
        if np.array_equal(index.get("stamp", ()), wanted) and not is_stale(index):
            return index
    index = {**build(size), "stamp": wanted}
    save_arrays([place() for place in places], index)
    return index


def load_arrays(file: Path | BinaryIO, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an npz (or `only` some: each takes a third of a millisecond), none where it is not there or
    whole."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            return {name: saved[name] for name in only or saved}
    except Exception:  # a file that others may have written, or a disk damaged: numpy and zipfile fail in every way
        return {}


def save_arrays(places: Sequence[Path], arrays: dict[str, np.ndarray]) -> None:
    """Write an npz to the first place that can be written to, if any."""
    for place in places:
        with contextlib.suppress(OSError):  # read-only or full: the next place
            if place.parent.is_dir() and not place.parent.stat().st_mode & 0o222:  # which would not stop root
                continue
            with written_whole(place) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle, too
            return


def cache_place(*words: object, suffix: str) -> Path:
    """Where the user's cache folder keeps what `words` name."""
    return cache_folder() / f"{digest(*words):032x}{suffix}"


def digest(*words: object) -> int:
    """128 bits that stand for `words`, which need not be UTF-8."""
    return hash_key(0, *(str(word).encode("utf-8", "backslashreplace").decode() for word in words))
