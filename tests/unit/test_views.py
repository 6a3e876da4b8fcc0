"""Views: decoded in true colours or refused with a reason, pure, and distributed as torchvision's."""

import io
import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from seer_scale.config import Crop, Views
from seer_scale.data import views as v
from seer_scale.errors import DataError

HOSTILE = Path(__file__).parents[2].parent / "shared" / "data" / "hostile"


def photo(height=120, width=160, seed=0):
    """Smooth colours over the whole cube, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(fine + rng.integers(-8, 9, fine.shape), 0, 255).astype(np.uint8)


def encode(image: Image.Image, form="JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def apart(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


# ------------------------------------------------------------------------------------------------------ decode


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(v, "simplejpeg", None)
    elif v.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_colours_are_pillows(decoder, mode):
    data = encode(Image.fromarray(photo()).convert(mode), quality=92)
    image = v.decode(data)
    assert image.dtype == np.uint8 and image.shape == (120, 160, 3)
    assert apart(image, Image.open(io.BytesIO(data)).convert("RGB")) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_honoured(decoder, orientation, order):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.endian = order
    data = encode(Image.fromarray(photo()), quality=95, exif=exif.tobytes())
    assert apart(v.decode(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) <= 3


@pytest.mark.parametrize("cut", range(6, 40, 3))
def test_a_damaged_exif_block_says_nothing(decoder, cut):
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    data = encode(Image.fromarray(photo()), exif=block[:cut] + b"\xff" * max(0, len(block) - cut))
    assert set(v.decode(data).shape) == {120, 160, 3}


def test_other_modes():
    rgb = photo()
    image = Image.fromarray(rgb)
    assert apart(v.decode(encode(image, "PNG")), rgb) == 0
    assert apart(v.decode(encode(image.convert("P"), "PNG")), image.convert("P").convert("RGB")) == 0
    grey = np.arange(120 * 160, dtype=np.uint16).reshape(120, 160) * 3
    assert apart(v.decode(encode(Image.fromarray(grey), "PNG"))[..., 1], grey / 257) <= 1
    half = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 128, np.uint8)]))
    assert apart(v.decode(encode(half, "PNG")), rgb * (128 / 255) + 127) <= 1.01
    frames = encode(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)])
    assert apart(v.decode(frames).mean((0, 1)), rgb.mean((0, 1))) < 3  # the first frame: the second is black


@pytest.mark.parametrize("data", [b"", b"<html>no image</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_what_is_no_image_is_refused(decoder, data):
    with pytest.raises(DataError):
        v.decode(data)


@settings(deadline=None)
@given(cut=st.floats(0.0, 0.95))
def test_a_jpeg_cut_short_is_refused(cut):
    data = encode(Image.fromarray(photo()))
    with pytest.raises(DataError):
        v.decode(data[: int(len(data) * cut)])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=20), st.booleans())
def test_damaged_bytes_give_an_image_or_a_reason(places, png):
    data = bytearray(encode(Image.fromarray(photo(24, 32)), "PNG" if png else "JPEG"))
    for place, value in places:
        data[place % len(data)] = value
    try:
        image = v.decode(bytes(data))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    except DataError as error:
        assert str(error)


def test_bombs_are_refused_by_their_announced_size(decoder):
    jpeg = bytearray(encode(Image.fromarray(photo())))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535
    with pytest.raises(DataError):
        v.decode(bytes(jpeg))


@pytest.mark.skipif(not HOSTILE.exists(), reason="no shared data")
def test_hostile_files_do_what_their_manifest_says():
    """Every strict entry, in a process of at most 4 GiB: one of the files announces 2.7 GB of pixels."""
    code = f"""
import json
from pathlib import Path
from seer_scale.data.views import decode
from seer_scale.errors import DataError
for entry in json.loads(Path({str(HOSTILE / "manifest.json")!r}).read_text())["files"]:
    try:
        image = decode((Path({str(HOSTILE)!r}) / entry["file"]).read_bytes())
        print(json.dumps([entry["file"], "decode", list(image.shape[1::-1]), image.mean((0, 1)).tolist()]))
    except DataError as error:
        print(json.dumps([entry["file"], "skip", None, str(error)]))
