"""The index of one tar: where its images lie, what they are called and labelled, and what it holds besides.

It is walked once, of which only headers and .cls members are read, or comes from the file beside it.
"""

from __future__ import annotations

import tarfile
from array import array
from collections import Counter
from functools import partial
from io import BufferedReader, BytesIO

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    HEIF,
    IMAGE_SUFFIXES,
    LabelsBuilder,
    NamesBuilder,
    StringArray,
    first_folder,
    is_image,
    load_arrays,
)
from seer_scale.data.sources.left_out import (
    HIDDEN_MEMBERS,
    LEFT_OUT_KINDS,
    LINKS,
    NO_END,
    NO_SUFFIX,
    NO_SUFFIX_MEMBERS,
    SECOND,
    SPARSE,
    SPECIAL,
    UNKNOWN_MEMBERS,
    is_hidden,
    kind_of,
)
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable

TAR_INDEX_VERSION = 105
"""To be raised with left_out.LEFT_OUT_KINDS."""
LONGEST_LABEL = 256
LONGEST_HEADER = 1 << 20
HEADERS_OF_GNU_TAR = (b"V", b"D")
"""Types of members that hold nothing: the name of a volume, what a folder held when a copy of what changed was made."""


def index_tar(path: str, size: int) -> dict[str, np.ndarray]:
    if remote.is_url(path):
        try:
            index = load_arrays(BytesIO(remote.read(remote.beside(path, ".index.npz"))))
        except remote.Refused:
            index = {}
        if _fits(index, size) and not is_stale(index):
            return index
    return walk_tar(path, size)


def label_texts(index: dict[str, np.ndarray], source: str) -> list[str]:
    """Of "cls" or "folder"."""
    names = StringArray(index[f"{source}_values"], index[f"{source}_ends"])
    return [names[i] for i in range(len(names))]


def is_stale(index: dict[str, np.ndarray]) -> bool:
    """Whether HEIF images were left out by a machine that could not read them, and this one can."""
    return bool(HEIF) and bool(index["left_out"][LEFT_OUT_KINDS.index("HEIF images")])


def _fits(index: dict[str, np.ndarray], size: int) -> bool:
    """Whether an index that somebody else made is one of a tar of `size` bytes; their dates may differ."""
    try:
        if index["stamp"][:2].tolist() != [TAR_INDEX_VERSION, size]:
            return False
        num = len(index["offset"])
        codes = ((index[k], len(index[f"{k}_ends"])) for k in ("cls", "folder"))
        return (
            index.keys() >= {"names", "cls_values", "folder_values"}
            and all(len(index[k]) == num for k in ("size", "name_ends", "cls", "folder"))
            and is_inside(index, size)
            and index["left_out"].shape == (len(LEFT_OUT_KINDS),)
            and all(bool(((code >= -1) & (code < values)).all()) for code, values in codes)
        )
    except (KeyError, TypeError, ValueError):
        return False


def is_inside(index: dict[str, np.ndarray], size: int) -> bool:
    """Whether all images lie within a tar of `size` bytes."""
    offset, sizes = index["offset"], index["size"]
    return bool(((offset >= 0) & (sizes >= 0) & (sizes <= size) & (offset <= size - sizes)).all())


class _Headers:
    """A tar as tarfile sees it, which reads nothing but headers: as long as they claim to be, but for this."""

    def __init__(self, tar: str, file: BufferedReader):
        self._tar, self._file, self.seek, self.tell = tar, file, file.seek, file.tell
        self.left = LONGEST_HEADER

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            rule = f"has a header of more than {LONGEST_HEADER:,} bytes before byte {self.tell():,}"
            raise _damaged(self._tar, f"{rule}: it is damaged, or made to do harm")
        return self._file.read(size)


def _damaged(tar: str, rule: str) -> DataError:
    return DataError(Problem(tar, NOTHING, rule, "fetch it again or remove it"))


def _open_whole(tar: str, size: int) -> BufferedReader:
    return remote.open_buffered(tar, size) if remote.is_url(tar) else open(tar, "rb")


