"""Masks for tests of what is packed."""

from __future__ import annotations

import torch


def drawn(num: int, grid: tuple[int, int], keep: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(masks, places) of so many visible tiles an image."""
    noise = torch.rand(num, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    places = noise.argsort(1)[:, :keep].sort(1).values
    return torch.ones_like(noise, dtype=torch.bool).scatter(1, places, False).view(num, *grid), places
