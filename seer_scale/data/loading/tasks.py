"""What loader processes do: the views of training images, the centres of those of an evaluation.

Imported by processes that are to stay small: neither this nor what it imports needs torch.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from seer_scale.config import ImageSize, Views, shape_of
from seer_scale.data.loading.worker import ItemTracker, Spec
from seer_scale.data.sampling.sampler import ElasticSampler
from seer_scale.data.sources import Source, Stream
from seer_scale.data.sources.base import unreadable_line
from seer_scale.data.transforms import photometric
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.views import load_views, resize_centre
from seer_scale.errors import NOTHING, DataError, Problem, SourceEnded

READ_AHEAD = 256 << 20
"""Bytes of images read ahead with which a loader process reads no further ones."""
STREAM_PATIENCE_S = 1800.0
"""Seconds that a stream's next image may take before its loader process counts as stuck."""
MAX_UNREADABLE_IN_A_ROW = 100
"""Unreadable images in a row that end a run: then it is not the images."""


@dataclass
class TrainBatches:
    """The batches of training: a row is an image's slot."""

    source: Source
    views: Views
    sampler: ElasticSampler
    rank: int
    world_size: int
    on_device: bool

    def __post_init__(self) -> None:
        self._slots: tuple[int, Any] = (-1, None)
        self._reader: _ReadAhead | _Stream
        if isinstance(self.source, Stream):
            self._reader = _Stream(self.source, self.sampler)
        else:
            self._reader = _ReadAhead(self.source, self.sampler, self.world_size)

    def buffers(self) -> list[Spec]:
        b, crops = self.rows(0), self.views.crops
        pixels: list[Spec] = [((c.num, b, 3, *c.shape), np.uint8) for c in crops]
        params: list[Spec] = [((c.num, b, photometric.PARAMS_PER_CROP), np.float32) for c in crops]
        return pixels + params * self.on_device

    def rows(self, key: int) -> int:
        return self.sampler.global_batch // self.world_size

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> tuple[int, list[str]]:
        if self._slots[0] != key:
            self._slots = key, self.sampler.slots(key, self.rank, self.world_size)
        epoch, offset, index = (int(x[row]) for x in self._slots[1])
        unreadable: list[str] = []
        limit = MAX_UNREADABLE_IN_A_ROW
        max_steps = limit if self.source.is_stream else min(limit, len(self.source))
        for step in range(max_steps):
            at, size = offset + step, self.sampler.size(epoch)
            if at >= size:  # a stream's beginning has gone by: of what came last, the nearest before
                at = (offset - 1 - (at - size) if self.source.is_stream else at) % size
            if step:
                index = int(self.sampler.at(epoch, np.array([at]))[0])
            try:
                tracker.begin(index)
                data = self._reader.read(epoch, at, index, tracker, is_own=not step)
                load_views(data, self.views, self.sampler.seed, epoch, index, [a[:, row] for a in out])
                return index, unreadable
            except SourceEnded:
                raise
            except (DataError, MemoryError) as error:
                unreadable.append(unreadable_line(self.source.name(index), error))
        some = f"leads to {max_steps} images in a row that cannot be read"
        rule = some if max_steps < len(self.source) else f"leads to {max_steps:,} images of which none can be read"
        raise DataError(Problem("data.path", NOTHING, rule, f"the first: {'; '.join(unreadable[:3])}"))

    def describe(self, item: int) -> str:
        return self.source.name(item)


