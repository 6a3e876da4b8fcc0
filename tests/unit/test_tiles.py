"""What is packed against slices of the whole map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_scale.models.layers.tiles import neighbours, on_canvas, visible_tiles, windows, with_zeros


def drawn(num: int, grid: tuple[int, int], keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(masks, places) of so many visible tiles an image."""
    noise = torch.rand(num, grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    places = noise.argsort(1)[:, :keep].sort(1).values
    return torch.ones_like(noise, dtype=torch.bool).scatter(1, places, False).view(num, *grid), places


@pytest.mark.parametrize("grid, keep, t, before, after", [
    ((3, 4), 5, 8, 3, 3), ((2, 5), 4, 4, 1, 0), ((3, 3), 9, 1, 1, 1), ((4, 2), 1, 2, 0, 2),
])  # fmt: skip
def test_windows_are_slices_of_the_map(grid, keep, t, before, after):
    """Values, and gradients of every one of them."""
    (masks, places), side = drawn(3, grid, keep), before + t + after
    x = torch.randn(3, t * grid[0], t * grid[1], 2, dtype=torch.float64, requires_grad=True)
    padded = F.pad(with_zeros(x, masks), (0, 0, before, after, before, after))
    every = padded.unfold(1, side, t).unfold(2, side, t).permute(0, 1, 2, 4, 5, 3).flatten(1, 2)
    expected = torch.stack([image[at] for image, at in zip(every, places, strict=True)])
    tiles = visible_tiles(x, masks.shape[1:], places)
    ours = windows(tiles, neighbours(masks, places), before, after)
    assert torch.equal(ours, expected)
    weights = torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, expected))
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    assert torch.equal(on_canvas(tiles, masks.shape[1:], places), with_zeros(x, masks))
