"""What a corpus is: how many images, of which sizes, formats and classes, how many cannot be read and why.

A sample is read and decoded, spread evenly over all images; processes do it, and one that an image ends is replaced, so
that such an image is named like any other that cannot be read. Of however many images, what is kept is a few arrays.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import math
import os
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from seer_scale.cores import available_cores
from seer_scale.data.loading.pool import iterate_batches
from seer_scale.data.loading.tasks import EvalBatches
from seer_scale.data.loading.worker import ItemTracker
from seer_scale.data.sources import Source, Stream, kind_of, open_source
from seer_scale.data.sources.base import unreadable_line
from seer_scale.data.sources.files import is_lfs_pointer
from seer_scale.data.sources.left_out import described
from seer_scale.data.transforms import decode as decoders
from seer_scale.data.transforms.decode import decode
from seer_scale.errors import NOTHING, DataError, Problem
from seer_scale.files import shown, to_json, written_whole
from seer_scale.formatting import counted, file_size, rough_duration

DEFAULT_SAMPLE = 2000
KEPT = 1 << 22
"""Images of which single values are kept; of more, medians are of every so many-th, and so are duplicates, by hash."""
SHARE = 2
"""Images of one worker in a batch: so few that a worker's replacements always get past those that end workers."""
FIRST_REASONS = 10
DESCRIBE_LOG_EVERY_S = 5.0
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 12, 8, 112
"""The contact sheet: crops across, crops down, pixels of one."""
SOURCE_OPTIONS: dict[str, tuple[Callable[[str], Any], tuple[str, ...], str]] = {
    "exclude": (
        lambda text: text.split(","),
        ("folder",),
        "patterns of what to leave out, as data.exclude takes them, parted by commas",
    ),
    "split": (str, ("hub", "stream"), "as data.split takes it"),
    "image_key": (str, ("hub", "stream"), "as data.image_key takes it"),
    "length": (int, ("stream",), "images of a stream, as data.length takes it"),
    "buffer": (int, ("stream",), "images of a stream that are mixed, as data.buffer takes it"),
}
"""Type, kinds and meaning of what only some sources take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="images, as data.path takes them")
    add_source_arguments(parser)
    parser.add_argument("--sample", type=int, help="images to scan, spread over all (default: 2000)")
    parser.add_argument("--all", action="store_true", help="scan every image")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one a core)")
    parser.add_argument(
        "--sheet",
        metavar="FILE.jpg",
        help=f"also write up to {SHEET_COLUMNS * SHEET_ROWS} of the images, small, into one picture",
    )
    parser.add_argument(
        "--unreadable", metavar="FILE", help="also list every image that cannot be read, one 'name: reason' a line"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What `open_from_arguments` takes besides a path."""
    parser.add_argument("--kind", default="auto", help="as data.kind takes it (default: auto)")
    for name, (kind, _, meaning) in SOURCE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=meaning)


def open_from_arguments(path: str, args: argparse.Namespace) -> tuple[str, Source, dict[str, Any]]:
    """(kind, source or stream, the options that were given) of a path. Raises DataError."""
    kind = kind_of(path) if args.kind == "auto" else args.kind
    options = {name: getattr(args, name) for name in SOURCE_OPTIONS if getattr(args, name) is not None}
    if idle := next((name for name in options if kind not in SOURCE_OPTIONS[name][1]), None):
        option, rule = f"--{idle.replace('_', '-')}", f"serves {' and '.join(SOURCE_OPTIONS[idle][1])} only"
        raise DataError(Problem(option, NOTHING, f"{rule}, and {path} is of kind {kind}", "leave it out"))
    return kind, open_source(path, kind, **options), options


