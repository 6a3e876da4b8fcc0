"""Features of images, shared out among the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import Source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World, all_gather

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised images [N, 3, S, S] -> features [N, D] and embeddings [N, dim]; all ranks call it equally often."""


def extract_features(
    encode: Encode, source: Source, indices: np.ndarray, *, size: int, batch: int, workers: int, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """This rank's share of `indices`: (features [b, D], embeddings [b, dim], labels [b], image numbers [b]) a batch.

    Every rank yields equally often, for the collectives within `encode` and the caller's own; a rank that has run
    out yields empty batches. Images that cannot be read are left out.
    """
    mine = indices[world.rank :: world.size]
    batches = eval_batches(source, mine, size, batch=batch, workers=workers)
    rounds = math.ceil(math.ceil(len(indices) / world.size) / batch)
    none = torch.empty(0, dtype=torch.int64)
    nothing = torch.zeros(1, 3, size, size, dtype=torch.uint8), none, none  # for the collectives all the same
    for _ in range(rounds):
        images, labels, numbers = next(batches, nothing)
        f, z = encode(to_float(images.to(world.device)))
        n, device = len(labels), world.device
        yield f[:n], z[:n], labels.to(device), numbers.to(device)


def gather_rows(x: Tensor, world: World) -> Tensor:
    """The rows of all ranks, in rank order, on every rank; ranks may have different numbers of rows. Two
    all-gathers."""
    if world.size == 1:
        return x
    counts = all_gather(torch.tensor(len(x), device=x.device)).tolist()
    max_rows = max(counts)
    padded = torch.cat([x, x.new_zeros(max_rows - len(x), *x.shape[1:])])
    return torch.cat([part[:n] for part, n in zip(all_gather(padded), counts)]) if max_rows else x
