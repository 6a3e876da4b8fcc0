"""Every second of a run is accounted for, once; what a restart abandoned is lost; and the causes are those of the
log."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.cli import main
from seer_scale.observe import time_account
from seer_scale.observe.progress import Progress
from seer_scale.observe.time_account import read_time_account
from seer_scale.observe.time_table import BAR_WIDTH, LOST, ON_WIDTH, RUNNING, START, text


class Log:
    """Writes a run's log as a clock of its own goes on."""

    def __init__(self, folder: Path):
        self.folder, self.now, self.step, self.number = folder, 1000.0, 0, 0
        self.spent: dict[str, float] = {}
        (folder / "launch").mkdir(parents=True)

    def _line(self, **record) -> None:
        own = {"spending": "useful", "wall_time": self.now, "spent": self.spent}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(own | record) + "\n")
        self.spent = {}

    def spend(self, category: str, seconds: float) -> None:
        self.now += seconds
        self.spent[category] = self.spent.get(category, 0.0) + seconds

    def attempt(self, event: str, cause: str = "") -> None:
        self.number += event == "begin"
        with (self.folder / "launch" / "attempts.jsonl").open("a") as file:
            file.write(
                json.dumps({"event": event, "time": self.now, "cause": cause, "attempt": f"7.0.{self.number}"}) + "\n"
            )

    def begin(self, seen: int, takes: float, **fields: object) -> None:
        began, self.step = self.now, seen // 10
        self.spent = {}
        self.spend("start", takes)
        self._line(
            event="resume" if seen else "start",
            samples_seen=seen,
            began=began,
            step=self.step,
            attempt=f"7.0.{self.number}",
            ranks=2,
            engine="fsdp",
            **fields,
        )

    def evaluation(self, seconds: float, stage: str = "", rest_s: float = 0.0) -> None:
        """stage "": killed in it. rest_s: of pictures after it."""
        self._line(event="evaluation", samples_seen=self.step * 10, spending="evaluation")
        if not stage:
            self.now += seconds
            return
        self.spend("evaluation", seconds)
        self._line(samples_seen=self.step * 10, **{"time/evaluation_s": seconds, "evaluation/stage": stage})
        self.spend("evaluation", rest_s)

    def updates(
        self, num: int, step_s: float, wait: float = 0.0, stall_s: float = 0.0, knn_s: float = 0.0, rest_s: float = 0.0
    ) -> None:
        for category, seconds in (("evaluation", knn_s), ("stall", stall_s), ("other", rest_s)):
            self.spend(category, seconds)
        self.step += num
        self.spend("useful", num * step_s)
        self._line(
            step=self.step,
            samples_seen=self.step * 10,
            **{"time/step_s": step_s, "time/data_wait_frac": wait, "time/checkpoint_stall_s": stall_s},
        )

    def event(self, kind: str, **fields: object) -> None:
        self._line(event=kind, samples_seen=self.step * 10, **fields)


def test_a_run_of_three_attempts(tmp_path):
    log = Log(tmp_path)
    log.attempt("begin")
    log.begin(0, takes=30)
    log.updates(10, 2.0, wait=0.1, knn_s=5)  # to 100 samples
    log.updates(10, 2.0, stall_s=1.0)  # to 200, of which a checkpoint at 150 is all that is left
    log.now += 7  # in mid-update
    log.attempt("end", "Rank 3 was ended by SIGKILL")
    log.now += 60
    log.attempt("begin")
    log.begin(150, takes=20)
    log.updates(5, 2.0)
    log.event("stop")
    log.attempt("end", "stopped")
    log.now += 100
    log.attempt("begin")
    log.begin(200, takes=20)
    log.updates(10, 2.0, rest_s=3)
    log.event("done")
    account = read_time_account(tmp_path)
    found = {k: round(v, 6) for k, v in account.seconds.items()}
    assert found == {
        "useful": 10 * 2 * 0.9 + 5 * 2 + 5 * 2 + 10 * 2,
        "data_wait": 2.0,
        "stall": 1.0,
        "evaluation": 5.0,
        "start": 70.0,
        "lost": 7 + 5 * 2,
        "other": 3.0,
        "down": 160.0,
    }
    assert account.total_s == pytest.approx(log.now - 1000)
    assert account.goodput == pytest.approx(found["useful"] / (log.now - 1000 - 160))
    assert [attempt.cause for attempt in account.attempts] == ["Rank 3 was ended by SIGKILL", "stopped", "done"]
    assert [attempt.seen for attempt in account.attempts] == [(0, 200), (150, 200), (200, 300)]
    assert [round(attempt.lost_s, 6) for attempt in account.attempts] == [17, 0, 0]
    assert account.mean_time_to_recover_s == pytest.approx(60 + 20 + 2)  # to its first update; the stop was no failure
    said = text(account)
    bars = [
        line.partition(f"{'2 ranks, fsdp':{ON_WIDTH}}  ")[2][:BAR_WIDTH]
        for line in said.splitlines()
        if "2 ranks" in line
    ]
    each = (log.now - 1000) / BAR_WIDTH
    spans = [
        (attempt.began - 1000, attempt.ready - 1000, attempt.ended - 1000 - attempt.lost_s, attempt.ended - 1000)
        for attempt in account.attempts
    ]
    assert len(bars) == 3
    for bar, (began, ready, lost, ended) in zip(bars, spans):
        expected = [
            (START, ready - began),
            (RUNNING, lost - ready),
            (LOST, ended - lost),
            (" ", each * BAR_WIDTH - ended + began),
        ]
        assert all(abs(bar.count(mark) * each - seconds) <= 1.5 * each for mark, seconds in expected), bar
        assert abs(len(bar) - len(bar.lstrip()) - began / each) <= 1
    assert (
        "Rank 3 was ended by SIGKILL" in said
        and "updates that were lost" in said
        and f"goodput {100 * account.goodput:.1f} %" in said
    )


