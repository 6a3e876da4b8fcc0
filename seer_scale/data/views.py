"""From encoded bytes to views: decode once, cut every crop from it, photometrics, all as uint8 on the CPU.

Order and distributions are SwAV's (FACTS; torchvision's RandomResizedCrop and ColorJitter): random resized crop, flip,
colour jitter, grey, Gaussian blur. The views of an image are a pure function of (image, views, seed, epoch, index).
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from functools import lru_cache

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from seer_scale.config import Views
from seer_scale.errors import DataError
from seer_scale.rng import numpy_generator

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same images at half the speed
    simplejpeg = None

MAX_PIXELS = 178_956_970
"""Larger images are refused before their pixels take memory; also where Pillow itself refuses."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""What Pillow may open; its rarer decoders (EPS starts a program) have no place before uncurated files."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of values in [0, 1]."""

# ------------------------------------------------------------------------------------------------------ decode


def decode(data: bytes) -> np.ndarray:
    """The image in `data` as RGB uint8 [H, W, 3], upright as its EXIF orientation asks.

    16-bit values are scaled, palettes resolved, transparency laid on white, the first frame of an animation taken.
    Raises DataError with the reason for anything that is not a whole image of at most MAX_PIXELS.
    """
    if not data:
        raise DataError("the file is empty")
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            if height * width > MAX_PIXELS:
                raise DataError(f"it announces {width} x {height} pixels, more than {MAX_PIXELS}")
            if space in ("YCbCr", "RGB", "Gray"):
                return _upright(simplejpeg.decode_jpeg(data, "RGB"), _jpeg_orientation(data))
        except (ValueError, KeyError):
            pass  # strict about every oddity: Pillow tells the harmless ones from the broken
    return _decode_pillow(data)


def _decode_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes below our limit, and about metadata nobody reads
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"it announces {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
                image.load()
                pixels = _rgb(image)
                orientation = _orientation(image)
        except DataError:
            raise
        except UnidentifiedImageError as error:
            raise DataError("its bytes are of no known image format") from error
        except Exception as error:  # decoders fail on hostile bytes with every kind of exception
            raise DataError(f"it is no whole image ({type(error).__name__}: {error})") from error
    return _upright(pixels, orientation)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise DataError("its floating-point values have no defined range")
    if image.mode.startswith("I"):  # 16 bits a pixel
        grey = (np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none or it is damaged (EXIF 2.3, 4.6.2: a TIFF directory)."""
    start = data.find(b"Exif\0\0", 0, 1 << 16) + 6
    if start < 6:
        return 1
    order = {b"II": "<", b"MM": ">"}.get(data[start : start + 2])
    try:
        directory = start + struct.unpack_from(f"{order}I", data, start + 4)[0]
        for n in range(struct.unpack_from(f"{order}H", data, directory)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, directory + 2 + 12 * n)
            if tag == 0x0112:
                return value if kind == 3 else 1
    except struct.error:
        pass
    return 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in (2, 3, 4, 5, 6, 7, 8):
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(image[:: -1 if vertical else 1, :: -1 if horizontal else 1])


# ------------------------------------------------------------------------------------------------------- views

DRAWS = 64
"""Uniform numbers a crop may use; a fixed number keeps each crop's independent of what the others needed."""


def make_views(image: np.ndarray, views: Views, seed: int, epoch: int, index: int) -> list[np.ndarray]:
    """The crops of RGB uint8 [H, W, 3], one uint8 array [num, 3, size, size] for each kind in views.crops."""
    draws = numpy_generator(seed, "views", epoch, index).random((sum(c.num for c in views.crops), DRAWS)).tolist()
    out, n = [], 0
    for kind in views.crops:
        crops = np.empty((kind.num, 3, kind.size, kind.size), np.uint8)
        for planes in crops:
            u = iter(draws[n])
            top, left, height, width = crop_box(image.shape[0], image.shape[1], kind.scale, u)
            crop = resize(image[top : top + height, left : left + width], kind.size)
            cv2.split(photometric(crop, views, u), list(planes))
            n += 1
        out.append(crops)
    return out


def crop_box(height: int, width: int, scale: tuple[float, float], u) -> tuple[int, int, int, int]:
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


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] to [size, size, 3], bilinear, antialiased along an axis that shrinks: Pillow's, to one level."""
    height, width = image.shape[:2]
    if height <= size and width <= size:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    batch = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)  # these strides: channels-last
    small = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).numpy()


def photometric(crop: np.ndarray, views: Views, u) -> np.ndarray:
    """Flip, colour jitter, grey and blur of uint8 [H, W, 3]; `u` iterates over uniform numbers in [0, 1)."""
    if next(u) < views.flip:
        crop = cv2.flip(crop, 1)
    if next(u) < views.jitter_p:
        order = sorted(range(4), key=[next(u) for _ in range(4)].__getitem__)
        where = [next(u) for _ in range(4)]
        for n in order:
            strength = views.jitter[n]
            low, high = (-strength, strength) if n == 3 else (max(0.0, 1 - strength), 1 + strength)
            if strength:
                crop = JITTER[n](crop, low + (high - low) * where[n])
    if next(u) < views.grey_p:
        crop = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if next(u) < views.blur_p:
        low, high = views.blur_sigma
        crop = blur(crop, low + (high - low) * next(u))
    return crop


def brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    """`crop` times the factor (uint8 [H, W, 3], as the other three; all saturate at 0 and 255)."""
    return cv2.addWeighted(crop, factor, crop, 0, 0)


def contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    """Blended with the mean of its grey values; 0 gives plain grey, 1 the crop."""
    mean = cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0]
    return cv2.addWeighted(crop, factor, crop, 0, (1 - factor) * mean)


def saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    """Blended with its own grey image; 0 gives grey, 1 the crop."""
    grey = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(crop, factor, grey, 1 - factor, 0)


def hue(crop: np.ndarray, shift: float) -> np.ndarray:
    """Hue turned by `shift` of the colour circle, -0.5 to 0.5; brightness and saturation (HSV) stay."""
    hsv = cv2.cvtColor(crop.astype(np.float32), cv2.COLOR_RGB2HSV)  # 8-bit hue has too few steps
    hsv[..., 0] += 360 * (shift % 1)  # the way back takes the remainder by 360 itself
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


JITTER = (brightness, contrast, saturation, hue)


def blur(crop: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a standard deviation of `sigma` pixels, cut at three, mirrored at the border."""
    kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def resize_centre(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [3, size, size] for evaluation: what centre-cropping leaves once the short side is round(size * 8/7)."""
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * size / round(size * 8 / 7)))  # cut first: no huge image on the way
    top, left = (height - side) // 2, (width - side) // 2
    crop = resize(image[top : top + side, left : left + side], size)
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


@lru_cache(maxsize=16)
def _mean_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (255 * mean).to(device), (1 / (255 * std)).to(device)  # once a device: no copy, so no wait, in the step


def to_float(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [N, 3, H, W] on any device as `dtype`, normalised with ImageNet's mean and standard deviation."""
    mean, scale = _mean_std(x.device)
    return x.to(torch.float32).sub_(mean).mul_(scale).to(dtype)