"""
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (4 << 30, 4 << 30))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = {r[0]: r[1:] for r in map(json.loads, done.stdout.splitlines())}
    for entry in json.loads((HOSTILE / "manifest.json").read_text())["files"]:
        outcome, size, colour = got[entry["file"]]
        if entry["strict"]:
            assert outcome == entry["expect"], (entry["file"], colour)
        if outcome == "decode" and entry["strict"] and "ref_mean_rgb" in entry:
            assert size == entry["oriented_size"], entry["file"]
            assert apart(colour, entry["ref_mean_rgb"]) <= 3, entry["file"]


# ------------------------------------------------------------------------------------------------------- views

KINDS = Views(crops=(Crop(num=2, size=64), Crop(num=3, size=32, scale=(0.05, 0.14))))


def test_views_are_a_pure_function():
    image = photo()
    first = v.make_views(image, KINDS, 1, 2, 3)
    assert [c.shape for c in first] == [(2, 3, 64, 64), (3, 3, 32, 32)] and all(c.dtype == np.uint8 for c in first)
    np.random.seed(7), torch.manual_seed(7)
    again = v.make_views(image.copy(), KINDS, 1, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and np.array_equal(image, photo())
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not any(np.array_equal(a, b) for a, b in zip(first, v.make_views(image, KINDS, *other)))


def test_a_crop_does_not_depend_on_the_kinds_after_it():
    alone = v.make_views(photo(), Views(crops=KINDS.crops[:1]), 1, 2, 3)
    assert np.array_equal(alone[0], v.make_views(photo(), KINDS, 1, 2, 3)[0])


@settings(deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), index=st.integers(0, 10**9))
def test_any_shape_of_image_gives_whole_crops(height, width, index):
    image = np.full((height, width, 3), 77, np.uint8)
    plain = Views(crops=KINDS.crops, jitter_p=0.0)
    assert all(apart(c, 77) <= 1 for c in v.make_views(image, plain, 0, 0, index))  # no padding, no black border


@pytest.mark.parametrize("shape", [(375, 500), (100, 900)])
@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
def test_crop_boxes_are_torchvisions(shape, scale):
    """Mean and spread of area, ratio and centre within 5 standard errors of torchvision's own draws."""
    n, (height, width) = 8000, shape
    draws = np.random.default_rng(0).random((n, v.DRAWS)).tolist()
    ours = np.array([v.crop_box(height, width, scale, iter(d)) for d in draws], float)
    torch.manual_seed(0)
    empty = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(empty, scale, (3 / 4, 4 / 3)) for _ in range(n)], float)

    def figures(boxes):
        top, left, h, w = boxes.T
        return np.stack([h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width])

    for a, b in zip(figures(ours), figures(theirs)):
        variance, fourth = b.var(), ((b - b.mean()) ** 4).mean()  # of which a sample variance's own error follows
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt(2 * variance / n) + 1e-3
        assert abs(a.var() - variance) < 5 * np.sqrt(2 * (fourth - variance**2) / n) + 1e-6
    inside = (ours[:, 0] >= 0) & (ours[:, 0] + ours[:, 2] <= height) & (ours[:, 1] + ours[:, 3] <= width)
    assert inside.all()


@pytest.mark.parametrize("shape", [(300, 270), (90, 400), (400, 90), (40, 50), (33, 500)])
def test_resize_is_pillows_bilinear(shape):
    image = photo(*shape)
    assert apart(v.resize(image, 96), Image.fromarray(image).resize((96, 96), Image.BILINEAR)) <= 2


