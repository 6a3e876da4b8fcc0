"""What is done to a batch on its device: it is normalised, before that `photometric` is done to it, all
crops at once.

What each crop needs is known to the host, so no step waits for the device: numbers and indices go there in one small
copy a chunk. Flip, hue and blur are done to the crops that have them. Every other operation blends a crop with black,
with the mean of its grey image or with that image, which differ in coefficients alone: each step is one formula for
all."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seer_scale.data.transforms.photometric import (
    CONTRAST,
    GREY,
    HUE,
    PARAMS_PER_CROP,
    SATURATION,
    PhotometricParams,
    encode,
)
from seer_scale.data.transforms.views import MEAN, STD

CHUNK = 2**24
"""Values distorted at a time, at most (or one crop): 64 MiB, of which about four copies are alive at once."""


@torch.no_grad()
def apply_photometric(crops: Tensor, how: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] as `how`, float32 [N, PARAMS_PER_CROP] on the CPU, says: float32 in [0, 255], not rounded.

    To one level `photometric.apply_photometric` of each, which rounds twice: before the blur and after it. Raises under
    autocast, which would blur in half precision.
    """
    assert how.shape == (len(crops), PARAMS_PER_CROP) and how.device.type == "cpu", (how.shape, how.device)
    out = crops.to(torch.float32)
    num = max(1, CHUNK // crops.shape[1:].numel())
    for x, numbers in zip(out.split(num), how.split(num)):
        _in_place(x, numbers)
    return out


def apply_on_cpu(crop: np.ndarray, how: PhotometricParams) -> np.ndarray:
    """RGB uint8 [S, S, 3] as uint8 [3, S, S]: `photometric.apply_photometric` without kernels in C."""
    planes = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None]
    return apply_photometric(planes, torch.from_numpy(encode(how))[None])[0].add_(0.5).to(torch.uint8).numpy()


def _in_place(x: Tensor, how: Tensor) -> None:
    ops, factors = how[:, 1:-1:2].T, how[:, 2:-1:2].T  # [MAX_OPS, n]
    flipped, blurred = how[:, 0].nonzero()[:, 0], how[:, -1].nonzero()[:, 0]
    steps = []
    for op, factor in zip(ops, factors):
        if (op >= 0).any():
            turned = (op == HUE).nonzero()[:, 0]
            steps += [_shares(op, factor), turned, _thirds(factor[turned])]
    weights = gaussians(how[blurred, -1])
    flipped, blurred, weights, *steps = _ship([flipped, blurred, weights, *steps], x.device)

    if len(flipped):
        x.index_copy_(0, flipped, x.index_select(0, flipped).flip(3))
    for shares, turned, thirds in zip(steps[::3], steps[1::3], steps[2::3]):
        _blend(x, *shares)
        if len(turned):
            x.index_copy_(0, turned, _turn(x.index_select(0, turned), thirds))
    if len(blurred):
        x.index_copy_(0, blurred, _blur(x.index_select(0, blurred), weights))


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
    """The hue of [n, 3, S, S] turned, in place. From its own colour on, a channel is highest for 1 of 6, falls for 1,
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
    most = int(radius.max()) if len(sigma) else 0
    at = torch.arange(-most, most + 1)
    weights = torch.exp(-0.5 * (at / sigma) ** 2) * (at.abs() <= radius)
    return (weights / weights.sum(1, keepdim=True)).float()


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    """[n, 3, S, S] with a line of weights each, across and then down: depthwise, as one image of 3n channels."""
    num, _, size, _ = x.shape
    weights, radius = weights.repeat_interleave(3, 0)[:, None, None], weights.shape[1] // 2
    x = x.view(1, 3 * num, size, size)
    x = F.conv2d(_mirror(x, radius, down=False), weights, groups=3 * num)
    x = F.conv2d(_mirror(x, radius, down=True), weights.mT, groups=3 * num)
    return x.view(num, 3, size, size)


def _mirror(x: Tensor, radius: int, down: bool) -> Tensor:
    """The border a mirror that is not repeated; where a blur reaches beyond the far side, the mirrored is mirrored."""
    while radius:
        size = x.shape[2 if down else 3]
        more, mode = (min(radius, size - 1), "reflect") if size > 1 else (radius, "replicate")
        x = F.pad(x, (0, 0, more, more) if down else (more, more, 0, 0), mode=mode)
        radius -= more
    return x


@lru_cache(maxsize=16)
def _mean_std(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (255 * mean).to(device), (1 / (255 * std)).to(device)  # once a device: no copy, so no wait, in the step


def to_float(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [N, 3, H, W] on any device as `dtype`, normalised with ImageNet's mean and standard deviation."""
    mean, scale = _mean_std(x.device)
    return x.to(torch.float32).sub_(mean).mul_(scale).to(dtype)
