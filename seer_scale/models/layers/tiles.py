"""Maps of which some tiles are seen: squares of as many pixels as the last map has a place for.

Dense, a map is [N, H, W, C] with 0 where tiles are masked; packed, [N, K, t, t, C], of the K visible tiles of each
image, with t places to a side. What looks beyond a tile, a convolution of a kernel wider than its stride, takes either
a canvas of zeros on which the tiles lie, or windows: each tile with the edges of its eight neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

FEW = 2
"""Places to a side of a tile, up to which CPUs are faster by matrix products than by a convolution of windows: 1.5 to 3
times, measured at groups of 8 to 232 channels."""


class Travelling(NamedTuple):
    """What travels between units of a masked network. maps: dense or packed. masks: of each resolution bool [N_r, H_r /
    stride, W_r / stride], the tiles that are not seen; or none. places: of packed maps, of each resolution int64 [N_r,
    K_r], the numbers of the visible tiles, row by row, rising; near: `neighbours` of them. scales: [N, blocks], what
    each image's branches are multiplied by, N being the sum of N_r; or none."""

    maps: list[Tensor]
    masks: list[Tensor]
    places: list[Tensor]
    near: list[Tensor]
    scales: list[Tensor]

    @classmethod
    def of(cls, xs: Sequence[Tensor]) -> Travelling:
        floats = [x for x in xs if x.is_floating_point()]
        numbers = [x for x in xs if x.dtype == torch.int64]
        return cls(
            [x for x in floats if x.ndim > 2],
            [x for x in xs if x.dtype == torch.bool],
            [x for x in numbers if x.ndim == 2],
            [x for x in numbers if x.ndim == 3],
            [x for x in floats if x.ndim == 2],
        )

    def with_maps(self, maps: list[Tensor]) -> list[Tensor]:
        return [*maps, *self.masks, *self.places, *self.near, *self.scales]

    def mask(self, i: int) -> Tensor | None:
        """Of the resolution i, where its map is dense and masked."""
        return self.masks[i] if self.masks and not self.places else None