@pytest.mark.parametrize("name,factors", [
    ("brightness", (0.2, 0.7, 1.0, 1.8)), ("contrast", (0.2, 0.7, 1.0, 1.8)),
    ("saturation", (0.0, 0.2, 0.7, 1.0, 1.8)), ("hue", (-0.5, -0.2, -0.03, 0.0, 0.1, 0.2, 0.5)),
])  # fmt: skip
def test_jitter_is_torchvisions_to_two_levels(name, factors):
    rng = np.random.default_rng(0)
    for image in (photo(), rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)):
        exact = torch.from_numpy(image).permute(2, 0, 1) / 255.0
        for factor in factors:
            theirs = 255 * getattr(tv, f"adjust_{name}")(exact, factor).permute(1, 2, 0).numpy()
            assert apart(getattr(v, name)(image, factor), theirs) <= 2


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_to_two_levels(sigma):
    image = photo()
    exact = torch.from_numpy(image).permute(2, 0, 1) / 255.0
    theirs = 255 * tv.gaussian_blur(exact, [17, 17], [sigma, sigma]).permute(1, 2, 0).numpy()
    assert apart(v.blur(image, sigma), theirs) <= 2


def test_every_photometric_step_happens_as_often_as_asked():
    """Shares of flipped, grey and blurred crops within 5 standard errors of their probabilities, alone and together."""
    left = np.zeros((16, 16, 3), np.uint8)
    left[:, :8] = (200, 60, 20)
    settings_ = Views(jitter_p=0.0, flip=0.3, grey_p=0.2, blur_p=0.6, blur_sigma=(1.0, 2.0))
    n = 3000
    draws = np.random.default_rng(1).random((n, v.DRAWS)).tolist()
    crops = [v.photometric(left, settings_, iter(d)).astype(int) for d in draws]
    flipped = np.array([c[0, 0].sum() < c[0, -1].sum() for c in crops])
    grey = np.array([np.ptp(c, axis=2).max() == 0 for c in crops])
    blurred = np.array([0 < c[8, 6:10].sum(1).min() or len({*c[8, :, 0]}) > 2 for c in crops])
    for share, p in ((flipped, 0.3), (grey, 0.2), (blurred, 0.6), (flipped & grey, 0.06), (grey & blurred, 0.12)):
        assert abs(share.mean() - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_jitter_factors_are_torchvisions_ranges(monkeypatch):
    seen = {n: [] for n in range(4)}
    monkeypatch.setattr(v, "JITTER", [lambda c, f, n=n: (seen[n].append(f), c)[1] for n in range(4)])
    views = Views(jitter=(0.8, 1.5, 0.0, 0.2), jitter_p=0.8)
    for d in np.random.default_rng(2).random((4000, v.DRAWS)).tolist():
        v.photometric(photo(8, 8), views, iter(d))
    for n, low, high in ((0, 0.2, 1.8), (1, 0.0, 2.5), (3, -0.2, 0.2)):
        factors = np.array(seen[n])
        assert abs(len(factors) / 4000 - 0.8) < 0.04
        assert low <= factors.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert not seen[2]  # strength 0 leaves the crop as it is


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("shape", [(120, 160), (200, 90), (64, 64), (30, 40)])
def test_resize_centre_is_torchvisions(shape):
    image = photo(*shape)
    big = tv.resize(Image.fromarray(image), round(64 * 8 / 7))
    theirs = np.asarray(tv.center_crop(big, 64), float).transpose(2, 0, 1)
    ours = v.resize_centre(image, 64)
    assert ours.shape == (3, 64, 64) and ours.dtype == np.uint8
    assert np.abs(ours - theirs).mean() < 8  # cut to whole source pixels before resizing instead of after


def test_resize_centre_of_a_thread_takes_no_memory():
    assert v.resize_centre(np.full((1, 60_000, 3), 9, np.uint8), 224).shape == (3, 224, 224)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_to_float_is_torchvisions_normalize(dtype, tolerance):
    x = torch.from_numpy(photo()).permute(2, 0, 1)[None]
    theirs = tv.normalize(x / 255.0, v.MEAN, v.STD)
    ours = v.to_float(x, dtype)
    assert ours.dtype == dtype and torch.allclose(ours.float(), theirs, atol=tolerance)
