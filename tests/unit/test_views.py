"""Views are a pure function, cut as torchvision's, and whole for any shape of image."""

import hashlib
import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from seer_scale.bench.data import reference
from seer_scale.config import Crop, Views
from seer_scale.data.transforms import on_device, photometric
from seer_scale.data.transforms import views as v
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.on_device import to_float
from tests.pictures import apart, encode, photo

KINDS = Views(crops=(Crop(num=2, size=64), Crop(num=3, size=32, scale=(0.05, 0.14))))
WIDE = Views(crops=(Crop(num=2, size=(48, 80)), Crop(num=3, size=(40, 24), scale=(0.05, 0.14))))


def test_views_are_a_pure_function():
    image = photo()
    first = v.make_views(image, KINDS, 1, 2, 3)
    assert [c.shape for c in first] == [(2, 3, 64, 64), (3, 3, 32, 32)] and all(c.dtype == np.uint8 for c in first)
    np.random.seed(7), torch.manual_seed(7)
    again = v.make_views(image.copy(), KINDS, 1, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and np.array_equal(image, photo())
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not any(np.array_equal(a, b) for a, b in zip(first, v.make_views(image, KINDS, *other)))


def test_crops_of_any_height_and_width_are_torchvisions():
    """Regions are those of squares, as RandomResizedCrop's are, resized to another shape."""
    image, plain = photo(), dict(flip=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
    wide = v.make_views(image, Views(crops=WIDE.crops, **plain), 1, 2, 3)
    assert [c.shape for c in wide] == [(2, 3, 48, 80), (3, 3, 40, 24)]
    boxes, of_squares = (
        [box for *_, box in v._boxes(views, v._draws(views, 1, 2, 3), *image.shape[:2])] for views in (WIDE, KINDS)
    )
    assert boxes == of_squares
    for box, crop in zip(boxes, (crop for kind in wide for crop in kind)):
        theirs = tv.resized_crop(Image.fromarray(image), *box, crop.shape[1:])
        assert apart(crop, np.asarray(theirs).transpose(2, 0, 1)) <= 2


def test_a_crop_does_not_depend_on_the_kinds_after_it():
    alone = v.make_views(photo(), Views(crops=KINDS.crops[:1]), 1, 2, 3)
    assert np.array_equal(alone[0], v.make_views(photo(), KINDS, 1, 2, 3)[0])


@pytest.mark.skipif(v.native() is None, reason="the kernels were not built")
def test_views_are_those_of_earlier_versions():
    """So that a run goes on as it began: a checksum of what was made before crops had photometrics of their own."""
    at = np.arange(90 * 120)
    image = np.stack([at * k // 7 + at // 120 * 3 for k in (1, 2, 3)], -1).reshape(90, 120, 3).astype(np.uint8)
    made = hashlib.sha256()
    for index in range(8):
        for kind in v.make_views(image, KINDS, 1, 2, index):
            made.update(kind.tobytes())
    assert made.hexdigest() == "480710789923254844e9f49c91dd45acfb24cbe576e84563fb0f951b01915304"


def test_each_crop_has_the_photometrics_of_its_kind(monkeypatch):
    """Of views where the kind says nothing; of its place where the kind has a list; done here or on the device."""
    first = Crop(num=2, size=32, blur_p=(1.0, 0.0), solarize_p=(0.0, 1.0), grayscale_p=1.0)
    asked = Views(crops=(first, Crop(num=1, size=16, jitter_p=0.0)), jitter_p=1.0, grayscale_p=0.0, blur_p=0.0)
    data = encode(Image.fromarray(photo()), "PNG")
    here = v.make_views(photo(), asked, 0, 0, 0)
    out = [np.empty((c.num, 3, c.size, c.size), np.uint8) for c in asked.crops]
    out += [np.empty((c.num, photometric.PARAMS_PER_CROP), np.float32) for c in asked.crops]
    for n, kind in enumerate(v.load_views(data, asked, 0, 0, 0, out)[:2]):
        params = torch.from_numpy(out[2 + n])
        assert apart(on_device.apply_and_round(torch.from_numpy(kind), params), here[n]) <= 1
    (blurred, solarized), (third,) = out[2], out[3]
    assert blurred[-2] > 0 and blurred[-1] == 0 and solarized[-2] == 0 and solarized[-1] == 1
    assert all(photometric.GREY in params[1:-2:2] and params[1] >= 0 for params in out[2])
    assert (third[1:-2:2] == -1).all() and not third[-2:].any()


@settings(deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), index=st.integers(0, 10**9))
def test_any_shape_of_image_gives_whole_crops(height, width, index):
    image = np.full((height, width, 3), 77, np.uint8)
    plain = Views(crops=KINDS.crops + WIDE.crops, jitter_p=0.0)
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
    assert apart(v.resize(image, (48, 80)), Image.fromarray(image).resize((80, 48), Image.BILINEAR)) <= 2


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("shape", [(120, 160), (200, 90), (64, 64), (30, 40)])
def test_resize_centre_is_torchvisions(shape):
    image = photo(*shape)
    big = tv.resize(Image.fromarray(image), round(64 * 8 / 7))
    theirs = np.asarray(tv.center_crop(big, 64), float).transpose(2, 0, 1)
    ours = v.resize_centre(image, 64)
    assert ours.shape == (3, 64, 64) and ours.dtype == np.uint8
    assert np.abs(ours - theirs).mean() < 8  # cut to whole source pixels before resizing instead of after


@pytest.mark.parametrize("shape", [(120, 160), (200, 90), (90, 130)])
def test_the_centre_of_another_shape_is_of_what_covers_it(shape):
    image = photo(*shape)
    share = max(round(48 * 8 / 7) / shape[0], round(80 * 8 / 7) / shape[1])
    big = tv.resize(Image.fromarray(image), [round(side * share) for side in shape])
    theirs = np.asarray(tv.center_crop(big, (48, 80)), float).transpose(2, 0, 1)
    ours = v.resize_centre(image, (48, 80))
    assert ours.shape == (3, 48, 80) and np.abs(ours - theirs).mean() < 8
    assert np.array_equal(v.resize_centre(image, (64, 64)), v.resize_centre(image, 64))


def test_resize_centre_of_a_thread_takes_no_memory():
    assert v.resize_centre(np.full((1, 60_000, 3), 9, np.uint8), 224).shape == (3, 224, 224)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_to_float_is_torchvisions_normalize(dtype, tolerance):
    x = torch.from_numpy(photo()).permute(2, 0, 1)[None]
    theirs = tv.normalize(x / 255.0, v.MEAN, v.STD)
    ours = to_float(x, dtype)
    assert ours.dtype == dtype and torch.allclose(ours.float(), theirs, atol=tolerance)


SMALL = Views(
    crops=(Crop(num=2, size=32, scale=(0.3, 1.0)), Crop(num=2, size=(16, 12), scale=(0.1, 0.3))),
    jitter_p=0.0,
    blur_p=0.0,
    grayscale_p=0.0,
)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("shape", [(480, 640), (64, 90), (30, 20), (1000, 333)])
def test_views_of_a_smaller_decoding_are_those_of_the_whole(shape, orientation):
    """Boxes are those of the full image, to a pixel, however large its decoding; smaller only where nothing is lost."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(smooth(*shape)), quality=95, exif=exif.tobytes())
    for index in range(20):
        whole = v.make_views(decode(data), SMALL, 0, 0, index)
        for a, b in zip(v.load_views(data, SMALL, 0, 0, index), whole):
            assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 6


def smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([255 * rows / height, 255 * columns / width, 128 + 100 * np.sin(6 * rows / height)], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "CMYK"])
def test_every_format_gives_the_views_of_its_pixels(form):
    image = Image.fromarray(photo()).convert("CMYK" if form == "CMYK" else "RGB")
    out = io.BytesIO()
    image.save(out, "JPEG" if form == "CMYK" else form)
    views = Views(
        crops=(Crop(num=2, size=100), Crop(num=1, size=120, scale=(0.05, 0.14)))
    )  # none allows a smaller decoding
    got = v.load_views(out.getvalue(), views, 0, 0, 7)
    assert all(np.array_equal(a, b) for a, b in zip(got, v.make_views(decode(out.getvalue()), views, 0, 0, 7)))


@pytest.mark.parametrize("junk", [b"", b"abc", b"\0" * 7, b"\xff\xfe\0\x02"])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_boxes_are_those_of_the_image_as_it_stands(junk, orientation):
    """Also where our look at the header and Pillow's disagree about which way up it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(photo(90, 160)), quality=95, exif=exif.tobytes())
    data = data[:20] + junk + data[20:]  # behind JFIF's segment
    assert data[:4] == b"\xff\xd8\xff\xe0"
    views = Views(crops=(Crop(num=3, size=100),))
    for a, b in zip(v.load_views(data, views, 0, 0, 7), v.make_views(decode(data), views, 0, 0, 7)):
        assert np.array_equal(a, b)


def test_decoding_is_smaller_only_where_every_crop_allows_it():
    data = encode(Image.fromarray(smooth(480, 640)))
    for least, want in (
        ((240, 320), (240, 320)),
        ((241, 320), (480, 640)),
        ((60, 80), (60, 80)),
        ((61, 80), (120, 160)),
        ((500, 700), (480, 640)),
    ):
        assert decode(data, lambda *_, least=least: least).shape[:2] == want
    told = []
    decode(encode(Image.fromarray(smooth(50, 70)), "PNG"), lambda *size: told.append(size) or size)
    assert told == [(50, 70)]  # it is as large as it is


def test_the_whole_pipeline_has_swavs_distribution():
    """Moments of what crops show, over 2,880 of each: colours, contrast, saturation, sharpness, how many are grey or
    sharp."""
    views = Views(crops=(Crop(num=4, size=32),))
    files = [encode(Image.fromarray(grainy(seed)), quality=92) for seed in range(12)]
    torch.manual_seed(0)
    random.seed(0)
    theirs_of = reference(views, 0)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (v.MEAN, v.STD))
    ours, theirs = [], []
    for turn in range(60):
        for n, data in enumerate(files):
            ours += [describe(crop) for crop in v.load_views(data, views, 1, turn, n)[0]]
            theirs += [describe(((crop * std + mean) * 255).numpy()) for crop in theirs_of(data)]
    a, b = np.array(ours), np.array(theirs)
    for moment in (1, 2):
        x, y = a**moment, b**moment
        z = (x.mean(0) - y.mean(0)) / np.sqrt((x.var(0) + y.var(0)) / len(x))
        assert np.abs(z).max() < 3.5, (moment, z)


def grainy(seed: int) -> np.ndarray:
    grain = np.random.default_rng(seed).integers(-40, 41, (66, 88, 1))
    return np.clip(photo(66, 88, seed).astype(int) + grain, 0, 255).astype(np.uint8)


def describe(crop: np.ndarray) -> list[float]:
    """Of uint8 or float [3, S, S] in [0, 255]."""
    x = np.asarray(crop, float)
    saturation, grain = (x.max(0) - x.min(0)).mean(), np.abs(np.diff(x, 2, axis=2)).mean()
    return [
        *x.mean((1, 2)),
        x.std(),
        saturation,
        grain,
        grain / (x.std() + 1),
        grain > 0.25 * x.std(),
        saturation < 1.5,
    ]
