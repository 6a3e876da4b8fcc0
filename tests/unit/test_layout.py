"""The memory format: chosen by measuring both, and changing nothing but speed."""

from __future__ import annotations

import pytest
import torch

from seer_scale.config import resolve
from seer_scale.methods.swav import SwAV
from seer_scale.models import layout
from seer_scale.world import World
from tests.tiny import RECIPE, fake_views, tiny

WORLD = World()


def backbone_of(**train):
    config = resolve({**RECIPE, "train": RECIPE["train"] | train}, {})
    with torch.device("meta"):
        return SwAV(config, WORLD).backbone, config


@pytest.mark.parametrize("faster", list(layout.FORMATS))
def test_auto_takes_what_ran_faster(monkeypatch, faster):
    slow = {layout.FORMATS[n]: 1.0 for n in layout.FORMATS if n != faster}
    monkeypatch.setattr(layout, "_time", lambda block, shapes, form, config, device: slow.get(form, 0.5))
    backbone, config = backbone_of()
    assert layout.choose_memory_format(backbone, config, WORLD) == layout.FORMATS[faster]
    totals = layout.measure(backbone, config, WORLD)
    assert totals[faster] == 0.5 * 5 and sum(totals.values()) == 1.5 * 5  # five blocks


def test_what_is_named_is_not_measured(monkeypatch):
    monkeypatch.setattr(layout, "measure", lambda *_: pytest.fail("measured"))
    for name, form in layout.FORMATS.items():
        assert layout.choose_memory_format(*backbone_of(memory_format=name), WORLD) == form


def test_measuring_runs_every_stage_and_leaves_the_model_on_the_meta_device():
    backbone, config = backbone_of()
    totals = layout.measure(backbone, config, WORLD, rounds=1)
    assert set(totals) == set(layout.FORMATS) and all(t > 0 for t in totals.values())
    assert all(p.is_meta for p in backbone.parameters())


def test_the_format_changes_no_loss():
    losses = []
    for form in layout.FORMATS.values():
        config, engine = tiny(WORLD, **{"parallel.engine": "single"})
        out = []
        for step in range(4):
            views = [v.contiguous(memory_format=form) for v in fake_views(config, step, WORLD)]
            out.append(engine.gradients([lambda views=views: views], samples_seen=8 * step)[0].item())
            engine.update(0.02)
        losses.append(out)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
