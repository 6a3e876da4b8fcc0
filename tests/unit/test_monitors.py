"""A monitor takes a metric line and says what is wrong; what is told once is told once, and what is fatal ends a
run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from seer_scale.config import Config, Data, Train
from seer_scale.errors import Problem, TrainingError
from seer_scale.training.monitors import Monitors, monitors_of, skipped_in_a_row, small_loss_scale


def test_skipped_updates_and_a_small_loss_scale_name_their_key():
    row = {"skipped_in_a_row": 3, "loss_scale": 2.0}
    assert skipped_in_a_row(row, most=4) is None and small_loss_scale(row, least=2.0) is None
    skipped, small = skipped_in_a_row(row, most=3), small_loss_scale(row, least=4.0)
    assert (skipped.key, skipped.value) == ("train.max_skips", 3)
    assert (small.key, small.value) == ("train.min_loss_scale", 4.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_loss_scale_is_watched_where_there_is_one(precision):
    config = Config(data=Data(path="x"), train=Train(precision=precision, min_loss_scale=4.0))
    method = SimpleNamespace(health=lambda row, config: None)
    fatal, _ = monitors_of(config, method, run_dir="run", workers=0, cores=1, is_contended=False)
    row = {"skipped_in_a_row": 0, "loss_scale": 1.0}
    assert any(monitor(row) for monitor in fatal) == (precision == "fp16")


def test_a_fatal_one_comes_first_and_ends_the_run():
    told: list[str] = []
    by_event = {"collapse": lambda row: Problem("optim.lr", 1.0, "it is too much")}
    log = lambda kind, text, **_: told.append(kind)  # noqa: E731
    with pytest.raises(TrainingError) as caught:
        Monitors([lambda row: Problem("train.max_skips", 3, "too many")], by_event, {}, log).check({})
    assert caught.value.problems[0].key == "train.max_skips" and not told


def test_what_was_told_is_not_told_again_in_another_start_either():
    told: list[str] = []
    by_event = {"collapse": lambda row: Problem("optim.lr", row["lr"], "it is too much") if row["lr"] > 1 else None}
    log = lambda kind, text, **_: told.append(f"{kind}: {text}")  # noqa: E731
    monitors = Monitors([], by_event, {}, log)
    for lr in (0.5, 2.0, 3.0):
        monitors.check({"lr": lr})
    assert told == ["collapse: optim.lr is 2, but it is too much."] and monitors.told == {"collapse"}
    Monitors([], by_event, {}, log, told=monitors.told).check({"lr": 4.0})
    assert len(told) == 1
