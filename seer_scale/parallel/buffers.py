"""A method's buffers by their kind: kept before a forward, averaged over micro-batches, restored where an update is
skipped."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seer_scale.methods.base import BufferKind, Method


class Statistics:
    """Running statistics that the same forwards move. now: a view of them. counts: of their layers' forwards."""

    def __init__(self, now: Tensor, counts: list[Tensor]):
        self.now, self.counts = now, counts
        self.before, self.sum = now.clone(), torch.zeros_like(now)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        counts = [count.clone() for count in self.counts]
        try:
            yield
        finally:
            self.now.copy_(self.before)
            if counts:
                torch._foreach_copy_(self.counts, counts)

    @contextmanager
    def micro_batch(self, index: int, num: int) -> Iterator[None]:
        """Each micro-batch starts from the statistics kept; after the last, they are the mean of what each came to."""
        if not self.now.numel():
            yield
            return
        self.now.copy_(self.before)
        yield
        self.sum = self.now / num + (self.sum if index else 0)  # no trace of the last update, which may be NaN
        if index == num - 1:
            self.now.copy_(self.sum)


class Buffers:
    """A method's float buffers as views of one tensor, so that keeping and restoring them is one copy each.

    `all`: first what is no running statistics (SwAV's queue), then those, which `statistics` is a view of: of layers
    that losses are made by, and of those that only targets are: layers whose parameters are moving averages (a
    teacher's). averages: the names of these parameters.
    """

    def __init__(self, method: Method[Any, Any], device: torch.device, averages: Collection[str] = ()):
        taught = {name.rpartition(".")[0] for name in averages}
        floats = {n: b for n, b in method.named_buffers() if b.is_floating_point()}
        moved = {n: b for n, b in method.named_buffers() if method.buffer_kind(n) == BufferKind.STATISTICS}
        of_targets = {n: b for n, b in moved.items() if n.rpartition(".")[0] in taught}
        of_losses = {n: b for n, b in moved.items() if n not in of_targets}
        rest = {n: b for n, b in floats.items() if n not in moved}
        ordered = {n: b for n, b in (rest | of_losses | of_targets).items() if n in floats}
        self.all = torch.cat([torch.empty(0, device=device), *(b.flatten() for b in ordered.values())])
        first = 0
        for (
            name,
            b,
        ) in ordered.items():  # .data: views proper share a version, and autograd would see all change with one
            module, _, own = name.rpartition(".")
            setattr(method.get_submodule(module), own, self.all.data[first : first + b.numel()].view_as(b))
            first += b.numel()
        sizes = [sum(b.numel() for n, b in part.items() if n in floats) for part in (of_losses, of_targets)]
        self.statistics = self.all.data[first - sum(sizes) :]
        counts = [[b for n, b in part.items() if n not in floats] for part in (of_losses, of_targets)]
        self.of_losses, self.of_targets = map(Statistics, self.statistics.split(sizes), counts)
        self._parts = [part for part in (self.of_losses, self.of_targets) if part.now.numel()]

    def keep(self) -> None:
        """Statistics as they are now are what `restore_where`, `unmoved` and `micro_batch` go back to."""
        for part in self._parts:
            part.before.copy_(part.now)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Statistics and counts, which forwards inside move, are afterwards as `keep` found them."""
        with self.of_losses.unmoved(), self.of_targets.unmoved():
            yield

    def restore_where(self, condition: Tensor) -> None:
        for part in self._parts:
            part.now.copy_(torch.where(condition, part.before, part.now))