def packed(xs: Sequence[Tensor], masks: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
    """What the first unit takes: images [N_r, 3, H_r, W_r] and what decides which of their tiles are computed, as
    `Travelling` has them; without places all are, as a dense masked network."""
    near = [neighbours(m, p) for m, p in zip(masks, places)] if places else []
    return [*xs, *masks, *places, *near]


def visible_places(x: Tensor, mask: Tensor) -> Tensor:
    """bool [N, H, W] of a dense map [N, H, W, C]."""
    t = x.shape[1] // mask.shape[1]
    return ~mask.repeat_interleave(t, 1).repeat_interleave(t, 2)


def with_zeros(x: Tensor, mask: Tensor | None) -> Tensor:
    """A dense map [N, H, W, C] with 0 where tiles are masked."""
    if mask is None:
        return x
    return x.masked_fill(~visible_places(x, mask)[..., None], 0)


def visible_tiles(x: Tensor, grid: torch.Size, places: Tensor) -> Tensor:
    """A map [N, H, W, C] of grid[0] x grid[1] tiles -> [N, K, t, t, C], those at `places` [N, K]."""
    num, (height, width) = len(x), grid
    t = x.shape[1] // height
    tiles = x.unflatten(2, (width, t)).unflatten(1, (height, t)).transpose(2, 3).reshape(num * height * width, t, t, -1)
    return tiles.index_select(0, _flat(places, height * width)).unflatten(0, places.shape)


def on_canvas(tiles: Tensor, grid: torch.Size, places: Tensor) -> Tensor:
    """[N, K, t, t, C] -> the map [N, H, W, C] with 0 where there is no tile."""
    (num, _, t, _, channels), (height, width) = tiles.shape, grid
    canvas = tiles.new_zeros(num * height * width, t, t, channels)
    canvas = canvas.index_copy(0, _flat(places, height * width), tiles.flatten(0, 1))
    return canvas.view(num, height, width, t, t, channels).transpose(2, 3).reshape(num, height * t, width * t, channels)


def _flat(places: Tensor, num: int) -> Tensor:
    """[N, K] of `num` tiles an image -> [N * K] among all of them."""
    return (places + num * torch.arange(len(places), device=places.device)[:, None]).flatten()


def neighbours(mask: Tensor, places: Tensor) -> Tensor:
    """Where among all N * K visible tiles lie the nine about each, row by row, itself in the middle; N * K for one that
    is masked or beyond the image. int64 [N, K, 9]; mask, places: as `Travelling` has them."""
    (num, keep), (height, width) = places.shape, mask.shape[1:]
    wide = width + 2
    slots = places.new_full((num, (height + 2) * wide), num * keep)
    at = (places // width + 1) * wide + places % width + 1
    slots = slots.scatter(1, at, torch.arange(num * keep, device=places.device).view(num, keep))
    shifts = torch.arange(3, device=places.device) - 1
    about = at[..., None] + (shifts[:, None] * wide + shifts).flatten()
    return slots.gather(1, about.flatten(1)).view(num, keep, 9)


def convolved_windows(
    tiles: Tensor, near: Tensor, before: int, after: int, weight: Tensor, stride: int, groups: int
) -> Tensor:
    """The convolution by weight [C', C / groups, k, k] of tiles within `before` and `after` places of their neighbours,
    at most t, 0 where there is none: as the map has it, [N, K, t, t, C] -> [N, K, t / stride, t / stride, C']. near:
    `neighbours`. For backward, tiles and the parameter are kept, neither windows nor a cast copy."""
    if torch.is_autocast_enabled(tiles.device.type):
        tiles = tiles.to(torch.get_autocast_dtype(tiles.device.type))
    flat, of_flat = tiles.flatten(0, 1), near.flatten(0, 1)
    if weight.shape[2] == 3 and stride == 1 and tiles.shape[2] <= FEW and tiles.device.type == "cpu":
        out = _ConvolvedTaps.apply(flat, of_flat, weight, groups)
    else:
        out = _ConvolvedWindows.apply(flat, of_flat, weight, (before, after, stride, groups))
    return out.unflatten(0, tiles.shape[:2])


def convolved_canvas(tiles: Tensor, grid: torch.Size, places: Tensor, weight: Tensor, groups: int) -> Tensor:
    """As `convolved_windows`, by way of `on_canvas`, of a convolution that keeps the sides of a map: [N, K, t, t, C] ->
    [N, K, t, t, C']. For backward, tiles and the parameter are kept, neither a canvas nor a cast copy."""
    if torch.is_autocast_enabled(tiles.device.type):
        tiles = tiles.to(torch.get_autocast_dtype(tiles.device.type))
    return _ConvolvedCanvas.apply(tiles, places, weight, (grid, groups))


class _Context(FunctionCtx):
    """What autograd makes of a forward for its backward, to type checkers."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    settings: tuple[int, int, int, int]
    groups: int


class _ConvolvedWindows(torch.autograd.Function):
    """[M, t, t, C] -> [M, t / stride, t / stride, C']; settings: before, after, stride, groups."""

    @staticmethod
    def forward(
        ctx: _Context, tiles: Tensor, near: Tensor, weight: Tensor, settings: tuple[int, int, int, int]
    ) -> Tensor:
        ctx.save_for_backward(tiles, near, weight)
        ctx.settings = before, after, stride, groups = settings
        of_windows = _gathered(tiles, near, before, tiles.shape[1], after).permute(0, 3, 1, 2)
        return F.conv2d(of_windows, weight.to(tiles.dtype), stride=stride, groups=groups).permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        tiles, near, weight = ctx.saved_tensors
        before, after, stride, groups = ctx.settings
        sides = before, tiles.shape[1], after
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2), _gathered(tiles, near, *sides).permute(0, 3, 1, 2), weight.to(tiles.dtype), None,
            [stride] * 2, [0, 0], [1, 1], False, [0, 0], groups,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[2], False],
        )  # fmt: skip
        dtiles = None if dx is None else _returned(dx.permute(0, 2, 3, 1), near, *sides)
        return dtiles, None, None if dw is None else dw.to(weight.dtype), None