def test_an_evaluation_is_one_also_where_it_was_cut_off(tmp_path):
    log = Log(tmp_path)
    log.attempt("begin")
    log.begin(0, takes=10)
    log.evaluation(30)
    log.attempt("end", "Rank 0 was ended by SIGKILL")
    log.attempt("begin")
    log.begin(0, takes=10)
    log.evaluation(40, "before")
    log.updates(10, 1.0)
    log.evaluation(20, "during")
    log.now += 3
    log.attempt("end", "Rank 0 was ended by SIGKILL")
    log.attempt("begin")
    log.begin(100, takes=10)
    log.updates(10, 1.0)
    log.evaluation(40, "after", rest_s=15)
    log.event("done")
    found = {k: round(v, 6) for k, v in read_time_account(tmp_path).seconds.items() if v > 1e-9}
    assert found == {"useful": 20.0, "evaluation": 30 + 40 + 20 + 40 + 15.0, "start": 30.0, "lost": 3.0}


def test_an_end_that_nothing_has_followed(tmp_path):
    """What the next start would do again is lost already; without a word of the end, the process that logged says if it
    runs."""

    def logged(folder: Path, pid: int, host: str) -> Log:
        log = Log(folder)
        log.attempt("begin")
        log.begin(0, takes=10, pid=pid, host=host)
        log.updates(5, 1.0)
        log.event("checkpoint", saved=30)
        log.updates(5, 1.0)
        log.now += 4
        return log

    def found(log: Log) -> tuple[str, float, float]:
        account = read_time_account(log.folder)
        assert sum(account.seconds.values()) == pytest.approx(account.total_s)
        return account.attempts[0].cause, round(account.seconds["useful"], 6), round(account.seconds["lost"], 6)

    here = socket.gethostname()
    for pid, host in ((os.getpid(), here), (2**22 + 1, f"not-{here}")):
        assert found(logged(tmp_path / host / str(pid), pid, host)) == ("running", 10.0, 0.0)
    log = logged(tmp_path / "gone", 2**22 + 1, here)
    assert found(log) == ("ended from outside", 3.0, 7.0)
    log.attempt("end", "Rank 0 was ended by SIGKILL")
    assert found(log) == ("Rank 0 was ended by SIGKILL", 3.0, 7.0 + 4)


def test_starts_that_log_nothing_and_an_end_that_nobody_could_tell(tmp_path):
    """A power cut, five hours in the queue, a start that dies before its first line, one that dies before an update."""
    log = Log(tmp_path)
    log.attempt("begin")
    log.begin(0, takes=30)
    log.updates(10, 2.0)
    log.now += 18000
    log.attempt("begin")
    log.now += 60
    log.attempt("end", "A rank ended with status 1")
    log.attempt("begin")
    log.begin(100, takes=20)
    log.now += 5
    log.attempt("end", "Rank 0 was ended by SIGKILL")
    log.attempt("begin")
    log.begin(100, takes=20)
    log.updates(10, 2.0)
    log.spend("stall", 3.0)
    log.event("checkpoint")
    log.spend("other", 1.0)
    log.event("stop")
    log.attempt("end", "stopped")
    account = read_time_account(tmp_path)
    found = {k: round(v, 6) for k, v in account.seconds.items() if v}
    assert found == {
        "useful": 40.0,
        "start": 30.0 + 60 + 20 + 20,
        "down": 18000.0,
        "lost": 5.0,
        "stall": 3.0,
        "other": 1.0,
    }
    assert [attempt.cause for attempt in account.attempts] == [
        "ended from outside",
        "Rank 0 was ended by SIGKILL",
        "stopped",
    ]
    second, third = 20 + 2, 18000 + 60 + 20 + 5 + 20 + 2
    assert account.mean_time_to_recover_s == pytest.approx((second + third) / 2)


