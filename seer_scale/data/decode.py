"""From encoded bytes to pixels: decode once, upright, in true colours, or refuse with a reason."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from seer_scale.errors import DataError

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same images at half the speed
    simplejpeg = None

MAX_PIXELS = 178_956_970
"""Larger images are refused before their pixels take memory; also where Pillow itself refuses."""

SWAPPED = (5, 6, 7, 8)
"""EXIF orientations that lay the image on its side."""

STRIP = 256
"""Rows that are laid on white together."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""What Pillow may open; its rarer decoders (EPS starts a program) have no place before uncurated files."""

AtLeast = Callable[[int, int], tuple[int, int]]


def decode(data: bytes, at_least: AtLeast | None = None) -> np.ndarray:
    """The image in `data` as RGB uint8 [H, W, 3], upright as its EXIF orientation asks.

    16-bit values are scaled, palettes resolved, transparency laid on white, the first frame of an animation taken.
    at_least: told (H, W), the least (H, W) that will do; a JPEG may then come smaller by 2, 4 or 8, others never do. What it
    is told last is the size of the whole.
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
                orientation = _jpeg_orientation(data)
                least = {}
                if at_least:
                    swapped = orientation in SWAPPED
                    rows, columns = at_least(*((width, height) if swapped else (height, width)))[:: -1 if swapped else 1]
                    if 2 * rows <= height and 2 * columns <= width:
                        least = {"min_height": rows, "min_width": columns, "min_factor": 2}
                return _upright(simplejpeg.decode_jpeg(data, "RGB", **least), orientation)
        except (ValueError, KeyError):
            pass  # strict about every oddity: Pillow tells the harmless ones from the broken
    image = _decode_pillow(data)
    if at_least:  # whatever was said of its size before: here it is
        at_least(*image.shape[:2])
    return image


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
        return _on_white(image)
    return np.asarray(image.convert("RGB"))


def _on_white(image: Image.Image) -> np.ndarray:
    """By strips: a whole image would be in memory several times."""
    out = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP):
        part = image.crop((0, top, image.width, min(image.height, top + STRIP))).convert("RGBA")
        out[top : top + STRIP] = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")
    return out


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none or it is damaged (EXIF 2.3, 4.6.2: a TIFF directory)."""
    if not (start := _exif_of(data)):
        return 1
    order = {b"II": "<", b"MM": ">"}.get(data[start : start + 2])
    try:
        directory = start + struct.unpack_from(f"{order}I", data, start + 4)[0]
        for n in range(struct.unpack_from(f"{order}H", data, directory)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, directory + 2 + 12 * n)
            if tag == 0x0112:
                if kind == 4:
                    value = struct.unpack_from(f"{order}I", data, directory + 10 + 12 * n)[0]
                return value if kind in (3, 4) else 1
    except struct.error:
        pass
    return 1


def _exif_of(data: bytes) -> int:
    """Where the TIFF header of a JPEG's EXIF segment is (ITU T.81, B.1.1.4: segments, each with its length); 0 for none."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # alone, without a length
            at += 2
        elif marker in (0xD9, 0xDA):  # the end, or what is no header any more
            break
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return at + 10
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in range(2, 9):
        return image
    if orientation in SWAPPED:
        image = image.transpose(1, 0, 2)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(image[:: -1 if vertical else 1, :: -1 if horizontal else 1])
