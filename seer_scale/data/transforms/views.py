"""From pixels to views: every crop cut from one decoded image, resized, its colours changed, all as uint8 on the CPU.

Order and distributions are SwAV's (torchvision's RandomResizedCrop and ColorJitter): random resized crop, flip,
colour jitter, grey, Gaussian blur; then solarisation, as in DINOv2. The views of an image are a pure function of
(image, views, seed, epoch, index).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from seer_scale.config import Crop, ImageSize, Views, shape_of
from seer_scale.data.transforms import photometric
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.native import native, scratch
from seer_scale.rng import numpy_generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of values in [0, 1]."""

Box = tuple[int, int, int, int]
"""(top, left, height, width)"""

DRAWS = 64
"""Uniform numbers a crop may use; a fixed number keeps each crop's independent of what the others needed."""


def load_views(
    data: bytes, views: Views, seed: int, epoch: int, index: int, out: Sequence[np.ndarray] | None = None
) -> Sequence[np.ndarray]:
    """`make_views` of an encoded image, decoded at 1/2, 1/4 or 1/8 where every crop is at least as large there as it
    will be (JPEG: fewer coefficients are transformed). Raises DataError for what is no whole image.

    out: arrays to write into instead of new ones, and to return. If there are twice as many, the others are float32
    [num, photometric.PARAMS_PER_CROP], and take each crop's photometric parameters, which are then not applied.
    """
    draws = _draws(views, seed, epoch, index)
    full: list[int] = []

    def at_least(height: int, width: int) -> tuple[int, int]:
        full[:] = height, width
        boxes = ((kind.shape, box[2:]) for kind, _, box in _boxes(views, draws, height, width))
        share = max(side / of_box for shape, box in boxes for side, of_box in zip(shape, box))
        return math.ceil(height * share), math.ceil(width * share)

    image = decode(data, at_least)
    return _cut(image, views, draws, full, _arrays(views) if out is None else out)


def make_views(image: np.ndarray, views: Views, seed: int, epoch: int, index: int) -> list[np.ndarray]:
    """The crops of RGB uint8 [H, W, 3], one uint8 array [num, 3, *shape] for each kind in views.crops."""
    out = _arrays(views)
    _cut(image, views, _draws(views, seed, epoch, index), image.shape[:2], out)
    return out


def _arrays(views: Views) -> list[np.ndarray]:
    return [np.empty((kind.num, 3, *kind.shape), np.uint8) for kind in views.crops]


def _draws(views: Views, seed: int, epoch: int, index: int) -> list[list[float]]:
    return numpy_generator(seed, "views", epoch, index).random((sum(c.num for c in views.crops), DRAWS)).tolist()


def _boxes(
    views: Views, draws: list[list[float]], height: int, width: int
) -> Iterator[tuple[Crop, Iterator[float], Box]]:
    """For each crop its kind, what is left of its draws, and its box in an image of this size."""
    kinds = (kind for kind in views.crops for _ in range(kind.num))
    for kind, u in zip(kinds, map(iter, draws)):
        yield kind, u, crop_box(height, width, kind.scale, u)


def _cut(
    image: np.ndarray, views: Views, draws: list[list[float]], full: Sequence[int], out: Sequence[np.ndarray]
) -> Sequence[np.ndarray]:
    """full: (height, width) of the image that `image` is a smaller copy of; boxes are chosen there."""
    planes = (p for kind in out[: len(views.crops)] for p in kind)
    encoded = (p for kind in out[len(views.crops) :] for p in kind)
    photometrics = (how for kind in views.photometric for how in kind)
    down, right = image.shape[0] / full[0], image.shape[1] / full[1]
    for to, how, (kind, u, (top, left, height, width)) in zip(planes, photometrics, _boxes(views, draws, *full)):
        rows = slice(round(top * down), max(round(top * down) + 1, round((top + height) * down)))
        columns = slice(round(left * right), max(round(left * right) + 1, round((left + width) * right)))
        crop, params = resize(image[rows, columns], kind.size), photometric.draw(how, u)
        if (later := next(encoded, None)) is not None:
            later[:], params = photometric.encode(params), photometric.IDENTITY
        photometric.apply_photometric(crop, params, to)
    return out


def crop_box(height: int, width: int, scale: tuple[float, float], u: Iterator[float]) -> Box:
    """(top, left, height, width) of a random resized crop; `u` iterates over uniform numbers in [0, 1).

    The distribution is that of torchvision's RandomResizedCrop.get_params with ratios 3/4 to 4/3.
    """
    log_ratio = math.log(4 / 3)
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * next(u))
        ratio = math.exp(log_ratio * (2 * next(u) - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(u) * (height - h + 1)), int(next(u) * (width - w + 1)), h, w
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: ImageSize) -> np.ndarray:
    """uint8 [H, W, 3] to this size, bilinear, antialiased along an axis that shrinks: Pillow's, to one level."""
    kernels = native()
    if kernels is None:
        from seer_scale.data.transforms import on_device  # loads torch, which loader processes otherwise do without

        return on_device.resize_on_cpu(image, size)
    if image.strides[1:] != (3, 1):
        image = np.ascontiguousarray(image)
    (height, width), shape = image.shape[:2], shape_of(size)
    out = np.empty((*shape, 3), np.uint8)
    of_axes = sum(to * (2 * math.ceil(max(1, n / to)) + 4) for n, to in zip((height, width), shape))
    floats = scratch(of_axes + 16 * (3 * width + 8))
    kernels.resize(image.ctypes.data, image.strides[0], height, width, *shape, out.ctypes.data, floats.ctypes.data)
    return out


def resize_centre(image: np.ndarray, size: ImageSize) -> np.ndarray:
    """uint8 [3, size, size] for evaluation: what centre-cropping leaves once the short side is round(size * 8/7). Where
    the size is (height, width), once the image is as small as still covers 8/7 of both."""
    shape = shape_of(size)
    within, whole = min(zip(image.shape, map(short_side, shape)), key=lambda axis: axis[0] / axis[1])
    height, width = (max(1, round(within * side / whole)) for side in shape)  # cut first: no huge image on the way
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    crop = resize(image[top : top + height, left : left + width], size)
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def short_side(size: int) -> int:
    """What the short side of an image is resized to before its centre of this size is cut."""
    return round(size * 8 / 7)


def eval_preprocessing(size: int) -> dict[str, Any]:
    """What `resize_centre` and normalising do, as data, for whoever makes it anew with another library."""
    return {
        "size": size,
        "resize_short_side": short_side(size),
        "crop": "centre",
        "interpolation": "bilinear",
        "antialias": True,
        "mean": list(MEAN),
        "std": list(STD),
    }
