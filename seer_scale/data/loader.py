"""Batches of views from worker processes: each item is one rank's whole part of one global batch.

What a batch holds depends on (source, views, sampler, its first sample) only, not on the workers, and what all ranks
hold together not on the ranks. An image that cannot be read is replaced by the next one of the epoch's order and
reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from seer_scale.config import Data, Views
from seer_scale.data import photometric
from seer_scale.data.decode import decode
from seer_scale.data.pool import Guard, stream
from seer_scale.data.sampler import ElasticSampler
from seer_scale.data.sources import Source
from seer_scale.data.views import load_views, resize_centre
from seer_scale.errors import DataError

GIVE_UP_AFTER = 100
"""Unreadable images in a row that end a run: then it is not the images."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch of b images a rank.

    views: for each kind of crop uint8 [num * b, 3, size, size], all images' first crop, then all their second.
    distortions: for each kind float32 [num * b, photometric.PACKED], to be done on the device; or none, where the views
    are done. indices: int64 [b], the images really used. samples_seen: global samples before this batch.
    unreadable: "name: reason" of each image that was replaced.
    """

    views: list[torch.Tensor]
    distortions: list[torch.Tensor]
    indices: torch.Tensor
    samples_seen: int
    unreadable: list[str]


def loader(
    source: Source, data: Data, views: Views, sampler: ElasticSampler, *, rank: int, world_size: int, start: int,
    stop: int, pin: bool = False, on_device: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's batches for the global samples start, start + sampler.global_batch, ... below `stop`.

    on_device: leave colour, flip and blur to the device. Workers live as long as the iterator, keep data.prefetch
    batches ready, and are replaced when they die or hang; ask from one thread. Raises DataError when GIVE_UP_AFTER
    images in a row cannot be read.
    """
    photometric.native()  # compiled before there are workers
    job = _Views(source, views, sampler, rank, world_size, on_device)
    keys = range(start, stop, sampler.global_batch)
    made = stream(job, keys, workers=data.workers, prefetch=data.prefetch, pin=pin, timeout_s=data.timeout_s)
    for samples_seen, (arrays, told) in zip(keys, made):
        flat, num = [a.flatten(0, 1) for a in arrays], len(views.crops)
        indices = torch.tensor([index for index, _ in told], dtype=torch.int64)
        yield Batch(flat[:num], flat[num:], indices, samples_seen, [line for _, lines in told for line in lines])


@dataclass
class _Views:
    """The batches of training: a row is an image's slot."""

    source: Source
    views: Views
    sampler: ElasticSampler
    rank: int
    world_size: int
    on_device: bool

    def __post_init__(self):
        self._slots: tuple[int, Any] = (-1, None)
        self._reader = (_Stream if self.source.is_stream else _ReadAhead)(self.source, self.sampler)

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        b, crops = self.rows(0), self.views.crops
        pixels = [((c.num, b, 3, c.size, c.size), np.uint8) for c in crops]
        return pixels + [((c.num, b, photometric.PACKED), np.float32) for c in crops] * self.on_device

    def rows(self, key: int) -> int:
        return self.sampler.global_batch // self.world_size

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], guard: Guard) -> tuple[int, list[str]]:
        if self._slots[0] != key:
            self._slots = key, self.sampler.slots(key, self.rank, self.world_size)
        epochs, offsets, _ = self._slots[1]
        epoch, offset = int(epochs[row]), int(offsets[row])
        unreadable: list[str] = []
        for step in range(GIVE_UP_AFTER):
            at = (offset + step) % self.sampler.size(epoch)
            index = int(self.sampler.at(epoch, np.array([at]))[0])
            try:
                guard.enter(index)
                data = self._reader.read(epoch, at, index)
                load_views(data, self.views, self.sampler.seed, epoch, index, [a[:, row] for a in out])
                return index, unreadable
            except DataError as error:
                name = self.source.name(index)
                unreadable.append(f"{name}: {str(error).removeprefix(f'{name} ')}")
        first = "; ".join(unreadable[:3])
        raise DataError(f"{GIVE_UP_AFTER} images in a row cannot be read, so check data.path; the first: {first}.")

    def describe(self, item: int) -> str:
        return self.source.name(item)


class _ReadAhead:
    """What a worker has read together with the images it was asked for, until it is asked for."""

    def __init__(self, source: Source, sampler: ElasticSampler):
        self._source, self._sampler = source, sampler
        self._blocks: dict[tuple[int, int], dict[int, bytes | DataError]] = {}

    def read(self, epoch: int, offset: int, index: int) -> bytes:
        run = self._sampler.run_of(epoch, offset, index)
        if run is None:
            return self._source.read(index)
        first, num = run
        block = self._blocks.get((epoch, first))
        if block is None:
            block = self._blocks[epoch, first] = self._fetch(first, num)
            while len(self._blocks) > 2 * self._sampler.global_batch:  # an image that was replaced leaves one behind
                del self._blocks[next(iter(self._blocks))]
        data = block.pop(index, None)
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


class _Stream:
    """A stream that is read in order, with what of it went by lately."""

    def __init__(self, source: Source, sampler: ElasticSampler):
        self._source, self._seed = source, sampler.seed
        self._epoch, self._next, self._images = -1, 0, iter(())
        self._lately: dict[int, bytes | DataError] = {}

    def read(self, epoch: int, offset: int, index: int) -> bytes:
        if epoch != self._epoch or offset < self._next and offset not in self._lately:
            self._epoch, self._next, self._lately = epoch, offset, {}
            self._images = self._source.iterate(self._seed, epoch, offset)
        while offset not in self._lately:
            position, data = next(self._images)
            self._lately[position], self._next = data, position + 1
            if len(self._lately) > GIVE_UP_AFTER:  # those may be asked for again, to replace others
                del self._lately[next(iter(self._lately))]
        data = self._lately[offset]
        if isinstance(data, DataError):
            raise data
        return data


def decoded(
    source: Source, indices: Sequence[int] | np.ndarray, size: int, *, batch: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(images uint8 [b, 3, size, size], labels int64 [b], image numbers int64 [b]) for evaluation, in order.

    b is at most `batch`. Images that cannot be read are left out; the label is -1 where there is none.
    """
    job = _Centres(source, np.asarray(indices, np.int64), size, batch)
    for (images, labels), told in stream(job, range(0, len(indices), batch), workers=workers):
        rows = [row for row, index in enumerate(told) if index is not None]
        if rows:
            numbers = torch.tensor([told[row] for row in rows], dtype=torch.int64)
            yield images[rows], labels[rows], numbers


@dataclass
class _Centres:
    """The batches of an evaluation: a row is an image, or none."""

    source: Source
    indices: np.ndarray
    size: int
    batch: int

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.batch, 3, self.size, self.size), np.uint8), ((self.batch,), np.int64)]

    def rows(self, key: int) -> int:
        return min(self.batch, len(self.indices) - key)

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], guard: Guard) -> int | None:
        images, labels = out
        index = int(self.indices[key + row])
        try:
            guard.enter(index)
            images[row] = resize_centre(decode(self.source.read(index)), self.size)
        except DataError:
            return None
        label = self.source.label(index)
        labels[row] = -1 if label is None else label
        return index

    def describe(self, item: int) -> str:
        return self.source.name(item)
