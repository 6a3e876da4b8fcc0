"""An update skipped in a precision without a loss scale is told at once, with what was not finite first, and nothing
waits."""

from __future__ import annotations

import math

import pytest
import torch

from seer_scale.distributed import World
from seer_scale.methods.swav.method import SwAV
from seer_scale.training import skips
from seer_scale.training.skips import MAX_LOGGED, SkipMonitor
from seer_scale.training.start import run_training
from tests.e2e.runs import events, recipe, steps
from tests.tiny import micro_batches, tiny

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)
NAMES = ["stem", "block", "head"]


def monitor(precision: str = "bf16", rank: int = 0, size: int = 1) -> tuple[SkipMonitor, list[str]]:
    told: list[str] = []
    return SkipMonitor(NAMES, precision, World(rank, size), told.append), told


def norms(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_what_came_first_is_named():
    """Backward goes from the head to the stem, and what it makes of a bad value is bad."""
    watch, told = monitor()
    watch.watch(1, torch.tensor(2.0), GOOD, norms(1, 1, 1))
    watch.watch(2, torch.tensor(2.0), BAD, norms(math.nan, math.inf, 1))
    watch.watch(3, torch.tensor(2.0), GOOD, norms(1, 1, 1))
    watch.watch(4, torch.tensor(math.nan), BAD, norms(math.nan, math.nan, math.nan))
    assert len(told) == 2
    assert (
        "Update 2 was skipped" in told[0]
        and "first the gradient of block, one of 2 of 3." in told[0]
        and "bf16 has no loss scale" in told[0]
    )
    assert "Update 4 was skipped" in told[1] and "first the loss." in told[1]


def test_a_rank_tells_of_its_own_loss_and_the_first_of_what_all_share():
    for rank, loss, expected in ((1, 2.0, 0), (1, math.inf, 1), (0, 2.0, 1)):
        watch, told = monitor(rank=rank, size=2)
        watch.watch(7, torch.tensor(loss), BAD, norms(1, 1, math.nan))
        assert len(told) == expected
    watch, told = monitor(rank=1, size=2)
    watch.watch(7, torch.tensor(math.inf), BAD, norms(1, 1, math.nan))
    assert "first the loss of rank 1" in told[0]


def test_a_row_is_told_once_and_not_for_ever_and_a_loss_scale_explains_itself():
    watch, told = monitor()
    for step in range(5):
        watch.watch(step, torch.tensor(2.0), BAD, norms(1, 1, math.nan))
    assert len(told) == 1
    for step in range(4 * MAX_LOGGED):
        watch.watch(step, torch.tensor(2.0), BAD if step % 2 else GOOD, norms(1, 1, math.nan))
    assert len(told) == MAX_LOGGED and told[-1].endswith("Further ones are only counted.")
    watch, told = monitor("fp16")
    watch.watch(1, torch.tensor(math.nan), BAD, norms(1, 1, math.nan))
    assert not told


def test_the_host_reads_only_what_the_device_has_finished(monkeypatch):
    class Unready:
        ready = False

        def query(self) -> bool:
            return self.ready

    class Unread(torch.Tensor):
        def tolist(self):
            assert events_of[-1].ready or events_of[0].ready, "read before it is there"
            return super().tolist()

    events_of: list[Unready] = []

    def copy(x: torch.Tensor):
        events_of.append(Unready())
        return x.as_subclass(Unread), events_of[-1]

    monkeypatch.setattr(skips, "_to_host", copy)
    watch, told = monitor()
    for step in (1, 2, 3):
        watch.watch(step, torch.tensor(2.0), BAD if step == 1 else GOOD, norms(1, math.nan, 1))
    assert not told
    events_of[0].ready = True
    watch.read()
    assert len(told) == 1 and "Update 1 " in told[0]


@pytest.mark.parametrize("name", ["prototypes.1.weight", "head.0.weight", "backbone.stem.conv.weight"])
def test_a_gradient_that_goes_bad_in_backward_is_found(name):
    config, engine = tiny(World(), **{"parallel.engine": "single"})
    told: list[str] = []
    watch = SkipMonitor(list(engine.shapes), "fp32", World(), told.append)
    dict(engine.method.named_parameters())[name].register_hook(lambda g: g * torch.inf)
    loss = engine.gradients(micro_batches(config, 0, World()), samples_seen=0).loss
    stats = engine.update(0.1, 0)
    watch.watch(1, loss, stats["skipped"], stats["grad_norms"])
    assert f"first the gradient of {name}, one of 1 of {len(engine.shapes)}." in told[0]


def test_a_run_says_so(tmp_path, photos, monkeypatch):
    calls, own = [], SwAV._swapped

    def sometimes(self, scores, codes):
        calls.append(1)
        return own(self, scores, codes) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(SwAV, "_swapped", sometimes)
    given = recipe(
        tmp_path,
        photos,
        train={"total_samples": 40, "log_every": 5},
        knn={"enabled": False},
        checkpoint={"every_samples": 0},
    )
    assert run_training(given, ["--run.dir", str(tmp_path / "run")]) == 0
    (event,) = events(tmp_path / "run", "skipped")
    assert (
        "Update 3 was skipped, as not all of it was finite: first the loss." in event["text"]
        and event["samples_seen"] == 24
    )
    assert list(steps(tmp_path / "run")) == [8, 40]  # between two metric lines
