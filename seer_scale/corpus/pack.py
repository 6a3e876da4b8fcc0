"""Copy any source into WebDataset tars: mixed, of equal size, each with its index beside, as training reads them best.

Which image goes where is decided before anything is written, so processes write the tars side by side, the result
depends on the source and the arguments alone, and the same command goes on after a stop: a tar exists whole or not at
all. Labels and classes are kept; files that cannot be read (with --check: decoded) are left out and listed in
DST/unreadable.txt. Of a stream, one process writes tar after tar.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from seer_scale.cores import available_cores
from seer_scale.corpus.describe import (
    FORMAT_NAMES,
    Progress,
    Sample,
    add_source_arguments,
    format_of,
    header,
    open_from_arguments,
)
from seer_scale.data.loading.pool import iterate_batches
from seer_scale.data.loading.worker import ItemTracker
from seer_scale.data.sampling.order import permute
from seer_scale.data.sources import Source, Stream, open_source
from seer_scale.data.sources.base import cached_index, is_image, unreadable_line
from seer_scale.data.sources.hub import HUB_PREFIX
from seer_scale.data.sources.left_out import warning
from seer_scale.data.sources.remote import is_url
from seer_scale.data.sources.tar_index import TAR_INDEX_VERSION, index_tar
from seer_scale.data.transforms.decode import decode
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable
from seer_scale.files import UNFINISHED, to_json, written_whole
from seer_scale.formatting import counted, file_size

PACK_VERSION = 1
MEASURED = 500
"""Images whose sizes say how many tars there will be."""
NAMED = 1000
"""Images whose names identify a source."""
QUALITY = 95
EXTENSIONS = dict(zip(FORMAT_NAMES, (".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".jp2", ".avif", ".ppm")))
UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
WORDS = {
    "version": "layout",
    "source": "source",
    "kind": "kind",
    "options": "way to read it",
    "images": "number of images",
    "content": "names or labels of the images",
    "shuffle": "shuffle seed",
    "size": "size of a tar",
    "max_side": "max side",
    "check": "check",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", help="images, as data.path takes them")
    parser.add_argument("dst", help="a new folder for the tars, or one whose packing was stopped")
    add_source_arguments(parser)
    parser.add_argument("--size", default="1GiB", help="of a tar, about (default: 1GiB)")
    parser.add_argument(
        "--shuffle",
        metavar="SEED|no",
        default="0",
        help="mix the images by this seed, or keep their order (default: 0)",
    )
    parser.add_argument(
        "--max-side",
        type=int,
        metavar="N",
        help=(
            f"shrink images whose shorter side is longer to N pixels (JPEG, quality {QUALITY}); the others are "
            "copied as they are"
        ),
    )
    parser.add_argument("--check", action="store_true", help="leave out what cannot be decoded, too")
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        help="processes (default: one a core; from URLs, more are faster)",
    )


def run(args: argparse.Namespace) -> str:
    """Pack; returns the lines to print. Raises DataError."""
    size, seed = _size(args.size), _seed(args.shuffle)
    if args.workers < 0:
        raise DataError(Problem("--workers", args.workers, "must be at least 0", 0))
    if args.max_side is not None and args.max_side < 1:
        raise DataError(Problem("--max-side", args.max_side, "must be at least 1", 1))
    dst = Path(args.dst)
    _must_be_apart(args.src, dst)
    kind, source, source_options = open_from_arguments(args.src, args)
    options = _PackOptions(args.max_side, args.check)
    where = os.path.abspath(args.src) if os.path.exists(args.src) else args.src
    plan = {
        "version": PACK_VERSION,
        "source": where,
        "kind": kind,
        "options": source_options,
        "images": len(source),
        "size": size,
        "max_side": options.max_side,
        "check": options.check,
    }
    with _alone_in(dst):
        if isinstance(source, Stream):
            print("A stream is packed in its own order: --shuffle and --workers have no effect.", file=sys.stderr)
            plan |= {"shuffle": None, "content": None}
            _tars_planned(dst, plan)
            _write_plan(dst, plan)
            _pack_stream(source, dst, size, options)
        else:
            if left_out := warning(source.left_out):
                print(left_out, file=sys.stderr)
            labels = source.labels  # read here once: a source may make them anew for every process
            plan |= {"shuffle": seed, "content": _content(source, labels)}
            num = _tars_planned(dst, plan) or min(
                len(source), math.ceil(_measure(source, options, labels, args.workers) / size)
            )
            _write_plan(dst, plan | {"tars": num})
            if labels is not None:
                names = (" ".join(name.splitlines()).strip() or "?" for name in source.classes)
                _write(dst / "classes.txt", b"".join(os.fsencode(name) + b"\n" for name in names))
            TarWriter(source, dst, num, seed, labels, options, max(1, args.workers)).pack(args.workers)
        _gather(dst)
        return _summary(dst, len(source))


# ------------------------------------------------------------------------------------------------ the plan


def _write_plan(dst: Path, plan: dict[str, Any]) -> None:
    _write(dst / "pack.json", to_json(plan, indent=1).encode())


def _tars_planned(dst: Path, plan: dict[str, Any]) -> int | None:
    """How many, if a pack was begun before that counts them. Raises DataError where it was another."""
    place = dst / "pack.json"
    if not place.exists():
        return None
    try:
        old = json.loads(place.read_bytes())
        differences = [key for key in WORDS if old[key] != plan[key]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(Problem(str(place), NOTHING, f"cannot be read ({error})", "give a new folder")) from error
    if differences:
        key = differences[0]
        fix = "give a new folder, or the same arguments to go on with that pack"
        if key == "content":
            raise DataError(Problem(f"the {WORDS[key]}", NOTHING, f"are others than in the pack in {dst}", fix))
        there = "none" if old[key] is None else old[key]
        raise DataError(Problem(f"the {WORDS[key]}", plan[key], f"is {there} in the pack in {dst}", fix))
    return old.get("tars")


def _content(source: Source, labels: np.ndarray | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    num = min(NAMED, len(source))
    for word in (
        *(source.name(p * len(source) // num) for p in range(num)),
        *(() if labels is None else source.classes),
    ):
        digest.update(os.fsencode(word) + b"\0")
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, np.int32).data)
    return digest.hexdigest()


def _must_be_apart(src: str, dst: Path) -> None:
    there = os.path.realpath(dst)
    for part in [src] if os.path.exists(src) else src.split(","):
        here = os.path.realpath(part := part.strip())
        common = "" if is_url(part) or part.startswith(HUB_PREFIX) else os.path.commonpath([here, there])
        if common in (here, there):
            how = f"is {part}" if here == there else f"lies inside {part}" if common == here else f"holds {part}"
            rule = f"{how}, but the tars need a folder of their own"
            raise DataError(Problem(str(dst), NOTHING, rule, "give one beside it"))


@contextlib.contextmanager
def _alone_in(dst: Path) -> Iterator[None]:
    """Makes the folder, which may hold nothing but a pack; what stopped ones left unfinished is removed."""
    try:
        others = [p.name for p in dst.iterdir() if not p.name.startswith(".")] if dst.exists() else []
        if others and "pack.json" not in others:
            rule = f"holds {min(others)}, but no pack.json that says what it is"
            raise DataError(Problem(str(dst), NOTHING, rule, "give a new folder"))
        (dst / ".unreadable").mkdir(parents=True, exist_ok=True)
        lock = open(dst / ".lock", "w")
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise DataError(Problem(str(dst), NOTHING, rule, "give another folder")) from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            rule = "is being packed by another process"
            raise DataError(Problem(str(dst), NOTHING, rule, "wait for it, or give another folder")) from error
        for unfinished in dst.rglob(f".*{UNFINISHED}"):
            unfinished.unlink(missing_ok=True)
        yield


@dataclass
class _Sizes(Sample):
    """Bytes in a tar that images of a sample take."""

    options: _PackOptions

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.batch,), np.int64)]

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> None:
        out[0][row] = 0
        with contextlib.suppress(DataError):
            tracker.begin(self.at(key + row))
            data = self.options.prepared(self.source.read(self.at(key + row)))
            out[0][row] = tarfile.BLOCKSIZE + _padded(len(data))


def _measure(source: Source, options: _PackOptions, labels: np.ndarray | None, workers: int) -> int:
    """Bytes that all tars will have, estimated; at least 1."""
    task = _Sizes(source, min(MEASURED, len(source)), workers, options)
    total = sum(
        int(sizes[: len(rows)].sum())
        for [sizes], rows in iterate_batches(task, task.keys(), workers=workers, prefetch=8)
    )
    return max(1, total * len(source) // task.num + (0 if labels is None else 2 * tarfile.BLOCKSIZE * len(source)))


# ------------------------------------------------------------------------------------------------ one image


@dataclass(frozen=True)
class _PackOptions:
    """What is done to an image on the way."""

    max_side: int | None
    check: bool

    def prepared(self, data: bytes) -> bytes:
        """The bytes to store. Raises Unreadable for an image that is to be left out."""
        if not data:
            raise Unreadable("the file is empty")
        if self.max_side:
            head = header(data)
            if head and min(head.height, head.width) > self.max_side:
                return _shrunk(data, self.max_side)
        if self.check:
            decode(data)
        return data


def _shrunk(data: bytes, side: int) -> bytes:
    """The image as a JPEG, antialiased, with its shorter side `side`."""
    full: list[int] = []

    def at_least(height: int, width: int) -> tuple[int, int]:
        full[:] = height, width
        share = 2 * side / min(height, width)  # a coarser copy than twice the size would show
        return math.ceil(height * share), math.ceil(width * share)

    image = decode(data, at_least)
    height, width = full or image.shape[:2]
    share = side / min(height, width)
    small = Image.fromarray(image).resize((round(width * share), round(height * share)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ one tar


@dataclass
class TarWriter:
    """The tars of a plan: batches of `group`, of which a row is a tar. Tar t has places t * n // num and on."""

    source: Source
    dst: Path
    num: int
    seed: int | None
    labels: np.ndarray | None
    options: _PackOptions
    group: int

    def pack(self, workers: int) -> None:
        self.todo = [t for t in range(self.num) if not _tar(self.dst, t).exists()]
        if not self.todo:
            print("All tars are there already: nothing is left to pack.", file=sys.stderr)
        keys, progress, done, images = (
            range(0, len(self.todo), self.group),
            Progress("Tars written", len(self.todo)),
            0,
            0,
        )
        for _, sizes in iterate_batches(self, keys, workers=workers, prefetch=8):
            done, images = done + len(sizes), images + sum(sizes)
            progress.update(done, images)

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        return []

    def rows(self, key: int) -> int:
        return min(self.group, len(self.todo) - key)

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> int:
        """Write one tar; returns the number of its places."""
        t, n, left_out = self.todo[key + row], len(self.source), []
        places = np.arange(t * n // self.num, (t + 1) * n // self.num)
        indices = (places if self.seed is None else permute(places, n, self.seed, 0)).tolist()
        with _whole(_tar(self.dst, t)) as file:
            for place, index, data in zip(places.tolist(), indices, self._read(indices, tracker)):
                try:
                    tracker.begin(index)
                    if isinstance(data, DataError):
                        raise data
                    data = self.options.prepared(data)
                except DataError as error:
                    left_out.append(unreadable_line(self.source.name(index), error))
                    continue
                extension = EXTENSIONS.get(format_of(data)) or _suffix(self.source.name(index))
                _add(file, place, n, extension, data, -1 if self.labels is None else int(self.labels[index]))
            _close(file, self.dst, t, left_out)
        _index(_tar(self.dst, t))
        return len(places)

    def _read(self, indices: list[int], tracker: ItemTracker) -> Iterator[bytes | DataError]:
        run = self.source.locality if self.seed is None else 1
        for first in range(0, len(indices), run):
            try:
                tracker.begin(indices[first])
                yield from self.source.read_run(indices[first], min(run, len(indices) - first))
            except DataError as error:  # it ended a worker before: read the others of its run alone
                yield error
                yield from (self.source.read_run(i, 1)[0] for i in indices[first + 1 : first + run])

    def describe(self, item: int) -> str:
        return self.source.name(item)


def _pack_stream(source: Stream, dst: Path, size: int, options: _PackOptions) -> None:
    """Tars cut at `size` bytes, after those that are whole: the stream is read again up to there."""
    n, t, left_out = len(source), next(t for t in count() if not _tar(dst, t).exists()), []
    first = _last_place(_tar(dst, t - 1)) + 1 if t else 0
    progress = Progress("Images packed", n - first)

    def usable() -> Iterator[tuple[int, bytes]]:
        for place, data in source.iterate(0, 0, first):
            try:
                if isinstance(data, DataError):
                    raise data
                data = options.prepared(data)
            except DataError as error:
                left_out.append(unreadable_line(f"image {place}", error))
                continue
            progress.update(place - first, place - first)
            yield place, data

    images = usable() if first < n else iter(())
    image = next(images, None)
    while image:
        with _whole(_tar(dst, t)) as file:
            while image and file.tell() < size:
                place, data = image
                _add(file, place, n, EXTENSIONS.get(format_of(data), ".jpg"), data, -1)
                image = next(images, None)
            _close(file, dst, t, left_out)
        _index(_tar(dst, t))
        t += 1
        left_out.clear()


def _last_place(tar: Path) -> int:
    source = open_source(str(tar), "tar")
    return int(source.name(len(source) - 1).rpartition("::")[2].partition(".")[0])


def _tar(dst: Path, t: int) -> Path:
    return dst / f"{t:06d}.tar"


def _suffix(name: str) -> str:
    """What stands for the format of bytes that are of none that is known."""
    return os.path.splitext(name)[1].lower() if is_image(name) else ".jpg"


def _add(file: BinaryIO, place: int, n: int, extension: str, data: bytes, label: int) -> None:
    """KEY.EXTENSION and, for a label, KEY.cls; KEY is the image's place in the order of the pack."""
    key = f"{place:0{max(9, len(str(n)))}d}"
    _member(file, key + extension, data)
    if label >= 0:
        _member(file, f"{key}.cls", b"%d" % label)


def _member(file: BinaryIO, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)  # dated 1970, of root
    about.size = len(data)
    file.write(about.tobuf(tarfile.USTAR_FORMAT))
    file.write(data)
    file.write(bytes(_padded(len(data)) - len(data)))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _close(file: BinaryIO, dst: Path, t: int, left_out: list[str]) -> None:
    """End a tar. What was left out is written before the tar appears, so that it is never forgotten."""
    file.write(bytes(2 * tarfile.BLOCKSIZE + -(file.tell() + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
    record = dst / ".unreadable" / f"{t:06d}.txt"
    record.unlink(missing_ok=True)
    if left_out:
        _write(record, b"".join(os.fsencode(line) + b"\n" for line in left_out))


def _index(tar: Path) -> None:
    cached_index(str(tar), TAR_INDEX_VERSION, partial(index_tar, str(tar)))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` once all of it is on the disk. Raises DataError where it cannot be
    written."""
    try:
        with written_whole(path, durable=True) as file:
            yield file
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error}), while the tars that are whole stay"
        raise DataError(Problem(str(path), NOTHING, rule, "mend that and give the same command again")) from error


def _write(path: Path, data: bytes) -> None:
    with _whole(path) as file:
        file.write(data)


# ------------------------------------------------------------------------------------------------ the end


def _gather(dst: Path) -> None:
    """Join what all tars left out into unreadable.txt; a stream that was read again names some of it twice."""
    (dst / "unreadable.txt").unlink(missing_ok=True)
    if records := sorted((dst / ".unreadable").glob("*.txt")):
        lines = dict.fromkeys(line for record in records for line in record.read_bytes().splitlines(keepends=True))
        _write(dst / "unreadable.txt", b"".join(lines))


def _summary(dst: Path, images: int) -> str:
    sizes, listed = [p.stat().st_size for p in dst.glob("*.tar")], f"listed in {dst / 'unreadable.txt'}"
    try:
        packed = len(open_source(str(dst), "tar"))
    except DataError as error:
        rule = f"holds no image: of {images:,}, those that cannot be read are {listed}"
        raise DataError(Problem(str(dst), NOTHING, rule)) from error
    left_out = f"; {images - packed:,} that cannot be read left out, {listed}" if packed < images else ""
    return (
        f"{counted(len(sizes), 'tar')}, {counted(packed, 'image')}, {file_size(sum(sizes))}{left_out}.\nTrain on them "
        f"with --data.path {dst}"
    )


def _size(word: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?", word.strip().lower())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2]]) if found else 0
    if size < 1:
        rule = "must be a number of bytes with a unit"
        raise DataError(Problem("--size", word, rule, "give one such as 1GiB or 500MB"))
    return size


def _seed(word: str) -> int | None:
    if word == "no":
        return None
    if not word.isascii() or not word.isdigit():
        raise DataError(Problem("--shuffle", word, "must be a seed or no", ("0", "no")))
    return int(word)