def walk_tar(tar: str, size: int) -> dict[str, np.ndarray]:
    """Offsets, sizes, names and label texts of the images in one tar; only headers and .cls members are read."""
    found, last, begun = _Found(), "no member is whole", False
    try:
        with (
            _open_whole(tar, size) as file,
            # the stub wants what only writing and pipes use
            tarfile.open(fileobj=(headers := _Headers(tar, file)), mode="r:") as archive,  # type: ignore[call-overload]
        ):
            position = -1
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all
                begun = True
                headers.left = LONGEST_HEADER
                if member.size < 0 or archive.offset <= position:
                    raise _damaged(tar, f"lies about the size of {member.name}")
                position = archive.offset
                is_sparse = member.sparse is not None
                if member.isreg() and not is_sparse and member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                last = f"the last whole member is {member.name}"
                name = _plain_path(member.name)
                if any(is_hidden(part) for part in name.split("/")):
                    found.left_out[HIDDEN_MEMBERS] += not member.isdir()
                elif member.issym() or member.islnk():
                    found.left_out[LINKS] += is_image(name)
                elif member.type not in tarfile.SUPPORTED_TYPES:
                    found.left_out[UNKNOWN_MEMBERS] += member.type not in HEADERS_OF_GNU_TAR
                elif not member.isreg():
                    found.left_out[SPECIAL] += not member.isdir()
                elif is_sparse:
                    found.left_out[SPARSE] += is_image(name)
                elif name.lower().endswith(".cls"):
                    file.seek(member.offset_data)
                    found.add_label(name, file.read(min(member.size, LONGEST_LABEL)))
                elif is_image(name):
                    found.add_image(name, member.offset_data, member.size)
                else:
                    kind = kind_of(name)
                    found.left_out[NO_SUFFIX_MEMBERS if kind == NO_SUFFIX else kind] += 1
            file.seek(archive.offset)
            tail = file.read(512)
            is_joined = any(chunk.strip(b"\0") for chunk in iter(partial(file.read, 1 << 20), b""))
    except tarfile.ReadError as error:
        if not begun:
            rule = f"is not a plain tar ({error})"
            raise DataError(Problem(tar, NOTHING, rule, "unpack a compressed one first")) from error
        raise _damaged(tar, f"is cut short ({last})") from error
    except (OSError, ValueError, EOFError, IndexError, OverflowError, RecursionError) as error:  # what tarfile lets out
        raise Unreadable(getattr(error, "strerror", None) or str(error), tar) from error
    if not tail:  # it ends after a member, as some writers leave it and all readers take it
        found.left_out[NO_END] += 1
    elif len(tail) < 512 or any(tail):  # whole tars end in blocks of zeros; tarfile takes any end for the end
        raise _damaged(tar, f"is cut short ({last})")
    if is_joined:
        rule = f"holds more after its end mark ({last}), as it was joined from several tars"
        raise DataError(Problem(tar, NOTHING, rule, "use those"))
    return found.index()


def _plain_path(name: str) -> str:
    """A member's path without what means nothing in it: ./, //, a leading / or ../."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


class _Found:
    """The images and labels of one tar, grouped by key into samples as WebDataset does it; the members of a sample need
    not be neighbours. A key that has a member twice begins another sample."""

    def __init__(self) -> None:
        self.offsets, self.sizes, self.left_out = array("q"), array("q"), Counter[str]()
        self._names, self._ranks, self._samples = NamesBuilder(), array("q"), array("q")
        self._labels: dict[int, str] = {}
        self._latest: dict[str, tuple[int, str]] = {}
        """The number of a key's last sample, and the suffixes it has."""
        self._suffixes: dict[str, str] = {}
        self._num = 0

    def add_image(self, name: str, offset: int, size: int) -> None:
        key, suffix = _key(name)
        self.offsets.append(offset)
        self.sizes.append(size)
        self._names.add(name)
        # 0.png before 0.mask.png: a suffix of one part goes before one of several
        self._ranks.append(IMAGE_SUFFIXES.index(suffix) if suffix in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES))
        self._samples.append(self._sample(key, suffix))

    def add_label(self, name: str, text: bytes) -> None:
        key, suffix = _key(name)
        if suffix == ".cls":
            self._labels[self._sample(key, suffix)] = text.decode("utf-8", "replace").strip()

    def _sample(self, key: str, suffix: str) -> int:
        number, has = self._latest.get(key, (-1, ""))
        if number < 0 or f"{suffix}/" in has:
            number, has, self._num = self._num, "", self._num + 1
        has = f"{has}{suffix}/"
        self._latest[key] = number, self._suffixes.setdefault(has, has)
        return number

    def index(self) -> dict[str, np.ndarray]:
        names, samples, ranks = self._names.build(), np.array(self._samples, np.int64), np.array(self._ranks, np.int64)
        best = np.full(self._num, len(IMAGE_SUFFIXES), np.int64)
        np.minimum.at(best, samples, ranks)
        kept = np.flatnonzero(ranks == best[samples])  # several where none has a plain suffix
        self.left_out[SECOND] += len(ranks) - len(kept)
        kept_names, labels, folders = NamesBuilder(), LabelsBuilder(), LabelsBuilder()
        for i in kept.tolist():
            kept_names.add(name := names[i])
            labels.add(self._labels.get(self._samples[i]) or None)  # an empty text is no label
            folders.add(first_folder(name))
        index = {"offset": np.array(self.offsets, np.int64)[kept], "size": np.array(self.sizes, np.int64)[kept]}
        for field, builder in ("cls", labels), ("folder", folders):
            values = NamesBuilder()
            for value in builder.values:
                values.add(value)
            texts = values.build()
            index[field] = np.array(builder.codes, np.int32)
            index |= {f"{field}_values": texts.blob, f"{field}_ends": texts.ends}
        built, counts = kept_names.build(), [self.left_out[kind] for kind in LEFT_OUT_KINDS]
        return {**index, "names": built.blob, "name_ends": built.ends, "left_out": np.array(counts, np.int64)}


def _key(name: str) -> tuple[str, str]:
    """(folder and name up to its first dot, the rest in small letters): what WebDataset calls key and suffix."""
    head, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{head}{slash}{stem}", (dot + suffix).lower()
