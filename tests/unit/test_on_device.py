"""Photometrics of a whole batch at once: each crop to one level what the CPU makes of it alone, and no crop's pixels
asked for on the way; and a batch as the engine takes it."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import functional as tv

from seer_scale.config import Crop, Views
from seer_scale.data.batch import Batch
from seer_scale.data.transforms import on_device
from seer_scale.data.transforms import photometric as p
from seer_scale.data.transforms.views import DRAWS
from tests.pictures import apart, photo

NOTHING = p.PhotometricParams(False, (), 0.0)


def encoded(hows) -> torch.Tensor:
    return torch.from_numpy(np.stack([p.encode(how) for how in hows]))


def stacked(images) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def at_once(images, hows) -> np.ndarray:
    return on_device.apply_photometric(stacked(images), encoded(hows)).numpy()


def one_by_one(images, hows) -> np.ndarray:
    out = np.empty((len(images), 3, *images[0].shape[:2]), np.uint8)
    for image, how, planes in zip(images, hows, out):
        p.apply_photometric(image, how, planes)
    return out


def noise(size: int, seed: int) -> np.ndarray:
    """Every kind of pixel: any colour, black, white, grey, and greys with one channel a level or two off."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size, 3))
    kind = rng.integers(0, 5, (size, size))
    image[kind == 1] = image[kind == 1][:, :1] + rng.integers(0, 3, image[kind == 1].shape)
    image[kind == 2] = image[kind == 2] // 128 * 255
    image[kind == 3] = image[kind == 3][:, :1]
    return image.clip(0, 255).astype(np.uint8)


def drawn(num: int, seed: int, views: Views | None = None) -> list[p.PhotometricParams]:
    how = (views or Views(solarize_p=0.3)).photometric[0][0]
    return [p.draw(how, iter(u)) for u in np.random.default_rng(seed).random((num, DRAWS)).tolist()]


# ------------------------------------------------------------------------------------------- the CPU's

number = st.floats(0, 3, width=32)
extreme = st.builds(
    lambda flip, factors, order, *last: p.PhotometricParams(flip, tuple((op, factors[op]) for op in order), *last),
    st.booleans(), st.tuples(number, number, number, st.floats(-0.5, 0.5, width=32), number),
    st.lists(st.integers(0, 4), unique=True), st.sampled_from([0.0, 0.125, 1.0]) | st.floats(0.125, 12, width=32),
    st.booleans(),
)  # fmt: skip


