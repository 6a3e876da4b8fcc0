"""An image of whatever kind as pixels, and as a backbone wants it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seer_scale.data.sources.files import read_file
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.on_device import to_float
from seer_scale.data.transforms.views import resize_centre
from seer_scale.errors import Problem, UserError

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""An image: a path, a file's bytes, Pillow's, or RGB uint8 [H, W, 3]."""


class Transform:
    """An image as a backbone wants it: the short side is resized to 8/7 of `size`, the centre cropped, normalised."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: ImageLike) -> Tensor:
        """float32 [3, size, size], normalised. Raises DataError for what is no image."""
        planes = torch.from_numpy(resize_centre(pixels_of(image), self.size))
        return to_float(planes[None])[0]

    def __repr__(self) -> str:
        return f"Transform(size={self.size})"


def pixels_of(image: ImageLike) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Raises DataError for what is no whole image."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(Problem("image", f"{image.dtype} {list(image.shape)}", "must be RGB uint8 [H, W, 3]"))
        return image
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, bytes):
        return decode(image)
    if not isinstance(image, str | Path):
        raise UserError(Problem("image", type(image).__name__, "must be a path, bytes, Pillow's or an array"))
    return decode(read_file(os.path.expanduser(image)))
