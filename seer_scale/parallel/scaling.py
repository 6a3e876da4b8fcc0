"""Dynamic loss scaling whose whole state lives on the device (torch.amp.GradScaler reads it back every step)."""

from __future__ import annotations

import torch
from torch import Tensor

INIT_SCALE, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""SEER's 10B config: start at 2^16, double after 2,000 good updates, halve after a bad one."""


class LossScaler:
    """`scale` multiplies the loss; fp32 and bf16 keep it at 1. Counts updates skipped in a row and in all."""

    def __init__(self, device: torch.device, *, dynamic: bool):
        self.dynamic = dynamic
        self.scale = torch.ones((), device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.restart()

    def restart(self) -> None:
        """The scale a run begins with; also where a resumed one changes its precision."""
        self.scale.fill_(INIT_SCALE if self.dynamic else 1.0)
        self.good.zero_()

    def state(self) -> dict[str, Tensor]:
        return {f"scaler/{k}": v for k, v in vars(self).items() if isinstance(v, Tensor)}

    def unscale_(self, grads: list[Tensor]) -> Tensor:
        """Divide the gradients by the scale; returns found_inf, a 0-dim 1 where one is not finite."""
        found_inf = torch.zeros((), device=self.scale.device)
        if grads:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, self.scale.reciprocal())
        return found_inf

    def update(self, found_inf: Tensor) -> None:
        """found_inf as agreed by all ranks."""
        self.skipped += found_inf
        self.skipped_in_a_row.add_(found_inf).mul_(found_inf)
        if self.dynamic:
            torch._amp_update_scale_(self.scale, self.good, found_inf, GROWTH, BACKOFF, INTERVAL)
