"""Images in data sets of Hugging Face's library `datasets`: on the Hub, saved by it, or in .parquet and .arrow files.

`HubSource` reads image i from memory-mapped Arrow files; what is not Arrow yet, the library first converts into its
cache (HF_HOME). `HubStream` reads in passing what is too large for that. Images are never decoded here, and code that
comes with a data set is never run. The library is loaded when a data set is opened, not before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from seer_scale.data.sources.base import Source, is_image, is_tar
from seer_scale.data.sources.files import is_file, is_folder, is_lfs_pointer, read_file
from seer_scale.data.sources.left_out import is_hidden
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable, nearest
from seer_scale.extras import how_to_install
from seer_scale.files import shown
from seer_scale.rng import key as hash_key
from seer_scale.rng import numpy_generator

HUB_PREFIX = "hf:"
FILES = (".parquet", ".arrow")
IMAGE_NAMES = ("image", "img", "jpg", "png")
LABEL_NAMES = ("label", "labels", "fine_label")
LOOKED_AT, FOLDERS_LOOKED_INTO, DEPTH = 1000, 100, 2
"""Entries of one folder, folders, and levels below the first one that are looked at to find a folder's kind."""
FEW_IMAGES = 50
"""As many beside tables may be illustrations."""
SLICE = 32
"""Images that a stream takes from the library at once."""


def looks_like_hub(path: str) -> bool:
    """Whether a path is for this module: hf:..., a folder that save_to_disk wrote, .parquet or .arrow files, or a
    folder of such, as a clone from the Hub is. Looks at some entries of a folder, and into some of its subfolders.
    Raises DataError for a folder of tables and a few images, which may be its illustrations as well as its data."""
    if path.startswith(HUB_PREFIX) or (path.lower().endswith(FILES) and not os.path.isdir(path)) or _is_saved(path):
        return True
    found = _look_into(path)
    if found.images and found.tables and not found.has_tars and len(found.images) <= FEW_IMAGES:
        table, image = (shown(os.path.relpath(some[0], path)) for some in (found.tables, found.images))
        rule = f"holds Parquet or Arrow files ({table}) and also {image}"
        fix = "say what is meant by data.kind hub (which reads the tables) or data.kind folder (which reads the images)"
        raise DataError(Problem(path, NOTHING, rule, fix))
    return bool(found.tables) and not found.images and not found.has_tars


@dataclass
class _Found:
    """Paths of what was seen below a folder."""

    tables: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    has_tars: bool = False


def _look_into(folder: str) -> _Found:
    """What lies in a folder and below it, the upper levels first, as far as is looked: until there are more than a few
    images. metadata.parquet, which the library lays beside images, is no table."""
    found, folders, left = _Found(), deque([(folder, 0)]), FOLDERS_LOOKED_INTO
    while folders and left and len(found.images) <= FEW_IMAGES:
        (here, depth), left = folders.popleft(), left - 1
        with contextlib.suppress(OSError), os.scandir(here) as entries:  # whoever opens it says what is wrong
            for entry in itertools.islice((e for e in entries if not is_hidden(e.name)), LOOKED_AT):
                name = entry.name.lower()
                if is_folder(entry):
                    folders.append((entry.path, depth + 1)) if depth < DEPTH else None
                elif is_image(name) and is_file(entry):
                    found.images.append(entry.path)
                elif name.endswith(FILES) and name != "metadata.parquet":
                    found.tables.append(entry.path)
                found.has_tars |= is_tar(name)
    return found


def open_hub(path: str, split: str = "train", image_key: str = "") -> HubSource:
    """The images of one split. Raises DataError.

    path: hf:OWNER/NAME or hf:OWNER/NAME@CONFIG on the Hub; a folder that save_to_disk wrote; a .parquet or .arrow file,
    or a glob of them; any other folder whose layout the library knows (hf:FOLDER where it might be taken for something
    else). What exists on this machine goes before the Hub. split: as the library has it, with train[:10%] where it
    converts; a folder saved without splits is all train; hf:...[SPLIT] has its own, for images that are tested on.
    image_key: the column, where there are several of images.
    """
    if own := re.fullmatch(rf"({HUB_PREFIX}[^\[]+)\[(.+)\]", path):
        path, split = own.groups()
    dataset = _load(path, split)
    if not len(dataset):
        raise DataError(Problem(path, NOTHING, f"holds no image in its split {split}"))
    return HubSource(dataset, _image_column(dataset.features, image_key, path), f"{_prefixed(path)}[{split}]")


