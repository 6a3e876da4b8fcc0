"""Where images come from: a folder tree, a list file, or WebDataset tars; each gives image i as bytes at random.

A source is a few numpy arrays (one blob of names with offsets, positions, labels), so ten million images are not ten
million Python objects and forked loader workers share them. Tars are walked once; their index is cached beside them.
Labels serve evaluation only.
"""

from __future__ import annotations

import contextlib
import glob
import os
import tarfile
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from seer_scale.errors import DataError, nearest
from seer_scale.rng import key as hash_key

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".ppm")
KINDS = ("auto", "folder", "list", "tar")
INDEX_VERSION = 1
OPEN_TARS = 64


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


def open_source(path: str, kind: str = "auto") -> Source:
    """The images at `path`: a folder tree, a list file, a tar, a folder of tars, or a glob or comma list of tars.

    Raises DataError when there is no image to read, saying what was looked for.
    """
    if kind not in KINDS:
        raise DataError(f"data.kind is {kind!r}, but must be one of {', '.join(KINDS)}; {nearest(kind, KINDS)}")
    if not path:
        raise DataError("data.path is empty: give a folder of images, a list file or tars.")
    kind = kind_of(path) if kind == "auto" else kind
    if kind == "tar":
        return Tars(_tar_paths(path))
    _must_exist(path)
    return folder(path) if kind == "folder" else list_file(path)


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


