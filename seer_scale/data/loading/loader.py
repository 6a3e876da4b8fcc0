"""Batches of views from worker processes: each item is one rank's whole part of one global batch.

What a batch holds depends on (source, views, sampler, its first sample) only, not on the workers, and what all ranks
hold together not on the ranks. An image that cannot be read is replaced by the next one of the epoch's order and
reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import torch

from seer_scale.config import Data, ImageSize, Views
from seer_scale.cores import available_cores
from seer_scale.data.batch import Batch
from seer_scale.data.loading.pool import iterate_batches, warn
from seer_scale.data.loading.tasks import EvalBatches, TrainBatches
from seer_scale.data.sampling.sampler import ElasticSampler
from seer_scale.data.sources import Source


def train_batches(
    source: Source, data: Data, views: Views, sampler: ElasticSampler, *, rank: int, world_size: int, start: int,
    stop: int, pin: bool = False, on_device: bool = False, log: Callable[[str], None] = warn,
) -> Generator[Batch, None, None]:  # fmt: skip
    """This rank's batches for the global samples start, start + sampler.global_batch, ... below `stop`.

    on_device: leave colour, flip and blur to the device. Workers live as long as the iterator, keep data.prefetch
    batches ready, and are replaced when they die or hang, which `log` gets a
    sentence about. Raises DataError when tasks.MAX_UNREADABLE_IN_A_ROW images in a row cannot be read.
    """
    if start < stop:
        sampler.slots(start, rank, world_size)  # counted here what an epoch in progress still shows
    task = TrainBatches(source, views, sampler, rank, world_size, on_device)
    keys = range(start, stop, sampler.global_batch)
    workers = data.num_workers(available_cores())
    made = iterate_batches(task, keys, workers=workers, prefetch=data.prefetch, timeout_s=data.timeout_s, log=log)
    with closing(made):
        for samples_seen, (arrays, results) in zip(keys, made):
            flat, num = [_own(a, pin).flatten(0, 1) for a in arrays], len(views.crops)
            indices = torch.tensor([index for index, _ in results], dtype=torch.int64)
            yield Batch(flat[:num], flat[num:], indices, samples_seen, [line for _, lines in results for line in lines])


def _own(array: np.ndarray, pin: bool) -> torch.Tensor:
    shared = torch.from_numpy(array)
    return torch.empty(shared.shape, dtype=shared.dtype, pin_memory=pin).copy_(shared)


def eval_batches(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    size: ImageSize,
    *,
    batch: int,
    workers: int,
    within: int = sys.maxsize,
) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor], None, None]:
    """(images uint8 [b, 3, *shape], labels int64 [b], image numbers int64 [b]) for evaluation, in order.

    b is at most `batch`. within: no batch reaches over a multiple of so many indices. Images that cannot be read are
    left out; the label is -1 where there is none.
    """
    task = EvalBatches(source, np.asarray(indices, np.int64), size, batch, within)
    for (images, labels), results in iterate_batches(task, task.keys(), workers=workers):
        rows = [row for row, index in enumerate(results) if index is not None]
        if rows:
            numbers = torch.tensor([results[row] for row in rows], dtype=torch.int64)
            yield torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]), numbers
