"""Images in WebDataset tars, here or behind URLs, walked once and then read at their offsets.

Made for 100,000 tars of 10,000 images: what is kept is the number of images of each tar. Where they lie in it is loaded
when one is asked for, and the least recently used goes.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
import tarfile
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from io import BufferedReader, BytesIO, FileIO
from typing import TYPE_CHECKING

import numpy as np

from seer_scale.cores import available_cores
from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    HEIF,
    SUFFIXES,
    LabelsBuilder,
    NamesBuilder,
    Source,
    StringArray,
    another_than_on_rank_0,
    cache_place,
    cached_index,
    changed,
    digest,
    encode_labels,
    file_version,
    first_folder,
    is_image,
    is_tar,
    load_arrays,
    must_exist,
    save_arrays,
    shorten,
    unlistable,
)
from seer_scale.data.sources.files import MAX_BYTES, read_file, too_large
from seer_scale.data.sources.left_out import (
    FOREIGN,
    HIDDEN_MEMBERS,
    KINDS,
    LINKS,
    NO_END,
    NO_SUFFIX,
    NO_SUFFIX_MEMBERS,
    SECOND,
    SPARSE,
    SPECIAL,
    described,
    is_hidden,
    kind_of,
)
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable
from seer_scale.files import shown
from seer_scale.formatting import counted

if TYPE_CHECKING:
    from seer_scale.data.loading.worker import ItemTracker

OUTSIDE_BRACES = r",(?![^{}]*\})"
"""Commas that part one path from the next."""
INDEX_VERSION = 105
"""To be raised with left_out.KINDS."""
COLLECTION_VERSION = 2 + bool(HEIF)
SUMS = 4 + len(KINDS)
LONGEST_LABEL = 256
INDEXING_TIMEOUT_S = 3600.0
"""Seconds after which a tar that is still being walked is given to another process; tars may have a terabyte."""
HEADERS_OF_GNU_TAR = (b"V", b"D")
"""Types of members that hold nothing: the name of a volume, what a folder held when a copy of what changed was made."""
OPEN_TARS = 64
KEPT_IMAGES = 1 << 21
"""Images whose places a process keeps, about: some 100 MB."""
GAP, LONGEST_READ = 1 << 16, 1 << 26
"""Bytes between two images that are read along rather than skipped; bytes of one read of several images."""
LONGEST_HEADER = 1 << 20
THREADS = 32
ALONE_BELOW_TARS, ALONE_BELOW_BYTES = 32, 1 << 30
"""So little is indexed before other processes have started."""
LOG_EVERY_S = 10.0
MAX_IN_BRACES = 10_000_000
PLACES = ("offset", "size", "names", "name_ends")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


class Tars(Source):
    """Images in tars, read at their offsets; members are never unpacked, and links are never followed.

    A label is the text of KEY.cls beside KEY.jpg, or else the member's first folder (where there are two or more). Of a
    key's images (KEY.jpg, KEY.mask.png) one is read, where one has a plain suffix.
    """

    locality = 32

    def __init__(self, paths: Sequence[str]):
        """paths: tars, or their URLs. Raises DataError for one that is cut short or no tar, or when there is no image
        in any."""
        self._stamps, sums = _survey(paths)
        self._starts = np.cumsum([0, *sums[:, 0]])
        self._short_names = shorten(paths)
        if not self._starts[-1]:
            others = dict(zip(KINDS, sums[:, 4:].sum(axis=0).tolist()))
            more = f"it holds {words}" if (words := described(others)) else ""
            rule = f"holds no image: looked for members that end in {', '.join(SUFFIXES)}"
            raise DataError(Problem(self._short_names, NOTHING, rule, more))
        builder = NamesBuilder()
        for path in paths:
            builder.add(path)
        self._paths = builder.build()
        self._labelled_by, self._is_labelled = _labelled_by(sums)
        self._unlabelled = _unlabelled(sums)
        self.left_out = {kind: n for kind, n in zip(KINDS, sums[:, 4:].sum(axis=0).tolist()) if n}
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
        stamps = _all_stamps(paths)
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
                if ends[a] - begins[a] > MAX_BYTES:
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
        index = cached_index(path, INDEX_VERSION, partial(index_tar, path), stamp, only)
        num = int(self._starts[shard + 1] - self._starts[shard])
        if "offset" in only and not (len(index["offset"]) == len(index["size"]) == num and _inside(index, stamp[0])):
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
        table = [values.setdefault(text, len(values)) for text in _texts(index, source)]
        codes.append(np.array([*table, -1], np.int32)[index[source]])
    return np.concatenate(codes), list(values)


def _texts(index: dict[str, np.ndarray], source: str) -> list[str]:
    names = StringArray(index[f"{source}_values"], index[f"{source}_ends"])
    return [names[i] for i in range(len(names))]


def _read_classes(tar: str) -> list[str]:
    path = os.path.join(os.path.dirname(tar.partition("?")[0] if remote.is_url(tar) else tar), "classes.txt")
    if not remote.is_url(path) and not os.path.isfile(path):
        return []
    try:
        text = read_file(path)
    except remote.Refused:
        return []
    return [line.strip() for line in text.decode("utf-8-sig", "replace").splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------ which tars are meant


def open_tars(path: str) -> Tars:
    """The tars that a path, URL, folder, glob, range in braces or comma list of these means, each once, in order."""
    paths: list[str] = []
    for part in [path] if os.path.exists(path) else re.split(OUTSIDE_BRACES, path):
        part = part.strip()
        for one in _without_braces(part) if BRACES.search(part) and not os.path.exists(part) else [part]:
            found = _found(one)
            if not found:
                fix = "give a folder of tars, or a glob such as shards/*.tar"
                raise DataError(Problem(one, NOTHING, "holds no .tar file", fix))
            paths += found
    return Tars(list(dict.fromkeys(paths)))


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


# ---------------------------------------------------------------------------------------------- all tars at once


def _survey(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(stamps int64 [n, 2], sums int64 [n, SUMS] as `_sums` gives them) of the tars; those of an earlier call for the
    same tars are kept in the user's cache folder, so that only a tar that changed since is indexed."""
    absolute = [path if remote.is_url(path) else os.path.abspath(path) for path in paths]
    place = cache_place(COLLECTION_VERSION, INDEX_VERSION, *absolute, suffix=".tars.npz")
    stamps = _all_stamps(paths)
    saved = load_arrays(place)
    is_known = np.zeros(len(paths), bool)
    sums = np.zeros((len(paths), SUMS), np.int64)
    if saved and saved["sums"].shape == sums.shape:
        is_known, sums = (saved["stamps"] == stamps).all(axis=1), saved["sums"]
    todo = np.flatnonzero(~is_known).tolist()
    if todo:
        stamped = [(paths[i], tuple(stamps[i].tolist())) for i in todo]
        for row, i in zip(with_progress("Indexing tars", _index_all(stamped), len(stamped)), todo):
            sums[i] = row
        save_arrays([place], {"stamps": stamps, "sums": sums})
    return stamps, sums


