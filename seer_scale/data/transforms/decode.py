"""From encoded bytes to pixels: decode once, upright, in true colours, or refuse with a reason."""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from seer_scale.data.transforms import jpeg
from seer_scale.errors import Unreadable

try:
    import pillow_heif
except ImportError:
    HEIF: tuple[str, ...] = ()
else:
    pillow_heif.register_heif_opener()
    HEIF = ("HEIF",)

MAX_PIXELS = 178_956_970
"""Larger images are refused before their pixels take memory; also where Pillow itself refuses."""
MAX_DECODE_BYTES = 7 * MAX_PIXELS
"""What decoding may take besides the file, 1.25 GB: four bytes a pixel in the decoder, three in what it gives."""
BYTES_A_PIXEL = {"WEBP": 17, "JPEG2000": 20, "AVIF": 14, "HEIF": 12}
"""Of formats whose decoders take more than those seven."""
SLOW_CODECS, MAX_SLOW_PIXELS = ("ppm", "ppm_plain", "bmp_rle"), 1 << 22
"""Pillow's decoders in Python, some microseconds a pixel, and how many pixels they may have."""
MAX_SCANS = 100
"""Of a JPEG; each is a pass over the whole image. Encoders make ten, and could make use of forty."""
MAX_TRIES, TRIES_OF_LARGEST = 150, 17
"""How often a JPEG is decoded of which libjpeg-turbo complains, to find out whether pixels are missing.

Fewer times if it is large, and if it is progressive, for each scan is a pass over all pixels.
"""

SWAPPED = (5, 6, 7, 8)
"""EXIF orientations that lay the image on its side."""

STRIP = 1 << 18
"""Pixels that are turned into RGB together, or one row: a whole image would be in memory several times."""

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", *HEIF)
"""What Pillow may open; its rarer decoders (EPS starts a program) have no place before uncurated files."""

