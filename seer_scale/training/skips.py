"""Tells of updates that were skipped where none should be: fp32 and bf16 have no loss scale that overflows until it
settles."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seer_scale.distributed import World

MAX_LOGGED = 10
"""Skipped updates that a start logs one by one; metric lines count all of them."""


class SkipMonitor:
    """Says of the first skipped update of a row what was not finite first: this rank's loss, else the gradient that
    backward reached first.

    The device is never waited for: what it finds is copied to the host, and read once it is there, on a GPU an update
    or a few later. names: of the parameters, in the order of `grad_norms`.
    """

    def __init__(self, names: Sequence[str], precision: str, world: World, log: Callable[[str], None]):
        self.names, self.precision, self.world, self._log = list(names), precision, world, log
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._num_logged, self._in_a_row = 0, False

    def watch(self, step: int, loss: Tensor, skipped: Tensor, grad_norms: Tensor) -> None:
        """One update. loss, skipped: scalars; grad_norms [P], of whole gradients; all on the device."""
        if self.precision == "fp16":
            return
        self._pending.append((step, *_to_host(torch.cat([loss.view(1).float(), skipped.view(1), grad_norms]))))
        self.read()

    def read(self) -> None:
        """Log what the device has reported by now."""
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            step, values, _ = self._pending.popleft()
            loss, skipped, *grad_norms = values.tolist()
            is_mine = self.world.is_main or not math.isfinite(loss)  # gradients are the same on all ranks
            if skipped and is_mine and not self._in_a_row and self._num_logged < MAX_LOGGED:
                self._num_logged += 1
                self._log(self._sentence(step, loss, grad_norms))
            self._in_a_row = bool(skipped)

    def _sentence(self, step: int, loss: float, grad_norms: list[float]) -> str:
        bad = [name for name, norm in zip(self.names, grad_norms) if not math.isfinite(norm)]
        first = f"the gradient of {bad[-1] if bad else 'some tensor'}, one of {len(bad)} of {len(self.names)}"
        if not math.isfinite(loss):
            first = "the loss" if self.world.size == 1 else f"the loss of rank {self.world.rank}"
        last = " Further ones are only counted." * (self._num_logged == MAX_LOGGED)
        return (
            f"Update {step:,} was skipped, as not all of it was finite: first {first}. {self.precision} has no loss "
            "scale that has to settle: if it comes again, lower optim.lr, or look for what is wrong with the images "
            f"or the device.{last}"
        )


def _to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what tells when it is there (None: now)."""
    if x.device.type != "cuda":
        return x, None
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return copy, there
