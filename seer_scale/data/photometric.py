"""What is done to the colours of a crop: flip, colour jitter, grey, Gaussian blur (SwAV's order and distributions).

`draw` says what is to be done, as numbers; `distort` does it to one crop on the CPU. There it is one or two passes in C
(pixels.c), compiled at first use by the machine's C compiler, or a pass an operation in OpenCV where there is none:
the same to a level of 255 for one operation, to some more where several follow one another, as it rounds in between. The operations are torchvision's, without its rounding in between. `pack` makes numbers
of a distortion, for batched.py to do a whole batch's on the accelerator.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from seer_scale.config import Views
from seer_scale.data.native import native, scratch

BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY = range(5)


class Distortion(NamedTuple):
    """What happens to one crop, in this order."""

    flip: bool
    ops: tuple[tuple[int, float], ...]
    """(operation, factor) one after the other; for HUE the factor is the turn, as a share of the colour circle."""
    sigma: float
    """The blur's standard deviation in pixels; 0 = none."""


MOST_OPS = 5
PACKED = 2 + 2 * MOST_OPS
"""Numbers a packed crop takes."""


def pack(how: Distortion) -> np.ndarray:
    """float32 [PACKED]: flip, (operation, factor) for each of MOST_OPS in order, (-1, 0) where there are fewer, sigma."""
    none = [(-1, 0.0)] * (MOST_OPS - len(how.ops))
    return np.array([how.flip, *sum((*how.ops, *none), ()), how.sigma], np.float32)


def draw(views: Views, u: Iterator[float]) -> Distortion:
    """One crop's distortion; `u` iterates over uniform numbers in [0, 1)."""
    flip, ops, sigma = next(u) < views.flip, [], 0.0
    if next(u) < views.jitter_p:
        order = sorted(range(4), key=[next(u) for _ in range(4)].__getitem__)
        where = [next(u) for _ in range(4)]
        for op in order:
            strength = views.jitter[op]
            low, high = (-strength, strength) if op == HUE else (max(0.0, 1 - strength), 1 + strength)
            if strength:
                ops.append((op, low + (high - low) * where[op]))
    if next(u) < views.grey_p:
        ops.append((GREY, 0.0))
    if next(u) < views.blur_p:
        low, high = views.blur_sigma
        sigma = low + (high - low) * next(u)
    return Distortion(flip, tuple(ops), sigma)


def distort(crop: np.ndarray, how: Distortion, planes: np.ndarray) -> None:
    """RGB uint8 [S, S, 3] distorted into `planes`, uint8 [3, S, S], contiguous."""
    kernel = native()
    if kernel is None:
        cv2.split(_with_opencv(crop, how), list(planes))
        return
    size, num = len(crop), len(how.ops)
    crop = np.ascontiguousarray(crop)
    ops = (ctypes.c_int * num)(*(op for op, _ in how.ops))
    factors = (ctypes.c_float * num)(*(factor for _, factor in how.ops))
    kernel.photometric(crop.ctypes.data, size, how.flip, num, ops, factors, planes.ctypes.data)
    if how.sigma:
        weights = gaussian(how.sigma)
        kernel.blur(planes.ctypes.data, size, len(weights) // 2, weights.ctypes.data, scratch(size * size + size + len(weights)).ctypes.data)


def gaussian(sigma: float) -> np.ndarray:
    """Weights [2 ceil(3 sigma) + 1] of a Gaussian cut at three standard deviations, which sum to 1."""
    return cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)[:, 0]


# ------------------------------------------------------------------------------------------------------ OpenCV


def _with_opencv(crop: np.ndarray, how: Distortion) -> np.ndarray:
    if how.flip:
        crop = cv2.flip(crop, 1)
    for op, factor in how.ops:
        crop = (_brightness, _contrast, _saturation, _hue, _grey)[op](crop, factor)
    if how.sigma:
        weights = gaussian(how.sigma)
        crop = cv2.sepFilter2D(crop, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
    return crop


def _brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(crop, factor, crop, 0, 0)


def _contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    """Blended with the mean of its grey values; 0 gives plain grey, 1 the crop."""
    mean = cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0]
    return cv2.addWeighted(crop, factor, crop, 0, (1 - factor) * mean)


def _saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its own grey image; 0 gives grey, 1 the crop."""
    return cv2.addWeighted(crop, factor, _grey(crop), 1 - factor, 0)


def _hue(crop: np.ndarray, turn: float) -> np.ndarray:
    hsv = cv2.cvtColor(crop.astype(np.float32), cv2.COLOR_RGB2HSV)  # 8-bit hue has too few steps
    hsv[..., 0] += 360 * (turn % 1)  # the way back takes the remainder by 360 itself
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _grey(crop: np.ndarray, _: float = 0.0) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
