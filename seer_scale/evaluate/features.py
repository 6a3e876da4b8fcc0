"""Features of images, shared out among the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seer_scale.config import ImageSize, shape_of
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sampling.order import permute
from seer_scale.data.sources import Source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World, all_gather

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised images [N, 3, S, S] -> features [N, D] and embeddings [N, dim]; all ranks call it equally often."""
SECOND_VIEW_SIDE = 0.7
"""Side of the second view of an image, as a share of the first's."""


class FeatureTable(NamedTuple):
    """What a network makes of N images, in the order of their numbers: features [N, D], embeddings [N, dim], labels [N]
    (-1: none), image numbers [N]; and, of P of them in no order, the embeddings of two views, [P, 2, dim]."""

    features: Tensor
    embeddings: Tensor
    labels: Tensor
    numbers: Tensor
    pairs: Tensor


def extract_features(
    encode: Encode, source: Source, indices: np.ndarray, *, size: int, batch: int, workers: int, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """This rank's share of `indices`: (features [b, D], embeddings [b, dim], labels [b], image numbers [b]) a batch.

    Every rank yields equally often, for the collectives within `encode` and the caller's own; a rank that has run
    out yields empty batches. Images that cannot be read are left out.
    """
    stream = shared_batches(source, indices, size=size, batch=batch, workers=workers, world=world)
    for images, labels, numbers in stream:
        (f, z), n = encode(images), len(labels)
        yield f[:n], z[:n], labels, numbers


def gather_features(
    encode: Encode, source: Source, indices: np.ndarray, *, num_pairs: int = 0, size: int, batch: int, workers: int,
    world: World,
) -> FeatureTable:  # fmt: skip
    """The features of `indices` on every rank, the same on each; of the first `num_pairs` of them a second view is
    encoded, too. Images that cannot be read are left out. Collective."""
    rounds = _num_rounds(num_pairs, batch, world)
    twice = torch.from_numpy(np.asarray(indices[:num_pairs], np.int64)).to(world.device)
    rows, pairs = [], []
    stream = shared_batches(source, indices, size=size, batch=batch, workers=workers, world=world)
    for number, (images, labels, numbers) in enumerate(stream):
        (f, z), n = encode(images), len(labels)
        rows.append((f[:n], z[:n], labels, numbers))
        if number < rounds:  # these hold the first of the indices, whatever the number of ranks
            _, other = encode(second_view(images))
            pairs.append(torch.stack([z[:n], other[:n]], dim=1)[torch.isin(numbers, twice)])
    f, z, labels, numbers = (gather_rows(torch.cat(column), world) for column in zip(*rows, strict=True))
    both = gather_rows(torch.cat(pairs), world) if pairs else z.new_zeros(0, 2, z.shape[1])
    order = numbers.argsort()
    return FeatureTable(f[order], z[order], labels[order], numbers[order], both)


def second_view(images: Tensor) -> Tensor:
    """Another view of the same images [N, 3, S, S], always the same one: their lower right part, mirrored, resized."""
    first = images.shape[3] - round(SECOND_VIEW_SIDE * images.shape[3])
    part = images[:, :, first:, first:].flip(3)
    return torch.nn.functional.interpolate(part, size=images.shape[2:], mode="bilinear", align_corners=False)


def draw_indices(source: Source, first: int, max_num: int) -> np.ndarray:
    """Image numbers at up to `max_num` (0: all) places of a fixed shuffle, from `first` on; it cuts classes evenly."""
    n = len(source)
    return np.sort(permute(np.arange(first, min(n, first + max_num) if max_num else n), n, seed=0, epoch=0))


def shared_batches(
    source: Source, indices: np.ndarray, *, size: ImageSize, batch: int, workers: int, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of `indices`, on its device: (images, normalised, labels [b], image numbers [b]) a batch; the
    image of an empty batch is there for the collectives of the network."""
    mine = indices[world.rank :: world.size]
    batches = eval_batches(source, mine, size, batch=batch, workers=workers)
    none = torch.empty(0, dtype=torch.int64)
    nothing = torch.zeros(1, 3, *shape_of(size), dtype=torch.uint8), none, none
    for _ in range(_num_rounds(len(indices), batch, world)):
        images, labels, numbers = (x.to(world.device) for x in next(batches, nothing))
        yield to_float(images), labels, numbers


def _num_rounds(num: int, batch: int, world: World) -> int:
    return math.ceil(math.ceil(num / world.size) / batch)


def gather_rows(x: Tensor, world: World) -> Tensor:
    """The rows of all ranks, in rank order, on every rank; ranks may have different numbers of rows. Two
    all-gathers."""
    if world.size == 1:
        return x
    counts = all_gather(torch.tensor(len(x), device=x.device)).tolist()
    max_rows = max(counts)
    padded = torch.cat([x, x.new_zeros(max_rows - len(x), *x.shape[1:])])
    return torch.cat([part[:n] for part, n in zip(all_gather(padded), counts)]) if max_rows else x
