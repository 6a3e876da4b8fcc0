"""RandAugment and random erasing of images in the order of training: what is done to one is a function of (seed,
sample), so the same on any number of processes and after a restart. On the images' device.

Cubuk et al., arXiv 1909.13719, with operations, ranges and chances of timm's "rand-mM-mstd0.5-inc1"; Zhong et al.,
arXiv 1708.04896, as timm's RandomErasing of mode "pixel".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from seer_scale.data.transforms.views import MEAN
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.rng import numpy_generator

RAND_OPERATIONS, RAND_CHANCE, MAGNITUDE_STD = 2, 0.5, 0.5
"""Drawn for an image, with replacement; how likely each is to be done; deviation of its magnitude."""
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), 0.3
"""Shares of the image's area; the least of height to width, and of width to height."""
Operation = Callable[[Tensor, float, float], Tensor]
"""(uint8 [3, H, W], strength from 0 to 1, sign) -> the same."""


def operations() -> dict[str, Operation]:
    """By timm's names. Raises UserError where torchvision is missing."""
    try:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as of_torchvision
    except ImportError as error:
        fix = how_to_install("torchvision")
        raise UserError(Problem("torchvision", NOTHING, "is what --randaugment needs", fix)) from error
    around = {"interpolation": InterpolationMode.BILINEAR, "fill": [round(255 * mean) for mean in MEAN]}

    def factor(strength: float, sign: float) -> float:
        return max(0.1, 1 + sign * 0.9 * strength)

    def moved(x: Tensor, *, right: float = 0, down: float = 0, shear: tuple[float, float] = (0, 0)) -> Tensor:
        degrees = [math.degrees(math.atan(s)) for s in shear]
        return of_torchvision.affine(x, 0, [right, down], 1, degrees, center=[0, 0], **around)

    return {
        "AutoContrast": lambda x, *_: of_torchvision.autocontrast(x),
        "Equalize": lambda x, *_: of_torchvision.equalize(x),
        "Invert": lambda x, *_: of_torchvision.invert(x),
        "Rotate": lambda x, s, sign: of_torchvision.rotate(x, 30 * s * sign, **around),
        "PosterizeIncreasing": lambda x, s, _: x & (256 - 2 ** (4 + int(4 * s))),
        "SolarizeIncreasing": lambda x, s, _: torch.where(x < 256 - int(256 * s), x, 255 - x),
        "SolarizeAdd": lambda x, s, _: torch.where(x < 128, x + int(110 * s), x),
        "ColorIncreasing": lambda x, s, sign: of_torchvision.adjust_saturation(x, factor(s, sign)),
        "ContrastIncreasing": lambda x, s, sign: of_torchvision.adjust_contrast(x, factor(s, sign)),
        "BrightnessIncreasing": lambda x, s, sign: of_torchvision.adjust_brightness(x, factor(s, sign)),
        "SharpnessIncreasing": lambda x, s, sign: of_torchvision.adjust_sharpness(x, factor(s, sign)),
        "ShearX": lambda x, s, sign: moved(x, shear=(0.3 * s * sign, 0)),
        "ShearY": lambda x, s, sign: moved(x, shear=(0, 0.3 * s * sign)),
        "TranslateXRel": lambda x, s, sign: moved(x, right=-0.45 * s * sign * x.shape[2]),
        "TranslateYRel": lambda x, s, sign: moved(x, down=-0.45 * s * sign * x.shape[1]),
    }


def rand_augment(images: Tensor, first: int, magnitude: float, seed: int) -> Tensor:
    """uint8 [n, 3, S, S] of the samples first, first + 1 ..., the same shape. magnitude: of ten."""
    known = list(operations().values())
    out = []
    for sample, image in enumerate(images, first):
        generator = numpy_generator(seed, "randaugment", sample)
        for _ in range(RAND_OPERATIONS):
            apply, is_done = known[generator.integers(len(known))], generator.random() < RAND_CHANCE
            strength = float(np.clip(generator.normal(magnitude, MAGNITUDE_STD), 0, 10)) / 10
            sign = 1.0 if generator.random() < 0.5 else -1.0
            image = apply(image, strength, sign) if is_done else image
        out.append(image)
    return torch.stack(out)


def erase(images: Tensor, first: int, share: float, seed: int) -> Tensor:
    """Normalised images [n, 3, S, S] of the samples first, first + 1 ...: in this share of them a rectangle is normal
    noise. In place, and returned."""
    size = images.shape[-1]
    for sample, image in enumerate(images, first):
        generator = numpy_generator(seed, "erase", sample)
        if generator.random() >= share:
            continue
        for _ in range(10):
            area = size**2 * generator.uniform(*ERASED_AREA)
            ratio = math.exp(generator.uniform(math.log(ERASED_RATIO), -math.log(ERASED_RATIO)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if max(height, width) < size:
                top, left = (int(generator.integers(0, size - n + 1)) for n in (height, width))
                noise = torch.from_numpy(generator.standard_normal((3, height, width), dtype=np.float32))
                image[:, top : top + height, left : left + width] = noise.to(image)
                break
    return images
