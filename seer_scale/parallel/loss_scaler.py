"""Dynamic loss scaling whose whole state lives on the device (torch.amp.GradScaler reads it back every step)."""

from __future__ import annotations

import torch
from torch import Tensor

INIT_SCALE, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""SEER's 10B config: start at 2^16, double after 2,000 good updates, halve after a bad one."""


class LossScaler:
    """`scale` multiplies the loss; fp32 and bf16 keep it at 1. Counts updates skipped in all, in a row, and in the
    longest row of this start."""

    def __init__(self, device: torch.device, *, dynamic: bool):
        self.dynamic = dynamic
        self.scale = torch.ones((), device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self.restart()

    def restart(self) -> None:
        """The scale a run begins with; also where a resumed one changes its precision."""
        self.scale.fill_(INIT_SCALE if self.dynamic else 1.0)
        self.good.zero_()
        self.longest_streak.zero_()

    def state(self) -> dict[str, Tensor]:
        return {f"scaler/{k}": v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "longest_streak"}

    def unscale_(self, grads: list[Tensor]) -> Tensor:
        """Divide the gradients by the scale; returns found_inf, a 0-dim 1 where one is not finite."""
        where = grads[0].device if grads else self.scale.device  # the host's, where the optimiser state is offloaded
        found_inf = torch.zeros((), device=where)
        if grads:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, self.scale.reciprocal().to(where))
        return found_inf.to(self.scale.device)

    def update(self, found_inf: Tensor) -> None:
        """found_inf as agreed by all ranks."""
        self.skipped += found_inf
        self.skipped_in_a_row.add_(found_inf).mul_(found_inf)
        torch.maximum(self.longest_streak, self.skipped_in_a_row, out=self.longest_streak)
        if self.dynamic:
            torch._amp_update_scale_(self.scale, self.good, found_inf, GROWTH, BACKOFF, INTERVAL)
