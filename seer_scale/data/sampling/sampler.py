"""Which image every global sample is, from the number of samples seen alone: for any ranks, and as the data change.

Global samples are positions in epochs. While the data stay as they are, sample p is the image at position p % n of
epoch p // n. When they change (a refresh), the epoch in progress goes on with what it still had to show of the parts
that stay and with all of the new parts, in proportion; whole epochs of the new data follow. So each epoch shows an
image exactly once, if it was there from the beginning and stays, or joined meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from seer_scale.data.sampling.order import Order

COUNTED = 4096
"""Positions that are counted together where a part is gone."""


@dataclass(frozen=True)
class DataVersion:
    """The data from global sample `since` on: parts as (name, number of images), and how they are read.

    epoch: the one in progress when they changed, or the next where it was just over. remaining: images it then had to
    show, 0 for a whole epoch. fraction_done: the share of it that was done. `ElasticSampler.next_version` finds
    these three.
    """

    since: int
    parts: tuple[tuple[str, int], ...]
    block: int = 1
    interleave: int = 1
    epoch: int = 0
    remaining: int = 0
    fraction_done: float = 0.0

    @property
    def n(self) -> int:
        return sum(num for _, num in self.parts)


class ElasticSampler:
    """Which images each rank takes, from `samples_seen` alone; a rank takes its contiguous part of the global batch, so
    all ranks together take the same images however many they are."""

    def __init__(self, versions: Sequence[DataVersion], seed: int, global_batch: int):
        """versions: in order; only the last one's samples can be asked for."""
        if global_batch < 1:
            raise ValueError(f"a sampler needs a batch of at least one, not {global_batch}")
        self.versions, self.version, self.seed, self.global_batch = tuple(versions), versions[-1], seed, global_batch
        self.n, self.order = self.version.n, Order(self.version.n, seed, self.version.block, self.version.interleave)

    @cached_property
    def _partial_epoch(self) -> _PartialEpoch:
        """What the epoch in which this version began showed from then on; needed in that epoch only."""
        return _partial_epoch_of(
            (*self.versions[:-1], replace(self.version, remaining=0, fraction_done=0.0)), self.seed, self.global_batch
        )

    def next_version(self, since: int, parts: Sequence[tuple[str, int]], block: int, interleave: int) -> DataVersion:
        """The version that begins at global sample `since`. Where a part went in mid-epoch, what was still to come of
        it is counted: a second for some 10^6 images."""
        (epoch,), (offset,) = (x.tolist() for x in self.locate(np.array([since])))
        in_progress = offset or self.version.remaining and epoch == self.version.epoch
        version = DataVersion(
            since, tuple((name, num) for name, num in parts), block, interleave, epoch, 0, self.progress(since) - epoch
        )
        if in_progress:
            remaining = len(
                _partial_epoch_of((*self.versions, replace(version, fraction_done=0.0)), self.seed, self.global_batch)
            )
            version = (
                replace(version, remaining=remaining)
                if remaining
                else replace(version, epoch=epoch + 1, fraction_done=0.0)
            )
        return version

    def size(self, epoch: int) -> int:
        """How many images this version shows in an epoch."""
        return self.version.remaining if self.version.remaining and epoch == self.version.epoch else self.n

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, offsets) of global samples (int64). Offsets count from the epoch's beginning, or from this version's
        where that is later."""
        inside, version = samples - self.version.since, self.version
        epochs, offsets = np.divmod(inside - version.remaining, self.n)
        first = inside < version.remaining
        return np.where(first, version.epoch, version.epoch + (version.remaining > 0) + epochs), np.where(
            first, inside, offsets
        )

    def progress(self, samples_seen: int) -> float:
        """Epochs done, with the share of the one in progress: of what was left when its images changed, where they
        did."""
        (epoch,), (offset,) = self.locate(np.array([samples_seen]))
        done = self.version.fraction_done if self.version.remaining and epoch == self.version.epoch else 0.0
        return float(epoch + done + (1 - done) * offset / self.size(int(epoch)))

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
        if self.version.remaining and epoch == self.version.epoch:
            return self._partial_epoch.at(offsets)
        return self.order.at(epoch, offsets)

    def block_of(self, epoch: int, offset: int, image: int) -> tuple[int, int, int] | None:
        """`Order.block_of`, where the global batch leaves each reader its interleave."""
        if self.version.remaining and epoch == self.version.epoch or self.order.interleave % self.global_batch:
            return None
        return self.order.block_of(epoch, offset, image)


class _PartialEpoch:
    """An epoch in progress as it goes on when the data change: what stays of the old order, and all images of new
    parts in an order of their own, one of either as their shares say, so that what is near in one stays near."""

    def __init__(self, versions: Sequence[DataVersion], seed: int, global_batch: int):
        *past, now = versions
        self._before = before = ElasticSampler(past, seed, global_batch)
        self._epoch, [self._offset] = now.epoch, before.locate(np.array([now.since]))[1].tolist()
        old, new = past[-1].parts, now.parts
        starts = dict(zip((name for name, _ in new), np.cumsum([0, *(num for _, num in new)]).tolist()))
        self._old_starts = np.cumsum([0, *(num for _, num in old)])
        self._moved = np.array([starts.get(name, -1) for name, _ in old], np.int64)
        joined = [(starts[name], num) for name, num in new if name not in _parts_shown(past, now.epoch)]
        self._joined = np.array([start for start, _ in joined], np.int64)
        self._joined_starts = np.cumsum([0, *(num for _, num in joined)])
        self._num_joined = int(self._joined_starts[-1])
        self._fresh = Order(self._num_joined, seed, now.block, now.interleave) if self._num_joined else None
        left = before.size(self._epoch) - self._offset
        self._counts = self._count(left) if (self._moved < 0).any() else None
        self._num = self._num_joined + (left if self._counts is None else int(self._counts[-1]))
        self._block_numbers: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._num

    def at(self, offsets: np.ndarray) -> np.ndarray:
        joined, joined_after = (x * self._num_joined // self._num for x in (offsets, offsets + 1))
        is_joined, images = joined_after > joined, np.empty(len(offsets), np.int64)
        if self._fresh is not None and is_joined.any():
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
            images[here] = self._numbers(int(block))[positions[here] - self._counts[block]]
        return images

    def _numbers(self, block: int) -> np.ndarray:
        """New numbers of the images of one block that stay; whoever asks for one asks for its neighbours next."""
        if block not in self._block_numbers:
            if len(self._block_numbers) >= 4:
                self._block_numbers.clear()
            numbers = self._old(self._positions(block))
            self._block_numbers[block] = numbers[numbers >= 0]
        return self._block_numbers[block]

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


@lru_cache(maxsize=2)
def _partial_epoch_of(versions: tuple[DataVersion, ...], seed: int, global_batch: int) -> _PartialEpoch:
    return _PartialEpoch(versions, seed, global_batch)


def needed(versions: Sequence[DataVersion]) -> tuple[DataVersion, ...]:
    """The last of some versions, and those before it on which the order of its first epoch depends."""
    first = len(versions) - 1
    while first and versions[first].remaining and versions[first].epoch == versions[-1].epoch:
        first -= 1
    return tuple(versions[first:])


def _parts_shown(past: Sequence[DataVersion], epoch: int) -> set[str]:
    """The parts that have been there in this epoch; one that went and comes back waits for the next."""
    names = set()
    for version in reversed(past):
        names |= {name for name, _ in version.parts}
        if not (version.remaining and version.epoch == epoch):  # it began before this epoch, or with it
            break
    return names