def run(args: argparse.Namespace) -> str:
    """Scan the images; returns the lines to print. Raises DataError."""
    if args.sample is not None and args.sample < 1:
        raise DataError(Problem("--sample", args.sample, "must be at least 1", 1))
    if args.workers < 0:
        raise DataError(Problem("--workers", args.workers, "must be at least 0", 0))
    for option, place in ("--sheet", args.sheet), ("--unreadable", args.unreadable):
        if place and not os.path.isdir(os.path.dirname(place) or "."):
            raise DataError(Problem(option, place, "its folder does not exist", "make it first"))
    if args.sheet and not args.sheet.lower().endswith((".jpg", ".jpeg")):
        raise DataError(Problem("--sheet", args.sheet, "the sheet is a JPEG", "let its name end in .jpg"))
    if args.all and args.sample is not None:
        raise DataError(Problem("--sample", args.sample, "--all is given, too", "leave one out"))
    sample = DEFAULT_SAMPLE if args.sample is None else args.sample
    (kind, source, _), images = open_from_arguments(args.path, args), None
    if isinstance(source, Stream):
        if args.all:
            rule = f"cannot be had of {args.path}, a stream, of which the first images are scanned"
            raise DataError(Problem("--all", NOTHING, rule, "leave it out, or give a larger --sample"))
        images, source = len(source), InMemorySource(source, sample)
    with _listing(args.unreadable) as listing:
        stats, rate = scan(source, len(source) if args.all else sample, args.workers, listing)
    if args.sheet:
        write_sheet(
            Path(args.sheet),
            source,
            stats.readable(SHEET_COLUMNS * SHEET_ROWS) * len(source) // stats.num,
            args.workers,
        )
    images = images or len(source)
    facts = {"path": shown(args.path), "kind": kind, "images": images, "labels": _labels(source)}
    facts |= {"left_out": {what: num for what, num in source.left_out.items() if num}}
    facts |= stats.facts(images) | {"images_per_s": round(rate, 1), "workers": args.workers}
    return to_json(facts, indent=1) if args.json else shown(_table(facts, args), keep="\n")


# ------------------------------------------------------------------------------------------------ one image


MAGIC = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("WebP", 8, b"WEBP"),
    ("GIF", 0, b"GIF8"),
    ("BMP", 0, b"BM"),
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("JPEG 2000", 4, b"jP  \r\n"),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("AVIF", 4, b"ftypavif"),
    ("AVIF", 4, b"ftypavis"),
    *(("PPM", 0, b"P%d" % n) for n in range(1, 7)),
)
FORMAT_NAMES = (*dict.fromkeys(name for name, _, _ in MAGIC), "a web page", "a Git LFS pointer", "no bytes", "unknown")
MODES = ("RGB", "1", "L", "LA", "I;16", "I", "P", "PA", "RGBA", "CMYK", "other")
GREY_MODES = ("1", "L", "LA", "I;16", "I")


def format_of(data: bytes) -> str:
    """One of FORMAT_NAMES, by the first bytes."""
    for name, at, magic in MAGIC:
        if data.startswith(magic, at):
            return name
    if not data:
        return "no bytes"
    if is_lfs_pointer(data):
        return "a Git LFS pointer"
    return "a web page" if data[:256].lstrip()[:5].lower() in (b"<html", b"<!doc") else "unknown"


class Header(NamedTuple):
    mode: str
    orientation: int
    height: int
    width: int


def header(data: bytes) -> Header | None:
    """What an image says of itself, before its orientation is applied; None where Pillow cannot read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=decoders.PILLOW_FORMATS) as image:
                width, height = image.size
                try:
                    orientation = image.getexif().get(0x0112, 1)
                except Exception:  # a damaged EXIF block says nothing about the image
                    orientation = 1
                return Header(image.mode, orientation, height, width)
        except Exception:  # hostile bytes raise every kind
            return None


# ------------------------------------------------------------------------------------------------ many images


@dataclass
class Sample:
    """Batches of `num` images spread evenly over a source: a row is an image. Subclasses say what is made of it."""

    source: Source
    num: int
    workers: int

    def keys(self) -> range:
        return range(0, self.num, self.batch)

    @property
    def batch(self) -> int:
        return SHARE * max(1, self.workers)

    def rows(self, key: int) -> int:
        return min(self.batch, self.num - key)

    def at(self, position: int) -> int:
        return position * len(self.source) // self.num

    def describe(self, item: int) -> str:
        return self.source.name(item)


BYTES, HASH, FORMAT, MODE, ROTATED, HEIGHT, WIDTH = range(7)


class _Facts(Sample):
    """Numbers int64 [7] of each image, -1 where they are not known; and why one cannot be read."""

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.batch, 7), np.int64)]

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> str | None:
        index, facts = self.at(key + row), out[0][row]
        facts[:] = -1
        try:
            tracker.begin(index)
            data = self.source.read(index)
            digest = hashlib.blake2b(data, digest_size=8).digest()
            facts[:3] = len(data), int.from_bytes(digest, "little", signed=True), FORMAT_NAMES.index(format_of(data))
            height, width = _whole_size(data)
            mode, orientation, *_ = header(data) or ("other", 1)
            facts[3:] = MODES.index(mode if mode in MODES else "other"), orientation in range(2, 9), height, width
        except DataError as error:
            return unreadable_line(self.source.name(index), error)
        return None


def _whole_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an image that is decoded as training does it, small where it may be. Raises DataError."""
    size = 0, 0

    def halved(height: int, width: int) -> tuple[int, int]:
        nonlocal size
        size = height, width
        return height // 2, width // 2

    decode(data, halved)
    return size


