"""What fairscale and DeepSpeed are given as the optimiser they shard: its step makes our update instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


def aligned(params: Iterable[Tensor]) -> list[Tensor]:
    """In the order given, but those last whose sizes are no multiple of 16 bytes.

    Both libraries make parameters views of one flat buffer, where a bias of two elements would move all that follow off
    such multiples; convolutions on CPUs then sum in another order than with the engines that keep tensors.
    """
    return sorted(params, key=lambda p: p.numel() * p.itemsize % 16 > 0)


class DelegatingOptimizer(torch.optim.Optimizer):
    """`apply` is called where the library, having averaged the gradients, wants its optimiser's step."""

    def __init__(self, params: ParamsT):
        self.apply: Callable[[], None] = lambda: None
        super().__init__(params, {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # with one, torch's gives its float
        self.apply()