def open_hub_stream(
    path: str, split: str = "train", image_key: str = "", length: int = 0, buffer: int = 10_000
) -> HubStream:
    """The images of one split, read in passing. Raises DataError.

    path, split, image_key: as for `open_hub`, but for a folder that save_to_disk wrote, which can be read at random.
    length: images that make an epoch; 0 for as many as the data set says it has. buffer: images held to be mixed.
    """
    dataset = _load(path, split, streaming=True)
    declared = (dataset.info.splits or {}).get(split)
    length = length or (declared and declared.num_examples) or 0
    if length < 1:
        rule = f"is needed, as {path} does not say how many images its split {split} has"
        raise DataError(Problem("data.length", NOTHING, rule, "give it (--length)"))
    column = _image_column(dataset.features or {}, image_key, path)
    return HubStream(dataset, column, f"{_prefixed(path)}[{split}]", length, buffer)


class HubSource(Source):
    """Images in a column of a `datasets.Dataset`; workers share the mapped files, and a pickle holds only their names.

    labels: of the only column of class labels, or the one of LABEL_NAMES; else of a column `label` of numbers or texts.
    """

    def __init__(self, dataset: Any, column: str, where: str):
        self._column, self._where, self._label = column, shown(where), _label_column(dataset.features)
        self._label_names = getattr(dataset.features.get(self._label), "names", None)
        self._data = dataset.select_columns([column, self._label] if self._label else [column]).data

    def __len__(self) -> int:
        return self._data.num_rows

    def read(self, i: int) -> bytes:
        return _encoded(self._cell(i), f"{self._where}#{i}")

    def name(self, i: int) -> str:
        """Where it is kept, as hf:OWNER/NAME[train]#123; nothing is read for it, as that may be what fails."""
        return f"{self._where}#{i}"

    def _cell(self, i: int) -> Any:
        return self._data.column(self._column)[i].as_py()

    @property
    def has_labels(self) -> bool:
        return self._label is not None and super().has_labels

    @property
    def labels(self) -> np.ndarray | None:
        return self._numbered[0] if self._label else None

    @property
    def classes(self) -> Sequence[str]:
        return [shown(name) for name in self._numbered[1]] if self._label else ()

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, list[str]]:
        """Read when an evaluation asks for them. The Hub writes -1 where there is no label."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column, names = self._data.column(self._label), self._label_names
        if names is None:
            values = sorted(v for v in column.unique().to_pylist() if v is not None and v not in (-1, ""))
            column, names = pc.index_in(column, pa.array(values, column.type)), [str(v) for v in values]
        return column.fill_null(-1).to_numpy().astype(np.int32), list(names)


class HubStream(Source):
    """Images in the order in which they come by, mixed.

    The order of an epoch is a function of (seed, epoch): the files come in a drawn order, one after the other, and what
    they give passes through `buffer` images held in memory, of which a drawn one leaves for each that enters. So an
    image moves little further than the buffer is long: in a single file sorted by class, classes stay near themselves.
    To go on in mid-epoch, the epoch is read from its beginning. Every process that iterates reads the whole stream and
    holds a buffer of its own: for more than a few, copy the data set with `seer-scale data pack` first.

    classes: the labels' names, where the data set has them; no image comes with its label.
    """

    is_stream = True
    classes: Sequence[str] = ()

    def __init__(self, dataset: Any, column: str, where: str, length: int, buffer: int):
        self._column, self._where, self._length, self.buffer = column, shown(where), length, buffer
        label = _label_column(dataset.features)
        self.classes = [shown(name) for name in getattr(dataset.features.get(label), "names", ())]
        # decode(False) comes first: on a stream from the Hub it takes away the threads that would decode every image
        self._dataset = dataset.decode(False).select_columns([column])

    def __len__(self) -> int:
        return self._length

    def name(self, i: int) -> str:
        return self._where

    def iterate(
        self, seed: int, epoch: int, first: int, tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, bytes | DataError]]:
        """(position in the epoch, encoded image or why it cannot be read), from position `first` to the epoch's end.

        Images beyond the length are left out. tick: called now and then, also while the buffer fills and what comes
        before `first` goes by. Raises DataError when there are fewer, or when the stream breaks off.
        """
        position = -1
        for position, cell in zip(range(self._length), self._mixed(seed, epoch, tick)):
            if position >= first:
                try:
                    yield position, _encoded(cell, f"{self._where} image {position} of epoch {epoch}")
                except DataError as error:
                    yield position, error
        if (count := position + 1) < self._length:
            rule = f"{self._where} ended after {count} images"
            raise DataError(Problem("data.length", self._length, rule, count))

    def _mixed(self, seed: int, epoch: int, tick: Callable[[], None]) -> Iterator[Any]:
        """The library shuffles the files; its own buffer fails at 2 GiB of images, so it is kept to SLICE."""
        held, rng = [], numpy_generator(seed, "stream", epoch)
        drawn_from = hash_key(seed, "stream", epoch) % 2**32
        with _explained(self._where):
            files = self._dataset.shuffle(drawn_from, buffer_size=SLICE, max_buffer_input_shards=1)
            # iter(dataset) would give each of a loader's worker processes some of the files only
            for rows in files.iter(batch_size=SLICE):
                tick()
                held += rows[self._column]
                while len(held) > self.buffer:
                    drawn = int(rng.integers(len(held)))
                    held[drawn], held[-1] = held[-1], held[drawn]
                    yield held.pop()
        rng.shuffle(held)
        yield from held


# ------------------------------------------------------------------------------------------------------ opening


def _load(path: str, split: str, **options: bool) -> Any:
    """The library's Dataset, or with streaming=True its IterableDataset."""
    datasets, place = _library(), path.removeprefix(HUB_PREFIX)
    with _explained(path):
        if _is_saved(place):
            if options:
                rule = f"{path} was saved by save_to_disk and can be read at random"
                raise DataError(Problem("data.kind", "stream", rule, ("hub",)))
            return _load_saved(place, split)
        if place.lower().endswith(FILES) and not os.path.isdir(place):
            kind = os.path.splitext(place)[1][1:].lower()
            return datasets.load_dataset(kind, data_files=place, split=split, **options)
        if any(not table.endswith(FILES) for table in _look_into(place).tables):  # which the library passes over
            files = sorted(_tables_below(place))
            kind = os.path.splitext(files[0])[1][1:].lower()
            return datasets.load_dataset(kind, data_files=files, split=split, **options)
        name, _, config = (place, "", "") if os.path.exists(place) else place.partition("@")
        return datasets.load_dataset(name, config or None, split=split, **options)


