"""Images in WebDataset tars, here or behind URLs, walked once and then read at their offsets.

Made for 100,000 tars of 10,000 images: what is kept is the number of images of each tar. Where they lie in it is loaded
when one is asked for, and the least recently used goes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from io import FileIO

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    IMAGE_SUFFIXES,
    NamesBuilder,
    Source,
    StringArray,
    another_than_on_rank_0,
    cached_index,
    changed,
    encode_labels,
    file_version,
    shorten,
)
from seer_scale.data.sources.files import MAX_FILE_BYTES, read_file, too_large
from seer_scale.data.sources.left_out import LEFT_OUT_KINDS, described
from seer_scale.data.sources.tar_index import TAR_INDEX_VERSION, index_tar, is_inside, label_texts
from seer_scale.data.sources.tar_paths import tar_paths
from seer_scale.data.sources.tar_survey import all_stamps, first_unlabelled, labelled_by, survey, with_progress
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable
from seer_scale.files import shown
from seer_scale.formatting import counted

OPEN_TARS = 64
KEPT_IMAGES = 1 << 21
"""Images whose places a process keeps, about: some 100 MB."""
GAP, LONGEST_READ = 1 << 16, 1 << 26
"""Bytes between two images that are read along rather than skipped; bytes of one read of several images."""
PLACES = ("offset", "size", "names", "name_ends")


def open_tars(path: str) -> Tars:
    """As `tar_paths` takes a path."""
    return Tars(tar_paths(path))


class Tars(Source):
    """Images in tars, read at their offsets; members are never unpacked, and links are never followed.

    A label is the text of KEY.cls beside KEY.jpg, or else the member's first folder (where there are two or more). Of a
    key's images (KEY.jpg, KEY.mask.png) one is read, where one has a plain suffix.
    """

    locality = 32

    def __init__(self, paths: Sequence[str]):
        """paths: tars, or their URLs. Raises DataError for one that is cut short or no tar, or when there is no image
        in any."""
        self._stamps, sums = survey(paths)
        self._starts = np.cumsum([0, *sums[:, 0]])
        self._short_names = shorten(paths)
        if not self._starts[-1]:
            others = dict(zip(LEFT_OUT_KINDS, sums[:, 4:].sum(axis=0).tolist()))
            more = f"it holds {words}" if (words := described(others)) else ""
            rule = f"holds no image: looked for members that end in {', '.join(IMAGE_SUFFIXES)}"
            raise DataError(Problem(self._short_names, NOTHING, rule, more))
        builder = NamesBuilder()
        for path in paths:
            builder.add(path)
        self._paths = builder.build()
        self._labelled_by, self._is_labelled = labelled_by(sums)
        self._unlabelled = first_unlabelled(sums)
        self.left_out = {kind: n for kind, n in zip(LEFT_OUT_KINDS, sums[:, 4:].sum(axis=0).tolist()) if n}
        self._begin()

    def _begin(self) -> None:
        mean = -(-int(self._starts[-1]) // len(self._paths))
        self._indexes: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()  # the least recently used first
        self._max_indexes = max(1, KEPT_IMAGES // mean)
        self._open = lru_cache(OPEN_TARS)(self._open_tar)  # one that goes is closed once nobody uses it

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_indexes", "_open")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> bytes:
        [data] = self.read_run(i, 1)
        if isinstance(data, DataError):
            raise data
        return data

    def read_run(self, first: int, num: int) -> list[bytes | DataError]:
        """As Source says; images of a tar that lie near each other come in one read."""
        out: list[bytes | DataError] = []
        while len(out) < num:
            shard, i = self._locate(first + len(out))
            out += self._read_in(shard, i, min(num - len(out), int(self._starts[shard + 1] - self._starts[shard]) - i))
        return out

    def name(self, i: int) -> str:
        return self._name(*self._locate(i))

    def arrive(self) -> None:
        """A node may have copies of its own, of other dates; they must be of the same sizes."""
        if remote.is_url(self._paths[0]) or file_version(self._paths[0]) == tuple(self._stamps[0].tolist()):
            return
        paths = [self._paths[shard] for shard in range(len(self._paths))]
        stamps = all_stamps(paths)
        if (other := np.flatnonzero(stamps[:, 0] != self._stamps[:, 0])).size:
            raise DataError(another_than_on_rank_0(paths[other[0]]))
        self._stamps = stamps

    # --- one tar

    def _locate(self, i: int) -> tuple[int, int]:
        """(number of the tar, number of the image in it)"""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, int(i - self._starts[shard])

    def _index(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._indexes:
            self._indexes[shard] = self._load(shard, PLACES)
            if len(self._indexes) > self._max_indexes:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _name(self, shard: int, i: int) -> str:
        path = self._paths[shard]
        try:
            if remote.is_url(path) and shard not in self._indexes:
                return f"{shown(path)}::{i}"  # a server that has just failed is not asked for a name
            index = self._index(shard)
        except DataError:  # a log needs a name all the same
            return f"{shown(path)}::{i}"
        return f"{shown(path)}::{shown(StringArray(index['names'], index['name_ends'])[i])}"

    def _read_in(self, shard: int, first: int, num: int) -> list[bytes | DataError]:
        try:
            index = self._index(shard)
        except DataError as error:
            return [error] * num
        begins = index["offset"][first : first + num].tolist()
        ends = [b + s for b, s in zip(begins, index["size"][first : first + num].tolist())]
        out: list[bytes | DataError] = []
        for a, b in _joined(begins, ends):
            try:
                if ends[a] - begins[a] > MAX_FILE_BYTES:
                    raise Unreadable(too_large(ends[a] - begins[a]))
                data = self._range(shard, begins[a], ends[b - 1] - begins[a])
                out += [data[begins[i] - begins[a] : ends[i] - begins[a]] for i in range(a, b)]
            except Unreadable as error:
                out += [Unreadable(error.reason, self._name(shard, first + i)) for i in range(a, b)]
            except DataError as error:
                out += [error] * (b - a)
        return out

    def _range(self, shard: int, offset: int, size: int) -> bytes:
        path = self._paths[shard]
        if remote.is_url(path):
            return remote.read(path, offset, size)
        try:
            file = self._open(shard).fileno()
            data, now = os.pread(file, size, offset), os.fstat(file)
        except OSError as error:
            raise Unreadable(error.strerror or str(error), path) from error
        if len(data) != size or (now.st_size, now.st_mtime_ns) != tuple(self._stamps[shard].tolist()):
            raise DataError(changed(path))
        return data

    def _open_tar(self, shard: int) -> FileIO:
        return open(self._paths[shard], "rb", buffering=0)

    def _load(self, shard: int, only: Sequence[str]) -> dict[str, np.ndarray]:
        path = self._paths[shard]
        stamp = file_version(path)
        if stamp != tuple(self._stamps[shard].tolist()):
            raise DataError(changed(path))
        index = cached_index(path, TAR_INDEX_VERSION, partial(index_tar, path), stamp, only)
        num = int(self._starts[shard + 1] - self._starts[shard])
        if "offset" in only and not (len(index["offset"]) == len(index["size"]) == num and is_inside(index, stamp[0])):
            rule = "has an index beside it that is another tar's"
            raise DataError(Problem(path, NOTHING, rule, f"remove {path}.index.npz, and start again"))
        return {name: index[name] for name in only}

    # --- labels

    @property
    def has_labels(self) -> bool:
        return self._is_labelled

    def unlabelled(self) -> str:
        """From the counts and one tar: the labels of all take long to read."""
        num, shard, source = self._unlabelled
        if not num:
            return ""
        name = shown(self._paths[shard])
        with suppress(DataError):
            first = int((self._load(shard, [source])[source] < 0).argmax())
            self._index(shard)  # without which no server is asked for a name
            name = self._name(shard, first)
        what = "without a .cls" if source == "cls" else "outside its folders"
        return f"{num:,} of its {counted(len(self), 'image')} {'is' if num == 1 else 'are'} {what} ({name})"

    @property
    def labels(self) -> np.ndarray | None:
        return self._numbered[0]

    @property
    def classes(self) -> Sequence[str]:
        return self._numbered[1]

    @cached_property
    def _numbered(self) -> tuple[np.ndarray | None, Sequence[str]]:
        """Read from all indexes when an evaluation asks for them."""
        if not self._labelled_by:
            return None, ()
        only = [f"{self._labelled_by}{part}" for part in ("", "_values", "_ends")]
        indexes = (self._load(shard, only) for shard in range(len(self._paths)))
        codes, values = merge(with_progress("Reading the labels of tars", indexes, len(self._paths)), self._labelled_by)
        return encode_labels(codes, values, _read_classes(self._paths[0]), self._short_names)


def _joined(begins: list[int], ends: list[int]) -> Iterator[tuple[int, int]]:
    """The images a .. b - 1 that are read at once."""
    a = 0
    for i in range(1, len(begins) + 1):
        if i == len(begins) or not 0 <= begins[i] - ends[i - 1] < GAP or ends[i] - begins[a] > LONGEST_READ:
            yield a, i
            a = i


def merge(indexes: Iterable[dict[str, np.ndarray]], source: str) -> tuple[np.ndarray, list[str]]:
    """Codes of all tars into one list of label texts."""
    values: dict[str, int] = {}
    codes = []
    for index in indexes:
        table = [values.setdefault(text, len(values)) for text in label_texts(index, source)]
        codes.append(np.array([*table, -1], np.int32)[index[source]])
    return np.concatenate(codes), list(values)


def _read_classes(tar: str) -> list[str]:
    path = os.path.join(os.path.dirname(tar.partition("?")[0] if remote.is_url(tar) else tar), "classes.txt")
    if not remote.is_url(path) and not os.path.isfile(path):
        return []
    try:
        text = read_file(path)
    except remote.Refused:
        return []
    return [line.strip() for line in text.decode("utf-8-sig", "replace").splitlines() if line.strip()]
