"""What is packed against slices of the whole map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_scale.models.layers.tiles import (
    convolved_windows,
    neighbours,
    on_canvas,
    visible_tiles,
    windows,
    with_zeros,
)
from tests.tiles import drawn


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


@pytest.mark.parametrize("keep, t, stride, groups", [(5, 4, 1, 2), (5, 4, 2, 1), (1, 1, 1, 4), (12, 2, 2, 2)])
def test_convolved_windows_are_slices_of_the_convolved_map(keep, t, stride, groups):
    """Values and gradients; under autocast, of what autocast makes of the map."""
    grid = (3, 4)
    (masks, places), after = drawn(2, grid, keep), 2 - stride
    x = torch.randn(2, t * grid[0], t * grid[1], 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4 // groups, 3, 3, dtype=torch.float64, requires_grad=True)

    def ours(x, weight):
        tiles = visible_tiles(x, masks.shape[1:], places)
        return convolved_windows(tiles, neighbours(masks, places), 1, after, weight, stride, groups)

    def whole(x, weight):
        y = F.conv2d(with_zeros(x, masks).permute(0, 3, 1, 2), weight, None, stride, 1, groups=groups)
        return visible_tiles(y.permute(0, 2, 3, 1), masks.shape[1:], places)

    results = [f(x, weight) for f in (ours, whole)]
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(y, (x, weight), upstream) for y in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    given = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        results = [f(*given) for f in (ours, whole)]
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y, given, upstream.bfloat16()) for y in results]
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02 * upstream.abs().max().item() * 4)