class _Names:
    """Immutable strings in two arrays: `blob` uint8, and `ends` int64 [n], where each one ends."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())


class _NamesBuilder:
    def __init__(self):
        self._blob, self._ends = bytearray(), array("q")

    def add(self, name: str) -> None:
        self._blob += os.fsencode(name)
        self._ends.append(len(self._blob))

    def build(self) -> _Names:
        return _Names(np.frombuffer(bytes(self._blob), np.uint8), np.array(self._ends, np.int64))


class _LabelsBuilder:
    """Label texts seen one by one: `codes` number them in order of appearance, -1 for none."""

    def __init__(self):
        self.codes, self.values = array("i"), {}

    def add(self, value: str | None) -> None:
        self.codes.append(-1 if value is None else self.values.setdefault(value, len(self.values)))


def _number(
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


def _first_folder(name: str) -> str | None:
    head, slash, _ = name.removeprefix("./").partition("/")
    return head if slash else None


# ------------------------------------------------------------------------------------------------ files on disk


class Files(Source):
    """Images that are files; `names` are relative to `root`, or absolute."""

    def __init__(self, root: str, names: _Names, labels: np.ndarray | None, classes: Sequence[str]):
        self._root, self._names, self.labels, self.classes = root, names, labels, classes

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        try:
            with open(self.name(i), "rb", buffering=0) as file:
                return file.readall()
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name(i)} cannot be read ({getattr(error, 'strerror', None) or error}).") from error

    def name(self, i: int) -> str:
        return os.path.join(self._root, self._names[i])


def folder(path: str) -> Files:
    """Every image below a folder, in sorted order. The first-level subfolders are the classes, where there are at
    least two and no image lies outside them. Raises DataError when there is no image."""
    if not os.path.isdir(path):
        raise DataError(f"{path} is not a folder, but data.kind is folder; use data.kind auto.")
    names, labels = _NamesBuilder(), _LabelsBuilder()
    for name in _walk(path, "", set()):
        names.add(name)
        labels.add(_first_folder(name))
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
        elif _is_image(entry.name):
            yield name


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


def list_file(path: str) -> Files:
    """The images of a text file: one path a line, relative to the file's folder, and on all lines or none a tab and a
    label. Raises DataError when there is none, or none of the first hundred exists."""
    root, names, labels = os.path.dirname(path), _NamesBuilder(), _LabelsBuilder()
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
            for number, line in enumerate(file, 1):
                name, tab, label = line.rstrip("\n").partition("\t")
                if "\0" in name:
                    raise DataError(f"{path} is not a list of paths: line {number} holds binary data.")
                if not name.strip():
                    continue
                if labels.codes and bool(tab) != (labels.codes[0] >= 0):
                    raise DataError(
                        f"{path}: line {number} has {'a' if tab else 'no'} label, unlike the lines before; "
                        "give every line a tab and a label, or none."
                    )
                names.add(name)
                labels.add(label.strip() if tab else None)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    if not len(labels.codes):
        raise DataError(f"{path} lists no image: it needs one path a line.")
    found = names.build()
    first = [os.path.join(root, found[i]) for i in range(min(100, len(found)))]
    if not any(map(os.path.exists, first)):
        raise DataError(
            f"{path} lists {first[0]!r}, which does not exist, nor do the lines after it; "
            "relative paths are taken from the list's own folder."
        )
    if labels.codes[0] < 0:
        return Files(root, found, None, ())
    return Files(root, found, *_number(np.array(labels.codes, np.int32), list(labels.values), (), path))


# ------------------------------------------------------------------------------------------------------- tars


class Tars(Source):
    """Images in tars, read at their offsets; members are never unpacked, and links are never followed.

    A label is the text of KEY.cls beside KEY.jpg, or else the member's first folder (where there are two or more).
    """

    def __init__(self, paths: Sequence[str]):
        """paths: tars. Raises DataError for one that is cut short or no tar, or when there is no image in any."""
        self._paths = list(paths)
        parts = [_index(p) for p in self._paths]
        self._starts = np.cumsum([0, *(len(p["offset"]) for p in parts)])
        if not self._starts[-1]:
            looked = ", ".join(SUFFIXES)
            raise DataError(f"{_few(self._paths)} holds no image: looked for members that end in {looked}.")
        self._offset, self._size = (np.concatenate([p[k] for p in parts]) for k in ("offset", "size"))
        blob_starts = np.cumsum([0, *(len(p["names"]) for p in parts)])
        ends = np.concatenate([p["name_ends"] + s for p, s in zip(parts, blob_starts)])
        self._names = _Names(np.concatenate([p["names"] for p in parts]), ends)
        classes = _read_classes(self._paths[0])
        for source in ("cls", "folder"):
            codes, values = _merge(parts, source)
            if (codes >= 0).any() if source == "cls" else codes.min() >= 0 and len(values) > 1:
                self.labels, self.classes = _number(codes, values, classes, _few(self._paths))
                break
        self._open: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self._offset)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def read(self, i: int) -> bytes:
        shard, size = self._shard(i), int(self._size[i])
        try:
            if (file := self._open.get(shard)) is None:
                while len(self._open) >= OPEN_TARS:  # the oldest is closed once nobody uses it
                    self._open.pop(next(iter(self._open)))
                file = self._open[shard] = open(self._paths[shard], "rb", buffering=0)
            data = os.pread(file.fileno(), size, int(self._offset[i]))
        except OSError as error:
            raise DataError(f"{self.name(i)} cannot be read ({error.strerror}).") from error
        if len(data) != size:
            raise DataError(f"{self.name(i)} is cut short: the tar changed after it was indexed; fetch it again.")
        return data

    def name(self, i: int) -> str:
        return f"{self._paths[self._shard(i)]}::{self._names[i]}"


def _merge(parts: list[dict[str, np.ndarray]], source: str) -> tuple[np.ndarray, list[str]]:
    """Codes of all tars into one list of label texts."""
    values: dict[str, int] = {}
    codes = []
    for part in parts:
        own = _Names(part[f"{source}_values"], part[f"{source}_ends"])
        table = [values.setdefault(own[i], len(values)) for i in range(len(own))]
        codes.append(np.array([*table, -1], np.int32)[part[source]])
    return np.concatenate(codes), list(values)


def _read_classes(tar: str) -> list[str]:
    path = Path(tar).parent / "classes.txt"
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def _index(tar: str) -> dict[str, np.ndarray]:
    """The index of one tar, from its cache or by walking it once."""
    try:
        stat = os.stat(tar)
    except OSError as error:
        raise DataError(f"{tar} cannot be read ({error.strerror}).") from error
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    places = _index_places(tar)
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as saved:
                index = dict(saved)
            if np.array_equal(index["stamp"], stamp):
                return index
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # not there, or not whole: build it again
    index = {"stamp": stamp, **_walk_tar(tar, stat.st_size)}
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


def _index_places(tar: str) -> list[Path]:
    """Where a tar's index may be: beside it, or in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seer_scale"
    return [Path(f"{tar}.index.npz"), cache / f"{hash_key(0, os.path.realpath(tar)):032x}.index.npz"]


