"""Multipliers, frozen spans, clipping groups and moving averages against torch's own optimiser and clipping."""

from __future__ import annotations

import math

import pytest
import torch

from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.models.classifier import parameter_depths
from seer_scale.optim.parameter_groups import ParameterGroup, check_groups
from seer_scale.parallel.engine import Engine
from tests.tiny import DINOV2, RECIPE, fake_views, losses_of, tiny
from tests.toy import UNIT_ROWS, Taught, toy

LR, UPDATES, CLIP = 1e-3, 4, 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_is_torchs(optimizer):
    world = World()
    over = {"optim.name": optimizer, "optim.weight_decay": 0.1, "optim.clip_norm": CLIP}
    over |= {"optim.weight_decay_end": 40.0}  # in four of twenty updates a share that shows
    config, engine = toy(lambda: Taught(world), Engine, world, **over)
    model, start = Taught(world), Taught(world)  # without what an engine put into its own
    for plain in (model, start):
        plain.load_state_dict(engine.method.state_dict())
    losses = losses_of(engine, config, world, range(UPDATES), LR)

    student = model.student
    embed = {n: p for n, p in student.named_parameters() if "embed" in n}
    rest = {n: p for n, p in student.named_parameters() if "embed" not in n}
    groups = [
        {"params": list(embed.values()), "lr": 0.2 * LR, "weight_decay": 0.0},
        {"params": list(rest.values()), "lr": LR, "weight_decay": 0.1},
    ]
    theirs = torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    expected = []
    for step in range(UPDATES):
        seen = step * config.train.global_batch
        loss = model.loss(fake_views(config, step, world), samples_seen=seen).loss
        expected.append(loss.item())
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], CLIP) for group in groups]
        assert norms[1] > CLIP  # else nothing is compared
        if seen == 8:  # the embedding is frozen
            for p in embed.values():
                p.grad = None
        groups[1]["weight_decay"] = 40 + (0.1 - 40) * 0.5 * (1 + math.cos(math.pi * seen / config.train.total_samples))
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():
            rows = model.get_parameter(UNIT_ROWS)
            rows.copy_(torch.nn.functional.normalize(rows, dim=1))
        momentum = model.average_momentum("", seen)
        with torch.no_grad():
            for average, source in zip(model.teacher.parameters(), student.parameters(), strict=True):
                average.mul_(momentum).add_(source, alpha=1 - momentum)

    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for (name, ours), there, before in zip(
        engine.method.named_parameters(), model.parameters(), start.parameters(), strict=True
    ):
        moved = (there - before).abs().max()
        assert moved > 0 and (ours - there).abs().max() < 1e-3 * moved + 1e-7, name


def test_a_moving_average_begins_as_its_source_and_stays_where_an_update_is_skipped():
    world = World()
    config, engine = toy(lambda: Taught(world), Engine, world, **{"train.precision": "fp16"})
    for average, source in zip(engine.method.teacher.parameters(), engine.method.student.parameters(), strict=True):
        assert torch.equal(average, source) and not average.requires_grad
    losses_of(engine, config, world, range(1), LR)  # so that they differ from now on
    before = [p.clone() for p in engine.method.parameters()]
    engine.gradients([lambda: [v * torch.inf for v in fake_views(config, 0, world)]], samples_seen=0)
    assert engine.update(LR, 0)["skipped"].item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, engine.method.parameters(), strict=True))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"a": ParameterGroup()}, "differ in"),
        ({"a": ParameterGroup(average_of="c"), "b": ParameterGroup()}, "a cannot be a moving average of c"),
        ({"a": ParameterGroup(average_of="b"), "b": ParameterGroup()}, "of its shape"),
        ({"a": ParameterGroup(), "b": ParameterGroup(normalized_rows=True)}, "b cannot have normalized rows"),
    ],
)
def test_what_cannot_be_declared_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        check_groups(wrong, {"a": torch.Size([2, 3]), "b": torch.Size([3])})


@pytest.mark.parametrize(
    "recipe, parts",
    [(RECIPE, {"backbone", "head", "prototypes"}), (DINOV2, {"student", "student_head", "student_patch_head"})],
)
def test_rates_of_layers_and_clipping_by_part_are_for_every_method(recipe, parts):
    over = {"optim.layer_decay": 0.5, "optim.patch_lr": 0.2, "optim.clip_norm": 1.0, "optim.clip_by": "part"}
    config, engine = tiny(World(), recipe, **over)
    trained = {n: g for n, g in engine.groups.items() if n not in engine.averages}
    assert {g.clip for g in trained.values()} == parts
    backbone = next(p for p in ("backbone.", "student.") if any(n.startswith(p) for n in trained))
    depths, top = parameter_depths(engine.method.backbone)
    for name, depth in depths.items():
        first = 0.2 if name in ("embed.proj.weight", "embed.proj.bias", "stem.conv.weight") else 1.0
        assert engine.groups[backbone + name].lr == pytest.approx(0.5 ** (top - depth) * first)
    assert all(g.lr == 1 for n, g in trained.items() if not n.startswith(backbone))
    losses_of(engine, config, World(), range(1))


def test_a_rate_for_a_convolution_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="optim.patch_lr"):
        toy(lambda: Taught(World()), Engine, World(), **{"optim.patch_lr": 0.5})
