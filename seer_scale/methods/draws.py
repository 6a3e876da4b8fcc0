"""What is dropped of which image: a function of (seed, the image's number in the run's order, its crop) alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.rng import draw


class ViewDraws:
    """Uniform numbers for each view: the same on any number of ranks and in any micro-batches, before or after a
    restart. width: how many a view takes; 0: there are none."""

    def __init__(self, config: Config, world: World, width: int):
        self.seed, self.width, self.world = config.run.seed, width, world
        self.nums = [crop.num for crop in config.views.crops]
        self.global_batch = config.train.global_batch

    def __call__(self, views: Sequence[Tensor], samples_seen: int, part: tuple[int, int]) -> list[Tensor] | None:
        """For each resolution [num * B, width] beside views [num * B, 3, S, S], crop-major, of micro-batch i of this
        rank's n, part (i, n); on their device, without waiting for it."""
        if not self.width:
            return None
        (index, num), own = part, self.global_batch // self.world.size
        batch, row = len(views[0]) // self.nums[0], sum(self.nums) * self.width
        first = samples_seen + self.world.rank * own + index * (own // num)
        drawn = torch.from_numpy(draw(self.seed, "drop path", start=first * row, stop=(first + batch) * row))
        by_crop = drawn.view(batch, -1, self.width).transpose(0, 1).contiguous()
        if views[0].device.type == "cuda":
            by_crop = by_crop.pin_memory()
        by_crop = by_crop.to(views[0].device, non_blocking=True)
        return [of_size.flatten(0, 1) for of_size in by_crop.split(self.nums)]