def _is_saved(folder: str) -> bool:
    has = [os.path.isfile(os.path.join(folder, f)) for f in ("dataset_dict.json", "dataset_info.json", "state.json")]
    return has[0] or all(has[1:])


def _load_saved(folder: str, split: str) -> Any:
    parts = os.path.join(folder, "dataset_dict.json")
    if not os.path.isfile(parts):
        dataset = _library().load_from_disk(folder)
        if split not in ("train", own := str(dataset.split)):
            raise DataError(Problem("data.split", split, f"{folder} was saved alone, as {own}", (own, "train")))
        return dataset
    with open(parts) as file:
        splits = json.load(file)["splits"]
    if split not in splits:
        raise DataError(Problem("data.split", split, f"{folder} has no such split", nearest(split, splits)))
    return _library().load_from_disk(os.path.join(folder, split))


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        rule = "is a data set for the library datasets, which is not installed"
        raise DataError(Problem("data.path", NOTHING, rule, how_to_install("datasets"))) from error
    return datasets


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """The library's many errors as one sentence."""
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError, _library().exceptions.DatasetsError) as error:
        is_wrapped = isinstance(error, _library().exceptions.DatasetGenerationError) and error.__cause__
        cause = error.__cause__ if is_wrapped else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        if _holds_pointers(path.removeprefix(HUB_PREFIX)):
            reason = "it holds pointers of Git LFS and not the files: run git lfs pull in it"
        raise Unreadable(reason, path) from error


