"""ImageNet-C's corruptions of images, at its five severities (Hendrycks and Dietterich, arXiv 1903.12261).

Thirteen of the fifteen, with the published constants, which are those of images of 224 pixels: frost needs its
photographs, and glass_blur swaps pixels one after the other. What is drawn for an image is a function of (seed,
corruption, severity, image number): the same in any batch, on any rank and device.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seer_scale.rng import numpy_generator

SEVERITIES = (1, 2, 3, 4, 5)
MIN_CORRUPTED_SIDE = 32
"""Kernels reach so far."""
LEFT_OUT = ("frost", "glass_blur")

Draws = list[np.random.Generator]
"""One for each image of a batch."""
Corruption = Callable[[Tensor, Draws, int], Tensor]
"""Images float32 [n, 3, S, S] in [0, 1], their draws, a severity's index (0 to 4) -> images; `corrupt` clips them."""


def corrupt(images: Tensor, numbers: np.ndarray, name: str, severity: int, seed: int) -> Tensor:
    """uint8 [n, 3, S, S] -> uint8, on its device; image i is corrupted as image number numbers[i]."""
    draws = [numpy_generator(seed, name, severity, int(number)) for number in numbers]
    made = CORRUPTIONS[name](images.float() / 255, draws, severity - 1)
    return (made.clamp(0, 1) * 255).to(torch.uint8)  # cut off, as there


# ------------------------------------------------------------------------------------------------ noise


def _normal(draws: Draws, shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    drawn = [d.standard_normal(shape, dtype=np.float32) for d in draws]
    return torch.from_numpy(np.stack(drawn)).to(like.device)


def gaussian_noise(x: Tensor, draws: Draws, level: int) -> Tensor:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * _normal(draws, x.shape[1:], x)


def shot_noise(x: Tensor, draws: Draws, level: int) -> Tensor:
    c = (60, 25, 12, 5, 3)[level]
    photons = [d.poisson(image * c).astype(np.float32) for d, image in zip(draws, x.cpu().numpy())]
    return torch.from_numpy(np.stack(photons)).to(x.device) / c


def impulse_noise(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Salt and pepper, of each channel its own."""
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    drawn = torch.from_numpy(np.stack([d.random((2, *x.shape[1:]), dtype=np.float32) for d in draws])).to(x.device)
    return torch.where(drawn[:, 0] < amount, (drawn[:, 1] < 0.5).float(), x)


# ------------------------------------------------------------------------------------------------ blur


def defocus_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    radius, sigma = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    reach, soft = (8, 1) if radius <= 8 else (radius, 2)
    at = torch.arange(-reach, reach + 1.0)
    disk = (at[:, None].square() + at.square() <= radius**2).float()
    kernel = _convolved((disk / disk.sum())[None, None], _gaussian(sigma, soft), "reflect")
    return F.conv2d(F.pad(x.flatten(0, 1)[:, None], [reach] * 4, "reflect"), kernel.to(x.device)).view_as(x)


def _gaussian(sigma: float, radius: int) -> Tensor:
    weights = (-0.5 * (torch.arange(-radius, radius + 1.0) / sigma).square()).exp()
    return weights / weights.sum()


def _convolved(x: Tensor, weights: Tensor, edges: str) -> Tensor:
    """[n, 1, H, W] along both axes. edges: "reflect" about the outermost pixels, "symmetric" about their outer edge."""
    radius, weights = len(weights) // 2, weights.to(x.device)
    if edges == "symmetric":
        for axis in (2, 3):
            first, last = (
                x.narrow(axis, 0, radius).flip(axis),
                x.narrow(axis, x.shape[axis] - radius, radius).flip(axis),
            )
            x = torch.cat([first, x, last], axis)
    else:
        x = F.pad(x, [radius] * 4, "reflect")
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def motion_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return torch.stack([_moved(image, radius, sigma, d.uniform(-45, 45)) for image, d in zip(x, draws)])


def _moved(x: Tensor, radius: int, sigma: float, angle: float) -> Tensor:
    """[C, H, W] as it leaves a trace in one direction; outside it is as at its edge."""
    at, (height, across) = np.arange(2 * radius + 1), x.shape[1:]
    weights = np.exp(-0.5 * (at / sigma) ** 2)
    down = -np.ceil(at * math.sin(math.radians(angle)) - 0.5).astype(np.int64)
    right = -np.ceil(at * math.cos(math.radians(angle)) - 0.5).astype(np.int64)
    inside = (np.abs(down) < height) & (np.abs(right) < across)  # both grow
    rows = (np.arange(height) - down[inside, None]).clip(0, height - 1)
    columns = (np.arange(across) - right[inside, None]).clip(0, across - 1)
    row, column = (torch.from_numpy(numbers).to(x.device) for numbers in (rows[:, :, None], columns[:, None]))
    share = torch.from_numpy((weights / weights.sum())[inside]).to(x)
    return torch.einsum("t,cthw->chw", share, x[:, row, column])


def zoom_blur(x: Tensor, draws: Draws, level: int) -> Tensor:
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    factors = np.arange(1, end, step).tolist()
    return (x + torch.stack([_zoomed(x, factor) for factor in factors]).sum(0)) / (len(factors) + 1)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """The centre of [n, C, S, S], enlarged, bilinear between the centres of its outermost pixels."""
    side = x.shape[2]
    inner = math.ceil(side / factor)
    first, size = (side - inner) // 2, round(inner * factor)
    part = x[:, :, first : first + inner, first : first + inner]
    return F.interpolate(part, size=(size, size), mode="bilinear", align_corners=True)[:, :, :side, :side]


# ------------------------------------------------------------------------------------------------ weather


def snow(x: Tensor, draws: Draws, level: int) -> Tensor:
    mean, std, zoom, least, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]  # fmt: skip
    flakes = _zoomed(mean + std * _normal(draws, (1, *x.shape[2:]), x), zoom)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    fallen = torch.stack([_moved(f, int(radius), sigma, d.uniform(-135, -45)) for f, d in zip(flakes, draws)])
    fallen = (fallen * 255).round() / 255
    gray = (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)).sum(1, keepdim=True)
    return share * x + (1 - share) * torch.maximum(x, 1.5 * gray + 0.5) + fallen + fallen.rot90(2, (2, 3))


def fog(x: Tensor, draws: Draws, level: int) -> Tensor:
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    side = x.shape[2]
    clouds = np.stack([_plasma(1 << (side - 1).bit_length(), decay, d)[:side, :side] for d in draws])
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * torch.from_numpy(clouds).to(x.device)[:, None]) * brightest / (brightest + amount)


def _plasma(side: int, decay: float, draw: np.random.Generator) -> np.ndarray:
    """float32 [side, side] in [0, 1] by the diamond-square algorithm."""
    plane, step, wibble = np.zeros((side, side), np.float32), side, 100.0

    def mean(total: np.ndarray) -> np.ndarray:
        return total / 4 + wibble * draw.uniform(-wibble, wibble, total.shape)

    while step >= 2:
        half, corners = step // 2, plane[::step, ::step]
        squares = corners + np.roll(corners, -1, 0)
        plane[half::step, half::step] = mean(squares + np.roll(squares, -1, 1))
        centres = plane[half::step, half::step]
        above, beside = centres + np.roll(centres, 1, 0), corners + np.roll(corners, -1, 1)
        plane[::step, half::step] = mean(above + beside)
        before, below = centres + np.roll(centres, 1, 1), corners + np.roll(corners, -1, 0)
        plane[half::step, ::step] = mean(before + below)
        step, wibble = half, wibble / decay
    plane -= plane.min()
    return plane / plane.max()


# ------------------------------------------------------------------------------------------------ digital


def brightness(x: Tensor, draws: Draws, level: int) -> Tensor:
    """Of HSV the value is raised: hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-12), raised)