def test_nothing_and_a_torn_line(tmp_path):
    assert text(read_time_account(tmp_path)) == "Nothing was logged yet."
    log = Log(tmp_path)
    log.begin(0, 1)
    log.updates(3, 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sam')
    account = read_time_account(tmp_path)
    assert account.seconds["useful"] == 3 and account.attempts[0].cause == "running"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_second_is_somewhere_and_every_sample_counts_once(tmp_path_factory, data):
    """Attempts of any length, each from any point that was reached: the sum is the clock's; useful time is that of the
    path."""
    log, saved = Log(tmp_path_factory.mktemp("run")), [0]
    per_update = data.draw(st.floats(0.5, 3))
    for _ in range(data.draw(st.integers(1, 5))):
        log.now += data.draw(st.floats(0, 50))
        log.attempt("begin")
        log.begin(saved[-1], data.draw(st.floats(0, 9)))
        for _ in range(data.draw(st.integers(0, 4))):
            log.updates(
                data.draw(st.integers(1, 7)),
                per_update,
                stall_s=data.draw(st.floats(0, 2)),
                rest_s=data.draw(st.floats(0, 2)),
            )
        log.now += data.draw(st.floats(0, 5))
        log.attempt("end", "ended")
        saved.append(data.draw(st.sampled_from(range(0, log.step * 10 + 1, 10))))
    first = log.step * 10
    log.attempt("begin")
    log.begin(saved[-1], 1.0)  # the last attempt is whole
    log.updates(3, per_update)
    account = read_time_account(log.folder)
    began = account.attempts[0].began
    assert account.total_s == pytest.approx(log.now - began)
    assert (
        account.seconds["useful"] == pytest.approx(per_update * log.step)
        and log.step * 10 == saved[-1] + 30
        and first >= 0
    )
    assert all(v >= -1e-9 for v in account.seconds.values())


def test_of_a_run_that_goes_on_the_clock_is_read(tmp_path, monkeypatch):
    def says(now: float, **progress) -> str | None:
        monkeypatch.setattr(time_account.time, "time", lambda: now)
        if progress:
            (tmp_path / "logs").mkdir(exist_ok=True)
            at = {
                "what": "measuring kNN",
                "total": 300,
                "unit": "images",
                "done": 100,
                "since": 1030.0,
                "advanced": progress["time"],
            }
            (tmp_path / "logs" / "progress.json").write_text(json.dumps(at | progress))
        found = read_time_account(tmp_path).now
        assert found is None or found["text"] in text(read_time_account(tmp_path))
        return found and f"{found['text']} {found['silent_s']:.0f}"

    log = Log(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert says(1000.0) is None
    assert (
        says(1005.0, time=1002.0, what="listing the images", total=0, since=1000.0) == "Listing the images, for 2 s 3"
    )
    log.attempt("begin")
    log.begin(0, takes=30)  # to 1030
    assert says(1040.0) == "Listing the images, for 2 s 10"
    assert says(1070.0, time=1040.0) == "Measuring kNN: 100 of 300 images, for 10 s 30"
    (tmp_path / "logs" / "progress.json").unlink()
    assert says(1090.0) == "Running 60"
    says(1090.0, time=1040.0)
    log.now = 1080.0
    log.attempt("end", cause="killed")
    assert says(1090.0) is None  # what it said last means nothing any more


def test_inspect_of_a_run_that_has_logged_nothing_yet_says_what_it_is_at(tmp_path, capsys):
    with Progress(tmp_path, every_s=0.01) as progress, progress.doing("listing the images of photos"):
        while not (tmp_path / "logs" / "progress.json").exists():
            time.sleep(0.01)
        assert main(["inspect", str(tmp_path)]) == 0
    assert "Nothing was logged yet. Listing the images of photos, for " in capsys.readouterr().out


def test_odd_lines_of_any_record_are_passed_over(tmp_path):
    log = Log(tmp_path)
    log.attempt("begin")
    log.begin(0, takes=30)
    log.now += 10
    log.attempt("end", cause="killed")
    expected = read_time_account(tmp_path)
    odd = b'\xff\n5\n[]\n{"event": "end"}\n{"event": 3, "time": 1, "attempt": "x"}\n{"event": "begin", "time": "x"}\n'
    with (tmp_path / "launch" / "attempts.jsonl").open("ab") as file:
        file.write(odd + b'{"event": "be')
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(odd + b'{"samples_seen": 5}\n{"samples_seen": 5, "wall_time": "x"}\n{"samples')
    assert read_time_account(tmp_path) == expected
    (tmp_path / "launch" / "attempts.jsonl").unlink()
    (tmp_path / "launch" / "attempts.jsonl").mkdir()
    assert read_time_account(tmp_path).attempts
