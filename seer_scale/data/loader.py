"""Batches of views from worker processes: each item is one rank's whole part of one global batch.

What a batch holds depends on (source, views, seed, global batch, its first sample) only, not on the workers, and what
all ranks hold together not on the ranks. An image that cannot be read is replaced by the next one of the epoch's
order and reported.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from seer_scale.config import Data, Views
from seer_scale.data import photometric
from seer_scale.data.decode import decode
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
    indices: int64 [b], the images really used. samples_seen: global samples before this batch.
    unreadable: "name: reason" of each image that was replaced.
    """

    views: list[torch.Tensor]
    indices: torch.Tensor
    samples_seen: int
    unreadable: list[str]

    def pin_memory(self) -> Batch:
        return Batch([v.pin_memory() for v in self.views], self.indices, self.samples_seen, self.unreadable)


def loader(
    source: Source, data: Data, views: Views, *, seed: int, global_batch: int, rank: int, world_size: int,
    start: int, stop: int, pin: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's batches for the global samples start, start + global_batch, ... below `stop`.

    Workers live as long as the iterator and keep data.prefetch batches each ready; start it from a thread that lives
    as long. Raises DataError when GIVE_UP_AFTER images in a row cannot be read.
    """
    photometric.native()  # compiled before there are workers
    sampler = ElasticSampler(len(source), seed, global_batch)
    build = partial(load_batch, source, views, sampler, rank=rank, world_size=world_size)
    return _stream(build, range(start, stop, global_batch), data.workers, data.prefetch, pin)


def load_batch(
    source: Source, views: Views, sampler: ElasticSampler, samples_seen: int, *, rank: int, world_size: int
) -> Batch:
    """The batch of `rank` that begins at global sample `samples_seen`; a pure function of its arguments."""
    epochs, offsets, indices = sampler.slots(samples_seen, rank, world_size)
    b = len(indices)
    out = [torch.empty((c.num, b, 3, c.size, c.size), dtype=torch.uint8) for c in views.crops]
    arrays, unreadable = [o.numpy() for o in out], []
    for i in range(b):
        epoch = int(epochs[i])
        made, indices[i] = _readable(source, views, sampler, epoch, int(offsets[i]), unreadable)
        for array, crops in zip(arrays, made):
            array[:, i] = crops
    return Batch([o.flatten(0, 1) for o in out], torch.from_numpy(indices), samples_seen, unreadable)


def _readable(
    source: Source, views: Views, sampler: ElasticSampler, epoch: int, offset: int, unreadable: list[str]
) -> tuple[list[np.ndarray], int]:
    """Views of the first image, from `offset` on in the order of `epoch`, that decodes, and its number."""
    reasons = []
    for step in range(GIVE_UP_AFTER):
        index = int(sampler.at(epoch, np.array([(offset + step) % sampler.n]))[0])
        try:
            return load_views(source.read(index), views, sampler.seed, epoch, index), index
        except DataError as error:
            name = source.name(index)
            reasons.append(f"{name}: {str(error).removeprefix(f'{name} ')}")
            unreadable.append(reasons[-1])
    first = "; ".join(reasons[:3])
    raise DataError(f"{GIVE_UP_AFTER} images in a row cannot be read, so check data.path; the first: {first}.")


def decoded(
    source: Source, indices: Sequence[int] | np.ndarray, size: int, *, batch: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(images uint8 [b, 3, size, size], labels int64 [b], image numbers int64 [b]) for evaluation, in order.

    b is at most `batch`. Images that cannot be read are left out; the label is -1 where there is none.
    """
    build = partial(_load_centres, source, np.asarray(indices, np.int64), size, batch)
    for images, labels, numbers in _stream(build, range(0, len(indices), batch), workers, 2, False):
        if len(numbers):
            yield images, labels, numbers


def _load_centres(source: Source, indices: np.ndarray, size: int, batch: int, first: int) -> tuple[torch.Tensor, ...]:
    images, labels, numbers = [], [], []
    for index in indices[first : first + batch].tolist():
        try:
            images.append(resize_centre(decode(source.read(index)), size))
        except DataError:
            continue
        label = source.label(index)
        labels.append(-1 if label is None else label)
        numbers.append(index)
    stacked = np.stack(images) if images else np.empty((0, 3, size, size), np.uint8)
    return torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64), torch.tensor(numbers, dtype=torch.int64)


# ----------------------------------------------------------------------------------------------------- workers


class _Items(torch.utils.data.Dataset):
    """build(key) as a dataset. A DataError is handed over as a value: torch would bury its sentence in a traceback."""

    def __init__(self, build: Callable[[int], Any]):
        self._build = build

    def __getitem__(self, item: int) -> Any:
        try:
            return self._build(item)
        except DataError as error:
            return error


def _stream(build: Callable[[int], Any], keys: range, workers: int, prefetch: int, pin: bool) -> Iterator[Any]:
    workers = min(workers, len(keys))
    batches = DataLoader(
        _Items(build),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_is,
        pin_memory=pin,
        worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
        multiprocessing_context="fork" if workers else None,  # workers share the index instead of copying it
        generator=torch.Generator(),  # torch draws a seed: not from the run's own generator
    )
    for item in batches:
        if isinstance(item, DataError):
            raise item
        yield item


def _as_is(item: Any) -> Any:
    return item


def _start_worker(parent: int, _: int) -> None:
    """One thread; stop signals are the main process's to judge; no worker outlives it."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(stop, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