def _walk_tar(tar: str, size: int) -> dict[str, np.ndarray]:
    """Offsets, sizes, names and label texts of the images in one tar; only headers and .cls members are read."""
    offsets, sizes = array("q"), array("q")
    names, folders, keys = _NamesBuilder(), _LabelsBuilder(), []
    cls: dict[str, str] = {}
    last = "no member is whole"
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all
                if member.offset_data + member.size > size and member.isreg():
                    raise tarfile.ReadError("unexpected end of data")
                last = f"the last whole member is {member.name}"
                if not member.isreg() or member.sparse is not None:
                    continue
                name = member.name.removeprefix("./")
                head, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                if extension.lower() == "cls":
                    text = os.pread(file.fileno(), min(member.size, 256), member.offset_data)
                    cls[f"{head}/{stem}"] = text.decode("utf-8", "replace").strip()
                elif _is_image(name):
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                    names.add(name)
                    folders.add(_first_folder(name))
                    keys.append(f"{head}/{stem}")
            tail = os.pread(file.fileno(), 1 << 20, archive.offset)
    except tarfile.ReadError as error:
        if not len(offsets) and "end of data" not in str(error):
            raise DataError(f"{tar} is not a plain tar ({error}); unpack a compressed one first.") from error
        raise DataError(f"{tar} is cut short ({last}); fetch it again or remove it.") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{tar} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if len(tail) < 512 or any(tail[:512]):  # whole tars end in blocks of zeros; tarfile takes any end for the end
        raise DataError(f"{tar} is cut short ({last}); fetch it again or remove it.")
    if any(tail):
        raise DataError(f"{tar} holds more after its end mark ({last}): it was joined from several tars; use those.")
    labels = _LabelsBuilder()
    for key in keys:
        labels.add(cls.get(key))
    index = {"offset": np.array(offsets, np.int64), "size": np.array(sizes, np.int64)}
    for field, builder in ("cls", labels), ("folder", folders):
        values = _NamesBuilder()
        for value in builder.values:
            values.add(value)
        texts = values.build()
        index |= {field: np.array(builder.codes, np.int32), f"{field}_values": texts.blob, f"{field}_ends": texts.ends}
    built = names.build()
    return {**index, "names": built.blob, "name_ends": built.ends}


# ------------------------------------------------------------------------------------------------------- paths


def kind_of(path: str) -> str:
    """Which kind of source a path is; lists no images. Raises DataError where it is none."""
    if not os.path.exists(path) and (glob.has_magic(path) or "," in path):
        return "tar"
    _must_exist(path)
    if not os.path.isdir(path):
        if path.lower().endswith(".tar"):
            return "tar"
        if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")):
            raise DataError(
                f"{path} is compressed, so no image can be read alone; unpack it to .tar files or a folder."
            )
        if _is_image(path):
            raise DataError(f"{path} is a single image; give its folder, or a list file.")
        return "list"
    entries = list(os.scandir(path))
    if not any(e.name.endswith(".tar") for e in entries):
        return "folder"
    other = next((e.name for e in entries if _is_image(e.name) or (e.is_dir() and not e.name.startswith("."))), None)
    if other:
        raise DataError(f"{path} holds tars and also {other}; say what is meant by data.kind tar or data.kind folder.")
    return "tar"


def _tar_paths(path: str) -> list[str]:
    """The tars that a path, a folder, a glob or a comma list of these means, each once, in order."""
    paths: list[str] = []
    for part in [path] if os.path.exists(path) else path.split(","):
        part = part.strip()
        if os.path.isdir(part):
            found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
        elif os.path.exists(part) or not glob.has_magic(part):
            _must_exist(part)
            found = [part]
        else:
            found = sorted(_matches(part))
        if not found:
            raise DataError(f"{part} holds no .tar file; give a folder of tars, or a glob such as shards/*.tar.")
        paths += found
    return list(dict.fromkeys(paths))


def _matches(pattern: str) -> list[str]:
    """What a glob matches; the folders at its beginning that exist as written are meant so, brackets and all."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return glob.glob(glob.escape(folder) + pattern[len(folder) :])


def _must_exist(path: str) -> None:
    if os.path.exists(path):
        return
    missing = Path(path)
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        close = nearest(missing.name, os.listdir(missing.parent))
    except OSError:
        close = ""
    if close.startswith("did"):
        hint = f"did you mean {missing.parent / close.removeprefix('did you mean ')}"
    else:
        hint = f"the nearest folder there is: {missing.parent.absolute()}."
    raise DataError(f"{path} does not exist; {hint}")


def _few(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"
