"""The record of a run: strict JSON whatever comes, whole lines after any kill, one path through any restarts."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from seer_scale.errors import ConfigError
from seer_scale.files import shown, to_json
from seer_scale.observe import sinks
from seer_scale.observe.console_sink import ConsoleSink
from seer_scale.observe.records import read_metrics
from seer_scale.observe.run_log import RunLog
from seer_scale.observe.sinks import SINKS, check_installed

BATCH = 64


class Nowhere:
    """A sink that keeps nothing."""

    def __init__(self, run_dir):
        pass

    def row(self, row):
        pass

    def event(self, event):
        pass

    def close(self):
        pass


def foot(log: RunLog) -> str:
    """What a terminal shows at its foot."""
    (console,) = (s for s in log._sinks if isinstance(s, ConsoleSink))
    return "  ".join(console._values(console._latest))


@pytest.fixture(autouse=True)
def no_tensorboard(request, monkeypatch):
    """Opening TensorBoard costs seconds; the one test about it has the real one."""
    if "tensorboard" not in request.node.name:
        monkeypatch.setitem(SINKS, "tensorboard", Nowhere)


def open_log(run_dir, total=6400) -> RunLog:
    return RunLog(run_dir, total, ("ln K", 4.159), active=True)


def row(step: int, **more) -> dict:
    return {"step": step, "samples_seen": step * BATCH, "loss": 4.0, "throughput/img_per_s": 100.0} | more


def strict_lines(run_dir) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


NAMES = ["loss", "lr", "loss_scale", "knn/top1", "throughput/img_per_s"]
numbers = st.floats() | st.floats(width=32).map(np.float32) | st.floats(width=32).map(torch.tensor)
values = st.recursive(
    numbers | st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)
anything = st.builds(
    lambda a, b: a | b, st.dictionaries(st.text(), values), st.dictionaries(st.sampled_from(NAMES), numbers)
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metrics=anything, text=st.text(), samples=st.integers(0, 2**40))
@example(metrics={"knn/samples": [], "knn/top1": 0.0}, text="", samples=0)
def test_every_line_is_strict_json_whatever_the_values(tmp_path, metrics, text, samples):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with open_log(tmp_path) as log:
        log.log(metrics | {"step": 1, "samples_seen": samples})
        log.event("note", text, samples_seen=samples, detail=metrics)
    first, second = strict_lines(tmp_path)
    assert first["samples_seen"] == second["samples_seen"] == samples
    assert second["text"] == shown(text)


def test_numbers_that_are_not_finite_become_null_and_tensors_numbers(tmp_path):
    with open_log(tmp_path) as log:
        log.log(row(1, loss=float("nan"), lr=np.float32("inf"), grad_norm=torch.tensor(1.5), some=[1, float("-inf")]))
    (line,) = strict_lines(tmp_path)
    assert (line["loss"], line["lr"], line["grad_norm"], line["some"]) == (None, None, 1.5, [1, None])


def test_a_kill_at_any_byte_loses_at_most_the_line_being_written(tmp_path):
    with open_log(tmp_path) as log:
        for step in (1, 2):
            log.log(row(step))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        before = [r["step"] for r in read_metrics(tmp_path)[0]]
        with open_log(tmp_path) as log:
            log.log(row(3))
        steps = [line["step"] for line in strict_lines(tmp_path)]
        assert steps == [1, 2][: whole[:cut].count(b"\n")] + [3]
        assert set(steps) - {3} <= set(before)  # a reader may see a last line whose end of line is still missing


def test_a_restart_drops_the_rows_beyond_the_point_it_went_on_from(tmp_path):
    with open_log(tmp_path) as log:
        log.event("start", "A new run.", samples_seen=0)
        log.log({"samples_seen": 0, "knn/top1": 20.0})
        for step in range(1, 8):
            log.log(row(step, loss=1.0))
        log.log({"samples_seen": 7 * BATCH, "knn/top1": 99.0})
    with open_log(tmp_path) as log:
        log.event("resume", "Going on from 256 images.", samples_seen=4 * BATCH)
        for step in (5, 6):
            log.log(row(step, loss=2.0))
        log.log({"samples_seen": 6 * BATCH, "knn/top1": 40.0})
    rows, events = read_metrics(tmp_path)
    assert [r["samples_seen"] // BATCH for r in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in rows[1:]] == [1.0] * 4 + [2.0] * 2
    assert [r["knn/top1"] for r in rows if "knn/top1" in r] == [20.0, 40.0]
    assert rows[-1]["step"] == 6  # an evaluation joins the row of its samples_seen
    assert [e["event"] for e in events] == ["start", "resume"]


def test_without_resume_events_the_later_line_of_the_same_samples_wins(tmp_path):
    with open_log(tmp_path) as log:
        log.log(row(1, loss=1.0))
        log.log(row(2, loss=1.0))
        log.log(row(1, loss=3.0))
    assert [r["loss"] for r in read_metrics(tmp_path)[0]] == [3.0, 1.0]


def test_a_run_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == ([], [])


def test_the_eta_forgets_the_rates_of_other_starts(tmp_path):
    with open_log(tmp_path) as log:
        assert log.eta_s() is None
        log.event("start", "A new run.", samples_seen=0)
        for step in range(1, 51):
            log.log(row(step, **{"throughput/img_per_s": 10.0}))
        assert log.eta_s() == pytest.approx(50 * BATCH / 10)
    with open_log(tmp_path) as log:  # on more ranks
        log.event("resume", "Going on.", samples_seen=40 * BATCH)
        assert log.eta_s() is None
        log.log(row(41, **{"throughput/img_per_s": 160.0}))
        assert log.eta_s() == pytest.approx(59 * BATCH / 160)


def test_one_line_is_enough_for_a_first_eta(tmp_path):
    with open_log(tmp_path) as log:
        log.log(row(1, **{"throughput/img_per_s": 100.0}))
        assert log.eta_s() == pytest.approx((6400 - BATCH) / 100)


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with RunLog(tmp_path, 400_000, ("ln K", 5.7038), active=True) as log:
        log.event("start", "A new run [of 400,000 images].", samples_seen=0)
        log.log(
            {
                "step": 50,
                "samples_seen": 12_800,
                "loss": 5.412,
                "lr": 0.3,
                "loss_scale": 65536.0,
                "throughput/img_per_s": 812.0,
            }
        )
        log.log({"samples_seen": 12_800, "knn/top1": 43.14, "knn/top1_stderr": 1.26, "knn/majority": 10.0})
        log.log({"step": 51, "samples_seen": 13_056, "loss": float("nan")})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines() == [
        "A new run [of 400,000 images].",
        "samples 12,800/400,000  loss 5.412 (ln K 5.704)  lr 0.3  scale 65536  812 img/s  ETA about 0:07:57",
        "samples 12,800/400,000  kNN top-1 43.1 % ± 1.3 (commonest class 10.0 %)",
        out.splitlines()[-1],
    ]
    assert "loss not finite (ln K 5.704)" in out.splitlines()[-1]


def test_on_a_terminal_the_progress_is_live(tmp_path):
    program = f"""
