"""Which patches of which views a student does not see, as functions of (seed, samples_seen, position in the global
batch, view): the same on any number of ranks and in any micro-batches.

Blocks are DINOv2's (BEiT's, arXiv 2106.08254), or DINOv3's, which have an exact number of patches. Each masked crop has
a stratum of the range of masked shares to itself, so that a batch holds all of them evenly. Here that is the global
batch; the released code does so on every rank, whose masks change with the number of ranks. Two things differ from it,
so that any part of the batch has about the same number of masked patches, and buffers can be of a fixed size that is
hardly larger than what fills them:

- Who is masked is drawn image by image: of two views of an image, half of which are to be masked, exactly one (there:
  any half of a rank's crops). Every term of a loss is of one masked view, so its mean is the same.
- The stratum of the i-th masked crop of the batch is (step i + shift) mod n, with a random shift and a step near n
  over the golden ratio: n crops in a row have all of them, and fewer nearly even ones (there: shuffled).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.methods.draws import first_of_part, sent
from seer_scale.rng import draw, key, numpy_generator

MIN_BLOCK, BLOCK_TRIES, MIN_ASPECT = 4, 10, 0.3
"""BEiT's: the least area of a block in patches, how often one is drawn anew, and its least height over width."""
ROUND_UP = 1e-6
"""Patches: a share such as 0.25 of 256 has all 64 of them, whatever the last digit of its stratum's edge."""


class Masks(NamedTuple):
    """Of V views of B images, in host memory. masked: bool [V * B, N], crop-major. places: int64 [M], where
    masked patches lie among all V * B * N, in their order, padded with 0. counts: fp32 [M], the number of masked
    patches of the crop of each, 0 for padding. M is `BlockMasking.bound`."""

    masked: Tensor
    places: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockMasking:
    """grid: patches of a view, high and wide. share: of the crops of a global batch that are masked. ratio: from which
    to which share of a crop's patches. exact: DINOv3's rule, each masked crop has as many patches as the upper edge of
    its stratum says; else DINOv2's, up to a number drawn from its stratum, which blocks may fall short of."""

    seed: int
    grid: tuple[int, int]
    global_batch: int
    views: int = 2
    share: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    exact: bool = False

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def num_masked(self) -> int:
        """Masked crops of a global batch."""
        return self._masked_before(self.global_batch * self.views)

    def bound(self, images: int) -> int:
        """The most patches that are masked of any `images` images in a row of any global batch; at least 1."""
        crops = min(self.num_masked, math.ceil(images * self.views * self.share))
        if not crops:
            return 1
        most = np.floor(self.num_patches * self._edges[1:] + ROUND_UP).astype(np.int64)
        in_turn = most[self._step * np.arange(self.num_masked) % self.num_masked]
        before = np.concatenate([[0], np.cumsum(np.concatenate([in_turn, in_turn]))])
        return max(1, int((before[crops:] - before[:-crops]).max()))

    def draw(self, samples_seen: int, first: int, images: int) -> Masks:
        """Of `images` images, the first of which is the `first` of the global batch that begins at `samples_seen`.

        The work of `images` V share small random searches on the host, some 0.2 ms each, and no other."""
        masked = np.zeros((self.views, images, self.num_patches), bool)
        shift = key(self.seed, "strata", samples_seen) % max(1, self.num_masked)
        for i in range(images):
            sample, before = samples_seen + first + i, (first + i) * self.views
            order = numpy_generator(self.seed, "masked views", sample).permutation(self.views)
            for place, view in enumerate(order):
                number = self._masked_before(before + place)
                if self._masked_before(before + place + 1) > number:
                    stratum = (self._step * number + shift) % self.num_masked
                    masked[view, i] = self.mask(sample, int(view), stratum).ravel()
        flat = masked.reshape(self.views * images, self.num_patches)
        counts = flat.sum(1)
        packed, of_places = np.flatnonzero(flat), np.repeat(counts, counts)
        places, padded = np.zeros(self.bound(images), np.int64), np.zeros(self.bound(images), np.float32)
        places[: len(packed)], padded[: len(packed)] = packed, of_places
        return Masks(torch.from_numpy(flat), torch.from_numpy(places), torch.from_numpy(padded))

    def mask(self, sample: int, view: int, stratum: int) -> np.ndarray:
        """bool [height, width] of one view of the global sample: a function of these three and the seed alone."""
        draws = numpy_generator(self.seed, "mask", sample, view)
        low, high = self._edges[stratum : stratum + 2]
        upto = high if self.exact else low + draws.random() * (high - low)
        return block_mask(draws, self.grid, int(self.num_patches * upto + ROUND_UP), exact=self.exact)

    def _masked_before(self, crop: int) -> int:
        """How many of the crops before this one are masked, counted image by image."""
        return math.floor(crop * self.share + ROUND_UP)

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.linspace(*self.ratio, self.num_masked + 1)

    @cached_property
    def _step(self) -> int:
        n = self.num_masked
        near = round(n * (math.sqrt(5) - 1) / 2)
        return min((s for s in range(1, n + 1) if math.gcd(s, n) == 1), key=lambda s: abs(s - near))


