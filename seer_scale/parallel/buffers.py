"""A method's buffers by their kind: kept before a forward, averaged over micro-batches, restored where an update is
skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seer_scale.methods.base import BufferKind, Method


class Buffers:
    """A method's float buffers as views of one tensor, so that keeping and restoring them is one copy each.

    `all`: first what is no running statistics (SwAV's queue), then those, which `statistics` is a view of.
    """

    def __init__(self, method: Method[Any, Any], device: torch.device):
        floats = {n: b for n, b in method.named_buffers() if b.is_floating_point()}
        statistics = {n: b for n, b in floats.items() if method.buffer_kind(n) == BufferKind.STATISTICS}
        ordered = {n: b for n, b in floats.items() if n not in statistics} | statistics
        self.all = torch.cat([torch.empty(0, device=device), *(b.flatten() for b in ordered.values())])
        first = 0
        for (
            name,
            b,
        ) in ordered.items():  # .data: views proper share a version, and autograd would see all change with one
            module, _, own = name.rpartition(".")
            setattr(method.get_submodule(module), own, self.all.data[first : first + b.numel()].view_as(b))
            first += b.numel()
        self.statistics = self.all.data[first - sum(b.numel() for b in statistics.values()) :]
        self._before = self.statistics.clone()
        self._sum = torch.zeros_like(self.statistics)
        self._counts = [
            b for n, b in method.named_buffers() if n not in floats and method.buffer_kind(n) == BufferKind.STATISTICS
        ]

    def keep(self) -> None:
        """Statistics as they are now are what `restore_where`, `unmoved` and `micro_batch` go back to."""
        self._before.copy_(self.statistics)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Statistics and counts, which forwards inside move, are afterwards as `keep` found them."""
        counts = [count.clone() for count in self._counts]
        try:
            yield
        finally:
            self.statistics.copy_(self._before)
            if counts:
                torch._foreach_copy_(self._counts, counts)

    def restore_where(self, condition: Tensor) -> None:
        self.statistics.copy_(torch.where(condition, self._before, self.statistics))

    @contextmanager
    def micro_batch(self, index: int, num: int) -> Iterator[None]:
        """Each micro-batch starts from the statistics kept; after the last, they are the mean of what each came to."""
        self.statistics.copy_(self._before)
        yield
        self._sum = self.statistics / num + (self._sum if index else 0)  # no trace of the last update, which may be NaN
        if index == num - 1:
            self.statistics.copy_(self._sum)