def contrast(x: Tensor, draws: Draws, level: int) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return (x - means) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + means


def elastic_transform(x: Tensor, draws: Draws, level: int) -> Tensor:
    side = x.shape[2]
    sigma, most = 0.01 * side, 0.005 * side
    alpha = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[level]
    moves = np.stack([d.uniform(-most, most, (2, side, side)).astype(np.float32) for d in draws])
    smooth = _gaussian(sigma, int(3 * sigma + 0.5))
    moved = _convolved(torch.from_numpy(moves).to(x.device).flatten(0, 1)[:, None], smooth, "symmetric")
    across, down = (moved.view(-1, 2, side, side) * alpha).unbind(1)
    at = torch.arange(side, device=x.device)
    grid = torch.stack([at + across, at[:, None] + down], -1)
    return F.grid_sample(x, (2 * grid + 1) / side - 1, "bilinear", "reflection", align_corners=False)


def pixelate(x: Tensor, draws: Draws, level: int) -> Tensor:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]

    def coarse(image: Image.Image) -> Image.Image:
        small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.NEAREST)

    return _by_pillow(x, coarse)


def jpeg_compression(x: Tensor, draws: Draws, level: int) -> Tensor:
    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
        return Image.open(file)

    return _by_pillow(x, compressed)


def _by_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
    # a little more than a whole level, which is cut off
    return (torch.from_numpy(changed).to(x.device).permute(0, 3, 1, 2).float() + 0.5) / 255


CORRUPTIONS: dict[str, Corruption] = {
    made.__name__: made
    for made in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, motion_blur, zoom_blur, snow, fog, brightness,
        contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip
