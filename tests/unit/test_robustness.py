"""Corruptions are those of ImageNet-C's code, functions of the image's number; the figure is that of any number of
ranks, before and after a kill."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seer_scale.distributed import World
from seer_scale.errors import ConfigError, UserError
from seer_scale.evaluate import context
from seer_scale.evaluate.corruptions import CORRUPTIONS, LEFT_OUT, SEVERITIES, corrupt
from seer_scale.evaluate.registry import task_class
from seer_scale.evaluate.run import read_settings
from seer_scale.evaluate.task import Result
from tests.pictures import photo
from tests.problems import refused
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.unit.test_evaluate import evaluation_of
from tests.unit.test_knn import write_corpus

SIDE = 64


def batch(num: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.stack([photo(SIDE, SIDE, seed=n).transpose(2, 0, 1) for n in range(num)]))


class Fixed:
    """Draws that a reference is given, too."""

    def __init__(self, angle: float = 0.0):
        self.angle = angle

    def uniform(self, low, high, size=None):
        return self.angle if size is None else np.random.default_rng(0).uniform(low, high, size)


def given(name: str, level: int, draw: object = None) -> tuple[np.ndarray, np.ndarray]:
    """A picture [S, S, 3] in [0, 1], and what is made of it."""
    x = batch(1).float() / 255
    made = CORRUPTIONS[name](x, [draw], level)
    return x[0].permute(1, 2, 0).double().numpy(), made[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("level", [0, 4])
def test_defocus_is_that_of_opencv(level):
    cv2 = pytest.importorskip("cv2")
    radius, sigma = [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)][level]
    at, soft = (np.arange(-8, 9), (3, 3)) if radius <= 8 else (np.arange(-radius, radius + 1), (5, 5))
    xs, ys = np.meshgrid(at, at)
    disk = np.array((xs**2 + ys**2) <= radius**2, np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), ksize=soft, sigmaX=sigma)
    x, made = given("defocus_blur", level)
    assert np.abs(cv2.filter2D(x, -1, kernel) - made).max() < 1e-5


@pytest.mark.parametrize("level", [0, 4])
def test_zoom_and_elastic_are_those_of_scipy(level):
    ndimage = pytest.importorskip("scipy.ndimage")
    x, made = given("zoom_blur", level)
    factors = [np.arange(1, 1.11, 0.01), 0, 0, 0, np.arange(1, 1.31, 0.03)][level]
    total = np.zeros_like(x)
    for factor in factors:
        inner = int(np.ceil(SIDE / factor))
        top = (SIDE - inner) // 2
        part = x[top : top + inner, top : top + inner]
        total += ndimage.zoom(part, (factor, factor, 1), order=1)[:SIDE, :SIDE]
    assert np.abs((x + total) / (len(factors) + 1) - made).max() < 1e-4

    x, made = given("elastic_transform", level, Fixed())
    moves = np.random.default_rng(0).uniform(-0.005 * SIDE, 0.005 * SIDE, (2, SIDE, SIDE)).astype(np.float32)
    alpha = 250 * [0.05, 0.065, 0.085, 0.1, 0.12][level]
    dx, dy = (ndimage.gaussian_filter(m, SIDE * 0.01, mode="reflect", truncate=3) * alpha for m in moves)
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    for channel in range(3):
        expected = ndimage.map_coordinates(x[..., channel], [rows + dy, columns + dx], order=1, mode="reflect")
        assert np.abs(expected - made[..., channel]).max() < 1e-4


def test_motion_is_a_trace_in_one_direction():
    """As the published code's shifts of the whole image."""

    def shift(image, dx, dy):
        shifted = np.roll(image, dx, axis=1)
        if dx:
            shifted[:, slice(dx, None) if dx < 0 else slice(dx)] = shifted[:, [dx - 1 if dx < 0 else dx]]
        shifted = np.roll(shifted, dy, axis=0)
        if dy:
            shifted[slice(dy, None) if dy < 0 else slice(dy)] = shifted[[dy - 1 if dy < 0 else dy]]
        return shifted

    for angle in (-37.0, 0.0, 20.0):
        x, made = given("motion_blur", 1, Fixed(angle))
        radius, sigma = 15, 5
        width = 2 * radius + 1
        weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
        weights /= weights.sum()
        point = width * np.sin(np.deg2rad(angle)), width * np.cos(np.deg2rad(angle))
        out = np.zeros_like(x)
        for i in range(width):
            dy = -int(np.ceil(i * point[0] / np.hypot(*point) - 0.5))
            dx = -int(np.ceil(i * point[1] / np.hypot(*point) - 0.5))
            out += weights[i] * shift(x, dx, dy)
        assert np.abs(out - made).max() < 1e-5