def _all_stamps(paths: Sequence[str]) -> np.ndarray:
    """Size and stamp int64 [n, 2] of each tar."""
    with ThreadPoolExecutor(THREADS) as pool:
        step = -(-len(paths) // (8 * THREADS))
        parts = pool.map(_stamps, (paths[i : i + step] for i in range(0, len(paths), step)))
        return np.array([stamp for part in parts for stamp in part], np.int64)


def _stamps(paths: Sequence[str]) -> list[tuple[int, int]]:
    return list(map(file_version, paths))


def _index_all(stamped: list[tuple[str, tuple[int, int]]]) -> Iterator[tuple[int, ...]]:
    """Local tars by processes, as walking one is work; remote ones by threads, as it is waiting."""
    if any(remote.is_url(path) for path, _ in stamped):
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(_sums, stamped)
        return
    cores = min(available_cores(), len(stamped))
    if cores == 1 or len(stamped) < ALONE_BELOW_TARS and sum(size for _, (size, _) in stamped) < ALONE_BELOW_BYTES:
        yield from map(_sums, stamped)
        return
    from seer_scale.data.loading.pool import (
        iterate_batches,  # which stands above the sources, and forks nothing from this process
    )

    indexing = _Indexing(stamped, max(cores, min(8 * cores, len(stamped) // 8)))
    for (sums,), _ in iterate_batches(indexing, indexing.keys(), workers=cores, timeout_s=INDEXING_TIMEOUT_S):
        yield from map(tuple, sums.tolist())


@dataclass
class _Indexing:
    """The sums of tars, `batch` at a time; a row is a tar."""

    stamped: list[tuple[str, tuple[int, int]]]
    batch: int

    def keys(self) -> range:
        return range(0, len(self.stamped), self.batch)

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.batch, SUMS), np.int64)]

    def rows(self, key: int) -> int:
        return min(self.batch, len(self.stamped) - key)

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> None:
        try:
            tracker.begin(key + row)
        except Unreadable as error:
            name, rule = self.describe(key + row), f"cannot be indexed ({error.reason})"
            raise DataError(Problem(name, NOTHING, rule, "remove it")) from error
        out[0][row] = _sums(self.stamped[key + row])

    def describe(self, item: int) -> str:
        return shown(self.stamped[item][0])


def _sums(stamped_path: tuple[str, tuple[int, int]]) -> tuple[int, ...]:
    """(images, of which have a .cls, of which lie in a folder, a number for that folder or -1 for several, and what is
    left out, by kind) of a tar."""
    path, stamp = stamped_path
    only = ("cls", "folder", "folder_values", "folder_ends", "left_out")
    index = cached_index(path, INDEX_VERSION, partial(index_tar, path), stamp, only, _is_stale)
    folders = _texts(index, "folder")
    folder = digest(*folders) >> 65 if len(folders) == 1 else -1
    labelled, sorted_ = int((index["cls"] >= 0).sum()), int((index["folder"] >= 0).sum())
    return len(index["cls"]), labelled, sorted_, folder, *index["left_out"].tolist()


def _labelled_by(sums: np.ndarray) -> tuple[str | None, bool]:
    """(what labels the images: "cls", "folder" or nothing, whether every image has a label), from the sums alone."""
    images, with_cls, in_folder, folder = sums[sums[:, 0] > 0, :4].T
    if with_cls.any():
        return "cls", bool((with_cls == images).all())
    is_sorted = bool((in_folder == images).all() and ((folder < 0).any() or len(np.unique(folder)) > 1))
    return ("folder" if is_sorted else None), is_sorted


def _unlabelled(sums: np.ndarray) -> tuple[int, int, str]:
    """(images without what labels others, the first tar that holds one, "cls" or "folder"), from the sums alone."""
    images, with_cls, in_folder, folder = sums[:, :4].T
    of = folder[in_folder > 0]
    by_cls, by_folder = with_cls.any(), (of < 0).any() or len(np.unique(of)) > 1
    lacking = images - (with_cls if by_cls else in_folder if by_folder else images)
    return int(lacking.sum()), int((lacking > 0).argmax()), "cls" if by_cls else "folder"


def with_progress(what: str, results: Iterable, total: int) -> Iterator:
    """The results, with a line on stderr now and then on how many have come."""
    logged = time.monotonic()
    for count, result in enumerate(results, 1):
        yield result
        if time.monotonic() - logged >= LOG_EVERY_S:
            logged = time.monotonic()
            print(f"{what}: {count:,} of {total:,}.", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------- one tar's index


def index_tar(path: str, size: int) -> dict[str, np.ndarray]:
    if remote.is_url(path):
        try:
            index = load_arrays(BytesIO(remote.read(remote.beside(path, ".index.npz"))))
        except remote.Refused:
            index = {}
        if _fits(index, size) and not _is_stale(index):
            return index
    return _walk_tar(path, size)


def _is_stale(index: dict[str, np.ndarray]) -> bool:
    """Whether HEIF images were left out by a machine that could not read them, and this one can."""
    return bool(HEIF) and bool(index["left_out"][KINDS.index("HEIF images")])


def _fits(index: dict[str, np.ndarray], size: int) -> bool:
    """Whether an index that somebody else made is one of a tar of `size` bytes; their dates may differ."""
    try:
        if index["stamp"][:2].tolist() != [INDEX_VERSION, size]:
            return False
        num = len(index["offset"])
        codes = ((index[k], len(index[f"{k}_ends"])) for k in ("cls", "folder"))
        return (
            index.keys() >= {"names", "cls_values", "folder_values"}
            and all(len(index[k]) == num for k in ("size", "name_ends", "cls", "folder"))
            and _inside(index, size)
            and index["left_out"].shape == (len(KINDS),)
            and all(bool(((code >= -1) & (code < values)).all()) for code, values in codes)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _inside(index: dict[str, np.ndarray], size: int) -> bool:
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
            raise damaged(self._tar, f"{rule}: it is damaged, or made to do harm")
        return self._file.read(size)


def damaged(tar: str, rule: str) -> DataError:
    return DataError(Problem(tar, NOTHING, rule, "fetch it again or remove it"))


def _open_whole(tar: str, size: int) -> BufferedReader:
    return remote.open_buffered(tar, size) if remote.is_url(tar) else open(tar, "rb")


def _walk_tar(tar: str, size: int) -> dict[str, np.ndarray]:
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
                    raise damaged(tar, f"lies about the size of {member.name}")
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
                    found.left_out[FOREIGN] += member.type not in HEADERS_OF_GNU_TAR
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
        raise damaged(tar, f"is cut short ({last})") from error
    except (OSError, ValueError, EOFError, IndexError, OverflowError, RecursionError) as error:  # what tarfile lets out
        raise Unreadable(getattr(error, "strerror", None) or str(error), tar) from error
    if not tail:  # it ends after a member, as some writers leave it and all readers take it
        found.left_out[NO_END] += 1
    elif len(tail) < 512 or any(tail):  # whole tars end in blocks of zeros; tarfile takes any end for the end
        raise damaged(tar, f"is cut short ({last})")
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
        self._ranks.append(SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES))
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
        best = np.full(self._num, len(SUFFIXES), np.int64)
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
        built, counts = kept_names.build(), [self.left_out[kind] for kind in KINDS]
        return {**index, "names": built.blob, "name_ends": built.ends, "left_out": np.array(counts, np.int64)}


def _key(name: str) -> tuple[str, str]:
    """(folder and name up to its first dot, the rest in small letters): what WebDataset calls key and suffix."""
    head, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{head}{slash}{stem}", (dot + suffix).lower()