def _holds_pointers(path: str) -> bool:
    """Whether the first of the files below a folder, or a file itself, is what a clone without Git LFS leaves."""
    first = path if os.path.isfile(path) else next(_tables_below(path), None)
    with contextlib.suppress(OSError):
        return first is not None and is_lfs_pointer(read_file(first) if os.path.getsize(first) < 1000 else b"")
    return False


def _tables_below(folder: str) -> Iterator[str]:
    for here, _, names in os.walk(folder):
        yield from (os.path.join(here, name) for name in names if name.lower().endswith(FILES))


def _prefixed(path: str) -> str:
    return HUB_PREFIX + path.removeprefix(HUB_PREFIX)


# -------------------------------------------------------------------------------------------- columns and cells


def _image_column(features: dict[str, Any], asked: str, path: str) -> str:
    datasets = _library()
    images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    readable = images + [name for name, f in features.items() if name not in images and _may_be_image(f)]
    if asked:
        if asked not in readable:
            rule = f"{path} has no such column of images"
            raise DataError(Problem("data.image_key", asked, rule, nearest(asked, readable or features)))
        return asked
    found = images or [name for name in IMAGE_NAMES if name in readable]
    if len(found) != 1:
        how_many = (
            f"{len(found)} columns of images ({', '.join(found)})" if found else "no column known to be of images"
        )
        rule = f"must be given, as {path} has {how_many}; its columns are {', '.join(features) or 'not declared'}"
        fix = "name one (--image-key), or give data that has images"
        raise DataError(Problem("data.image_key", NOTHING, rule, fix))
    return found[0]


def _may_be_image(feature: Any) -> bool:
    """Whether a column holds bytes, paths, or both under these names, without being declared to be of images."""
    if isinstance(feature, dict):
        parts = [feature[key] for key in ("bytes", "path") if key in feature]
        kinds = [part for part in parts if getattr(part, "dtype", None) != "null"]  # a column that is empty throughout
        return bool(kinds) and all(map(_may_be_image, kinds))
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def _label_column(features: dict[str, Any]) -> str | None:
    datasets = _library()
    declared = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if declared:
        return next((n for n in LABEL_NAMES if n in declared), declared[0] if len(declared) == 1 else None)
    kind = str(getattr(features.get("label"), "dtype", ""))
    return "label" if kind.startswith(("int", "uint", "string", "large_string")) else None


def _parts(cell: Any) -> tuple[bytes | None, str | None]:
    """Bytes and path of a cell, which is {bytes, path}, bytes, a path, or None."""
    if isinstance(cell, dict):
        return cell.get("bytes"), cell.get("path")
    return (None, cell) if isinstance(cell, str) else (cell, None)


def _encoded(cell: Any, name: str) -> bytes:
    data, path = _parts(cell)
    if data is not None:
        return data
    if not path:
        raise Unreadable("it has neither bytes nor a path", name)
    if "://" not in path or "::" not in path:
        return read_file(path)
    member, _, archive = path.partition("::")
    protocol, _, member = member.partition("://")
    try:
        return _archive(f"{protocol}://::{archive}", os.getpid()).cat_file(member)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Unreadable(f"{type(error).__name__}: {error}", path) from error


@lru_cache(maxsize=64)
def _archive(url: str, process: int) -> Any:
    """An archive's filesystem, made once in each process: in a stream, a folder's zip on the Hub is not unpacked."""
    return url_to_fs(url)[0]
