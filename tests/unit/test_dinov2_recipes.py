"""Recipes with DINOv2's published hyperparameters: their schedules at iterations whose values the released code gave
(dinov2 b8931f7, vitl16_short.yaml and vitl14.yaml), and their parameters counted in it.

Its ramps, of the learning rate and the temperature, reach their end at the last of their n iterations, i / (n - 1);
these are functions of samples and reach it after the last, i / n. So `ramp` of what ours adds must be what it adds."""

from __future__ import annotations

import pytest
import torch

from seer_scale.config import Config, load_recipe, resolve
from seer_scale.distributed import World
from seer_scale.methods.dinov2.method import DINOv2
from seer_scale.methods.registry import build_method
from seer_scale.optim.schedules import LearningRate, weight_decay

SHORT, LONG, GIANT = "dinov2_vitl16_short", "dinov2_vitl14", "dinov2_vitg14"


def made(name: str) -> tuple[Config, DINOv2, int]:
    """The recipe, its method without weights, and its global batch."""
    raw = load_recipe(name) | {"data": {"path": "unused"}}
    config = resolve(raw, {}, world_size=raw["parallel"]["ranks"])
    with torch.device("meta"):
        method = build_method(config, World())
    assert isinstance(method, DINOv2)
    return config, method, config.train.global_batch


def ramp(iteration: int, num: int) -> float:
    return num / (num - 1) if iteration < num else 1.0


@pytest.mark.parametrize("name,iteration,warmup,published", [
    (SHORT, 1250, 12_500, 5.657307e-4), (SHORT, 12_499, 12_500, 5.656854e-3), (SHORT, 12_500, 12_500, 5.656854e-3),
    (SHORT, 68_750, 12_500, 2.828927e-3), (SHORT, 125_000, 12_500, 1e-6), (LONG, 362_500, 100_000, 1.737051e-4),
])  # fmt: skip
def test_learning_rate(name, iteration, warmup, published):
    config, _, batch = made(name)
    assert LearningRate(config)(iteration * batch) * ramp(iteration, warmup) == pytest.approx(published, rel=2e-7)


@pytest.mark.parametrize("name", [SHORT, LONG, GIANT])
def test_temperature_last_layers_weight_decay_and_momentum(name):
    config, method, batch = made(name)
    for iteration, published in ((0, 0.04), (1250, 0.04100003), (18_750, 0.05500040), (37_499, 0.07), (37_500, 0.07)):
        rise = method.teacher_temperature(iteration * batch) - 0.04
        assert 0.04 + rise * ramp(iteration, 37_500) == pytest.approx(published, abs=5e-9)
    groups = method.parameter_groups()
    for iteration, is_frozen in ((0, True), (1249, True), (1250, False)):
        frozen = {key for key, group in groups.items() if group.is_frozen(iteration * batch)}
        assert frozen == {key for key in groups if is_frozen and ".last_layer." in key and key.startswith("student")}
    if name == SHORT:
        ends = [weight_decay(config, 0), weight_decay(config, config.end()), method.teacher_momentum(0)]
        assert ends == pytest.approx([0.04, 0.4, 0.992])
    else:
        assert weight_decay(config, 362_500 * batch) == pytest.approx(0.139895, abs=5e-7)
        assert method.teacher_momentum(362_500 * batch) == pytest.approx(0.997746, abs=5e-7)
    assert method.teacher_momentum(config.end()) == 1


@pytest.mark.parametrize("name,backbone,heads", [
    (SHORT, None, [23_662_848]),
    (LONG, 303_655_168, [57_545_088, 40_505_600]),
    (GIANT, 1_134_771_200, None),
])  # fmt: skip
def test_parameters(name, backbone, heads):
    _, method, _ = made(name)
    found = {key: sum(p.numel() for p in part.parameters()) for key, part in method.named_children()}
    assert backbone in (None, found["student"]) and found["student"] == found["teacher"]
    of_student = [num for key, num in found.items() if key.startswith("student_")]
    assert heads in (None, of_student)
    assert sum(found.values()) == 2 * (found["student"] + sum(of_student))


def test_koleo_s_groups_are_a_gpu_s_images_as_published():
    for name in (SHORT, LONG, GIANT):
        config, method, batch = made(name)
        assert method.config.koleo_group == batch // config.parallel.ranks
