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
from seer_scale.data.decode import decode
from seer_scale.errors import DataError
for entry in json.loads(Path({str(HOSTILE / "manifest.json")!r}).read_text())["files"]:
    try:
        image = decode((Path({str(HOSTILE)!r}) / entry["file"]).read_bytes())
        print(json.dumps([entry["file"], "decode", list(image.shape[1::-1]), image.mean((0, 1)).tolist()]))
    except DataError as error:
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