@pytest.mark.skipif(p.native() is None, reason="the kernels were not built")
@settings(deadline=None, max_examples=80)
@given(
    size=st.sampled_from([8, 16, 33, 96]), seed=st.integers(0, 2**20), more=st.lists(extreme, min_size=1, max_size=4)
)
def test_each_crop_is_the_cpus_to_one_level(size, seed, more):
    """Of which a half is the CPU's rounding before the blur and a half that after it. Nothing is wider at the wraps of
    the hue or in near-greys, though hue itself jumps there: the turned colour does not."""
    hows = [*drawn(4, seed), *more]
    images = [(photo, noise)[i % 2](*[size] * (2 - i % 2), seed + i) for i in range(len(hows))]
    images = [image[: size - seed % 3 * size // 4] for image in images]  # a square, or less high than wide
    assert apart(at_once(images, hows), one_by_one(images, hows)) <= 1.01


@pytest.mark.skipif(p.native() is None, reason="the kernels were not built")
def test_each_operation_is_the_cpus_to_one_level():
    ways = [p.PhotometricParams(False, ((op, f),), 0.0) for op in (0, 1, 2) for f in (0.0, 0.3, 1.0, 1.5, 2.0)]
    ways += [p.PhotometricParams(False, ((p.HUE, f),), 0.0) for f in (-0.5, -0.2, 0.0, 1 / 6, 0.25, 0.5)]
    ways += [p.PhotometricParams(False, ((p.GREY, 0.0),), 0.0), p.PhotometricParams(True, (), 0.0)]
    ways += [p.PhotometricParams(False, (), sigma) for sigma in (0.125, 0.5, 2.0, 9.0, 30.0)]
    ways += [p.PhotometricParams(False, (), sigma, solarize=True) for sigma in (0.0, 2.0)]
    for size in (8, 33, 96):
        for images in ([noise(size, i) for i in range(len(ways))], [photo(size, size, i) for i in range(len(ways))]):
            assert apart(at_once(images, ways), one_by_one(images, ways)) <= 1.01


def test_blur_weights_are_the_cpus():
    sigmas = np.float32([0.1, 0.34, 0.5, 1.0, 1.43, 2.0, 9.0])
    for sigma, line in zip(sigmas, on_device.gaussians(torch.from_numpy(sigmas)).numpy()):
        theirs = p.gaussian(float(sigma))
        margin = (len(line) - len(theirs)) // 2
        assert len(line) == 2 * 27 + 1 and not line[:margin].any() and not line[len(line) - margin :].any()
        assert np.allclose(line[margin : len(line) - margin], theirs, rtol=1e-6, atol=0)


# -------------------------------------------------------------------------------------- torchvision's


@pytest.mark.parametrize(
    "name,op,factors",
    [
        ("brightness", p.BRIGHTNESS, (0.0, 0.2, 0.7, 1.0, 1.8, 4.0)),
        ("contrast", p.CONTRAST, (0.0, 0.2, 0.7, 1.0, 1.8, 4.0)),
        ("saturation", p.SATURATION, (0.0, 0.2, 0.7, 1.0, 1.8, 4.0)),
        ("hue", p.HUE, (-0.5, -0.2, -0.03, 0.0, 0.1, 1 / 3, 0.5)),
    ],
)
def test_jitter_is_torchvisions(name, op, factors):
    """To its grey's weights, which sum to 0.9999: a blend magnifies 0.0255 by the factor less 1."""
    images = [noise(61, i) for i in range(len(factors))]
    ours = at_once(images, [p.PhotometricParams(False, ((op, f),), 0.0) for f in factors])
    for image, factor, made in zip(stacked(images) / 255, factors, ours):
        assert apart(made, 255 * getattr(tv, f"adjust_{name}")(image, factor)) <= 0.08


def test_blur_grey_and_flip_are_torchvisions():
    images, sigmas = [noise(64, i)[:, :40] for i in range(6)], (0.125, 0.5, 1.0, 2.0, 5.0, 9.0)
    ours = at_once(images, [p.PhotometricParams(True, ((p.GREY, 0.0),), sigma) for sigma in sigmas])
    for image, sigma, made in zip(stacked(images) / 255, sigmas, ours):
        width = 2 * int(np.ceil(3 * sigma)) + 1
        theirs = tv.gaussian_blur(tv.rgb_to_grayscale(tv.hflip(image), 3), [width, width], [sigma, sigma])
        assert apart(made, 255 * theirs) <= 0.05


# ------------------------------------------------------------------------------------------ properties


def test_nothing_to_do_leaves_every_pixel_as_it_is():
    images = [noise(40, i) for i in range(5)]
    want = stacked(images)
    asked = [
        NOTHING,
        p.PhotometricParams(False, ((p.BRIGHTNESS, 1.0), (p.CONTRAST, 1.0), (p.SATURATION, 1.0)), 0.0),
        NOTHING,
    ]
    busy = p.PhotometricParams(True, ((p.HUE, 0.3), (p.CONTRAST, 0.1)), 3.0)
    ours = torch.from_numpy(at_once(images, [*asked, busy, p.PhotometricParams(True, (), 0.0)]))
    assert torch.equal(ours[:3], want[:3].float()) and torch.equal(ours[4], want[4].flip(2).float())
    assert not torch.equal(ours[3], want[3].float()) and torch.equal(want, stacked(images))  # nor are the crops touched


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), hows=st.lists(extreme, min_size=2, max_size=9), a_time=st.integers(1, 9))
def test_a_crop_does_not_depend_on_its_batch(seed, hows, a_time):
    """Alone, in any order, in chunks of any size."""
    images, order = [noise(24, seed + i) for i in range(len(hows))], np.random.default_rng(seed).permutation(len(hows))
    together = at_once(images, hows)
    for i, (image, how) in enumerate(zip(images, hows)):
        assert apart(at_once([image], [how])[0], together[i]) < 2e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "PHOTOMETRIC_CHUNK", a_time * 3 * 24 * 24)
        assert apart(at_once([images[i] for i in order], [hows[i] for i in order]), together[order]) < 2e-3


