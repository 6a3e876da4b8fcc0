"""What is done to a batch on its device: it is cut into micro-batches; the crops of each, all at once, are flipped,
coloured, blurred, solarised and normalised.

This is the second implementation of the kernels of pixels.c, equal to a level, and stands in for them on a CPU where
they were not built. What each crop needs is known to the host, so no step waits for the device: numbers and indices go
there in one small copy a chunk. Flip, hue, blur and solarisation are done to the crops that have them. Every other
operation blends a crop with black, with the mean of its grey image or with that image, which differ in coefficients
alone: each step is one formula for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seer_scale.config import Crop, ImageSize, shape_of
from seer_scale.data.batch import Batch
from seer_scale.data.transforms.photometric import (
    CONTRAST,
    GREY,
    HUE,
    MAX_OPS,
    PARAMS_PER_CROP,
    SATURATION,
    PhotometricParams,
    encode,
)
from seer_scale.data.transforms.views import MEAN, STD

PHOTOMETRIC_CHUNK = 2**24
"""Values taken at a time, at most (or one crop): 64 MiB, of which about four copies are alive at once."""


@torch.no_grad()
def apply_photometric(crops: Tensor, params: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] by `params`, float32 [N, PARAMS_PER_CROP] on the CPU: float32 in [0, 255], not rounded.

    To one level `photometric.apply_photometric` of each, which rounds twice: before the blur and after it. Raises under
    autocast, which would blur in half precision.
    """
    assert params.shape == (len(crops), PARAMS_PER_CROP) and params.device.type == "cpu", (params.shape, params.device)
    out = crops.to(torch.float32)
    num = max(1, PHOTOMETRIC_CHUNK // crops.shape[1:].numel())
    for x, its_params in zip(out.split(num), params.split(num)):
        _in_place(x, its_params)
    return out


def apply_and_round(crops: Tensor, params: Tensor) -> Tensor:
    """`apply_photometric` as uint8."""
    return apply_photometric(crops, params).add_(0.5).to(torch.uint8)


def apply_on_cpu(crop: np.ndarray, params: PhotometricParams) -> np.ndarray:
    """RGB uint8 [H, W, 3] as uint8 [3, H, W]: `photometric.apply_photometric` without kernels in C."""
    planes = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None]
    return apply_and_round(planes, torch.from_numpy(encode(params))[None])[0].numpy()


def _in_place(x: Tensor, params: Tensor) -> None:
    flip, pairs, sigma, solarize = params.split((1, 2 * MAX_OPS, 1, 1), 1)
    ops, factors = pairs[:, ::2].T, pairs[:, 1::2].T  # [MAX_OPS, n]
    flipped, blurred, solarized = (asked[:, 0].nonzero()[:, 0] for asked in (flip, sigma, solarize))
    steps = []
    for op, factor in zip(ops, factors):
        if (op >= 0).any():
            turned = (op == HUE).nonzero()[:, 0]
            steps += [_shares(op, factor), turned, _thirds(factor[turned])]
    weights = gaussians(sigma[blurred, 0])
    flipped, blurred, weights, solarized, *steps = _ship([flipped, blurred, weights, solarized, *steps], x.device)

    if len(flipped):
        x.index_copy_(0, flipped, x.index_select(0, flipped).flip(3))
    for shares, turned, thirds in zip(steps[::3], steps[1::3], steps[2::3]):
        _blend(x, *shares)
        if len(turned):
            x.index_copy_(0, turned, _turn(x.index_select(0, turned), thirds))
    if len(blurred):
        x.index_copy_(0, blurred, _blur(x.index_select(0, blurred), weights))
    if len(solarized):  # as far from 127.5, below it
        x.index_copy_(0, solarized, x.index_select(0, solarized).sub_(127.5).abs_().neg_().add_(127.5))