from pathlib import Path
from seer_scale.observe.run_log import RunLog
with RunLog(Path({str(tmp_path)!r}), 6400, ("ln K", 4.159), active=True, sinks=()) as log:
    log.event("start", "A new run.", samples_seen=0)
    log.log({row(50, loss=3.5, lr=0.3, **{"knn/top1": 41.0})})
"""
    ours, theirs = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stdin=theirs, env=env)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    for words in (
        "A new run.",
        "3,200/6,400",
        "100 img/s",
        "ETA about 0:00:32",
        "loss 3.500 (ln K 4.159)",
        "41.0 %",
        "━━━",
    ):
        assert words in text, words


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", 100, ("ln K", 1.0), active=False) as log:
        log.log(row(1))
        log.event("start", "A new run.", samples_seen=0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_told_once_and_never_ends_the_run(tmp_path, monkeypatch, capsys):
    write = os.write

    def full(fd, data):
        write(fd, data[:5])
        return 5

    with open_log(tmp_path) as log:
        log.log(row(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            log.log(row(2))
            log.log(row(3))
        log.log(row(4))
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 4]
    assert capsys.readouterr().err.count("free some space") == 1


def test_tensorboard_has_the_scalars_by_samples_without_the_abandoned_ones(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(row(step, loss=1.0))
    with open_log(tmp_path) as log:
        log.event("resume", "Going on.", samples_seen=BATCH)
        log.log(row(2, loss=2.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(BATCH, 1.0), (2 * BATCH, 2.0)]


def test_json_is_strict_whatever_it_holds():
    text = to_json({"a": [math.inf, -math.nan, 1.5], "b": {1: torch.tensor([math.nan, 2.0])}, "c": Path("x")})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": {"1": [None, 2.0]}, "c": "x"}


def test_a_terminal_shows_of_where_its_knn_is(tmp_path):
    """Also one that another start has measured."""
    for row in ({"samples_seen": 320, "knn/top1": 30.0}, {"samples_seen": 640, "loss": 5.0}):
        with RunLog(tmp_path, 1000, ("nothing", 5.0), active=True) as log:
            log.log(row)
            shown = foot(log)
    assert "kNN top-1 30.0 % at 320 samples" in shown
    assert "knn/samples" not in (tmp_path / "metrics.jsonl").read_text()
    with RunLog(tmp_path, 1000, ("nothing", 5.0), active=True) as log:
        assert "kNN top-1 30.0 % at 320 samples" in foot(log)
        log.log({"samples_seen": 960, "knn/top1": 35.0})
        assert foot(log).endswith("kNN top-1 35.0 %")


class Broken(Nowhere):
    """A service that cannot be reached, ever."""

    calls = 0

    def row(self, *_):
        Broken.calls += 1
        raise ConnectionError("no network")

    event = close = row


@pytest.mark.parametrize("slow", [False, True])
def test_a_sink_that_fails_on_every_call_costs_a_warning(tmp_path, monkeypatch, capsys, slow):
    monkeypatch.setitem(SINKS, "broken", Broken)
    monkeypatch.setattr(sinks, "SLOW_SINKS", {"broken"} if slow else set())
    monkeypatch.setattr(Broken, "calls", 0)
    with RunLog(tmp_path, 6400, ("ln K", 4.159), active=True, sinks=("broken",)) as log:
        log.event("start", "A new run.", samples_seen=0)
        log.log(row(1))
        log.log(row(2))
    assert Broken.calls == 4
    assert [line.get("step") for line in strict_lines(tmp_path)] == [None, 1, 2]
    assert capsys.readouterr().err.count("run.sinks broken cannot be written to (no network)") == 1


def test_a_sink_that_cannot_be_made_is_left_out(tmp_path, monkeypatch, capsys):
    def unmade(run_dir):
        raise ImportError("half installed")

    monkeypatch.setitem(SINKS, "broken", unmade)
    with RunLog(tmp_path, 6400, ("ln K", 4.159), active=True, sinks=("broken",)) as log:
        log.log(row(1))
    assert len(strict_lines(tmp_path)) == 1 and "half installed" in capsys.readouterr().err


def test_a_slow_sink_holds_up_neither_the_run_nor_its_end(tmp_path, monkeypatch, capsys):
    over = threading.Event()

    class Slow(Nowhere):
        def row(self, row):
            over.wait(60)

    monkeypatch.setitem(SINKS, "slow", Slow)
    monkeypatch.setattr(sinks, "SLOW_SINKS", {"slow"})
    monkeypatch.setattr(sinks, "SINK_CLOSE_S", 0.01)
    monkeypatch.setattr(sinks, "MAX_WAITING", 2)
    begin = time.perf_counter()
    with RunLog(tmp_path, 6400, ("ln K", 4.159), active=True, sinks=("slow",)) as log:
        for step in range(1, 9):
            log.log(row(step))
    assert time.perf_counter() - begin < 30
    over.set()
    assert len(strict_lines(tmp_path)) == 8 and capsys.readouterr().err.count("too slow") == 1


def test_a_sink_whose_package_is_missing_is_refused_with_how_to_install_it(monkeypatch):
    """A folder called wandb, as one run of it leaves behind, is no package either."""
    specs = {"tensorboard": SimpleNamespace(origin="x.py"), "mlflow": None, "wandb": SimpleNamespace(origin=None)}
    monkeypatch.setattr(sinks, "find_spec", specs.get)
    check_installed(("tensorboard",))
    with pytest.raises(ConfigError) as caught:
        check_installed(("tensorboard", "mlflow", "wandb"))
    for problem, name in zip(caught.value.problems, ("mlflow", "wandb"), strict=True):
        assert problem.key == "run.sinks" and name in problem.rule and problem.nearest.startswith("pip install ")


def test_mlflow_goes_on_in_one_run_of_a_store_in_the_runs_folder(tmp_path, monkeypatch, capsys):
    """Three updates, then a restart from the first."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("optim: {lr: 0.3, betas: [0.9, 0.99]}\ntrain: {total_samples: 6400}\n")
    for samples, steps, loss in ((0, (1, 2, 3), 1.0), (BATCH, (2,), 2.0)):
        with RunLog(run_dir, 6400, ("ln K", 4.159), active=True, sinks=("mlflow",)) as log:
            log.event("resume" if samples else "start", "Training.", samples_seen=samples)
            for step in steps:
                log.log(row(step, loss=loss, grad_norm=float("nan")))
    assert capsys.readouterr().err.count("cannot be") == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.3", "optim.betas": "[0.9, 0.99]", "train.total_samples": "6400"}
    losses = sorted((m.step // BATCH, m.value) for m in client.get_metric_history(run.info.run_id, "loss"))
    assert losses == [(1, 1.0), (2, 1.0), (2, 2.0), (3, 1.0)]
    assert "grad_norm" not in run.data.metrics
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_wandb_goes_on_in_one_run_offline_in_the_runs_folder(tmp_path):
    """In a process of its own, at whose end wandb has written everything."""
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {total_samples: 6400}\n")
    program = """
from pathlib import Path
from seer_scale.observe.run_log import RunLog
for samples in (0, 64):
    with RunLog(Path("run"), 6400, ("ln K", 4.159), active=True, sinks=("wandb",)) as log:
        log.event("resume" if samples else "start", "Training.", samples_seen=samples)
        log.log({"step": 1, "samples_seen": samples + 64, "loss": 1.0})
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "cannot be" not in done.stderr
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # its id is in its name
    assert all(b"loss" in file.read_bytes() and b"total_samples" in file.read_bytes() for file in files)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