class _OfCanvas(FunctionCtx):
    """As `_Context`."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    settings: tuple[torch.Size, int]


class _ConvolvedCanvas(torch.autograd.Function):
    """[N, K, t, t, C] -> [N, K, t, t, C']; settings: grid, groups."""

    @staticmethod
    def forward(
        ctx: _OfCanvas, tiles: Tensor, places: Tensor, weight: Tensor, settings: tuple[torch.Size, int]
    ) -> Tensor:
        ctx.save_for_backward(tiles, places, weight)
        ctx.settings = grid, groups = settings
        canvas, pad = on_canvas(tiles, grid, places).permute(0, 3, 1, 2), weight.shape[2] // 2
        y = F.conv2d(canvas, weight.to(tiles.dtype), padding=pad, groups=groups)
        return visible_tiles(y.permute(0, 2, 3, 1), grid, places)

    @staticmethod
    def backward(ctx: _OfCanvas, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (tiles, places, weight), (grid, groups) = ctx.saved_tensors, ctx.settings
        of_output, canvas = (on_canvas(x, grid, places).permute(0, 3, 1, 2) for x in (grad, tiles))
        dx, dw, _ = torch.ops.aten.convolution_backward(
            of_output, canvas, weight.to(tiles.dtype), None, [1, 1], [weight.shape[2] // 2] * 2, [1, 1], False, [0, 0],
            groups, [ctx.needs_input_grad[0], ctx.needs_input_grad[2], False],
        )  # fmt: skip
        dtiles = None if dx is None else visible_tiles(dx.permute(0, 2, 3, 1), grid, places)
        return dtiles, None, None if dw is None else dw.to(weight.dtype), None


class _ConvolvedTaps(torch.autograd.Function):
    """As `_ConvolvedWindows`, of 3 x 3 places and a stride of 1, by a matrix product for each group. What a place gives
    to those about it is what it takes of their gradients, opposite ones, so backward gathers taps of these alone."""

    @staticmethod
    def forward(ctx: _Context, tiles: Tensor, near: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(tiles, near, weight)
        ctx.groups = groups
        of_group = weight.to(tiles.dtype).unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        return _taps(tiles, near, groups, [-1, 0, 1]).bmm(of_group).transpose(0, 1).reshape(*tiles.shape[:3], -1)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        tiles, near, weight = ctx.saved_tensors
        taps, dtiles, dweight = _taps(grad, near, ctx.groups, [1, 0, -1]), None, None
        if ctx.needs_input_grad[0]:
            of_group = weight.to(grad.dtype).unflatten(0, (ctx.groups, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            dtiles = taps.bmm(of_group).transpose(0, 1).reshape(tiles.shape)
        if ctx.needs_input_grad[2]:
            of_group = tiles.reshape(-1, ctx.groups, weight.shape[1]).permute(1, 2, 0)  # [groups, C / groups, places]
            dweight = of_group.bmm(taps).unflatten(2, (3, 3, -1)).permute(0, 4, 1, 2, 3).flatten(0, 1).to(weight.dtype)
        return dtiles, None, dweight, None


def _taps(tiles: Tensor, near: Tensor, groups: int, steps: list[int]) -> Tensor:
    """[M, t, t, C] -> [groups, M * t * t, 9 C / groups], the places about each that are so many steps down and across,
    0 where there is none."""
    num, t, _, channels = tiles.shape
    at = torch.tensor([[place + step for step in steps] for place in range(t)])
    beside, inside = at.div(t, rounding_mode="floor") + 1, at % t
    of_tile = near[:, 3 * beside[:, None, :, None] + beside[None, :, None, :]]  # [M, t, t, 3, 3]
    rows = (of_tile * t + inside[:, None, :, None]) * t + inside[None, :, None, :]
    rows = rows.clamp_(max=num * t * t).view(-1) * groups + torch.arange(groups, device=near.device)[:, None]
    of_groups = torch.cat([tiles.reshape(-1), tiles.new_zeros(channels)]).view(-1, channels // groups)
    return of_groups.index_select(0, rows.view(-1)).view(groups, num * t * t, -1)


def _gathered(tiles: Tensor, near: Tensor, before: int, t: int, after: int) -> Tensor:
    """[M, t, t, C] -> windows [M, before + t + after, before + t + after, C]."""
    out = tiles.new_empty(len(tiles), before + t + after, before + t + after, tiles.shape[3])
    for of_window, of_tile, slots, _ in _pieces(near, before, t, after):
        out[of_window] = _at(tiles[of_tile], slots)
    return out


def _returned(grad: Tensor, near: Tensor, before: int, t: int, after: int) -> Tensor:
    """The gradient of windows -> that of tiles. Gathers, too, from the opposite neighbours: no two writes meet."""
    out = grad[:, before : before + t, before : before + t].contiguous()
    for of_window, of_tile, _, opposite in _pieces(near, before, t, after):
        if opposite is not None:
            out[of_tile] += _at(grad[of_window], opposite)
    return out


Piece = tuple[slice, slice, slice]


def _pieces(
    near: Tensor, before: int, t: int, after: int
) -> Iterator[tuple[Piece, Piece, Tensor | None, Tensor | None]]:
    """Of each of the nine that gives something: the piece of windows that it fills, the piece of tiles that it is, in
    which tile that lies, and of which window a tile fills it; None: its own."""
    along = [(slice(0, before), slice(t - before, t)), (slice(before, before + t), slice(0, t)),
             (slice(before + t, before + t + after), slice(0, after))]  # fmt: skip
    for n, ((down, rows), (across, columns)) in enumerate(itertools.product(along, repeat=2)):
        if down.start < down.stop and across.start < across.stop:
            slots = (None, None) if n == 4 else (near[:, n], near[:, 8 - n])
            yield (slice(None), down, across), (slice(None), rows, columns), *slots


def _at(x: Tensor, slots: Tensor | None) -> Tensor:
    """x [M, ...] at `slots` [M], 0 at M."""
    return x if slots is None else torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, slots)
