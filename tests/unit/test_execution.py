"""Threads and memory format: chosen by measuring them, and changing nothing but speed."""

from __future__ import annotations

import pytest
import torch

from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.methods.swav.method import SwAV
from seer_scale.models import execution
from tests.tiny import RECIPE, fake_views, tiny

WORLD = World()


def backbone_of(**train):
    config = resolve({**RECIPE, "train": RECIPE["train"] | train}, {})
    with torch.device("meta"):
        return SwAV(config, WORLD).backbone, config


@pytest.fixture
def no_threads_told(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def times(monkeypatch, seconds):
    """Have each measurement of a block take seconds(threads, format)."""
    monkeypatch.setattr(
        execution, "_time", lambda block, shapes, form, config, device: seconds(torch.get_num_threads(), form)
    )


@pytest.mark.parametrize("faster", list(execution.MEMORY_FORMATS))
def test_auto_takes_the_format_that_ran_faster(monkeypatch, faster, no_threads_told):
    times(monkeypatch, lambda _, form: 0.5 if form == execution.MEMORY_FORMATS[faster] else 1.0)
    backbone, config = backbone_of()
    assert execution.choose_execution(backbone, config, WORLD, 1).memory_format == execution.MEMORY_FORMATS[faster]
    assert execution.measure(backbone, config, WORLD, execution.MEMORY_FORMATS[faster]) == 0.5 * 5  # five blocks


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: 1.0, 2: 2.0, 1: 4.0}, 4),  # an idle machine
        ({4: 7.0, 2: 3.0, 1: 1.0}, 1),  # one that others use: threads wait for each other
        ({4: 2.0, 2: 1.0, 1: 1.5}, 2),
        ({4: 1.0, 2: 0.99, 1: 0.1}, 4),  # noise
    ],
)
def test_threads_are_measured(monkeypatch, seconds, chosen, no_threads_told):
    times(monkeypatch, lambda threads, _: seconds[threads])
    assert execution.choose_execution(*backbone_of(), WORLD, 4).threads == chosen == torch.get_num_threads()


def test_what_is_named_is_not_measured(monkeypatch, no_threads_told):
    monkeypatch.setattr(execution, "measure", lambda *_: pytest.fail("measured"))
    for name, form in execution.MEMORY_FORMATS.items():
        assert execution.choose_execution(*backbone_of(memory_format=name, threads=3), WORLD, 8).memory_format == form
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert (
        execution.choose_execution(*backbone_of(memory_format=name), WORLD, 8).threads == 2 == torch.get_num_threads()
    )
    assert (
        execution.choose_execution(*backbone_of(memory_format=name, threads=3), WORLD, 8).threads == 3
    )  # the recipe's own word


@pytest.mark.parametrize("train", [{"threads": 1}, {"memory_format": "contiguous"}])
def test_what_is_asked_between_two_timings_may_end_them(monkeypatch, train, no_threads_told):
    done = []
    times(monkeypatch, lambda threads, _: done.append(threads) or 1.0)

    def stop():
        if len(done) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        execution.choose_execution(*backbone_of(**train), WORLD, 4, stop)
    assert len(done) == 3


def test_measuring_runs_every_stage_and_leaves_the_model_on_the_meta_device(no_threads_told):
    backbone, config = backbone_of()
    assert execution.measure(backbone, config, WORLD, rounds=1) > 0
    assert all(p.is_meta for p in backbone.parameters())


def test_the_format_changes_no_loss():
    losses = []
    for form in execution.MEMORY_FORMATS.values():
        config, engine = tiny(WORLD, **{"parallel.engine": "single"})
        out = []
        for step in range(4):
            views = [v.contiguous(memory_format=form) for v in fake_views(config, step, WORLD)]
            out.append(engine.gradients([lambda views=views: views], samples_seen=8 * step)[0].item())
            engine.update(0.02, 8 * step)
        losses.append(out)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
