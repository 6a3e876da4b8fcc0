"""Every second of a process is charged to one category, and each line of the log tells of those since the last."""

from __future__ import annotations

import json

import pytest

from seer_scale.observe import run_log, stopwatch
from seer_scale.observe.progress import Progress
from seer_scale.observe.run_log import RunLog
from seer_scale.observe.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(run_log, "time", clock)
    return clock


def test_a_second_goes_to_the_innermost_category(clock):
    watch = Stopwatch()
    clock.now += 1
    with watch.spending("useful"):
        clock.now += 2
        with watch.spending("stall"):
            clock.now += 4
        assert watch.take(clock.now) == {"other": 1, "useful": 2, "stall": 4}
        clock.now += 8
        clock.now -= 1  # a clock that is set back counts as none
    assert watch.category == "other" and watch.take(clock.now) == {"useful": 7}


def test_what_raises_ends_its_category(clock):
    watch = Stopwatch()
    with pytest.raises(ValueError), watch.spending("useful"), watch.spending("evaluation"):
        raise ValueError
    assert watch.category == "other"


def test_the_lines_of_a_log_account_for_all_time(tmp_path, clock):
    progress = Progress(tmp_path, every_s=0)
    with RunLog(tmp_path, 6400, ("ln K", 4.0), active=True, progress=progress, sinks=()) as log:
        clock.now += 5
        log.event("start", "A new run.", samples_seen=0, began=990.0)
        with progress.doing("training", category="useful"):
            clock.now += 3
            log.log({"step": 1, "samples_seen": 64})
            with progress.spending("evaluation"), progress.doing("measuring kNN"):
                clock.now += 2
                log.event("evaluation", "Measuring.")
        clock.now += 1
        log.event("done", "Done.")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["spent"], line["spending"]) for line in lines] == [
        ({"start": 15}, "other"),
        ({"useful": 3}, "useful"),
        ({"evaluation": 2}, "evaluation"),
        ({"other": 1}, "other"),
    ]
    assert sum(sum(line["spent"].values()) for line in lines) == lines[-1]["wall_time"] - 990