BITS, PHOTOMETRIC, WHITE, PLANES, SAMPLE_FORMAT, SIGNED_WHITE = 258, 262, 281, 284, 339, 341
"""TIFF tags."""
WHITE_IS_ZERO = 0
RANGES = ((0, 255), (2048, 4095), (0, 65535), (0, 2**24 - 1), (0, 2**32 - 1))
"""What the grey values of a TIFF that does not say may span, whatever holds them, and the least that the largest of
them must then reach: 8 bits; 12, as cameras of science give, half used at least; 16, 24 and 32. Any other is a dark
image."""
WIDENED = (256, 257)
"""What 8 bits are multiplied by to fill 16: such values are not of 12."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # which would write to stderr, naming no file
for _name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):  # libtiff writes by the hundred, naming no file
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(Image.core.__file__), _name)(None)

AtLeast = Callable[[int, int], tuple[int, int]]


def decode(data: bytes, at_least: AtLeast | None = None) -> np.ndarray:
    """The image in `data` as RGB uint8 [H, W, 3], upright as its EXIF orientation asks.

    16-bit values are scaled, palettes resolved, transparency laid on white, the first frame of an animation taken.
    at_least: of (H, W), the least (H, W) that will do; a JPEG may then come smaller, by 2 at least, others never do.
    Its last argument is the size of the whole.
    Raises Unreadable with the reason for anything that is not a whole image of at most MAX_PIXELS and
    MAX_DECODE_BYTES, as far as decoders notice that a part is missing.
    """
    if not data:
        raise Unreadable("the file is empty")
    if data[:2] == b"\xff\xd8" and (image := _decode_jpeg(data, at_least)) is not None:
        return image
    image = _decode_pillow(data)
    if at_least:  # this is its size, whatever it was asked for before
        at_least(*image.shape[:2])
    return image


def _decode_jpeg(data: bytes, at_least: AtLeast | None) -> np.ndarray | None:
    """None for what is Pillow's to decode or to refuse."""
    header = jpeg.read_header(data)
    if header is None:
        return None
    height, width, channels = header.height, header.width, 4 if len(header.sampling) == 4 else 3
    kept = header.coefficients(data)
    if kept and jpeg.scans(data, header, MAX_SCANS) > MAX_SCANS:
        raise Unreadable(f"it has more than {MAX_SCANS} scans, which would take minutes to decode")
    _check_size(width, height, (7 if channels == 4 else 3) + 2 * kept)
    if not header.can_be_reduced or len(header.sampling) == 2:
        return None
    least = {}
    if at_least:
        swapped = header.orientation in SWAPPED
        rows, columns = at_least(*((width, height) if swapped else (height, width)))[:: -1 if swapped else 1]
        if 2 * rows <= height and 2 * columns <= width:
            least = {"min_height": rows, "min_width": columns, "min_factor": 2}
    space = "CMYK" if channels == 4 else "RGB"
    pixels, complaint = _strictly(data, space, least)
    if pixels is None:
        if not jpeg.is_warning(complaint):
            return None
        scans = jpeg.tidied(data, header)
        passes = max(1, TRIES_OF_LARGEST * MAX_PIXELS // (height * width * max(1, len(scans))))
        tries = min(MAX_TRIES, TRIES_OF_LARGEST - 1 + MAX_PIXELS // (height * width), passes)
        whole = jpeg.without_oddities(scans, header, complaint, lambda other: _checksum(other, space), tries)
        pixels, _ = _strictly(whole, space, least)
        if pixels is None:
            return None
    return _upright(pixels if channels == 3 else _of_cmyk(pixels), header.orientation)


def _strictly(data: bytes, space: str, least: dict[str, int]) -> tuple[np.ndarray | None, str]:
    """Pixels, or libjpeg-turbo's first complaint."""
    try:
        return simplejpeg.decode_jpeg(data, space, **least), ""
    except ValueError as error:
        return None, str(error)


def _checksum(data: bytes, space: str) -> tuple[int | None, str]:
    """Of the pixels, or libjpeg-turbo's first complaint."""
    pixels, complaint = _strictly(data, space, {})
    return (None if pixels is None else zlib.crc32(pixels.data)), complaint


def _check_size(width: int, height: int, bytes_a_pixel: float) -> None:
    max_pixels = min(MAX_PIXELS, int(MAX_DECODE_BYTES / bytes_a_pixel))
    if width * height > max_pixels:
        raise Unreadable(f"it announces {width} x {height} pixels, more than {max_pixels}")


def _decode_pillow(data: bytes) -> np.ndarray:
    pixels, orientation = _opened(data)
    return _upright(pixels, orientation)


def _opened(data: bytes) -> tuple[np.ndarray, int]:
    """Pixels as they lie, and their orientation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes below our limit, and about metadata nobody reads
        try:
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                _check_size(image.width, image.height, BYTES_A_PIXEL.get(image.format or "", 7))
                if isinstance(image, TiffImageFile):
                    _check_blocks(image)
                codec, _, _, raw = image.tile[0] if image.tile else (None,) * 4
                if codec in SLOW_CODECS and image.width * image.height > MAX_SLOW_PIXELS:
                    raise Unreadable(
                        f"it has {image.width} x {image.height} pixels, which would take minutes to decode"
                    )
                image.load()
                return _rgb(image, is_deep=";16" in str(raw)), _orientation(image)
        except Unreadable:
            raise
        except UnidentifiedImageError as error:
            raise Unreadable("its first bytes are those of no image format that is read here") from error
        except Exception as error:  # decoders fail on hostile bytes with every kind of exception
            raise Unreadable(f"it is no whole image ({type(error).__name__}: {error})") from error


def _check_blocks(image: TiffImageFile) -> None:
    """A TIFF's tile or strip is decoded as a whole beside the image, however little of it the image shows (TIFF 6.0, 8,
    15)."""
    tags = image.tag_v2
    rows, columns = min(tags.get(278, image.height), image.height), image.width
    if 322 in tags:
        columns, rows = tags[322], tags.get(323, image.height)
    bits = tags.get(258, (1,))
    samples = 1 if tags.get(284, 1) == 2 else tags.get(277, 1)
    block = columns * rows * samples * max(bits if isinstance(bits, tuple) else (bits,)) / 8
    if block + 7 * image.width * image.height > MAX_DECODE_BYTES:
        raise Unreadable(
            f"it announces blocks of {columns} x {rows} pixels, {block / 1e6:.0f} MB each beside its own, more "
            f"than {MAX_DECODE_BYTES / 1e6:.0f} in all"
        )


def _rgb(image: Image.Image, is_deep: bool) -> np.ndarray:
    """is_deep: its values have 16 bits in the file, of which modes of several channels keep the upper 8."""
    turn: Callable[[Image.Image], np.ndarray] = _plain
    if image.mode == "F":
        raise Unreadable("its floating-point values have no defined range")
    if isinstance(image, TiffImageFile):
        _check_tiff(image, is_deep)
    if image.mode.startswith("I"):
        turn = _of_grey(image)
    elif image.has_transparency_data:
        if is_deep and isinstance(key := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)
        turn = _on_white
    out = np.empty((image.height, image.width, 3), np.uint8)
    for rows, part in _strips(image):
        out[rows] = turn(part)
    return out


def _rows(height: int, width: int) -> Iterator[slice]:
    num = max(1, STRIP // width)
    return (slice(top, min(height, top + num)) for top in range(0, height, num))


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    for rows in _rows(image.height, image.width):
        yield rows, image.crop((0, rows.start, image.width, rows.stop))


def _plain(part: Image.Image) -> np.ndarray:
    return np.asarray(part.convert("RGB"))


def _on_white(part: Image.Image) -> np.ndarray:
    part = part.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"))


def _check_tiff(image: TiffImageFile, is_deep: bool) -> None:
    """Raises Unreadable for what Pillow reads as something else."""
    tags = image.tag_v2
    if tags.get(PLANES) == 2 and max(tags.get(BITS, (1,))) > 8:
        raise Unreadable("its planes of more than 8 bits a value cannot be read")
    if image.mode.startswith("I"):
        return
    if 2 in tags.get(SAMPLE_FORMAT, ()):
        raise Unreadable("its values are signed, and have no defined range")
    if is_deep and np.max(image.getextrema()) < 16:
        raise Unreadable("its 16-bit colours use the lowest 12 bits only, and would be black")


def _of_grey(image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """What makes 8 bits of an image's grey values of more. They fill their 16 bits, but in TIFF, where they may be
    wider, or narrower than what holds them: there the tag for it says, or the largest of them."""
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    unsigned = tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,)
    white, clear = 65535, image.info.get("transparency")

    def values(part: Image.Image) -> np.ndarray:
        return np.asarray(part).view(np.uint32) if unsigned else np.asarray(part)

    def is_widened() -> bool:
        return any(not any((values(part) % factor).any() for _, part in _strips(image)) for factor in WIDENED)

    if tags:
        extremes = [(int(v.min()), int(v.max())) for v in (values(part) for _, part in _strips(image))]
        if min(low for low, _ in extremes) < 0:
            raise Unreadable("its values are signed, and have no defined range")
        highest = max(high for _, high in extremes)
        white = _declared_white(tags, highest) or next(
            upto for at_least, upto in RANGES if at_least <= highest <= upto and not (at_least and is_widened())
        )

    def turn(part: Image.Image) -> np.ndarray:
        grey = values(part)
        out = (grey * (255 / white) + 0.5).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            out = 255 - out
        if clear is not None:
            out[grey == clear] = 255
        return out[..., None]

    return turn


def _declared_white(tags: Mapping[int, tuple], highest: int) -> int:
    """The value of white that a TIFF declares, as a largest one or by its bits (Pillow unpacks 12 to the lower ones); 0
    where it has none, or one below its largest value."""
    declared = [v for tag in (WHITE, SIGNED_WHITE) for v in tags.get(tag, ()) if isinstance(v, (int, float))]
    if tags.get(BITS) == (12,):
        declared.append(4095)
    return next((int(v) for v in declared if highest <= v < 2**32 and v >= 1), 0)


def _of_cmyk(pixels: np.ndarray) -> np.ndarray:
    """Of a JPEG, which holds them inverted (Adobe's way, as every decoder takes it)."""
    out = np.empty((*pixels.shape[:2], 3), np.uint8)
    for rows in _rows(*out.shape[:2]):
        out[rows] = Image.fromarray(255 - pixels[rows], "CMYK").convert("RGB")
    return out


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112)
        if value is None and image.format not in ("HEIF", "AVIF"):  # which are turned by what they say themselves
            value = jpeg.xmp_orientation(image.info.get("xmp", b""))
        return value[0] if isinstance(value, bytes) else value or 1  # a BYTE
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in range(2, 9):
        return image
    if orientation in SWAPPED:
        image = image.transpose(1, 0, 2)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(image[:: -1 if vertical else 1, :: -1 if horizontal else 1])
