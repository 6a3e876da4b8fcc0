"""A metric line is of the updates since the line before, and of those with a finite loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from seer_scale.data.batch import Batch
from seer_scale.distributed import World
from seer_scale.training.clock import Clock
from seer_scale.training.metric_window import MetricLine, MetricWindow, fingerprint, metric_line


def engine(streak: float = 0.0) -> SimpleNamespace:
    scaler = SimpleNamespace(scale=torch.tensor(4.0), skipped=torch.tensor(2.0), longest_streak=torch.tensor(streak))
    method = SimpleNamespace(metrics=lambda means, loss: {name: value.item() for name, value in means.items()})
    return SimpleNamespace(world=World(), scaler=scaler, method=method)


def line(window: MetricWindow, streak: float = 0.0) -> MetricLine:
    stats = {"grad_norm": torch.tensor(3.0), "param_norm": torch.tensor(5.0)}
    metrics = {"any/metric": torch.tensor(0.25)}
    clock = Clock(4, 80, 8, 2)
    return metric_line(window, engine(streak), clock, rates={"lr": 0.1}, epoch=0.5, stats=stats, metrics=metrics)


def window_of(run_dir, *losses: float) -> MetricWindow:
    window = MetricWindow(World(), run_dir)
    for i, loss in enumerate(losses):
        window.add(Batch([], [], torch.arange(4) + 4 * i, 4 * i, []), torch.tensor(loss))
    return window


def test_a_line_is_the_mean_of_finite_losses(tmp_path):
    made = line(window_of(tmp_path, 2.0, math.inf, 4.0), streak=1.0)
    assert (made.loss_sum, made.loss_count, made.skipped_in_a_row, made.unreadable) == (6.0, 2.0, 1, 0)
    row = made.row
    assert (row["loss"], row["grad_norm"], row["param_norm"], row["loss_scale"]) == (3.0, 3.0, 5.0, 4.0)
    assert (row["step"], row["samples_seen"], row["epoch"], row["lr"], row["skipped"]) == (2, 8, 0.5, 0.1, 2)
    assert row["any/metric"] == 0.25 and row["data/fingerprint"] == fingerprint(torch.arange(12).numpy())
    assert math.isnan(line(window_of(tmp_path, math.nan)).row["loss"])


def test_a_window_begins_anew_after_its_line(tmp_path):
    window = window_of(tmp_path, 2.0)
    line(window)
    window.reset()
    window.add(Batch([], [], torch.arange(4), 4, []), torch.tensor(7.0))
    assert line(window).row["loss"] == 7.0


def test_what_is_no_update_costs_none_of_their_time(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    window = MetricWindow(World(), tmp_path)
    for _ in range(2):
        now += 0.5
        window.add(Batch([], [], torch.arange(4), 0, []), torch.ones(()))
        with window.paused():
            now += 10.0
    assert window.timing(4)["time/step_s"] == pytest.approx(0.5)
    assert window.timing(4)["throughput/img_per_s"] == pytest.approx(8.0)
