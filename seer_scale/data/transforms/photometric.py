"""Photometric augmentation of a crop: flip, colour jitter, grey, Gaussian blur (SwAV's order and distributions) and
solarisation, where DINOv2 has it: last.

`draw` draws the parameters; `apply_photometric` applies them to one crop on the CPU: in one or two passes in C
(pixels.c), or as on_device.py does where that was not built, the same to a level of 255. The operations are
torchvision's, without its rounding in between. `encode` makes an array of the parameters, for on_device.py to apply a
whole batch's on the accelerator."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from seer_scale.config import Photometric
from seer_scale.data.transforms.native import native, scratch

BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY = range(5)


class PhotometricParams(NamedTuple):
    """What happens to one crop, in this order."""

    flip: bool
    ops: tuple[tuple[int, float], ...]
    """(operation, factor) one after the other; for HUE the factor is the turn, as a share of the colour circle."""
    sigma: float
    """The blur's standard deviation in pixels; 0 = none."""
    solarize: bool = False
    """Channels of at least 128 are inverted."""


IDENTITY = PhotometricParams(False, (), 0.0)
MAX_OPS = 5
PARAMS_PER_CROP = 3 + 2 * MAX_OPS
"""Numbers that encode a crop's."""


def encode(params: PhotometricParams) -> np.ndarray:
    """float32 [PARAMS_PER_CROP]: flip, (operation, factor) for each of MAX_OPS in order, (-1, 0) where there are fewer,
    sigma, solarize."""
    none = [(-1, 0.0)] * (MAX_OPS - len(params.ops))
    return np.array([params.flip, *sum((*params.ops, *none), ()), params.sigma, params.solarize], np.float32)


def draw(how: Photometric, u: Iterator[float]) -> PhotometricParams:
    """One crop's parameters; `u` iterates over uniform numbers in [0, 1)."""
    flip, ops, sigma = next(u) < how.flip, [], 0.0
    if next(u) < how.jitter_p:
        order = sorted(range(4), key=[next(u) for _ in range(4)].__getitem__)
        where = [next(u) for _ in range(4)]
        for op in order:
            strength = how.jitter[op]
            low, high = (-strength, strength) if op == HUE else (max(0.0, 1 - strength), 1 + strength)
            if strength:
                ops.append((op, low + (high - low) * where[op]))
    if next(u) < how.grayscale_p:
        ops.append((GREY, 0.0))
    if next(u) < how.blur_p:
        low, high = how.blur_sigma
        sigma = low + (high - low) * next(u)
    solarize = how.solarize_p > 0 and next(u) < how.solarize_p
    return PhotometricParams(flip, tuple(ops), sigma, solarize)


def apply_photometric(crop: np.ndarray, params: PhotometricParams, planes: np.ndarray) -> None:
    """RGB uint8 [H, W, 3] by `params` into `planes`, uint8 [3, H, W], contiguous."""
    kernel = native()
    if kernel is None:
        from seer_scale.data.transforms import on_device  # loads torch, which loader processes otherwise do without

        planes[:] = on_device.apply_on_cpu(crop, params)
        return
    height, width, num = *crop.shape[:2], len(params.ops)
    crop = np.ascontiguousarray(crop)
    ops = (ctypes.c_int * num)(*(op for op, _ in params.ops))
    factors = (ctypes.c_float * num)(*(factor for _, factor in params.ops))
    kernel.photometric(crop.ctypes.data, height, width, params.flip, num, ops, factors, planes.ctypes.data)
    if params.sigma:
        weights = gaussian(params.sigma)
        kernel.blur(
            planes.ctypes.data,
            height,
            width,
            len(weights) // 2,
            weights.ctypes.data,
            scratch(height * width + width + len(weights)).ctypes.data,
        )
    if params.solarize:
        np.minimum(planes, ~planes, out=planes)  # of v and 255 - v the smaller is 255 - v from 128 on


def gaussian(sigma: float) -> np.ndarray:
    """Weights [2 ceil(3 sigma) + 1] of a Gaussian cut at three standard deviations, which sum to 1."""
    radius = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)
