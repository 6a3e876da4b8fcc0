"""What is drawn for an image of a batch: a function of (seed, its number in the run's order, its crop) alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.rng import draw


def first_of_part(config: Config, world: World, part: tuple[int, int]) -> int:
    """The place in the global batch of the first image of micro-batch i of this rank's n, part (i, n)."""
    (index, num), own = part, config.train.global_batch // world.size
    return world.rank * own + index * (own // num)


def sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """From host memory to `device`, without waiting for it."""
    if device.type == "cuda":
        tensors = [t.pin_memory() for t in tensors]
    return [t.to(device, non_blocking=True) for t in tensors]


class ViewDraws:
    """Uniform numbers for each view: the same on any number of ranks and in any micro-batches, before or after a
    restart. width: how many a view takes; 0: there are none."""

    def __init__(self, config: Config, world: World, width: int):
        self.config, self.world, self.width = config, world, width
        self.nums = [crop.num for crop in config.views.crops]

    def __call__(self, views: Sequence[Tensor], samples_seen: int, part: tuple[int, int]) -> list[Tensor] | None:
        """For each resolution [num * B, width] beside views [num * B, 3, H, W], crop-major, of micro-batch i of this
        rank's n, part (i, n); on their device."""
        if not self.width:
            return None
        batch, row = len(views[0]) // self.nums[0], sum(self.nums) * self.width
        first = samples_seen + first_of_part(self.config, self.world, part)
        seed = self.config.run.seed
        drawn = torch.from_numpy(draw(seed, "drop path", start=first * row, stop=(first + batch) * row))
        by_crop = sent([drawn.view(batch, -1, self.width).transpose(0, 1).contiguous()], views[0].device)[0]
        return [of_size.flatten(0, 1) for of_size in by_crop.split(self.nums)]
