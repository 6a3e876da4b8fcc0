"""What is packed against slices of the whole map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_scale.models.layers.tiles import (
    convolved_canvas,
    convolved_windows,
    neighbours,
    on_canvas,
    visible_tiles,
    with_zeros,
)
from tests.tiles import drawn


@pytest.mark.parametrize("grid, keep, t, kernel, stride, groups", [
    ((3, 4), 5, 4, 3, 1, 2), ((3, 4), 5, 4, 3, 2, 1), ((2, 5), 1, 1, 3, 1, 4), ((3, 4), 12, 2, 3, 2, 2),
    ((3, 4), 7, 2, 3, 1, 2), ((4, 3), 6, 8, 7, 1, 4), ((3, 4), 7, 3, 7, 1, 1), ((2, 5), 4, 1, 7, 1, 4),
])  # fmt: skip
def test_convolved_tiles_are_those_of_the_convolved_map(grid, keep, t, kernel, stride, groups):
    """Values and gradients, of windows and of a canvas; under autocast, of what autocast makes of the map."""
    (masks, places), reach = drawn(2, grid, keep), kernel // 2
    x = torch.randn(2, t * grid[0], t * grid[1], 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4 // groups, kernel, kernel, dtype=torch.float64, requires_grad=True)

    def of_windows(x, weight):
        tiles, after = visible_tiles(x, masks.shape[1:], places), kernel - stride - reach
        return convolved_windows(tiles, neighbours(masks, places), reach, after, weight, stride, groups)

    def of_canvas(x, weight):
        tiles = visible_tiles(x, masks.shape[1:], places)
        assert torch.equal(on_canvas(tiles, masks.shape[1:], places), with_zeros(x, masks))
        return convolved_canvas(tiles, masks.shape[1:], places, weight, groups)

    def whole(x, weight):
        y = F.conv2d(with_zeros(x, masks).permute(0, 3, 1, 2), weight, None, stride, reach, groups=groups)
        return visible_tiles(y.permute(0, 2, 3, 1), masks.shape[1:], places)

    for ours in [of_windows] * (t >= reach) + [of_canvas] * (stride == 1):
        results = [f(x, weight) for f in (ours, whole)]
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-12)
        upstream = torch.randn_like(results[0])
        gradients = [torch.autograd.grad(y, (x, weight), upstream) for y in results]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-11)
        given = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            results = [f(*given) for f in (ours, whole)]
        assert results[0].dtype == torch.bfloat16
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(y, given, upstream.bfloat16()) for y in results]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
