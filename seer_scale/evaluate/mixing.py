"""Mixup and CutMix of neighbours in the order of training: a pair is two successive samples, and how it is mixed a
function of (seed, pair), so the same on any number of processes and after a restart.

Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899. Where both are asked for, each pair is mixed by one of
them, as timm's Mixup of mode "pair" does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seer_scale.rng import draw, numpy_generator

Box = tuple[int, int, int, int]
"""(top, bottom, left, right)"""


def mix_pairs(images: Tensor, first: int, *, mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    """images: [n, 3, S, S] of the samples first, first + 1 ...; both numbers even. mixup, cutmix: of the Beta
    distribution, 0: not at all. The mixed images, and how much of its own target each has [n]; the rest is that of its
    partner, `partners`."""
    assert first % 2 == 0 and len(images) % 2 == 0, (first, len(images))
    size = images.shape[-1]
    drawn = [_draw(pair, size, mixup, cutmix, seed) for pair in range(first // 2, (first + len(images)) // 2)]
    shares = torch.tensor([share for share, _ in drawn], dtype=torch.float32).repeat_interleave(2).to(images.device)
    boxes = [box for _, box in drawn]
    other = images[partners(len(images))]
    blend = torch.tensor([1.0 if box else share for share, box in drawn]).repeat_interleave(2)
    blend = blend.to(images.device, images.dtype)[:, None, None, None]
    mixed = blend * images + (1 - blend) * other
    for i, box in enumerate(boxes):
        if box:
            top, bottom, left, right = box
            pair = slice(2 * i, 2 * i + 2)
            mixed[pair, :, top:bottom, left:right] = other[pair, :, top:bottom, left:right]
    return mixed, shares


def partners(n: int) -> Tensor:
    """[n]: 1, 0, 3, 2 ..."""
    return torch.arange(n) ^ 1


def _draw(pair: int, size: int, mixup: float, cutmix: float, seed: int) -> tuple[float, Box | None]:
    generator = numpy_generator(seed, "mix", pair)
    cuts = cutmix > 0 and (mixup == 0 or bool(generator.random() < 0.5))
    alpha = cutmix if cuts else mixup
    share = float(generator.beta(alpha, alpha))
    if not cuts:
        return share, None
    side = int(size * math.sqrt(1 - share))
    y, x = (int(v) for v in generator.integers(0, size, 2))
    top, left = max(0, y - side // 2), max(0, x - side // 2)
    bottom, right = min(size, y + (side + 1) // 2), min(size, x + (side + 1) // 2)
    return 1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right)


def dropout_scale(first: int, shape: tuple[int, int], rate: float, seed: int) -> Tensor:
    """[n, D] of the samples first, first + 1 ...: 0 with probability `rate`, else 1 / (1 - rate); on the CPU."""
    n, width = shape
    drawn = draw(seed, "dropout", start=first * width, stop=(first + n) * width)
    return (torch.from_numpy(drawn) >= rate).view(n, width).float() / (1 - rate)