class _ReadAhead:
    """What a worker has read together with the images it was asked for, until it is asked for."""

    def __init__(self, source: Source, sampler: ElasticSampler, world_size: int):
        self._source, self._sampler = source, sampler
        self._blocks: dict[tuple[int, int], dict[int, bytes | DataError]] = {}
        self._bytes = self._largest = 0
        self._max_blocks = 2 * max(1, sampler.order.interleave // world_size)  # twice what this rank reads side by side

    def read(self, epoch: int, offset: int, index: int, tracker: ItemTracker, *, is_own: bool) -> bytes:
        """is_own: this row is the image's own, not one where it replaces another, and so reads on in its block."""
        found = self._sampler.block_of(epoch, offset, index)
        if found is None:
            return self._source.read(index)
        first, num, before = found
        block = self._blocks.get((epoch, first))
        if block is None:
            # another row's block would be kept for nothing, and of one begun before a part; and memory has an end
            if not is_own or before or self._bytes + num * self._largest > READ_AHEAD:
                return self._source.read(index)
            block = self._blocks[epoch, first] = self._fetch(first, num)
            self._bytes += _size(block)
            self._largest = max(self._largest, _size(block) // num)
            while len(self._blocks) > self._max_blocks:  # one with an image that is refused is never used up
                self._bytes -= _size(self._blocks.pop(next(iter(self._blocks))))
        data = block.pop(index, None)
        self._bytes -= _size({index: data})
        if not block:
            del self._blocks[epoch, first]
        if data is None:  # read before, in the place of one that cannot be read
            return self._source.read(index)
        if isinstance(data, DataError):
            raise data
        return data

    def _fetch(self, first: int, num: int) -> dict[int, bytes | DataError]:
        before_end = min(num, self._sampler.n - first)
        found = dict(enumerate(self._source.read_run(first, before_end), first))
        if before_end < num:
            found |= enumerate(self._source.read_run(0, num - before_end))
        return found


def _size(images: dict[int, Any]) -> int:
    return sum(len(data) for data in images.values() if isinstance(data, bytes))


class _Stream:
    """A stream that is read in order, with its most recent images."""

    def __init__(self, source: Stream, sampler: ElasticSampler):
        self._source, self._seed = source, sampler.seed
        self._epoch, self._next = -1, 0
        self._images: Iterator[tuple[int, bytes | DataError]] = iter(())
        self._recent: dict[int, bytes | DataError] = {}

    def read(self, epoch: int, offset: int, index: int, tracker: ItemTracker, *, is_own: bool) -> bytes:
        if epoch != self._epoch or offset < self._next and offset not in self._recent:
            self._epoch, self._next, self._recent = epoch, offset, {}
            self._images = self._source.iterate(self._seed, epoch, offset, tracker.heartbeat)
        while offset not in self._recent:
            try:
                with _alive(tracker):
                    position, data = next(self._images)
            except DataError as error:
                raise SourceEnded(*error.problems) from error
            self._recent[position], self._next = data, position + 1
            if len(self._recent) > MAX_UNREADABLE_IN_A_ROW:  # those may be asked for again, to replace others
                del self._recent[next(iter(self._recent))]
        data = self._recent[offset]
        if isinstance(data, DataError):
            raise data
        return data


@contextmanager
def _alive(tracker: ItemTracker) -> Iterator[None]:
    """For at most STREAM_PATIENCE_S of waiting: the library tries servers again for many minutes, without a word."""
    over, deadline = threading.Event(), time.monotonic() + STREAM_PATIENCE_S

    def tick() -> None:
        while not over.wait(0.2) and time.monotonic() < deadline:
            tracker.heartbeat()

    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@dataclass
class EvalBatches:
    """The batches of an evaluation, none of which reaches over a multiple of `within` indices: a row is an image, or
    none."""

    source: Source
    indices: np.ndarray
    size: ImageSize
    batch: int
    within: int = sys.maxsize

    def keys(self) -> list[int]:
        """The first index of each."""
        n = len(self.indices)
        return [i for first in range(0, n, self.within) for i in range(first, min(first + self.within, n), self.batch)]

    def buffers(self) -> list[Spec]:
        return [((self.batch, 3, *shape_of(self.size)), np.uint8), ((self.batch,), np.int64)]

    def rows(self, key: int) -> int:
        return min(self.batch, self.within - key % self.within, len(self.indices) - key)

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> int | None:
        images, labels = out
        index = int(self.indices[key + row])
        try:
            tracker.begin(index)
            images[row] = resize_centre(decode(self.source.read(index)), self.size)
        except (DataError, MemoryError):
            return None
        label = self.source.label(index)
        labels[row] = -1 if label is None else label
        return index

    def describe(self, item: int) -> str:
        return self.source.name(item)