@dataclass(frozen=True, kw_only=True)
class RandomMasking:
    """So many patches of each view are seen, drawn one by one. ratio: the share that is not."""

    seed: int
    grid: tuple[int, int]
    ratio: float

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def keep(self) -> int:
        """Patches that are seen."""
        return int(round(self.num_patches * (1 - self.ratio), 6))

    def noise(
        self, config: Config, world: World, samples_seen: int, part: tuple[int, int], batch: int, views: int, kind: int
    ) -> Tensor:
        """Uniform numbers [views * batch, patches], crop-major, on the host: of the images of micro-batch i of this
        rank's n, part (i, n), and of the kind of crop; the same on any number of ranks and in any micro-batches."""
        first, row = samples_seen + first_of_part(config, world, part), views * self.num_patches
        drawn = draw(self.seed, "visible patches", kind, start=first * row, stop=(first + batch) * row)
        return torch.from_numpy(drawn).view(batch, views, -1).transpose(0, 1).flatten(0, 1)

    def noise_of(self, numbers: Sequence[int]) -> Tensor:
        """The same of images that are only looked at, by their numbers: [N, patches]."""
        num = self.num_patches
        drawn = [draw(self.seed, "patches shown", start=n * num, stop=(n + 1) * num) for n in numbers]
        return torch.from_numpy(np.stack(drawn))

    def masks(self, noise: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(bool [N, h, w], what is not seen; int64 [N, keep], the numbers of what is, row by row, rising), on the
        device: the order of noise decides, and the host waits for nothing."""
        (there,) = sent([noise.contiguous()], device)
        places = there.argsort(dim=1, stable=True)[:, : self.keep].sort(1).values
        hidden = torch.ones_like(there, dtype=torch.bool).scatter(1, places, False)
        return hidden.unflatten(1, self.grid), places


def block_mask(draws: np.random.Generator, grid: tuple[int, int], target: int, *, exact: bool = False) -> np.ndarray:
    """bool [height, width] of rectangles until `target` patches are masked, or none of 10 in a row fits; never more.

    A rectangle has an area from 4 to what is left (at most half the grid) and a log-uniform aspect, is smaller than the
    grid both ways, and masks something, but no more than is left. exact: what then is missing is drawn one by one.
    """
    (height, width), mask = grid, np.zeros(grid, bool)
    left, low = target, math.log(MIN_ASPECT)
    while left > 0:
        most = min(left, height * width / 2)
        for area, aspect, down, across in draws.random((BLOCK_TRIES, 4)):
            size, shape = MIN_BLOCK + area * (most - MIN_BLOCK), math.exp(low * (1 - 2 * aspect))
            h, w = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
            if h >= height or w >= width:
                continue
            top, start = int(down * (height - h + 1)), int(across * (width - w + 1))
            block = mask[top : top + h, start : start + w]
            new = h * w - int(np.count_nonzero(block))
            if 0 < new <= most:
                block[:] = True
                left -= new
                break
        else:
            break
    if exact and left > 0:
        free = np.flatnonzero(~mask)
        mask.flat[draws.permutation(free)[:left]] = True
    return mask
