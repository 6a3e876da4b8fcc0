"""Flip, jitter, grey, blur and solarisation: torchvision's to two levels, drawn as often as asked, the same in C and in
torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as tv

from seer_scale.config import Crop, Photometric, Views
from seer_scale.data.transforms import photometric as p
from seer_scale.data.transforms.views import DRAWS
from tests.pictures import apart, photo

OPS = {"brightness": p.BRIGHTNESS, "contrast": p.CONTRAST, "saturation": p.SATURATION, "hue": p.HUE}


@pytest.fixture(params=["c", "torch"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(p, "native", lambda: None)
    elif p.native() is None:
        pytest.skip("the kernels were not built")


def changed(image: np.ndarray, flip=False, ops=(), sigma=0.0, solarize=False) -> np.ndarray:
    planes = np.full((3, *image.shape[:2]), 77, np.uint8)
    p.apply_photometric(image, p.PhotometricParams(flip, tuple(ops), sigma, solarize), planes)
    return planes


def of_each(**views: object) -> Photometric:
    """That of the only kind of crop."""
    ((how,),) = Views(crops=(Crop(num=1),), **views).photometric
    return how


def exact(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1) / 255.0


@pytest.mark.parametrize("name,factors", [
    ("brightness", (0.2, 0.7, 1.0, 1.8)), ("contrast", (0.2, 0.7, 1.0, 1.8)),
    ("saturation", (0.0, 0.2, 0.7, 1.0, 1.8)), ("hue", (-0.5, -0.2, -0.03, 0.0, 0.1, 0.2, 0.5)),
])  # fmt: skip
def test_jitter_is_torchvisions_to_two_levels(kernel, name, factors):
    rng = np.random.default_rng(0)
    for image in (photo(64, 64), rng.integers(0, 256, (61, 83, 3)).astype(np.uint8), photo(600, 600)):
        for factor in factors:
            theirs = 255 * getattr(tv, f"adjust_{name}")(exact(image), factor).numpy()
            assert apart(changed(image, ops=[(OPS[name], factor)]), theirs) <= 2


def test_operations_follow_one_another(kernel):
    """In each order, as torchvision does them without rounding in between."""
    image = photo(80, 112)
    how = [(p.HUE, 0.1), (p.SATURATION, 1.5), (p.CONTRAST, 0.6), (p.BRIGHTNESS, 1.4), (p.GREY, 0.0)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2, 4]):
        theirs = exact(image)
        for op, factor in (how[i] for i in order):
            name = {v: k for k, v in OPS.items()}.get(op)
            theirs = getattr(tv, f"adjust_{name}")(theirs, factor) if name else tv.rgb_to_grayscale(theirs, 3)
        ours = changed(image, ops=[how[i] for i in order])
        assert np.abs(ours - 255 * theirs.numpy()).mean() < 1 and apart(ours, 255 * theirs.numpy()) <= 5


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 9.0])
def test_blur_is_torchvisions_to_two_levels(kernel, sigma):
    image = photo(48, 80)
    width = 2 * int(np.ceil(3 * sigma)) + 1
    theirs = 255 * tv.gaussian_blur(exact(image), [width, width], [sigma, sigma]).numpy()
    assert apart(changed(image, sigma=sigma), theirs) <= 2


def test_solarisation_is_torchvisions_after_the_blur(kernel):
    image = np.arange(3 * 256).astype(np.uint8).reshape(16, 16, 3)  # every level in every channel
    theirs = tv.solarize(torch.from_numpy(image).permute(2, 0, 1), 128)
    assert np.array_equal(changed(image, solarize=True), theirs)
    image = photo(80, 80)
    theirs = 255 * tv.solarize(tv.gaussian_blur(exact(image), [13, 13], [2.0, 2.0]), 0.5).numpy()
    assert apart(changed(image, sigma=2.0, solarize=True), theirs) <= 2
    assert apart(tv.gaussian_blur(tv.solarize(exact(image), 0.5), [13, 13], [2.0, 2.0]) * 255, theirs) > 20


def test_flip_and_nothing(kernel):
    image = photo(40, 60)
    assert np.array_equal(changed(image), image.transpose(2, 0, 1))
    assert np.array_equal(changed(image, flip=True), image[:, ::-1].transpose(2, 0, 1))
    assert np.array_equal(changed(image[::-1]), image[::-1].transpose(2, 0, 1))  # not contiguous


def test_every_step_happens_as_often_as_asked(kernel):
    """Shares of flipped, grey, blurred and solarised crops within 5 standard errors of their probabilities, alone and
    together."""
    left = np.zeros((16, 16, 3), np.uint8)
    left[:, :8] = (250, 150, 20)
    asked = of_each(jitter_p=0.0, flip=0.3, grayscale_p=0.2, blur_p=0.6, blur_sigma=(1.0, 2.0), solarize_p=0.4)
    n = 3000
    draws = np.random.default_rng(1).random((n, DRAWS)).tolist()
    crops = [changed(left, *p.draw(asked, iter(d))).astype(int).transpose(1, 2, 0) for d in draws]
    flipped = np.array([c[0, 0].sum() < c[0, -1].sum() for c in crops])
    grey = np.array([np.ptp(c, axis=2).max() == 0 for c in crops])
    solarized = np.array([c.max() < 128 for c in crops])
    blurred = np.array([0 < c[8, 6:10].sum(1).min() or len({*c[8, :, 0]}) > 2 for c in crops])
    for share, probability in (
        (flipped, 0.3),
        (grey, 0.2),
        (blurred, 0.6),
        (solarized, 0.4),
        (flipped & grey, 0.06),
        (grey & blurred, 0.12),
        (blurred & solarized, 0.24),
    ):
        assert abs(share.mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / n)


def test_jitter_factors_are_torchvisions_ranges_in_any_order():
    seen: dict[int, list[float]] = {n: [] for n in range(5)}
    orders = set()
    how = of_each(jitter=(0.8, 1.5, 0.0, 0.2), jitter_p=0.8, grayscale_p=0.0)
    for d in np.random.default_rng(2).random((4000, DRAWS)).tolist():
        ops = p.draw(how, iter(d)).ops
        orders.add(tuple(op for op, _ in ops))
        for op, factor in ops:
            seen[op].append(factor)
    for n, low, high in ((p.BRIGHTNESS, 0.2, 1.8), (p.CONTRAST, 0.0, 2.5), (p.HUE, -0.2, 0.2)):
        factors = np.array(seen[n])
        assert abs(len(factors) / 4000 - 0.8) < 0.04
        assert low <= factors.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert not seen[p.SATURATION] and not seen[p.GREY]  # strength 0 leaves the crop as it is
    assert len(orders) == 1 + 6


@pytest.mark.skipif(p.native() is None, reason="the kernels were not built")
def test_the_kernel_leaves_small_numbers_of_the_process_alone():
    assert float(np.float32(1e-40) * np.float32(0.5)) > 0 and 5e-324 / 1 > 0
