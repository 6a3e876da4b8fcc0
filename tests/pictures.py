"""Pictures that tests make, and how far apart two are."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(height=120, width=160, seed=0):
    """Smooth colours over the whole cube, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(fine + rng.integers(-8, 9, fine.shape), 0, 255).astype(np.uint8)


def encode(image: Image.Image, form="JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def apart(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()
