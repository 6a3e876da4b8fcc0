"""Images are decoded upright in true colours, or refused with a reason."""

import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, features

from seer_scale.data.transforms import decode as decoding
from seer_scale.data.transforms.decode import decode
from seer_scale.errors import DataError, Unreadable
from tests.pictures import apart, encode, photo
from tests.problems import unreadable

HOSTILE = Path(__file__).parents[2].parent / "shared" / "data" / "hostile"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_colours_are_pillows(mode):
    data = encode(Image.fromarray(photo()).convert(mode), quality=92)
    image = decode(data)
    assert image.dtype == np.uint8 and image.shape == (120, 160, 3)
    assert apart(image, Image.open(io.BytesIO(data)).convert("RGB")) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_honoured(orientation, order):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.endian = order
    data = encode(Image.fromarray(photo()), quality=95, exif=exif.tobytes())
    assert apart(decode(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) <= 3


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2, "big") + content


@pytest.mark.parametrize("kind", ["far", "long", "comment", "fill"])
def test_exif_orientation_is_found_wherever_pillow_finds_it(kind):
    """Behind 130 kB of colour profile; as a LONG; after a comment that looks like EXIF; after fill bytes."""
    plain = encode(Image.fromarray(photo()), quality=95)
    tiff = (
        b"II*\0\x08\0\0\0\x01\0"
        + (b"\x12\x01\x04\0\x01\0\0\0\x06\0\0\0" if kind == "long" else b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0")
        + bytes(4)
    )
    before = {
        "far": segment(0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(65000))
        + segment(0xE2, b"ICC_PROFILE\0\x02\x02" + bytes(65000)),
        "long": b"",
        "comment": segment(0xFE, b"Exif\0\0II*\0\x08\0\0\0\0\0"),
        "fill": b"\xff\xff",
    }[kind]
    data = plain[:2] + before + segment(0xE1, b"Exif\0\0" + tiff) + plain[2:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (120, 160) and apart(decode(data), expected) <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white_strip_by_strip(mode, monkeypatch):
    rgba = np.dstack([photo(), np.random.default_rng(0).integers(0, 256, (120, 160)).astype(np.uint8)])
    image = Image.fromarray(rgba)
    image = image.convert(mode) if mode in ("RGBA", "LA") else image.quantize(200)
    whole = image.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    monkeypatch.setattr(decoding, "STRIP", 7 * 160)
    out = io.BytesIO()
    image.save(out, "PNG" if mode != "PA" else "TIFF" if image.mode == "PA" else "PNG")
    assert apart(decode(out.getvalue()), expected) <= 1


@pytest.mark.parametrize("cut", range(6, 40, 3))
def test_a_damaged_exif_block_says_nothing(cut):
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    data = encode(Image.fromarray(photo()), exif=block[:cut] + b"\xff" * max(0, len(block) - cut))
    assert set(decode(data).shape) == {120, 160, 3}


def test_other_modes():
    rgb = photo()
    image = Image.fromarray(rgb)
    assert apart(decode(encode(image, "PNG")), rgb) == 0
    assert apart(decode(encode(image.convert("P"), "PNG")), image.convert("P").convert("RGB")) == 0
    grey = np.arange(120 * 160, dtype=np.uint16).reshape(120, 160) * 3
    assert apart(decode(encode(Image.fromarray(grey), "PNG"))[..., 1], grey / 257) <= 1
    half = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 128, np.uint8)]))
    assert apart(decode(encode(half, "PNG")), rgb * (128 / 255) + 127) <= 1.01
    frames = encode(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)])
    assert apart(decode(frames).mean((0, 1)), rgb.mean((0, 1))) < 3  # the first frame: the second is black


# ------------------------------------------------------------------------------- what a JPEG says of itself


