"""A first start that is refused leaves nothing behind; one that begins keeps what it says."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seer_scale import console
from seer_scale.checkpoint.lock import RunLock
from seer_scale.config import Config, resolve
from seer_scale.data.sources import remote
from seer_scale.distributed import World
from seer_scale.errors import STOP_SIGNALS, RankLostError, StartStopped, TrainingError, UserError
from seer_scale.files import to_json
from seer_scale.methods.registry import build_method
from seer_scale.models import execution as layout
from seer_scale.training import components, resume, run, start
from seer_scale.training.start import run_training
from tests.e2e.runs import RECIPE, events
from tests.tiny import RECIPE as TINY

SMALL = RECIPE | {
    "parallel": {"engine": "single"},
    "train": RECIPE["train"] | {"total_samples": 8},
    "knn": {"enabled": False},
}


@pytest.fixture
def given(tmp_path, photos) -> tuple[str, list[str]]:
    """A recipe, and the folder of a run that is not there yet, nor is the one it lies in."""
    path = tmp_path / "small.yaml"
    path.write_text(to_json(SMALL | {"data": RECIPE["data"] | {"path": str(photos)}}))
    return str(path), ["--run.dir", str(tmp_path / "runs" / "new")]


def refused(given: tuple[str, list[str]], *words: str) -> str:
    with pytest.raises(UserError) as error:
        run_training(given[0], [*given[1], *words])
    return str(error.value)


def test_a_first_start_that_is_refused_leaves_no_folder(given, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    (tmp_path / "none").mkdir()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "flat" / "0.png")
    (tmp_path / "list.txt").write_text("no/such.jpg\n")
    for words in (
        ["--data.path", str(tmp_path / "none")],
        ["--data.path", str(tmp_path / "list.txt")],
        ["--knn.enabled", "true", "--knn.bank", str(tmp_path / "flat")],
        ["--checkpoint.init_from", str(tmp_path / "flat")],
        ["--checkpoint.init_from", str(tmp_path / "flatt")],
        ["--checkpoint.resume", str(tmp_path / "flat")],
    ):
        refused(given, *words)
        assert not runs.exists(), words

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_whole", full)
        assert "cannot be written (No space left on device)" in refused(given)
    assert not runs.exists()

    runs.mkdir()  # what was there before stays
    (runs / "new").mkdir()
    refused(given, "--data.path", str(tmp_path / "none"))
    assert (runs / "new").is_dir()


def test_an_interrupt_before_anything_is_begun_is_a_stop(given, tmp_path, monkeypatch):
    def interrupted(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "read_recipe", interrupted)
    with pytest.raises(StartStopped, match="Stopped by SIGINT before anything was begun"):
        run_training(*given)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_stop_is_heard_while_images_are_listed(number, given, tmp_path, monkeypatch):
    def listed(*args, **how):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal should have ended this")

    monkeypatch.setattr(components, "open_data_history", listed)
    handlers = [signal.getsignal(s) for s in STOP_SIGNALS]
    assert refused(given).startswith(f"Stopped by {number.name} while images were listed")
    assert handlers == [signal.getsignal(s) for s in STOP_SIGNALS] and not (tmp_path / "runs").exists()


def test_a_stop_is_heard_while_a_server_says_nothing(given, tmp_path):
    """Threads ask it, which no signal reaches; their waits end, too."""
    over, before = threading.Event(), signal.signal(signal.SIGTERM, lambda *_: None)  # for one that comes late
    with socket.create_server(("127.0.0.1", 0)) as server:

        def stop() -> None:
            server.accept()
            while not over.wait(0.1):  # Python hears one late that comes just before it waits for a thread
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises(StartStopped, match="Stopped by SIGTERM while images were listed"):
                run_training(given[0], [*given[1], "--data.path", f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"])
            assert time.monotonic() - began < remote.READ_TIMEOUT_S
        finally:
            over.set()
            thread.join(1.0)
            signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "runs").exists()


def test_a_run_beside_its_images_has_a_folder_of_its_own(given, photos, tmp_path):
    """Among them it goes on with the same images; in their own folder it is refused."""
    told = refused((given[0], ["--run.dir", f"{photos}/../{photos.name}"]))
    assert told.count("  - ") == 1 and "that is data.path, too, and a run needs a folder of its own" in told
    assert not (photos / ".lock").exists()
    shutil.copytree(photos, tmp_path / "mine")
    words = [
        "--data.path",
        str(tmp_path / "mine"),
        "--run.prototype_images",
        "0",
        "--run.dir",
        str(tmp_path / "mine" / "runs" / "r"),
    ]
    for samples in ("8", "16"):
        assert run_training(given[0], [*words, "--train.total_samples", samples]) == 0
        assert list((tmp_path / "mine" / "runs" / "r" / "gallery").rglob("*.*"))
    told = [e["text"] for e in events(tmp_path / "mine" / "runs" / "r", "note")]
    assert sum("1 folder of a run" in text for text in told) == 2


def test_a_checkpoint_that_is_not_there_is_said_to_be_so(given, tmp_path):
    (tmp_path / "runs").mkdir()
    for key in ("init_from", "resume"):
        told = refused(given, f"--checkpoint.{key}", str(tmp_path / "runz"))
        assert f"runz, but it does not exist; did you mean {tmp_path / 'runs'}" in told


def test_links_that_lead_nowhere_are_not_offered_as_themselves(given, tmp_path):
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run").mkdir()
    for key in ("data.path", "knn.bank", "checkpoint.init_from", "checkpoint.resume"):
        for name, why in (
            ("lost", "is a link that leads nowhere."),
            ("lost/x", f"does not exist; {tmp_path}/lost is a link that leads nowhere."),
            ("loop", "cannot be read (Too many levels of symbolic links)."),
            ("run/x", f"does not exist; the nearest folder there is: {tmp_path}/run."),
            ("runn", f"does not exist; did you mean {tmp_path}/run?"),
            ("small.yaml/x", f"does not exist; {tmp_path}/small.yaml is no folder."),
        ):
            told = refused(given, "--knn.enabled", "true", f"--{key}", str(tmp_path / name))
            assert told.endswith(why) and "?." not in told, (key, told)
    run_training(*given)
    refused(given, "--checkpoint.resume", str(tmp_path / "loop"))  # compared with what the run holds


def test_a_stop_while_it_is_measured_what_runs_fastest_ends_the_start(given, tmp_path, monkeypatch):
    done = []

    def timed(*_):
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    monkeypatch.setattr(layout, "_time", timed)
    with pytest.raises(StartStopped, match="Stopped by SIGTERM before training began. Start it again"):
        run_training(given[0], [*given[1], "--train.memory_format", "auto"])
    assert len(done) == 2 and not (tmp_path / "runs").exists()


def test_threads_that_only_wait_for_each_other(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "available_cores", lambda: 1)
    told = refused(given, "--train.threads", "5")
    assert "train.threads is 5, but must be at most 4 here, 4 for each core" in told and "give 1, or 0" in told
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(components, "rank_cores", lambda world: 1)
    run_training(given[0], [*given[1], "--train.threads", "2"])
    assert "There are 2 CPU threads a rank (train.threads" in (said := capsys.readouterr().out)
    assert "but a rank may use 1 core: they stand" in said
    torch.set_num_threads(1)


def test_what_one_rank_makes_of_an_engine_is_said(given, capsys):
    """Beside the keys of that engine, which have no effect then."""
    words = ["--parallel.engine", "fsdp", "--parallel.min_unit_mib", "5", "--train.total_samples", "8"]
    run_training(given[0], [*given[1], *words])
    said = capsys.readouterr().out
    assert "There is one rank, so nothing is shared out: parallel.engine fsdp computes as single here." in said
    assert said.index("There is one rank") < said.index("parallel.min_unit_mib is 5, but has no effect")


def test_what_is_anothers_is_left_alone(given, tmp_path, monkeypatch):
    """Another command makes the folder first, and has begun, or is about to."""
    place = tmp_path / "runs" / "new"
    others: list[RunLock] = []

    class Second(RunLock):
        def __init__(self, run_dir: Path, *args, **how):
            if not others:
                others.append(RunLock(run_dir))
            super().__init__(run_dir, *args, **how)

    monkeypatch.setattr(run, "RunLock", Second)
    assert "is in use by" in refused(given)
    assert (place / ".lock").exists()
    others[0].release()


@pytest.mark.parametrize(
    "error, has_begun, stays",
    [
        (KeyboardInterrupt(), False, False),  # SIGINT for the second time
        (StartStopped("Stopped by SIGTERM"), False, False),
        (RankLostError("Another rank has ended"), False, True),  # which has crashed, as far as this one knows
        (RuntimeError("out of memory"), False, True),
        (KeyboardInterrupt(), True, True),
        (TrainingError("The loss is not finite"), True, True),
    ],
    ids=repr,
)
def test_a_folder_stays_where_a_run_has_begun_or_crashed(given, tmp_path, monkeypatch, error, has_begun, stays):
    def train(config: Config, world: World, run_dir: Path, *_) -> int:
        (run_dir / "logs").mkdir(parents=True)
        if has_begun:
            (run_dir / "metrics.jsonl").write_text(to_json({"event": "start", "samples_seen": 0}) + "\n")
        raise error

    monkeypatch.setattr(start, "train", train)
    with pytest.raises(type(error)):
        run_training(*given)
    assert (tmp_path / "runs" / "new" / "logs").exists() == (tmp_path / "runs").exists() == stays


def test_without_locks_no_folder_is_removed(given, tmp_path, monkeypatch):
    """As nobody knows whether another command has begun there."""

    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "none").mkdir()
    refused(given, "--data.path", str(tmp_path / "none"))
    assert (tmp_path / "runs" / "new" / ".lock").exists()


def test_weights_that_do_not_fit_are_refused_before_images_are_listed(given, tmp_path, monkeypatch):
    assert run_training(given[0], given[1]) == 0
    listed = []
    monkeypatch.setattr(components, "list_images", lambda *given: listed.append(given))
    words = ["--checkpoint.init_from", given[1][1], "--swav.prototypes", "[11]"]
    told = refused((given[0], ["--run.dir", str(tmp_path / "other")]), *words)
    assert "give checkpoint.init_part backbone" in told and not listed and not (tmp_path / "other").exists()


def test_the_remedy_for_another_network_names_what_makes_it():
    """A key is named where it changes what is built, and no other."""
    config = resolve(TINY, [], world_size=1)

    def shapes(config: Config) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in resume.state_of(build_method(config, World())).items()}

    def other(section: str, **keys: Any) -> Config:
        field = {"swav": "method_settings"}.get(section, section)
        return dataclasses.replace(config, **{field: dataclasses.replace(getattr(config, field), **keys)})

    change = {bool: lambda v: not v, tuple: lambda v: (*v, 9), float: lambda v: 1.5 * v, int: lambda v: v + 8}
    swav = {key: change[type(value)](value) for key, value in dataclasses.asdict(config.method_settings).items()}
    for section, changed in ("swav", swav), ("model", {"depth": 6, "group_width": 4, "se_ratio": 0.5}):
        for key, value in changed.items():
            now = other(section, **{key: value})
            is_named = f"{section}.{key} " in resume.remedy(config.to_dict(), now)
            assert is_named == (shapes(now) != shapes(config)), key
    assert "(swav.embedding_dim 16 -> 24)" in resume.remedy(
        config.to_dict(), other("swav", embedding_dim=24, temperature=0.3)
    )


def test_a_run_keeps_what_it_says_where_no_launcher_does(given, monkeypatch, tmp_path, capsys):
    console.install()
    print("before the run's folder is there")
    assert run_training(given[0], given[1]) == 0
    place = tmp_path / "runs" / "new"
    kept = (place / "logs" / "console-0.txt").read_text()
    said = capsys.readouterr().out
    assert [line[20:] for line in kept.splitlines()] == said.splitlines()
    assert said.splitlines()[0].startswith("before") and "Done: " in said and events(place, "start")[0]["text"] in kept

    console.install()
    assert run_training(given[0], ["--run.dir", str(tmp_path / "launched")], attempt="1") == 0
    assert not (tmp_path / "launched" / "logs" / "console-0.txt").exists()


def test_a_crash_leaves_what_it_said(given, tmp_path, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(components, "build_engine", broken)
    with pytest.raises(RuntimeError):
        run_training(*given)
    assert (tmp_path / "runs" / "new" / "logs").is_dir()


def test_figures_that_were_asked_for_and_are_not_reached_are_told(given, capsys):
    """More neighbours than images that vote, fewer samples than were seen."""
    run_training(given[0], [*given[1], "--knn.enabled", "true", "--knn.k", "500", "--train.total_samples", "32"])
    assert re.search(r"knn\.k is 500, but \d+ images can vote in kNN: all of them do", capsys.readouterr().out)
    run_training(given[0], [*given[1], "--train.total_samples", "30"])  # whole batches
    assert "fewer than" not in capsys.readouterr().out
    run_training(given[0], [*given[1], "--train.total_samples", "16"])
    said = capsys.readouterr().out
    assert (
        "all 32 samples were seen" in said and "train.total_samples asks for 16, fewer than this run has seen" in said
    )
