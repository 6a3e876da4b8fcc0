"""When a run will end, and what it is at: told by time where nothing else is, from this start alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seer_scale.observe import progress as module
from seer_scale.observe.eta import Eta
from seer_scale.observe.progress import FILE, Progress, read_progress


def line(step: int, rate: float, **more) -> dict:
    return {"step": step, "samples_seen": 64 * step, "throughput/img_per_s": rate} | more


def test_updates_evaluations_and_checkpoints_are_estimated_apart():
    eta = Eta(6400, evaluate_every=1600, checkpoint_every=640)
    eta.begin(0)
    assert eta.seconds() is None
    eta.add(line(1, 4.0))
    assert eta.seconds() == pytest.approx(6336 / 4) and eta.is_rough  # one line must do
    eta.add(line(10, 64.0, **{"time/checkpoint_stall_s": 2.0}))
    assert eta.seconds() == pytest.approx(5760 / 64 + 8 * 2)  # it is forgotten: the first starts loaders, and compiles
    assert not eta.is_rough
    eta.add({"samples_seen": 640, "time/evaluation_s": 100.0})
    assert eta.seconds() == pytest.approx(5760 / 64 + 8 * 2 + 4 * 100)  # at 1600, 3200, 4800 and the end
    eta.add(line(76, 64.0, **{"time/checkpoint_stall_s": 0.0}))
    assert eta.seconds() == pytest.approx(24 * 64 / 64 + 2 * 2 + 100)
    eta.add(line(100, 64.0))
    assert eta.seconds() == 0


def test_the_newest_lines_tell_the_rate_and_one_that_does_not_move_tells_none():
    eta = Eta(64 * 1000)
    for step in range(1, 101):
        eta.add(line(step, 10.0 if step <= 50 else 40.0))
    assert eta.seconds() == pytest.approx(900 * 64 / 40)
    eta = Eta(10**9)
    eta.add(line(1, 1e-6))
    assert eta.seconds() is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""

    class Clock:
        now = 1_700_000_000.0

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_what_takes_long_is_told_and_nothing_else(clock, capsys):
    progress = Progress(every_s=60)

    def after(seconds: float) -> str | None:
        clock.now += seconds
        if text := progress.due(clock.now):
            progress.print(text)
        return text

    assert after(1000) is None  # nothing is being done
    with progress.doing("listing the images of photos"):
        assert after(9) is None
        assert after(1) == "Listing the images of photos, for 10 s ..."
        assert after(59) is None
        assert after(1) == "Listing the images of photos, for 1 min 10 s ..."
    with progress.doing("training", 6400, done=640):
        progress.print("samples 640/6,400")
        assert after(59) is None
        progress.print("samples 640/6,400")
        assert after(59) is None
        progress.advance(64)
        assert after(10) == "Training: 704 of 6,400 images, for 2 min 8 s, the last 10 s ago ..."
        with progress.doing("measuring kNN during training", 300):
            progress.advance(100)
            assert after(10) == "Measuring kNN during training: 100 of 300 images, for 10 s, the last 10 s ago ..."
        assert after(59) is None
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert Progress(every_s=0).__enter__()._thread is None and Progress(active=False).__enter__()._thread is None


def test_others_read_what_a_run_is_at_while_it_runs(tmp_path):
    assert read_progress(tmp_path) is None
    with Progress(tmp_path, every_s=0.01) as progress, progress.doing("training", 640):
        progress.advance(64)
        while not (found := read_progress(tmp_path)) or found["done"] != 64:
            time.sleep(0.01)
        assert (
            found["text"].startswith("Training: 64 of 640 images, for ")
            and found["time"] >= found["advanced"] >= found["since"]
        )
    assert not (tmp_path / FILE).exists()
    for torn in ("", "{", "[]", json.dumps({"what": 1, "no": 2})):
        (tmp_path / FILE).write_text(torn)
        assert read_progress(tmp_path) is None
    (tmp_path / FILE).unlink()
    with Progress(tmp_path / FILE.name, every_s=0.01, active=False):
        pass
    assert not any(tmp_path.rglob("*.json"))


def test_a_bar_on_a_terminal_and_lines_on_none(tmp_path):
    program = """
from seer_scale import console
from seer_scale.observe.progress import Progress
import pathlib, sys
console.install()
console.record.keep(pathlib.Path(sys.argv[1]))
with Progress(every_s=60) as progress, progress.doing("listing the images of photos", 200):
    progress.advance(50)
    progress.print("A line.")
    print("Another [b]line[/b].")
"""
    ours, theirs = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "drawn"], stdout=theirs, stdin=theirs, env=env
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"\\x1b" not in seen and b"\x1b[?25l" in seen  # its cursor moves
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    for words in ("A line.", "━━━", "Listing the images of photos: 0 of 200 images"):
        assert words in text, words
    plain = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "plain"], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert plain.stdout == "A line.\nAnother [b]line[/b].\n"
    for kept in ("drawn", "plain"):  # the bar is no line
        assert [line[20:] for line in (tmp_path / kept).read_text().splitlines()] == plain.stdout.splitlines()