def test_orientation_is_found_where_photo_tools_write_it():
    """In XMP alone, as attribute, element or in single quotes; behind a doubled Exif name; Exif's wins over XMP's."""
    plain = encode(Image.fromarray(photo()), quality=95)
    upright = decode(plain)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%c\0\0\0" + bytes(4)

    def xmp(words: bytes) -> bytes:
        return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description " + words + b"</x:xmpmeta>")

    for before, turns in (
        (xmp(b'tiff:Orientation="6"/>'), 3),
        (xmp(b"tiff:Orientation = '3'/>"), 2),
        (xmp(b"><tiff:Orientation>8</tiff:Orientation>"), 1),
        (segment(0xE1, b"Exif\0\0" + exif % 6), 3),
        (segment(0xE1, exif % 3) + xmp(b'tiff:Orientation="6"/>'), 2),
        (xmp(b'tiff:Orientation="6"/>') + segment(0xE1, exif[:-20] % ()), 3),
        (xmp(b'tiff:Orientation="1"/>'), 0),
    ):
        data = plain[:2] + before + plain[2:]
        assert np.array_equal(decode(data), np.rot90(upright, turns)), before


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_of_one_byte_is_read(form, order):
    """Exif says SHORT, some write BYTE; OpenCV takes both."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    exif = b"Exif\0\0" + mark + struct.pack(f"{order}IHHHI4sI", 8, 1, 0x0112, 1, 1, b"\x06", 0)
    assert decode(encode(Image.fromarray(photo()), form, exif=exif)).shape == (160, 120, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_in_xmp_is_found_by_its_namespace(form):
    """Whatever its prefix, and whatever attributes its element has; one of another namespace is another thing."""
    tiff_space, exif_space = b'="http://ns.adobe.com/tiff/1.0/"', b'="http://ns.adobe.com/exif/1.0/"'
    for words, is_turned in (
        (b"xmlns:tiff" + tiff_space + b'><tiff:Orientation rdf:datatype="x">6</tiff:Orientation>', True),
        (b"xmlns:t" + tiff_space + b' t:Orientation="6">', True),
        (b"xmlns:t" + tiff_space + b"><t:Orientation\n>\n 6 </t:Orientation>", True),
        (b"xmlns:t" + tiff_space + b" xmlns:exif" + exif_space + b' exif:Orientation="6">', False),
        (b"xmlns:t" + tiff_space + b' not:Orientation="6" t:OrientationOf="6">', False),
    ):
        xmp = b"<x:xmpmeta><rdf:Description " + words + b"</rdf:Description></x:xmpmeta>"
        options = {"JPEG": {"xmp": xmp}, "WEBP": {"xmp": xmp}, "TIFF": {"tiffinfo": {700: xmp}}}.get(form)
        if form == "PNG":
            options = {"pnginfo": PngImagePlugin.PngInfo()}
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
        data = encode(Image.fromarray(photo()), form, **options)
        assert decode(data).shape == ((160, 120, 3) if is_turned else (120, 160, 3)), words


def grey(process: int, precision: int, channels: int) -> bytes:
    """A JPEG of 256 x 256 pixels whose coefficients are all 0."""
    names = range(1, channels + 1)
    frame = struct.pack(">BHHB", precision, 256, 256, channels) + b"".join(bytes([c, 0x11, 0]) for c in names)
    codes = b"".join(segment(0xC4, bytes([kind, 1, *[0] * 15, 0])) for kind in (0x00, 0x10))  # one of one bit each
    scan = segment(0xDA, bytes([channels]) + b"".join(bytes([c, 0]) for c in names) + b"\0\x3f\0")
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(process, frame) + codes
    return head + scan + bytes(32 * 32 * channels * 2 // 8) + b"\xff\xd9"


@pytest.mark.parametrize("process,precision,channels", [
    (0xC0, 8, 1), (0xC0, 8, 3), (0xC1, 8, 3), (0xC1, 12, 1), (0xC1, 12, 3), (0xC0, 8, 2),
])  # fmt: skip
def test_libjpeg_turbo_is_given_what_it_promises_to_decode(process, precision, channels, monkeypatch):
    """Whole files, so that nothing else refuses them."""
    given, data = [], grey(process, precision, channels)
    takes = decoding.simplejpeg.decode_jpeg
    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", lambda *a, **k: given.append(0) or takes(*a, **k))
    is_promised = precision == 8 and channels != 2
    if is_promised:
        assert (decode(data) == 128).all() and (decode(data, lambda h, w: (64, 64)) == 128).all()
    else:
        for at_least in (None, lambda h, w: (64, 64)):
            with suppress(DataError):  # it is Pillow's to say
                decode(data, at_least)
    assert bool(given) == is_promised


def lossless(height: int, width: int) -> bytes:
    """A JPEG of the lossless process (SOF3), of the one colour whose differences are all 0."""
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"\x01\x11\0\x02\x11\0\x03\x11\0"
    table = bytes([0, 1, *[0] * 15, 0])  # one code of one bit, which says 0
    scan = segment(0xDA, b"\x03\x01\0\x02\0\x03\0\x01\0\0") + bytes(-(-3 * height * width // 8))
    return b"\xff\xd8" + segment(0xC3, frame) + segment(0xC4, table) + scan + b"\xff\xd9"


def test_only_what_may_be_decoded_smaller_is():
    """A lossless JPEG decoded smaller was a segmentation fault; nor is there a promise for 12 bits, arithmetic codes,
    two channels."""
    assert apart(decode(lossless(400, 600), lambda h, w: (h // 4, w // 4)), np.full((400, 600, 3), 128)) == 0
    plain = encode(Image.fromarray(photo()))
    frame = plain.index(b"\xff\xc0")
    for at, value in ((1, 0xC9), (1, 0xC3), (1, 0xC5), (4, 12), (9, 2), (9, 0), (11, 0x00), (11, 0x44)):
        data = bytearray(plain)
        data[frame + at] = value
        try:
            assert decode(bytes(data), lambda h, w: (h // 4, w // 4)).shape[2] == 3
        except DataError as error:
            assert isinstance(error, Unreadable) and error.reason


@pytest.mark.parametrize("at_least", [None, lambda h, w: (h // 2, w // 2)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_a_part_missing_is_refused_though_it_ends_well(at_least, progressive):
    data = encode(Image.fromarray(photo(200, 200)), quality=90, progressive=progressive)
    for broken in (data[: len(data) // 2] + b"\xff\xd9", data[: len(data) // 2], data[:-40] + b"\xff\xd9"):
        with unreadable("", "no whole image"):
            decode(broken, at_least)
    middle = len(data) // 2
    with pytest.raises(DataError):
        decode(
            data[:middle] + data[middle + 9 :] if progressive else data[:middle] + b"\xff\xd0" + data[middle:], at_least
        )


def with_junk(data: bytes, junk: dict[int, bytes]) -> bytes:
    """The file with bytes before each marker that `junk` names."""
    at, out, is_codes = 2, data[:2], False
    while at < len(data):
        begin = data.index(b"\xff", at)
        marker = data[begin + 1]
        if is_codes and (not marker or marker in range(0xD0, 0xD8)):
            out, at = out + data[at : begin + 2], begin + 2
            continue
        end = begin + 2 + (0 if marker == 0xD9 else int.from_bytes(data[begin + 2 : begin + 4], "big"))
        out += data[at:begin] + junk.get(marker, b"") + data[begin:end]
        at, is_codes = end, marker == 0xDA
    return out


ICC = b"ICC_PROFILE\0%b" + bytes(90)
ODD_SEGMENTS = {
    "ICC's number": segment(0xE2, ICC % b"\3\1"),
    "ICC's number 0": segment(0xE2, ICC % b"\0\0"),
    "ICC twice": segment(0xE2, ICC % b"\1\1") * 2,
    "a part of ICC": segment(0xE2, ICC % b"\1\2"),
    "JFIF's revision": segment(0xE0, b"JFIF\0\7\1\0\0\1\0\1\0\0"),
    "Adobe's transform": segment(0xEE, b"Adobe\0\x64\0\0\0\0\x4d"),
    "a comment of length 0": b"\xff\xfe\0\0",
    "junk": b"junk!",
    "all": segment(0xE2, ICC % b"\3\1") + b"junk" + segment(0xE0, b"JFIF\0\7\1\0\0\1\0\1\0\0") + b"\xff\0",
    "nothing": b"",
}
ENDS = {"zeros": bytes(300), "a line's end": b"\r\n", "text": b"\r\n--- 0123456789 ---\r\n", "nothing": b""}


@pytest.mark.parametrize("odd", ODD_SEGMENTS)
@pytest.mark.parametrize("process", ["baseline", "progressive", "restarts"])
def test_harmless_oddities_are_no_damage(odd, process):
    """Alone or together, wherever they are; Pillow, OpenCV and libvips read them."""
    options = {"baseline": {}, "progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 7}}[process]
    plain = encode(Image.fromarray(photo(200, 200)), quality=90, **options)
    tables = [0xDB, 0xC4] if odd == "junk" else [0xDB]
    for name, end in ENDS.items():
        data = with_junk(plain, dict.fromkeys(tables, ODD_SEGMENTS[odd]) | {0xD9: end})
        assert np.array_equal(decode(data), decode(plain)), name
        assert np.array_equal(
            decode(data, lambda h, w: (h // 2, w // 2)), decode(plain, lambda h, w: (h // 2, w // 2))
        ), name


def test_what_else_is_no_damage():
    """A film behind the image; an end that is missing; a sequential scan that selects coefficients; padding like its
    last code; Adobe's mark in JFIF's place, of a transform that nobody knows; restarts misnumbered."""
    plain = encode(Image.fromarray(photo(200, 200)), quality=90)
    movie = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes() + b"\xff\xda\0\x02" * 200
    for data in (
        plain + movie,
        plain[:-2],
        plain[:-1],
        plain[:-2] + bytes(500),
        plain.replace(b"\0\x3f\0", b"\0\x3e\0"),
        plain[:-2] + plain[-3:-2] * 300 + plain[-2:],
        plain[:2] + ODD_SEGMENTS["Adobe's transform"] + plain[20:],
    ):
        assert np.array_equal(decode(data), decode(plain))
    restarting = encode(Image.fromarray(photo(200, 200)), quality=90, restart_marker_blocks=7)
    assert b"\xff\xd7" in restarting
    for new in (b"\xff\xd3", b"\xff\xd6"):
        assert np.array_equal(decode(restarting.replace(b"\xff\xd7", new)), decode(plain))


@pytest.mark.parametrize("progressive", [False, True])
def test_an_oddity_hides_no_damage_behind_it(progressive):
    """What libjpeg-turbo complains of first is not all there is."""
    whole = encode(Image.fromarray(photo(200, 200)), quality=90, progressive=progressive)
    table = whole.index(b"\xff\xdb")
    odd = {
        "revision": whole[:9] + b"\x02\x07" + whole[11:],
        "junk": whole[:table] + b"junk!" + whole[table:],
        "nothing": whole,
    }
    for what, data in odd.items():
        assert np.array_equal(decode(data), decode(whole)), what
        half = data[: len(data) // 2]
        for tail in (b"", bytes(len(data) - len(half) - 2), bytes(20_000)):
            with pytest.raises(DataError):
                decode(half + tail + b"\xff\xd9")


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_hole_is_no_oddity(end):
    """Zeros in the middle of a scan, whose codes end early and leave some over; restarts that are missing, or too many;
    an end that is missing where nobody knows how many scans are."""
    image = Image.fromarray(photo(200, 200))
    data = with_junk(encode(image, quality=90), {0xDB: b"junk!", 0xD9: end})
    middle, holes = len(data) // 2, 0
    for size in (200, 600, 2000):
        with suppress(DataError):
            decode(data[:middle] + bytes(size) + data[middle + 9 :])
            holes += 1
    assert not holes
    restarting = with_junk(encode(image, quality=90, restart_marker_blocks=7), {0xD9: end})
    third = restarting.index(b"\xff\xd2")
    for broken in (restarting[:third] + restarting[third + 2 :], restarting[:third] + b"\xff\xd2" + restarting[third:]):
        with pytest.raises(DataError):
            decode(broken)
    with unreadable("", "Premature end"):
        decode(encode(image, progressive=True)[:-2] + end)


@pytest.mark.parametrize("progressive", [False, True])
def test_codes_that_are_left_over_are_told_from_junk(progressive):
    """What a repeated block leaves behind the last code is no text."""
    data = encode(Image.fromarray(photo(200, 200)), quality=90, progressive=progressive)
    begin, whole = data.index(b"\xff\xda") + 14, decode(data)
    for at in range(begin, len(data) - 400, (len(data) - 400 - begin) // 24):
        with suppress(DataError):
            assert np.array_equal(decode(data[: at + 300] + data[at:]), whole)


def test_a_complaint_costs_few_decodes(monkeypatch):
    """However many scans have something behind them; fewest where the image is large."""
    calls, strictly = [], decoding.simplejpeg.decode_jpeg
    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(0) or strictly(*a, **k))
    data = encode(Image.fromarray(photo(200, 200)), quality=90, progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    padded = data[:end] + (data[last:end] + b"0123456789") * 60 + data[end:]
    between = with_junk(data, dict.fromkeys((0xC4, 0xDA, 0xD9), bytes(14)))
    for file, limit in itertools.product((padded, between), (4_000_000, 40_000 * 4)):
        calls.clear()
        monkeypatch.setattr(decoding, "MAX_PIXELS", limit)
        with suppress(DataError):
            decode(file)
        assert 1 < len(calls) <= 2 + 16 + limit // 40_000
        passes = (len(calls) - 2) * file.count(b"\xff\xda")  # behind the first try
        assert passes <= 17 * limit // 40_000
    assert len(calls) > 2
    padding = with_junk(encode(Image.fromarray(photo(200, 200)), quality=90), {0xD9: bytes(1000)})
    calls.clear()
    decode(padding)
    assert len(calls) <= 6


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    data = encode(Image.fromarray(photo(400, 400)), progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    with unreadable("", "more than 100 scans"):
        decode(data[:end] + data[last:end] * 2000 + data[end:])
    hidden = segment(0xFE, b"\xff\xd9")  # an end that is none
    with unreadable("", "more than 100 scans"):
        decode(data[:last] + hidden + data[last:end] * 200 + data[end:])


# ----------------------------------------------------------------------------------------- more than 8 bits


def tiff(values: np.ndarray, order="<", **tags: int) -> bytes:
    """A TIFF of one strip, as its numbers lie."""
    height, width, *channels = values.shape
    num = channels[0] if channels else 1
    bits, body = 8 * values.itemsize, values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 2 if num == 3 else 1,
        273: 8,
        277: num,
        278: height,
        279: len(body),
        284: 1,
        339: 2 if values.dtype.kind == "i" else 1,
    } | {int(tag[1:]): value for tag, value in tags.items()}
    directory, extra = 8 + len(body), b""
    rows = b""
    for tag, value in sorted(entries.items()):
        if tag == 258 and num == 3:
            extra = struct.pack(f"{order}3H", bits, bits, bits)
            rows += struct.pack(f"{order}HHII", tag, 3, 3, directory + 6 + 12 * len(entries))
        else:
            rows += (
                struct.pack(f"{order}HHII", tag, 4, 1, value)
                if value > 65535 or tag in (273, 279)
                else struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
            )
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(f"{order}I", directory)
        + body
        + struct.pack(f"{order}H", len(entries))
        + rows
        + bytes(4)
        + extra
    )


@pytest.mark.parametrize("side", [16, 26000])
def test_a_tiff_of_a_few_pixels_has_no_block_of_a_gigabyte(side):
    """A tile is decoded whole, however little of it the image shows."""
    pixels = np.full((16, 16, 3), 7, np.uint8)
    if side == 16:
        assert (decode(tiff(pixels, t322=side, t323=side)) == 7).all()
    else:
        with unreadable("", "it announces blocks of 26000 x 26000 pixels"):
            decode(tiff(pixels, t322=side, t323=side))


RAMP = np.arange(48 * 64).reshape(48, 64) * 255 // (48 * 64 - 1)
"""Grey levels 0 to 255."""


@pytest.mark.parametrize(
    "data,kind",
    [
        (tiff((RAMP * 257).astype(np.uint16)), "16 bits"),
        (tiff((RAMP * 257).astype(np.uint16), ">"), "big-endian"),
        (tiff((RAMP * 16).astype(np.uint16)), "12 in 16"),
        (tiff((RAMP * 16).astype(np.uint16), ">"), "12 in 16, big-endian"),
        (tiff(RAMP.astype(np.uint16)), "8 in 16"),
        (tiff(RAMP.astype(np.uint32)), "8 in 32"),
        (tiff(RAMP.astype(np.int32)), "8 in 32, signed"),
        (tiff((RAMP << 24).astype(np.uint32)), "32 bits"),
        (tiff((RAMP << 16).astype(np.int32)), "24 in 32"),
        *[
            (tiff((RAMP * most // 255).astype(np.uint16), **{tag: most}), f"to {most}, told")
            for most in (511, 1023, 2040, 16383)
            for tag in ("t281", "t341")
        ],
        (tiff((16383 - RAMP * 16383 // 255).astype(np.uint16), t262=0, t281=16383), "14 in 16, white is zero"),
        (tiff((65535 - RAMP * 257).astype(np.uint16), t262=0), "white is zero"),
    ],
)
def test_deep_grey_tiffs_fill_their_range(data, kind):
    assert apart(decode(data), np.repeat(RAMP[..., None], 3, 2)) <= 1, kind


@pytest.mark.parametrize(
    "values,tags",
    [
        *[
            (RAMP * most // 255, {}) for most in (300, 694, 1500, 2047, 4500, 8191, 16383)
        ],  # as Pillow, OpenCV, libvips have it
        (RAMP // 16 * 257, {}),
        (RAMP // 20 * 256, {}),  # 8 bits, widened
        (RAMP * 2500 // 255, {"t281": 65535}),
        (RAMP * 2500 // 255, {"t281": 100, "t341": 65535}),
    ],
)
def test_a_dark_tiff_of_16_bits_stays_dark(values, tags):
    assert apart(decode(tiff(values.astype(np.uint16), **tags)), np.repeat(values[..., None] / 257, 3, 2)) <= 1


def test_a_tiff_of_12_packed_bits_has_their_range_however_dark():
    values = (RAMP * 1000 // 255).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1).astype(
        np.uint8
    )
    image = decode(tiff(packed.reshape(48, 96), t256=64, t258=12))
    assert apart(image, np.repeat(values.reshape(48, 64, 1) * 255 / 4095, 3, 2)) <= 1


@pytest.mark.parametrize("data", [
    tiff((RAMP - 100).astype(np.int32)), tiff((RAMP - 100).astype(np.int16)), tiff((RAMP // 2).astype(np.int8)),
    tiff(RAMP.astype(np.float32), t339=3), tiff(np.stack([RAMP * 16] * 3, 2).astype(np.uint16)),
    tiff(np.stack([RAMP * 257] * 3, 2).astype(np.uint16), t284=2),
], ids=["int32", "int16", "int8", "float", "12-bit colours", "planes"])  # fmt: skip
def test_tiffs_without_a_defined_range_are_refused_with_the_reason(data):
    with pytest.raises(Unreadable, match="signed|floating|lowest 12 bits|planes"):
        decode(data)


def test_a_tiff_that_libtiff_complains_of_leaves_stderr_alone(capfd):
    out = io.BytesIO()
    Image.fromarray(photo()).save(out, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(out.getvalue())
    data[60:2000] = bytes(1940)
    with pytest.raises(DataError):
        decode(bytes(data))
    for tag, value in ((0x8000, 1), (0xFFFE, 2)):  # tags that nobody knows
        decode(encode(Image.fromarray(photo()), "TIFF", compression="tiff_lzw", tiffinfo={tag: value}))
    assert capfd.readouterr().err == ""


def png(values: np.ndarray, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits, with its transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def test_the_transparent_colour_of_16_bits_is_white():
    grey = (RAMP * 257).astype(np.uint16)
    colours = np.stack([grey, grey[::-1], grey], 2)
    for values, clear in ((grey, grey[5, 5:6]), (colours, colours[5, 5])):
        where = (values == clear).reshape(48, 64, -1).all(2)
        expected = np.where(where[..., None], 255, values.reshape(48, 64, -1) >> 8)
        assert where.any() and apart(decode(png(values, clear.astype(">u2").tobytes())), expected) <= 1
        assert apart(decode(png(values)), values.reshape(48, 64, -1) >> 8) <= 1


# ---------------------------------------------------------------------------------------------- time and memory


@pytest.mark.parametrize("data", [b"P6 3000 3000 100\n" + bytes(100), b"P3 3000 3000 255\n" + b"1 " * 100])
def test_what_python_would_decode_for_minutes_is_refused(data):
    with unreadable("", "minutes"):
        decode(data)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was used at most"
)
def test_memory_a_pixel_is_what_the_limit_counts_on(tmp_path):
    """In a process each, for what one leaves another may use: the whole image is in memory once in the decoder's form
    and once in ours."""
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    image = Image.fromarray(np.kron(levels, np.ones((75, 75, 1), np.uint8)))
    kinds = [
        ("JPEG", "CMYK", {}, 7),
        ("JPEG", "RGB", {"progressive": True}, 6),
        ("PNG", "RGBA", {}, 7),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}, 7),
        ("WEBP", "RGB", {"method": 0}, 0),
        ("JPEG2000", "RGB", {}, 0),
        *[("AVIF", "RGBA", {"subsampling": "4:4:4", "speed": 10}, 0)] * features.check("avif"),
        *[(form, "RGBA", {"chroma": 444, "enc_params": {"preset": "ultrafast"}}, 0) for form in decoding.HEIF],
    ]
    for n, (form, mode, options, _) in enumerate(kinds):
        for size in ((300, 200), image.size):
            (tmp_path / f"{n}-{size[0]}").write_bytes(encode(image.resize(size).convert(mode), form, **options))
    code = """