class CorpusStats:
    """What is known of the images scanned so far: sums over all, single values of at most KEPT."""

    def __init__(self, num: int):
        self.num, self.every, self.seen = num, -(-num // KEPT), 0
        self.reasons: list[str] = []
        self.unreadable = 0
        self._kept = np.empty((-(-num // self.every), 3), np.int64)
        """Bytes, height and width of every `every`-th image."""
        self._hashes = array("q")
        """Of the images whose hash `every` divides: of equal images all, or none."""
        self._formats, self._modes = np.zeros(len(FORMAT_NAMES), np.int64), np.zeros(len(MODES), np.int64)
        self._bytes = self._rotated = self._slow = 0
        self._sides: list[tuple[int, ...]] = []
        """The smallest image and the largest."""

    def add(self, facts: np.ndarray) -> None:
        """facts: int64 [k, 7] of the next k images."""
        first = -self.seen % self.every
        kept = facts[first :: self.every]
        place = (self.seen + first) // self.every
        self._kept[place : place + len(kept)] = kept[:, [BYTES, HEIGHT, WIDTH]]
        self.seen += len(facts)
        read, whole = facts[facts[:, BYTES] >= 0], facts[facts[:, HEIGHT] >= 0]
        self._bytes += int(read[:, BYTES].sum())
        self._hashes.extend(read[read[:, HASH] % self.every == 0, HASH].tolist())
        self._formats += np.bincount(read[:, FORMAT], minlength=len(FORMAT_NAMES))
        if not len(whole):
            return
        self._modes += np.bincount(whole[:, MODE], minlength=len(MODES))
        self._rotated += int(whole[:, ROTATED].sum())
        self._slow += int((whole[:, FORMAT] != FORMAT_NAMES.index("JPEG")).sum())
        area = whole[:, HEIGHT] * whole[:, WIDTH]
        sides = [tuple(whole[i, [HEIGHT, WIDTH]].tolist()) for i in (area.argmin(), area.argmax())]
        by_area = sorted([*self._sides, *sides], key=math.prod)
        self._sides = [by_area[0], by_area[-1]]

    def readable(self, num: int) -> np.ndarray:
        """Positions int64 in the sample of up to `num` images that decode, spread evenly."""
        found = np.flatnonzero(self._kept[:, 1] >= 0) * self.every
        return found[np.linspace(0, len(found) - 1, min(num, len(found))).astype(np.int64)]

    def facts(self, images: int) -> dict[str, Any]:
        """As numbers, for a corpus of so many images; shares are counts of the sample."""
        sizes, sides = self._kept[self._kept[:, 0] >= 0, 0], self._kept[self._kept[:, 1] >= 0, 1:]
        low, median, high = np.percentile(sizes, (1, 50, 99)).round().astype(int).tolist() if len(sizes) else (0, 0, 0)
        smallest, largest = (self._sides[0], self._sides[-1]) if self._sides else (None, None)
        modes = {name: int(n) for name, n in zip(MODES, self._modes) if n}
        return {
            "sample": self.num,
            "unreadable": {"count": self.unreadable, "first": self.reasons},
            "bytes": {"total": round(self._bytes / self.num * images), "median": median, "p1": low, "p99": high},
            "formats": {name: int(n) for name, n in zip(FORMAT_NAMES, self._formats) if n},
            "slow_decoder": self._slow,
            "pixels": {
                "median": np.median(sides, axis=0).astype(int).tolist() if len(sides) else None,
                "smallest": smallest,
                "largest": largest,
            },
            "modes": modes,
            "greyscale": sum(modes.get(m, 0) for m in GREY_MODES),
            "rotated": self._rotated,
            "duplicates": (len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.int64)))) * self.every,
        }


def scan(source: Source, sample: int, workers: int, listing: BinaryIO | None = None) -> tuple[CorpusStats, float]:
    """Read and decode up to `sample` images; returns their statistics and images/s. listing: takes the line of each
    that cannot be read."""
    task = _Facts(source, min(sample, len(source)), workers)
    stats, progress = CorpusStats(task.num), Progress("Images scanned", task.num)
    waiting: list[np.ndarray] = []
    begin, seen = time.monotonic(), 0
    for key, (arrays, reasons) in zip(task.keys(), iterate_batches(task, task.keys(), workers=workers, prefetch=16)):
        waiting.append(arrays[0][: len(reasons)].copy())
        for line in filter(None, reasons):
            stats.unreadable += 1
            if len(stats.reasons) < FIRST_REASONS:
                stats.reasons.append(line)
            if listing:
                listing.write(os.fsencode(line) + b"\n")
        seen = key + len(reasons)
        if len(waiting) >= 256 or seen == task.num:
            stats.add(np.concatenate(waiting))
            waiting.clear()
        progress.update(seen, seen)
    return stats, seen / (time.monotonic() - begin)


class InMemorySource(Source):
    """The first images of a stream, in memory."""

    def __init__(self, stream: Stream, num: int):
        self._images = [data for _, data in islice(stream.iterate(0, 0, 0), min(num, len(stream)))]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> bytes:
        data = self._images[i]
        if isinstance(data, DataError):
            raise data
        return data

    def name(self, i: int) -> str:
        return f"image {i}"


class Progress:
    """A line on stderr now and then: how much is done, at what rate, and how long it will take."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._begin = what, total, time.monotonic()
        self._logged = self._begin

    def update(self, done: int, images: int) -> None:
        """done: of the total; images: dealt with since the beginning."""
        now = time.monotonic()
        if now - self._logged < DESCRIBE_LOG_EVERY_S:
            return
        self._logged, taken = now, now - self._begin
        left = f"{rough_duration(taken * (self._total / done - 1))} left" if done else "no estimate yet"
        print(
            f"{self._what}: {done:,} of {self._total:,}, {images / taken:,.0f} images/s, {left}.",
            file=sys.stderr,
            flush=True,
        )


def write_sheet(path: Path, source: Source, indices: np.ndarray, workers: int) -> None:
    """One JPEG of the centres of those images, row by row. Raises DataError where it cannot be written."""
    rows = -(-len(indices) // SHEET_COLUMNS)
    sheet = np.full((max(1, rows) * SHEET_SIDE, SHEET_COLUMNS * SHEET_SIDE, 3), 255, np.uint8)
    made = iterate_batches(
        EvalBatches(source, indices, SHEET_SIDE, SHEET_COLUMNS), range(0, len(indices), SHEET_COLUMNS), workers=workers
    )
    tiles = (tile for (images, _), indices in made for tile, index in zip(images, indices) if index is not None)
    for n, tile in enumerate(tiles):
        top, left = n // SHEET_COLUMNS * SHEET_SIDE, n % SHEET_COLUMNS * SHEET_SIDE
        sheet[top : top + SHEET_SIDE, left : left + SHEET_SIDE] = tile.transpose(1, 2, 0)
    try:
        with written_whole(path) as file:
            Image.fromarray(sheet).save(file, "JPEG", quality=88)
    except OSError as error:
        rule = f"it cannot be written ({error.strerror or error})"
        raise DataError(Problem("--sheet", str(path), rule, "give another place")) from error


@contextlib.contextmanager
def _listing(path: str | None) -> Iterator[BinaryIO | None]:
    if path is None:
        yield None
        return
    try:
        with written_whole(Path(path)) as file:
            yield file
    except OSError as error:
        rule = f"it cannot be written ({error.strerror or error})"
        raise DataError(Problem("--unreadable", path, rule, "give another place")) from error


# ------------------------------------------------------------------------------------------------ what is printed


def _labels(source: Source) -> dict[str, Any] | None:
    labels = source.labels
    if labels is None or not len(source.classes):
        return None
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
    largest, smallest = ([source.classes[i], int(counts[i])] for i in (int(counts.argmax()), int(counts.argmin())))
    return {"classes": len(source.classes), "labelled": int(counts.sum()), "largest": largest, "smallest": smallest}


def _table(facts: dict[str, Any], args: argparse.Namespace) -> str:
    sample = facts["sample"]

    def share(count: int) -> str:
        return f"{count:,} ({100 * count / sample:.3g} %)"

    def sides(pair: Sequence[int] | None) -> str:
        return f"{pair[0]} x {pair[1]}" if pair else "none"

    about, labels, sizes, pixels = (
        [f"{facts['path']}: {facts['kind']}, {counted(facts['images'], 'image')}"],
        facts["labels"],
        facts["bytes"],
        facts["pixels"],
    )
    if labels:
        unlabelled = facts["images"] - labels["labelled"]
        (few, least), (many, most) = labels["smallest"], labels["largest"]
        about.append(
            f"{counted(labels['classes'], 'class')} "
            + (f"from {few} ({least:,}) to {many} ({most:,})" if least < most else f"of {most:,} each")
        )
        about += [f"{unlabelled:,} without a label"] if unlabelled else []
    else:
        about.append("no labels")
    spread = (
        "All of them:"
        if sample == facts["images"]
        else f"Of {sample:,} of them, {'the first' if facts['kind'] == 'stream' else 'spread evenly'}:"
    )
    other = {mode: n for mode, n in facts["modes"].items() if mode != "RGB" and mode not in GREY_MODES}
    more = facts["unreadable"]["count"] - len(facts["unreadable"]["first"])
    left_out = described(facts["left_out"])
    lines = [
        ("unreadable", share(facts["unreadable"]["count"])),
        *(("", line) for line in facts["unreadable"]["first"]),
        *[("", f"and {more:,} more (--unreadable FILE lists all)")] * (more > 0),
        (
            "bytes",
            (
                f"{file_size(sizes['total'])} {'together' if sample == facts['images'] else 'estimated for all'}; an "
                f"image {file_size(sizes['median'])} (median), {file_size(sizes['p1'])} (1 %), "
                f"{file_size(sizes['p99'])} (99 %)"
            ),
        ),
        (
            "formats",
            ", ".join(f"{name} {share(n)}" for name, n in sorted(facts["formats"].items(), key=lambda f: -f[1])),
        ),
        ("slow decoder", f"{share(facts['slow_decoder'])} need Pillow: all but JPEGs"),
        (
            "height x width",
            (
                f"median {sides(pixels['median'])}, smallest {sides(pixels['smallest'])}, largest "
                f"{sides(pixels['largest'])}"
            ),
        ),
        (
            "colour",
            ", ".join([f"greyscale {share(facts['greyscale'])}", *(f"{mode} {share(n)}" for mode, n in other.items())]),
        ),
        ("EXIF-rotated", share(facts["rotated"])),
        (
            "duplicates",
            f"{share(facts['duplicates'])} have the bytes of another{', by estimate' if sample > KEPT else ''}",
        ),
        ("speed", f"{facts['images_per_s']:,.0f} images/s read and decoded, {counted(facts['workers'], 'worker')}"),
    ]
    written = [f"The contact sheet is {args.sheet}."] if args.sheet else []
    written += [f"All that cannot be read are listed in {args.unreadable}."] if args.unreadable else []
    return "\n".join(
        [
            "; ".join(about) + ".",
            *([f"Left out: {left_out}."] if left_out else []),
            spread,
            *(f"  {name:16}{text}" for name, text in lines),
            *written,
        ]
    )
