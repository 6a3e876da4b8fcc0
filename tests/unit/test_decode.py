"""Images are decoded upright in true colours, or refused with a reason."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from seer_scale.data import decode as decoding
from seer_scale.data.decode import decode
from seer_scale.errors import DataError
from tests.pictures import apart, encode, photo

HOSTILE = Path(__file__).parents[2].parent / "shared" / "data" / "hostile"


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    elif decoding.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_colours_are_pillows(decoder, mode):
    data = encode(Image.fromarray(photo()).convert(mode), quality=92)
    image = decode(data)
    assert image.dtype == np.uint8 and image.shape == (120, 160, 3)
    assert apart(image, Image.open(io.BytesIO(data)).convert("RGB")) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_honoured(decoder, orientation, order):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.endian = order
    data = encode(Image.fromarray(photo()), quality=95, exif=exif.tobytes())
    assert apart(decode(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) <= 3


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2, "big") + content


@pytest.mark.parametrize("kind", ["far", "long", "comment", "fill"])
def test_exif_orientation_is_found_wherever_pillow_finds_it(decoder, kind):
    """Behind 130 kB of colour profile; as a LONG; after a comment that looks like EXIF; after fill bytes."""
    plain = encode(Image.fromarray(photo()), quality=95)
    tiff = b"II*\0\x08\0\0\0\x01\0" + (b"\x12\x01\x04\0\x01\0\0\0\x06\0\0\0" if kind == "long" else b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0") + bytes(4)
    before = {
        "far": segment(0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(65000)) + segment(0xE2, b"ICC_PROFILE\0\x02\x02" + bytes(65000)),
        "long": b"", "comment": segment(0xFE, b"Exif\0\0II*\0\x08\0\0\0\0\0"), "fill": b"\xff\xff",
    }[kind]  # fmt: skip
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
    monkeypatch.setattr(decoding, "STRIP", 7)
    out = io.BytesIO()
    image.save(out, "PNG" if mode != "PA" else "TIFF" if image.mode == "PA" else "PNG")
    assert apart(decode(out.getvalue()), expected) <= 1


@pytest.mark.parametrize("cut", range(6, 40, 3))
def test_a_damaged_exif_block_says_nothing(decoder, cut):
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


@pytest.mark.parametrize("data", [b"", b"<html>no image</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_what_is_no_image_is_refused(decoder, data):
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
        assert str(error)


def test_bombs_are_refused_by_their_announced_size(decoder):
    jpeg = bytearray(encode(Image.fromarray(photo())))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535
    with pytest.raises(DataError):
        decode(bytes(jpeg))


@pytest.mark.skipif(not HOSTILE.exists(), reason="no shared data")
def test_hostile_files_do_what_their_manifest_says():
    """Every strict entry, in a process of at most 4 GiB: one of the files announces 2.7 GB of pixels."""
    code = f"""
import json, resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from pathlib import Path
from seer_scale.config import Crop, Views
from seer_scale.data.decode import decode
from seer_scale.data.views import load_views
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
        print(json.dumps([entry["file"], "skip", None, str(error)]))
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