def _ship(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """The parts on `device`, sent as one: indices too travel as float32, which holds whole numbers to 2^24."""
    flat = torch.cat([part.reshape(-1).float() for part in parts])
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    return [there.view(part.shape).to(part.dtype) for there, part in zip(flat.split([p.numel() for p in parts]), parts)]


# -------------------------------------------------------------------------------------------- colours


def _shares(op: Tensor, factor: Tensor) -> Tensor:
    """[3, n, 1, 1, 1]: what one step takes of a crop, of the mean of its grey image, and of that image."""
    keep = torch.where((op < 0) | (op == HUE), 1, torch.where(op == GREY, 0, factor))
    of_mean, of_grey = (op == CONTRAST) * (1 - keep), ((op == SATURATION) | (op == GREY)) * (1 - keep)
    return torch.stack([keep, of_mean, of_grey])[..., None, None, None]


def _blend(x: Tensor, keep: Tensor, of_mean: Tensor, of_grey: Tensor) -> None:
    """In place."""
    red, green, blue = x.split(1, 1)
    grey = (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    torch.addcmul(of_mean * grey.mean((1, 2, 3), keepdim=True), of_grey, grey, out=grey)
    torch.addcmul(grey, keep, x, out=x).clamp_(0, 255)


def _thirds(turn: Tensor) -> Tensor:
    """[n, 3, 1, 1]: added to a hue, of a circle of six, it is what has been gone from red, from green, from blue."""
    return (6 * turn[:, None] + torch.tensor([0.0, 4.0, 2.0]))[..., None, None]


def _turn(x: Tensor, thirds: Tensor) -> Tensor:
    """The hue of [n, 3, H, W] turned, in place. From its own colour on, a channel is highest for 1 of 6, falls for 1,
    is lowest for 2, rises for 1 and is highest for 1; what is highest and lowest stays, so HSV and back is that and no
    more."""
    red, green, blue = x.unbind(1)
    low, high = x.amin(1), x.amax(1)
    spread = high - low
    hue = torch.where(high == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = torch.where(high == red, green - blue, hue)
    hue /= spread.clamp(min=1e-30)  # grey: 0 / 1e-30
    torch.add(hue[:, None], thirds, out=x).remainder_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low[:, None], spread[:, None], x, out=x)


# ----------------------------------------------------------------------------------------------- blur


def gaussians(sigma: Tensor) -> Tensor:
    """`photometric.gaussian` of each of float32 [n] as float32 [n, width], with zeros around the narrower ones."""
    sigma = sigma.double()[:, None]
    radius = (3 * sigma).ceil()
    widest = int(radius.max()) if len(sigma) else 0
    at = torch.arange(-widest, widest + 1)
    weights = torch.exp(-0.5 * (at / sigma) ** 2) * (at.abs() <= radius)
    return (weights / weights.sum(1, keepdim=True)).float()


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    """[n, 3, H, W] with a line of weights each, across and then down: depthwise, as one image of 3n channels."""
    shape, groups = x.shape, 3 * len(x)
    weights, radius = weights.repeat_interleave(3, 0)[:, None, None], weights.shape[1] // 2
    x = x.view(1, groups, *shape[2:])
    x = F.conv2d(_mirror(x, radius, down=False), weights, groups=groups)
    x = F.conv2d(_mirror(x, radius, down=True), weights.mT, groups=groups)
    return x.view(shape)


def _mirror(x: Tensor, radius: int, down: bool) -> Tensor:
    """The border a mirror that is not repeated; where a blur reaches beyond the far side, the mirrored is mirrored."""
    while radius:
        size = x.shape[2 if down else 3]
        more, mode = (min(radius, size - 1), "reflect") if size > 1 else (radius, "replicate")
        x = F.pad(x, (0, 0, more, more) if down else (more, more, 0, 0), mode=mode)
        radius -= more
    return x


@lru_cache(maxsize=16)
def mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """What `to_float` takes off, and what it then multiplies with: [3, 1, 1] each."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (255 * mean).to(device), (1 / (255 * std)).to(device)  # once a device: no copy, so no wait, in the step


def to_float(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [N, 3, H, W] on any device as `dtype`, normalised with ImageNet's mean and standard deviation."""
    mean, scale = mean_and_scale(x.device)
    return x.to(torch.float32).sub_(mean).mul_(scale).to(dtype)


def micro_batches(
    batch: Batch, crops: Sequence[Crop], num: int, device: torch.device, memory_format: torch.memory_format
) -> list[Callable[[], list[Tensor]]]:
    """What makes the views of each of `num` equal parts of a batch: for each kind of crop float32 [kind.num * b / num,
    3, *kind.shape], on `device`, photometrics applied and normalised.

    All of the uint8 goes to the device at once; floats exist a part at a time, where one is asked for.
    """

    def parts(kinds: list[Tensor]) -> list[list[Tensor]]:
        """Of each kind the rows of each part: all its images' first crop, then all their second."""
        return [
            [part.flatten(0, 1) for part in rows.unflatten(0, (kind.num, -1)).chunk(num, dim=1)]
            for rows, kind in zip(kinds, crops)
        ]

    pixels = parts([views.to(device, non_blocking=True) for views in batch.views])
    params = parts(batch.photometric_params)

    def make(part: int) -> list[Tensor]:
        views = [kind[part] for kind in pixels]
        if params:
            views = [apply_photometric(own, kind[part]) for own, kind in zip(views, params)]
        return [to_float(own).contiguous(memory_format=memory_format) for own in views]

    return [partial(make, part) for part in range(num)]


# --------------------------------------------------------------------------------------------- resizing


def resize_on_cpu(image: np.ndarray, size: ImageSize) -> np.ndarray:
    """`views.resize` without kernels in C: their sums in their order, so the same bytes."""
    (height, width), (to_height, to_width) = image.shape[:2], shape_of(size)
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    first, num, weights = _triangle(height, to_height)
    odd = num % 2  # rows are added two by two, an odd one before them
    taps = int(num.max())
    place = torch.arange(taps + taps % 2 + 2) - odd[:, None]
    weights = F.pad(weights, (1, 3)).gather(1, place + 1)[..., None, None]
    rows = (first[:, None] + place).clamp_(0, height - 1)
    down = torch.zeros(to_height, width, 3)
    for k in range(0, place.shape[1], 2):
        down += weights[:, k] * pixels[rows[:, k]] + weights[:, k + 1] * pixels[rows[:, k + 1]]
    first, num, weights = _triangle(width, to_width)
    across = torch.zeros(to_height, to_width, 3)
    for k in range(int(num.max())):
        across += weights[:, k, None] * down[:, (first + k).clamp_(0, width - 1)]
    return across.add_(0.5).to(torch.uint8).numpy()


def _triangle(n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where `size` outputs of `n` inputs look, and how much they weigh: first, num int64 [size], weights float32 [size,
    taps]."""
    scale = n / size
    reach = max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    first, end = (centre - reach + 0.5).long().clamp_(min=0), (centre + reach + 0.5).long().clamp_(max=n)
    at = first[:, None] + torch.arange(int((end - first).max()))
    away = ((at - centre[:, None] + 0.5) / reach).abs()
    weights = torch.where((away < 1) & (at < end[:, None]), 1 - away, 0.0).float()
    total = weights.double().cumsum(1)[:, -1:]
    return first, end - first, (weights / total).float()
