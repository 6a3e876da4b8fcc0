"""Which image every global sample is, from the number of samples seen alone: for any ranks, and as the data change.

Global samples are positions in epochs. While the data stay as they are, sample p is the image at position p % n of epoch
p // n. When they change (a refresh), the epoch in progress goes on with what it still had to show of the parts that
stay and with all of the new parts, in proportion; whole epochs of the new data follow. So each epoch shows an image
exactly once, if it was there from the beginning and stays, or joined meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seer_scale.data.order import Order

COUNTED = 4096
"""Positions that are counted together where a part is gone."""


@dataclass(frozen=True)
class Era:
    """The data from global sample `since` on: parts as (name, number of images), and how they are read."""

    since: int
    parts: tuple[tuple[str, int], ...]
    block: int = 1
    lanes: int = 1

    @property
    def n(self) -> int:
        return sum(num for _, num in self.parts)


class ElasticSampler:
    """Which images each rank takes, from `samples_seen` alone; a rank takes its contiguous part of the global batch, so
    all ranks together take the same images however many they are."""

    def __init__(self, eras: Sequence[Era], seed: int, global_batch: int):
        """eras: in order; only the last one's samples can be asked for. Where a part went before its epoch was over, what
        was still to come of it is counted: a second for some 10^7 images."""
        if global_batch < 1:
            raise ValueError(f"a sampler needs a batch of at least one, not {global_batch}")
        *past, era = eras
        self.n, self.seed, self.global_batch = era.n, seed, global_batch
        self.order, self._since = Order(era.n, seed, era.block, era.lanes), era.since
        self._begun, self._rest = 0, None
        """The epoch in which this era began, and what it showed from then on, if it had begun before."""
        if past:
            before = ElasticSampler(past, seed, global_batch)
            (self._begun,), (offset,) = (x.tolist() for x in before.locate(np.array([era.since])))
            if offset or before._rest and before._begun == self._begun:
                self._rest = _Rest(before, self._begun, offset, past[-1].parts, era.parts)

    def size(self, epoch: int) -> int:
        """How many images this era shows in an epoch."""
        return len(self._rest) if self._rest and epoch == self._begun else self.n

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, offsets) of global samples (int64). Offsets count from the epoch's beginning, or from this era's where
        that is later."""
        inside = samples - self._since
        if self._rest is None:
            epochs, offsets = np.divmod(inside, self.n)
            return epochs + self._begun, offsets
        epochs, offsets = np.divmod(inside - len(self._rest), self.n)
        first = inside < len(self._rest)
        return np.where(first, self._begun, self._begun + 1 + epochs), np.where(first, inside, offsets)

    def progress(self, samples_seen: int) -> float:
        """Epochs done, with the share of the one in progress (of which a refresh changes the size)."""
        (epoch,), (offset,) = self.locate(np.array([samples_seen]))
        return float(epoch + offset / self.size(int(epoch)))

    def left(self, samples_seen: int) -> int:
        """How many images the epoch in progress has still to show."""
        (epoch,), (offset,) = self.locate(np.array([samples_seen]))
        return self.size(int(epoch)) - int(offset)

    def slots(self, samples_seen: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, offsets, image numbers), each int64 [local batch], for the batch that begins at `samples_seen`."""
        local, rest = divmod(self.global_batch, world_size)
        if rest or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} has no whole part of a batch of {self.global_batch}")
        epochs, offsets = self.locate(samples_seen + rank * local + np.arange(local, dtype=np.int64))
        indices = np.empty(local, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self.at(int(epoch), offsets[here])
        return epochs, offsets, indices

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Image numbers at offsets (int64, in [0, size(epoch))) of one epoch."""
        if self._rest and epoch == self._begun:
            return self._rest.at(offsets)
        return self.order.at(epoch, offsets)

    def run_of(self, epoch: int, offset: int, image: int) -> tuple[int, int] | None:
        """`Order.run_of`, where the global batch leaves each reader its lanes."""
        if self._rest and epoch == self._begun or self.order.lanes % self.global_batch:
            return None
        return self.order.run_of(epoch, offset, image)


class _Rest:
    """An epoch in progress as it goes on when the data change: what stays of the old order, and all images of new
    parts in an order of their own, one of either as their shares say, so that what is near in one stays near."""

    def __init__(
        self, before: ElasticSampler, epoch: int, offset: int, old: Sequence[tuple[str, int]], new: Sequence[tuple[str, int]]
    ):
        self._before, self._epoch, self._offset = before, epoch, offset
        starts = dict(zip((name for name, _ in new), np.cumsum([0, *(num for _, num in new)]).tolist()))
        self._old_starts = np.cumsum([0, *(num for _, num in old)])
        self._moved = np.array([starts.get(name, -1) for name, _ in old], np.int64)
        joined = [(starts[name], num) for name, num in new if name not in dict(old)]
        self._joined = np.array([start for start, _ in joined], np.int64)
        self._joined_starts = np.cumsum([0, *(num for _, num in joined)])
        self._num_joined = int(self._joined_starts[-1])
        order = before.order
        self._fresh = Order(self._num_joined, order.seed, order.block, order.lanes) if self._num_joined else None
        left = before.size(epoch) - offset
        self._counts = self._count(left) if (self._moved < 0).any() else None
        self._num = self._num_joined + (left if self._counts is None else int(self._counts[-1]))

    def __len__(self) -> int:
        return self._num

    def at(self, offsets: np.ndarray) -> np.ndarray:
        joined, joined_after = (x * self._num_joined // self._num for x in (offsets, offsets + 1))
        is_joined, images = joined_after > joined, np.empty(len(offsets), np.int64)
        if is_joined.any():
            fresh = self._fresh.at(self._epoch, joined[is_joined])
            part = np.searchsorted(self._joined_starts, fresh, side="right") - 1
            images[is_joined] = self._joined[part] + fresh - self._joined_starts[part]
        images[~is_joined] = self._kept((offsets - joined)[~is_joined])
        return images

    def _kept(self, positions: np.ndarray) -> np.ndarray:
        """New numbers of the images at positions among those that stay."""
        if self._counts is None:
            return self._old(positions)
        images = np.empty(len(positions), np.int64)
        blocks = np.searchsorted(self._counts, positions, side="right") - 1
        for block in np.unique(blocks):
            here = blocks == block
            numbers = self._old(self._positions(int(block)))
            images[here] = numbers[numbers >= 0][positions[here] - self._counts[block]]
        return images

    def _old(self, positions: np.ndarray) -> np.ndarray:
        """New numbers of the images at positions of what was left of the old order; -1 for those that are gone."""
        images = self._before.at(self._epoch, self._offset + positions)
        part = np.searchsorted(self._old_starts, images, side="right") - 1
        moved = self._moved[part]
        return np.where(moved < 0, -1, moved + images - self._old_starts[part])

    def _positions(self, block: int) -> np.ndarray:
        left = self._before.size(self._epoch) - self._offset
        return np.arange(block * COUNTED, min((block + 1) * COUNTED, left), dtype=np.int64)

    def _count(self, left: int) -> np.ndarray:
        """How many images stay before each block of COUNTED positions, and in all."""
        kept = [np.count_nonzero(self._old(self._positions(b)) >= 0) for b in range(-(-left // COUNTED))]
        return np.cumsum([0, *kept])