import os, sys
from pathlib import Path
from seer_scale.data.transforms import decode as d

def most():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, num, width, pixels = Path(sys.argv[1]), *map(int, sys.argv[2:])
for n in range(num):
    if not (child := os.fork()):
        small, large = ((folder / f"{n}-{size}").read_bytes() for size in (300, width))
        d.decode(small)
        open("/proc/self/clear_refs", "w").write("5")
        before = most()
        d.decode(large)
        print((most() - before) / pixels, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
try:
    d.decode(MANY_SAMPLES)  # of which Pillow would tell stderr
except d.Unreadable:
    pass
"""
    code = code.replace("MANY_SAMPLES", repr(tiff(RAMP.astype(np.uint8), t277=512)))
    words = [tmp_path, len(kinds), image.width, image.width * image.height]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    for (form, mode, _, counted), bytes_a_pixel in zip(kinds, map(float, done.stdout.split()), strict=True):
        assert bytes_a_pixel < (counted or decoding.BYTES_A_PIXEL[form]) + 2.5, (
            form,
            mode,
        )  # a strip on its way is not counted


def test_images_that_would_take_more_memory_are_refused_by_their_header():
    jpeg = bytearray(encode(Image.fromarray(photo()), progressive=True, subsampling=0))
    frame = jpeg.index(b"\xff\xc2")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 13000, 13000)  # nine bytes a pixel, six of them coefficients
    with unreadable("", "more than 139188754"):
        decode(bytes(jpeg))
    webp = bytearray(encode(Image.fromarray(photo()), "WEBP"))
    place = webp.index(b"\x9d\x01\x2a") + 3
    webp[place : place + 4] = struct.pack("<HH", 12000, 12000)
    with pytest.raises(DataError):
        decode(bytes(webp))


@pytest.mark.parametrize("data", [b"", b"<html>no image</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DataError):
        decode(data)


@settings(deadline=None)
@given(cut=st.floats(0.0, 0.95))
def test_a_jpeg_cut_short_is_refused(cut):
    data = encode(Image.fromarray(photo()))
    with pytest.raises(DataError):
        decode(data[: int(len(data) * cut)])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=20), st.booleans())
def test_damaged_bytes_give_an_image_or_a_reason(places, png):
    data = bytearray(encode(Image.fromarray(photo(24, 32)), "PNG" if png else "JPEG"))
    for place, value in places:
        data[place % len(data)] = value
    try:
        image = decode(bytes(data))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    except DataError as error:
        assert isinstance(error, Unreadable) and error.reason


def test_bombs_are_refused_by_their_announced_size():
    jpeg = bytearray(encode(Image.fromarray(photo())))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535
    with pytest.raises(DataError):
        decode(bytes(jpeg))


def of_opencv(data: bytes) -> np.ndarray:
    cv2 = pytest.importorskip("cv2")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def of_libvips(data: bytes) -> np.ndarray:
    pyvips = pytest.importorskip("pyvips")
    image = pyvips.Image.new_from_buffer(data, "").autorot().colourspace("srgb").cast("uchar")
    return (image.extract_band(0, n=3) if image.bands > 3 else image).numpy()


@pytest.mark.parametrize("other", [of_opencv, of_libvips])
def test_formats_are_those_of_independent_decoders(other):
    """Where our reading and Pillow's are one: some levels of difference are upsampled chroma's."""
    rgb, exif = Image.fromarray(photo(48, 64)), Image.Exif()
    exif[0x0112] = 6
    files = {
        f"JPEG {n}": encode(rgb, quality=95, subsampling=0, **o)
        for n, o in enumerate(({}, {"progressive": True}, {"exif": exif}))
    }
    files |= {form: encode(rgb, form) for form in ("PNG", "BMP", "TIFF", "PPM")}
    files |= {
        "grey JPEG": encode(rgb.convert("L"), quality=95),
        "grey PNG": encode(rgb.convert("L"), "PNG"),
        "palette": encode(rgb.quantize(99), "PNG"),
    }
    files |= {
        "LZW": encode(rgb, "TIFF", compression="tiff_lzw"),
        "WebP": encode(rgb, "WEBP", lossless=True),
        "JPEG 2000": encode(rgb, "JPEG2000"),
    }
    deep = np.stack([RAMP, RAMP[::-1], RAMP // 2], 2).astype(np.uint16) * 257
    files |= {"PNG of 16 bits": png(deep), "TIFF of 16 bits": tiff(deep), "grey PNG of 16 bits": png(deep[..., 0])}
    if (
        other is of_libvips
    ):  # whose wheels read fewer formats; OpenCV takes no white that is zero, libvips' CMYK has a profile
        files["white is zero"] = tiff((65535 - RAMP * 257).astype(np.uint16), t262=0)
        del files["BMP"], files["JPEG 2000"], files["PPM"]
    else:
        files["CMYK"] = encode(rgb.convert("CMYK"), quality=95)
    for name, data in files.items():
        off = np.abs(decode(data).astype(int) - other(data))
        assert off.mean() < 1.5 and off.max() <= 6, (name, off.mean(), off.max())


@pytest.mark.skipif(not decoding.HEIF, reason="pillow-heif is missing, or broken")
def test_heic_is_read_where_its_library_is():
    image = photo()
    assert np.abs(decode(encode(Image.fromarray(image), "HEIF", quality=95)).astype(int) - image).mean() < 4


@pytest.mark.skipif(not HOSTILE.exists(), reason="no shared data")
def test_hostile_files_do_what_their_manifest_says():
    """Every strict entry, in a process of at most 4 GiB: one of the files announces 2.7 GB of pixels."""
    code = f"""
import json, resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from pathlib import Path
from seer_scale.config import Crop, Views
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.views import load_views
from seer_scale.errors import DataError
views = Views(crops=(Crop(num=2, size=32), Crop(num=1, size=24)))
for entry in json.loads(Path({str(HOSTILE / "manifest.json")!r}).read_text())["files"]:
    data = (Path({str(HOSTILE)!r}) / entry["file"]).read_bytes()
    try:
        made = [v.shape for v in load_views(data, views, 0, 0, 0)]  # as training does
        assert made == [(2, 3, 32, 32), (1, 3, 24, 24)]
    except DataError:
        made = None
    try:
        image = decode(data)
        assert made, entry["file"]
        print(json.dumps([entry["file"], "decode", list(image.shape[1::-1]), image.mean((0, 1)).tolist()]))
    except DataError as error:
        assert not made, entry["file"]
        print(json.dumps([entry["file"], "skip", None, error.reason]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    got = {r[0]: r[1:] for r in map(json.loads, done.stdout.splitlines())}
    for entry in json.loads((HOSTILE / "manifest.json").read_text())["files"]:
        outcome, size, colour = got[entry["file"]]
        if entry["strict"]:
            assert outcome == entry["expect"], (entry["file"], colour)
        if outcome == "decode" and entry["strict"] and "ref_mean_rgb" in entry:
            assert size == entry["oriented_size"], entry["file"]
            assert apart(colour, entry["ref_mean_rgb"]) <= 3, entry["file"]