def test_operations_follow_one_another_in_their_order():
    ops = ((p.BRIGHTNESS, 1.9), (p.CONTRAST, 0.3), (p.SATURATION, 2.5), (p.HUE, 0.2))
    orders = ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2])
    image = noise(32, 0)
    together = at_once([image] * 4, [p.PhotometricParams(False, tuple(ops[i] for i in order), 0.0) for order in orders])
    for order, made in zip(orders, together):
        theirs = stacked([image])[0] / 255
        for i in order:
            theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[i](
                theirs, ops[i][1]
            )
        assert apart(made, 255 * theirs) <= 0.5
    assert all(apart(a, b) > 20 for i, a in enumerate(together) for b in together[:i])


def test_packed_says_all_that_is_drawn():
    for how in drawn(300, 3):
        flip, *pairs, sigma, solarize = p.encode(how).tolist()
        ops = [(int(op), factor) for op, factor in zip(pairs[::2], pairs[1::2]) if op >= 0]
        assert len(pairs) + 3 == p.PARAMS_PER_CROP
        assert (flip, [op for op, _ in ops], solarize) == (how.flip, [op for op, _ in how.ops], how.solarize)
        assert [sigma, *(f for _, f in ops)] == pytest.approx([how.sigma, *(f for _, f in how.ops)], rel=1e-6)


def test_no_crops():
    none = torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    assert on_device.apply_photometric(none, torch.empty(0, p.PARAMS_PER_CROP)).shape == none.shape


def test_half_precision_is_refused():
    with torch.autocast("cpu"), pytest.raises(RuntimeError):
        at_once([photo(32, 32)], [p.PhotometricParams(False, (), 2.0)])


# ---------------------------------------------------------------------------------------------- device


class Alive(TorchDispatchMode):
    """The most bytes that tensors made on a device held at once."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.peak, self.tensors = device, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors = [ref for ref in self.tensors if ref() is not None]
        self.tensors += [
            weakref.ref(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == self.device
        ]
        held = {s._cdata: s.nbytes() for s in (ref().untyped_storage() for ref in self.tensors)}
        self.peak = max(self.peak, sum(held.values()))
        return out


@pytest.mark.parametrize("num,size,copies", [(64, 96, 4.0), (1024, 224, 1.4)])
def test_pixels_are_never_asked_for_and_memory_is_bounded(num, size, copies):
    """Crops without data ("meta") refuse whatever needs a value on the host; a large batch is held but once."""
    crops = torch.empty(num, 3, size, size, dtype=torch.uint8, device="meta")
    with Alive("meta") as alive:
        out = on_device.apply_photometric(crops, encoded(drawn(num, 5)))
    assert out.device.type == "meta" and out.shape == crops.shape and out.dtype == torch.float32
    assert alive.peak <= copies * 4 * crops.numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_host_never_waits_for_a_gpu():
    images, hows = [photo(64, 64, i) for i in range(48)], drawn(48, 1)
    crops, how = stacked(images).cuda(), encoded(hows)
    on_device.apply_photometric(crops, how)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = on_device.apply_photometric(crops, how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert apart(ours.cpu(), at_once(images, hows)) <= 0.05


@pytest.mark.parametrize("later", [False, True], ids=["views are done", "photometrics here"])
def test_micro_batches_are_equal_parts_of_the_images(later):
    """Of each kind all crops of an image are in one part; parts hold what the whole batch would, crop-major."""
    crops, b = (Crop(num=2, size=16), Crop(num=3, size=(8, 12))), 6
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(256, (c.num * b, 3, *c.shape), generator=generator, dtype=torch.uint8) for c in crops]
    params = [encoded(drawn(c.num * b, seed)) for seed, c in enumerate(crops)] if later else []
    batch = Batch(pixels, params, torch.arange(b), 0, [])

    def views(num: int) -> list[list[torch.Tensor]]:
        cpu, form = torch.device("cpu"), torch.channels_last
        return [make() for make in on_device.micro_batches(batch, crops, num, cpu, form)]

    [whole], parts = views(1), views(3)
    for kind, c in enumerate(crops):
        expected = on_device.apply_photometric(pixels[kind], params[kind]) if later else pixels[kind]
        assert torch.equal(whole[kind], on_device.to_float(expected))
        assert whole[kind].is_contiguous(memory_format=torch.channels_last)
        joined = torch.cat([part[kind].unflatten(0, (c.num, -1)) for part in parts], dim=1).flatten(0, 1)
        assert [len(part[kind]) for part in parts] == [c.num * b // 3] * 3
        assert torch.allclose(joined, whole[kind], atol=1e-4)
