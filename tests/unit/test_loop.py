"""The order of what happens between two updates, with stand-ins for all that does it."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seer_scale.config import Checkpoint, Config, Crop, Data, Knn, Train, Views
from seer_scale.data.batch import Batch
from seer_scale.distributed import World
from seer_scale.optim.schedules import LearningRate, weight_decay
from seer_scale.training import loop as module
from seer_scale.training import metric_window
from seer_scale.training.clock import Clock
from seer_scale.training.loop import TrainingLoop
from seer_scale.training.stop import StopRequested

CONFIG = Config(
    data=Data(path="x"),
    views=Views(crops=(Crop(num=2, size=32),)),
    train=Train(global_batch=4, total_samples=32, log_every=4),
    checkpoint=Checkpoint(every_samples=12),
    knn=Knn(every_samples=20),
)


class FakeBatches:
    waited_s, epoch = 0.0, 0.5

    def __init__(self, clock: Clock, done: list[str]):
        self.clock, self.done = clock, done

    def __enter__(self) -> None:
        self.done.append("open")

    def __exit__(self, *_: object) -> None:
        self.done.append("close")

    def next(self) -> Batch | None:
        return None if self.clock.at_end else Batch([], [], torch.arange(4), self.clock.samples_seen, [])

    def refresh(self, number: int) -> bool:
        return bool(number) and not self.done.append("refresh")


class FakeEngine:
    world, method = World(), SimpleNamespace(metrics=lambda means, loss: {})
    scaler = SimpleNamespace(scale=torch.ones(()), skipped=torch.zeros(()), longest_streak=torch.zeros(()))

    def __init__(self, done: list[str]):
        self.done = done
        self.rates: dict[int, float] = {}

    def gradients(self, micro_batches, *, samples_seen: int, with_metrics: bool):
        self.done.append(f"{samples_seen} measured" if with_metrics else f"{samples_seen}")
        return torch.ones(()), {}, None

    def update(self, lr: float, samples_seen: int):
        self.rates[samples_seen] = lr
        return dict.fromkeys(("grad_norm", "param_norm", "skipped", "grad_norms"), torch.zeros(()))


class Due:
    """What is due every so many samples, and says that it was done."""

    def __init__(self, clock: Clock, done: list[str], every: int):
        self.clock, self.done, self.every = clock, done, every

    is_due = property(lambda self: self.clock.passed_multiple(self.every) and not self.clock.at_end)

    def __getattr__(self, name: str):
        return lambda *given: self.done.append(" ".join([name, *map(str, given)]))


def made(
    run_dir, monkeypatch, *, stop_after: int = 0, refresh_after: int = 0, seen: int = 0
) -> tuple[TrainingLoop, list[str]]:
    """The loop, and what it does by name."""
    done: list[str] = []
    clock = Clock(CONFIG.train.global_batch, CONFIG.end(), seen, seen // CONFIG.train.global_batch)
    newest = lambda _: int(0 < refresh_after == clock.samples_seen)  # noqa: E731
    monkeypatch.setattr(metric_window, "newest_manifest", newest)
    monkeypatch.setattr(module, "micro_batches", lambda *_: [])
    checkpoints = Due(clock, done, CONFIG.checkpoint.every_samples)
    checkpoints.report_ended = lambda: None
    loop = TrainingLoop(
        config=CONFIG,
        world=World(),
        run_dir=run_dir,
        engine=FakeEngine(done),
        memory_format=torch.contiguous_format,
        clock=clock,
        schedule=LearningRate(CONFIG),
        batches=FakeBatches(clock, done),
        skips=SimpleNamespace(watch=lambda *_: None, read=lambda: None),
        monitors=SimpleNamespace(check=lambda row: done.append("check")),
        unreadable=SimpleNamespace(add=lambda *_: None),
        checkpoints=checkpoints,
        evaluation=Due(clock, done, CONFIG.knn.every_samples),
        probe=None,
        stop=SimpleNamespace(stop_signal=lambda _: "SIGTERM" if 0 < stop_after == clock.samples_seen else None),
        log=SimpleNamespace(log=lambda row: done.append(f"log {row['samples_seen']}")),
        log_event=lambda *_, **__: None,
        watchdog=SimpleNamespace(patient=lambda seconds: nullcontext(), beat=lambda: None),
        progress=SimpleNamespace(advance=lambda num: None, spending=lambda category: nullcontext()),
    )
    return loop, done


def test_the_order_of_a_run(tmp_path, monkeypatch):
    """Metric lines are foreseen, each fourth update, and where something else is due or training ends."""
    loop, done = made(tmp_path, monkeypatch)
    loop.run()
    assert done[0] == "open" and done[1].startswith("show_crops")
    assert done[2:] == [
        *("0 measured", "log 4", "check"),
        "4",
        *("8 measured", "log 12", "check", "save_in_step"),
        *("12 measured", "log 16", "check"),
        *("16 measured", "log 20", "check", "measure during"),
        *("20 measured", "log 24", "check", "save_in_step"),
        "24",
        *("28 measured", "log 32", "check"),
        "close",
    ]


def test_a_stop_logs_what_no_line_has_told_and_closes_the_loaders(tmp_path, monkeypatch):
    loop, done = made(tmp_path, monkeypatch, stop_after=8)
    with pytest.raises(StopRequested, match="SIGTERM"):
        loop.run()
    assert done[-4:] == ["4", "log 8", "check", "close"]
    loop, done = made(tmp_path, monkeypatch, stop_after=16)
    with pytest.raises(StopRequested):
        loop.run()
    assert done.count("log 16") == 1


def test_other_data_are_taken_up_at_a_metric_line_and_saved_at_once(tmp_path, monkeypatch):
    loop, done = made(tmp_path, monkeypatch, refresh_after=16)
    loop.run()
    assert done[done.index("log 16") :][:4] == ["log 16", "check", "refresh", "forget_newest"]
    assert done[done.index("forget_newest") + 1] == "save_in_step"


def test_a_run_that_is_complete_trains_nothing(tmp_path, monkeypatch):
    loop, done = made(tmp_path, monkeypatch, seen=32)
    loop.run()
    assert done == ["open", "close"]


def test_each_update_takes_the_rate_that_its_line_tells(tmp_path, monkeypatch):
    loop, _ = made(tmp_path, monkeypatch)
    lines = []
    loop.log = SimpleNamespace(log=lines.append)
    loop.run()
    schedule = LearningRate(CONFIG)
    assert loop.engine.rates == {seen: schedule(seen) for seen in range(0, 32, 4)} and schedule(0) != schedule(28)
    assert {row["samples_seen"]: row["lr"] for row in lines} == {
        row["samples_seen"]: loop.engine.rates[row["samples_seen"] - 4] for row in lines
    }
    assert not any("weight_decay" in row for row in lines)  # a constant is in the recipe


def test_a_line_tells_the_weight_decay_where_a_schedule_moves_it(tmp_path, monkeypatch):
    loop, _ = made(tmp_path, monkeypatch)
    loop.config = replace(CONFIG, optim=replace(CONFIG.optim, weight_decay_end=0.2))
    lines = []
    loop.log = SimpleNamespace(log=lines.append)
    loop.run()
    told = {row["samples_seen"]: row["weight_decay"] for row in lines}
    assert told == {seen: weight_decay(loop.config, seen - 4) for seen in told} and told[4] < told[32]


def test_saves_and_evaluations_count_for_no_update_and_a_save_behind_is_asked_about(tmp_path, monkeypatch):
    """An evaluation comes after the save that falls on the same update; both lie within the window's pause."""
    loop, done = made(tmp_path, monkeypatch)
    loop.evaluation.every = 12
    loop.checkpoints.report_ended = lambda: done.append("report_ended")
    paused, stalls = [], []

    @contextmanager
    def pause():
        paused.append(len(done))
        yield
        paused.append(len(done))

    loop.window.paused = pause
    save = loop.checkpoints.save_in_step
    loop.checkpoints.save_in_step = lambda: (stalls.append(loop.window.stalled_s), time.sleep(0.01), save())
    logged = loop.window.reset
    loop.window.reset = lambda: (stalls.append(loop.window.stalled_s), logged())
    loop.run()
    assert done.count("report_ended") == 8
    inside = [set(range(a, b)) for a, b in zip(paused[::2], paused[1::2])]
    for n, what in enumerate(done):
        assert any(n in span for span in inside) == (what in ("save_in_step", "measure during")), what
    assert done.index("measure during") == done.index("save_in_step") + 1
    assert max(stalls) >= 0.01