def test_digital_ones_are_those_of_pillow_and_hsv():
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    x, made = given("brightness", 2)
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    assert np.abs(hsv_to_rgb(hsv) - made).max() < 1e-5
    x, made = given("contrast", 2)
    assert np.abs((x - x.mean((0, 1))) * 0.2 + x.mean((0, 1)) - made).max() < 1e-5
    image = Image.fromarray(batch(1)[0].permute(1, 2, 0).numpy())
    out = io.BytesIO()
    image.save(out, "JPEG", quality=15)
    coarse = image.resize((SIDE * 2 // 5, SIDE * 2 // 5), Image.Resampling.BOX).resize(
        image.size, Image.Resampling.NEAREST
    )
    for name, expected in (("jpeg_compression", Image.open(out)), ("pixelate", coarse)):
        found = corrupt(batch(1), np.array([0]), name, 3, 0)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.asarray(expected)), name


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_the_image_and_grows(name):
    pixels, numbers = batch(), np.array([7, 3, 11])
    levels = [corrupt(pixels, numbers, name, severity, 0) for severity in SEVERITIES]
    assert levels[0].dtype == torch.uint8 and levels[0].shape == pixels.shape
    alone = corrupt(pixels[1:2], numbers[1:2], name, 3, 0)
    assert (alone[0].int() - levels[2][1].int()).abs().max() <= 1, "in any batch"
    off = [(level.float() - pixels.float()).abs().mean().item() for level in levels]
    assert off[0] > 0.3 and off[-1] > off[0]
    is_drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    same_other_number = corrupt(pixels[1:2], np.array([4]), name, 3, 0)
    assert torch.equal(same_other_number, alone) != is_drawn
    assert torch.equal(corrupt(pixels[1:2], numbers[1:2], name, 3, 1), alone) != is_drawn


def test_what_is_left_out_is_named():
    assert len(CORRUPTIONS) + len(LEFT_OUT) == 15


def measured(corpus: Path, world: World = World(), **more: object) -> Result:
    options = {"corruptions": "contrast,gaussian_noise", "severities": "5,1", "size": "32"} | (more or {"k": "5"})
    evaluation = evaluation_of(corpus, world, task="robustness", **options)
    result = task_class("robustness")(evaluation.options).measure(evaluation)
    evaluation.clean()
    return result


def on_ranks(rank: int, size: int, corpus: Path) -> list:
    context.SHARD = 8
    world = world_of(rank, size)
    return [measured(corpus, world).table, measured(corpus, world, classifier="linear").table]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_same_figures_on_two_ranks_and_after_a_kill(corpus, monkeypatch):
    monkeypatch.setattr(context, "SHARD", 8)
    alone = on_ranks(0, 1, corpus)
    assert run_ranks(2, on_ranks, corpus) == [alone, alone]
    result = measured(corpus)
    assert [(row["corruption"], row["severity"]) for row in result.table] == [
        ("none", 0), ("contrast", 1), ("contrast", 5), ("gaussian_noise", 1), ("gaussian_noise", 5)
    ]  # fmt: skip
    mean = np.mean([row["top1"] for row in result.table[1:]])
    assert result.scores["robustness/top1"] == pytest.approx(mean)
    assert result.scores["robustness/error_beyond_clean"] == pytest.approx(result.table[0]["top1"] - mean)

    killed = evaluation_of(corpus, task="robustness", corruptions="contrast", severities="5,1", size="32", k="5")
    forward, model = killed.subject.model.forward, killed.subject.model

    def until(images):
        if model.seen >= 33 + 15 + 2 * 12:  # train, test, a shard of both severities and a batch
            raise KeyboardInterrupt
        return forward(images)

    model.forward = until
    with pytest.raises(KeyboardInterrupt):
        task_class("robustness")(killed.options).measure(killed)
    again = evaluation_of(corpus, task="robustness", corruptions="contrast", severities="5,1", size="32", k="5")
    table = task_class("robustness")(again.options).measure(again).table
    kept = sorted(path.name.split("-")[0] for path in (again.folder / "unfinished").iterdir())
    assert kept == ["features", "features", "robustness"], "of the clean images, and figures"
    more = evaluation_of(corpus, task="robustness", corruptions="contrast", severities="5,1", size="32", k="5")
    assert task_class("robustness")(more.options).measure(more).table == table and not more.subject.model.seen
    again.clean()
    one = replace(more.options, severities=(5,), corruptions=("contrast",))
    told = task_class("robustness")(one)._result(table[0], table[1:], ("contrast",), "").protocol
    assert "1 corruption of ImageNet-C at severity 5;" in told and "at severities 1, 5;" in result.protocol
    assert again.subject.model.seen == 2 * (15 - 8) and table == result.table[:3]


def test_bad_options_are_told_together(corpus):
    with pytest.raises(ConfigError) as told:
        read_settings("robustness", {"corruptions": "fogg,snow", "severities": "1,1", "k": "0"})
    assert ("--corruptions", "did you mean fog?") in [(p.key, p.nearest) for p in told.value.problems]
    assert {p.key for p in told.value.problems} == {"--corruptions", "--severities", "--k"}
    with refused("--size", 16, (32,), error=UserError):
        measured(corpus, size="16")
