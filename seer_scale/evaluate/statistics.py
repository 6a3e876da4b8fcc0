"""BatchNorm statistics of images, for a network that has seen none.

Until its first updates the running statistics of a network are mean 0 and variance 1. Its features with these are
others than with the statistics of its images, and often better for kNN (docs/performance.md): measured so, what
training has taught would be mistaken for less than it is. So an untrained network is measured with the statistics of
some images, those of the train part, as it would have them after a few updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn

from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sampling.order import permute
from seer_scale.data.sources import Source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World
from seer_scale.models.layers.norm import estimate_statistics

MAX_IMAGES = 1024
BATCH = 32


def statistics_of_images(
    module: nn.Module,
    encode: Callable[[Tensor], object],
    source: Source,
    indices: np.ndarray,
    *,
    size: int,
    workers: int,
    world: World,
) -> int:
    """Running statistics of every BatchNorm in `module` become the mean over batches of some of the images `indices`;
    returns of how many images, 0 where it has none to take. Collective.

    encode: runs normalised images [n, 3, S, S] through `module` in eval mode, as often on each rank as on the others.
    Which images make a batch depends on `indices` alone, and so, but for rounding, do the statistics.
    """
    num_batches = math.ceil(min(MAX_IMAGES, len(indices)) / BATCH)
    batch = min(MAX_IMAGES, len(indices)) // max(1, num_batches)
    drawn = indices[permute(np.arange(num_batches * batch), len(indices), seed=0, epoch=0)]
    mine = drawn.reshape(num_batches, batch)[world.rank :: world.size].ravel()
    none = torch.empty(0, dtype=torch.int64)
    nothing = torch.zeros(2, 3, size, size, dtype=torch.uint8), none, none

    def forwards() -> Iterator[int]:
        with closing(eval_batches(source, mine, size, batch=batch, workers=workers, within=batch)) as batches:
            for _ in range(math.ceil(num_batches / world.size)):
                images, _, numbers = next(batches, nothing)
                if len(numbers) < 2:  # no image varies by itself where a map is one pixel
                    images, _, numbers = nothing
                encode(to_float(images.to(world.device)))
                yield len(numbers)

    return estimate_statistics(module, forwards(), world.sum_)
