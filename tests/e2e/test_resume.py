"""A run stopped at any moment, in any way, goes on as if it had not been, on any number of ranks."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial

import torch

from seer_scale.checkpoint.store import TensorReader
from seer_scale.cli import main
from seer_scale.launch.job import Job
from seer_scale.models import execution as layout
from seer_scale.models.init import initial_values
from seer_scale.observe.gallery import read_gallery
from seer_scale.observe.records import read_metrics
from seer_scale.parallel import engine
from seer_scale.rank_info import detect
from seer_scale.training.start import run_training
from tests.e2e import runs
from tests.e2e.runs import (
    LAUNCH,
    TRAIN,
    assert_same_path,
    checkpoints,
    command,
    events,
    raises_on_rank_1,
    reaches,
    recipe,
    run,
    start,
    until,
)
from tests.tiny import DINOV2, FCMAE
from tests.vissl import classy, vissl


def test_killed_on_two_ranks_goes_on_on_one(straight, tmp_path, photos):
    """kill -9 of the whole launched run, mid-way: updates after the newest checkpoint are repeated."""
    given, place = recipe(tmp_path, photos, data={"workers": 1}), tmp_path / "run"
    launcher = command(*LAUNCH, given, "--cluster", "local", "--ranks", 2, "--run.dir", place, folder=tmp_path)
    until(reaches(place, 72), lambda: launcher.text)
    runs.end_all()
    assert launcher.wait() == -signal.SIGKILL
    until(lambda: not runs.processes())
    done = max(runs.steps(place))
    assert done < 160

    text = run("train", given, "--run.dir", place, "--parallel.engine", "ddp", folder=tmp_path)
    begun = events(place, "resume")[0]["samples_seen"]
    assert 0 < begun <= done and begun % 24 == 0 and f"samples-{begun:012d}" in text
    assert_same_path(place, straight)


def test_a_lost_rank_ends_the_others(straight, tmp_path, photos):
    """By an exception, then by a kill. All are started again, once here, and the second loss ends the run; it goes on
    all the same."""
    given, place = recipe(tmp_path, photos, checkpoint={"every_samples": 40}), tmp_path / "run"
    words = (*LAUNCH, given, "--cluster", "local", "--ranks", 2, "--run.dir", place, "--restarts", 0)
    launcher = command(*words, folder=tmp_path, **raises_on_rank_1(tmp_path))
    until(reaches(place, 40), lambda: launcher.text)
    (tmp_path / "raise").touch()
    until(lambda: events(place, "resume"), lambda: launcher.text)
    assert (
        "[rank 1] ArithmeticError" in launcher.text
        and "Rank 1 ended with status 1. Starting the ranks again, from the checkpoint at" in launcher.text
    )
    os.kill(runs.ranks_of(launcher)[1], signal.SIGKILL)
    assert launcher.wait() == 1
    assert "Rank 1 was ended by SIGKILL, from outside" in launcher.text and "Another rank has ended" in launcher.text
    assert (
        "As the last start brought no new checkpoint, the run ends here; the newest checkpoint stands" in launcher.text
    )
    assert not list((place / "logs").glob("*.pkl")) and not list((place / "logs").glob("rendezvous*"))

    # the launcher itself killed: its ranks save and stop, and the next start goes on from there
    launcher = command(*words, folder=tmp_path)
    until(
        lambda: events(place, "resume") and reaches(place, events(place, "resume")[-1]["samples_seen"])(),
        lambda: launcher.text,
    )
    launcher.process.kill()
    assert launcher.wait() == -signal.SIGKILL
    until(lambda: not runs.processes())
    run("train", given, "--run.dir", place, folder=tmp_path)
    assert len(events(place, "stop")) == 1 or max(runs.steps(place)) == 160
    assert_same_path(place, straight)


def test_launcher_passes_stops_on(straight, tmp_path, photos):
    """One that comes before the ranks can hear it, then one to the whole process group in mid-run, as a terminal that
    closes, service managers and Ctrl-C send it, which reaches the ranks twice, and ends the `| tee` that the launcher
    prints to, too; the same command goes on each time. What another launcher has left in the environment counts for
    nothing."""
    given, place = recipe(tmp_path, photos), tmp_path / "run"
    words = (*LAUNCH, given, "--cluster", "local", "--ranks", 2, "--run.dir", place)
    for number, moment, send in (
        (signal.SIGUSR2, runs.ranks_of, os.kill),
        (signal.SIGHUP, lambda _: reaches(place, 24)(), os.killpg),
    ):
        left = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": 9}
        launcher = command(*words, folder=tmp_path, pipe=number == signal.SIGHUP, **left)
        until(partial(moment, launcher), lambda: launcher.text)  # noqa: B023
        launcher.break_pipe()
        send(launcher.process.pid, number)
        assert launcher.wait() == 75, launcher.text
        assert launcher.is_piped or "Start it again and it goes on." in launcher.text
        assert bool(checkpoints(place)) == (number == signal.SIGHUP)
    assert [(end["status"], end["cause"]) for end in Job.of(place).attempts() if end["event"] == "end"] == [
        (75, "stopped")
    ] * 2
    run("train", given, "--run.dir", place, folder=tmp_path)
    assert_same_path(place, straight)


def test_a_rank_that_hangs_ends_all_and_they_start_again(straight, tmp_path, photos):
    """Stopped by SIGSTOP, as by a dead file system: the other one tells where it waits."""
    given, place = (
        recipe(tmp_path, photos, data={"workers": 1, "timeout_s": 0.4}, run={"hang_timeout_s": 10.0}),
        tmp_path / "run",
    )
    launcher = command(*LAUNCH, given, "--cluster", "local", "--ranks", 2, "--run.dir", place, folder=tmp_path)
    until(reaches(place, 40), lambda: launcher.text)
    os.kill(runs.ranks_of(launcher)[1], signal.SIGSTOP)
    assert launcher.wait() == 0, launcher.text
    assert (
        re.search(r"\[rank 0\] no progress for \d+ s \(run.hang_timeout_s 10\)", launcher.text)
        and "[rank 0] thread MainThread:" in launcher.text
    )
    assert "Rank 0 hung and was ended by its watchdog. Starting the ranks again" in launcher.text
    assert_same_path(place, straight)


def test_signal_to_train(straight, tmp_path, photos):
    """The command itself, by SIGTERM, then SIGINT in the middle of what it had left."""
    given, place = recipe(tmp_path, photos), tmp_path / "run"
    words = (*TRAIN, given, "--run.dir", place)
    early = command(*words[:-1], tmp_path / "early", folder=tmp_path)
    until(lambda: "starting " in early.text)  # while torch is loaded
    early.process.send_signal(signal.SIGUSR1)
    assert early.wait() == 75 and "Stopped by SIGUSR1" in early.text and "Traceback" not in early.text
    first = command(*words, folder=tmp_path)
    until(reaches(place, 24), lambda: first.text)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text
    begun = max(runs.steps(place))
    second = start(*words[3:], folder=tmp_path)
    until(reaches(place, begun), lambda: second.text)
    second.kill(signal.SIGINT)
    assert second.wait() == [75], second.text
    assert checkpoints(place)[-1] == f"samples-{max(runs.steps(place)):012d}"
    run(*words[3:], folder=tmp_path, ranks=2)
    assert [e["samples_seen"] for e in events(place, "resume")] == [e["samples_seen"] for e in events(place, "stop")]
    assert_same_path(place, straight)


def test_plateau_is_that_of_a_run_never_stopped(tmp_path, photos):
    """Killed, stopped, resumed on other ranks, with other metric lines: the rate is cut where it would have been."""
    plateau = {"name": "plateau", "plateau_samples": 20, "plateau_threshold": 0.02}
    given, place = (
        recipe(tmp_path, photos, schedule=plateau | {"warmup_samples": 9}, knn={"enabled": False}),
        tmp_path / "run",
    )
    run("train", given, "--run.dir", tmp_path / "straight", folder=tmp_path)
    first = start("train", given, "--run.dir", place, folder=tmp_path)
    until(reaches(place, 24), lambda: first.text)
    first.kill(signal.SIGKILL)
    first.wait()
    second = start("train", given, "--run.dir", place, "--train.log_every", 3, folder=tmp_path)
    until(
        lambda: reaches(place, events(place, "resume")[0]["samples_seen"])() if events(place, "resume") else False,
        lambda: second.text,
    )
    second.kill(signal.SIGTERM)
    assert second.wait() == [75], second.text
    run("train", given, "--run.dir", place, "--train.log_every", 5, folder=tmp_path, ranks=2)
    want, got = runs.steps(tmp_path / "straight"), runs.steps(place)
    cuts = [e["samples_seen"] for e in events(tmp_path / "straight", "plateau")]
    assert len({r["lr"] for r in want.values()}) > 2 and all(s == 160 or (s - 9) % 20 < 8 for s in cuts), cuts
    assert {s: r["lr"] for s, r in got.items()} == {s: want[s]["lr"] for s in got}


def test_second_signal_ends_at_once(tmp_path, photos):
    given, place = recipe(tmp_path, photos, train={"total_samples": 80_000}), tmp_path / "run"
    r = start("train", given, "--run.dir", place, folder=tmp_path)
    until(reaches(place, 24), lambda: r.text)
    r.kill(signal.SIGINT)
    r.kill(signal.SIGINT)
    assert r.wait()[0] in (1, 75), r.text  # the kernel may make one of two signals
    assert "Traceback" not in r.text and "Stopped " in r.text
    run("train", given, "--run.dir", place, "--train.total_samples", max(runs.steps(place)) + 8, folder=tmp_path)


def test_a_stop_during_evaluation_does_not_wait_for_its_end(tmp_path, photos):
    """Before the first update there is nothing to save; during the run there is."""
    given, place = (
        recipe(tmp_path, photos, knn={"every_samples": 8, "batch": 1}, train={"total_samples": 80_000}),
        tmp_path / "run",
    )
    r = start("train", given, "--run.dir", place, ranks=2, folder=tmp_path)
    until(lambda: events(place, "start"))
    r.kill(signal.SIGTERM, rank=1)
    assert r.wait() == [75, 75], r.text
    assert "Stopped by SIGTERM" in r.text


def test_torn_checkpoint_is_passed_over(straight, tmp_path, photos):
    given, place = recipe(tmp_path, photos), tmp_path / "run"
    run("train", given, "--run.dir", place, "--train.total_samples", 72, folder=tmp_path)
    whole, torn = checkpoints(place)[-2:]
    file = next((place / "checkpoints" / torn).glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    text = run("train", given, "--run.dir", place, "--schedule.warmup_samples", 9, folder=tmp_path)
    assert f"{torn} is passed over" in text and f"Going on from {place}/checkpoints/{whole}" in text
    assert "Changed since: " in text and "schedule.warmup_samples 8 -> 9" in text


def test_a_probe_goes_on_on_another_number_of_ranks_and_leaves_no_trace(straight, tmp_path, photos):
    """The network's path is that of the run without it; the probe's that of a run never stopped."""
    given = recipe(tmp_path, photos, probe={"enabled": True, "lr": 0.01}, checkpoint={"every_samples": 80})
    lines = {}
    for name, ranks, stops in (("at once", 1, ()), ("stopped", 2, (80,))):
        place = tmp_path / name
        for end in stops:
            whole = {"--train.total_samples": end, "--schedule.decay_samples": 160}
            words = [word for pair in whole.items() for word in pair]
            run("train", given, "--run.dir", place, *words, ranks=ranks, folder=tmp_path)
        text = run("train", given, "--run.dir", place, folder=tmp_path)
        assert "A linear probe of" in text and "begins anew" not in text
        assert_same_path(place, straight)
        lines[name] = [r for r in read_metrics(place)[0] if r["samples_seen"] > 80]
    for one, other in zip(lines["at once"], lines["stopped"], strict=True):
        for key in ("probe/loss", "probe/train_top1", "probe/top1"):
            assert (key in one) == (key in other) and abs(one.get(key, 0) - other.get(key, 0)) < 1e-2, (key, one, other)
    assert "probe/top1" in one and lines["at once"][-1]["probe/loss"] < 2


def test_resume_and_init_from_are_different_words(tmp_path, photos):
    given, place = recipe(tmp_path, photos, train={"total_samples": 48}), tmp_path / "run"
    run("train", given, "--run.dir", place, folder=tmp_path)
    old, new = (place / "checkpoints" / name for name in checkpoints(place)[-2:])

    text = run("train", given, "--run.dir", place, "--checkpoint.resume", "none", folder=tmp_path, status=2)
    assert "already holds samples-000000000048" in text and "resume auto" in text
    text = run("train", given, "--run.dir", place, "--checkpoint.resume", old, folder=tmp_path, status=2)
    assert "give another run.dir" in text and len(checkpoints(place)) == 2

    # an older one goes on in a run.dir of its own, and the same command, given again, goes on there
    words = ("train", given, "--run.dir", tmp_path / "branch", "--checkpoint.resume", old, "--train.total_samples")
    run(*words, 56, folder=tmp_path)
    (begun,) = events(tmp_path / "branch", "resume")
    assert begun["samples_seen"] == 24 and "train.total_samples 48 -> 56" in begun["text"]
    assert "The learning rate goes from 0.0131 to 0.015, because of train.total_samples" in begun["text"]
    run(*words, 64, folder=tmp_path)
    assert [e["samples_seen"] for e in events(tmp_path / "branch", "resume")] == [24, 56]
    assert list(runs.steps(tmp_path / "branch")) == [32, 40, 48, 56, 64]
    run("train", given, "--run.dir", place, "--checkpoint.resume", new, "--train.total_samples", 56, folder=tmp_path)

    run("train", given, "--run.dir", tmp_path / "fresh", "--checkpoint.init_from", new, folder=tmp_path)
    rows = runs.read_metrics(tmp_path / "fresh")[0]
    assert [r["samples_seen"] for r in rows] == list(range(0, 49, 8))
    (begun,) = events(tmp_path / "fresh", "start")
    assert f"Its weights are those of {new}" in begun["text"] and 0 < begun["load_bytes"] < sum(
        f.stat().st_size for f in new.iterdir()
    )
    after = [r for r in runs.read_metrics(place)[0] if r["samples_seen"] == 48][0]
    assert rows[0]["knn/top1"] == after["knn/top1"]

    # of a run's newest, into another projection head: refused as a whole, taken without it
    words = ("train", given, "--run.dir", tmp_path / "part", "--checkpoint.init_from", place, "--swav.embedding_dim", 8)
    text = run(*words, ranks=2, folder=tmp_path, status=2)
    assert "in this run; give checkpoint.init_part backbone, which draws all else anew" in text
    assert not (tmp_path / "part").exists()
    run(*words, "--checkpoint.init_part", "backbone", "--train.total_samples", 8, folder=tmp_path)
    (begun,) = events(tmp_path / "part", "start")
    assert f"Its backbone is that of {place}/checkpoints/samples-000000000056 and all else drawn anew" in begun["text"]
    assert (
        abs(runs.read_metrics(tmp_path / "part")[0][0]["knn/top1"] - after["knn/top1"]) < 10
    )  # features are the backbone's


def test_a_start_that_goes_on_draws_no_initial_value(tmp_path, photos, monkeypatch):
    given, place = recipe(tmp_path, photos, train={"total_samples": 16}, knn={"enabled": False}), str(tmp_path / "run")
    drawn = []
    monkeypatch.setattr(engine, "initial_values", lambda *args: drawn.append(args) or initial_values(*args))
    assert run_training(given, ["--run.dir", place]) == 0
    assert drawn
    drawn.clear()
    assert run_training(given, ["--run.dir", place, "--train.total_samples", "24"]) == 0
    assert not drawn and list(runs.steps(tmp_path / "run")) == [8, 16, 24]
    words = ["--checkpoint.init_from", place, "--checkpoint.init_part"]
    for part, anew in (("all", set()), ("backbone", {"head", "prototypes"})):
        drawn.clear()
        assert run_training(given, ["--run.dir", str(tmp_path / part), *words, part]) == 0
        assert {name.partition(".")[0] for _, _, _, name, *_ in drawn} == anew


def test_precision_and_queue_may_change_on_a_resume(tmp_path, photos):
    """The loss scale begins anew with another precision; a queue that was not there is filled before it joins."""
    given, place = recipe(tmp_path, photos), tmp_path / "run"
    run("train", given, "--run.dir", place, "--train.total_samples", 24, folder=tmp_path)
    changed = ("--train.precision", "fp16", "--swav.queue", 16, "--train.total_samples", 64)
    text = run("train", given, "--run.dir", place, *changed, folder=tmp_path)
    assert "train.precision" in text and "swav.queue" in text  # the log names what changed
    rows = runs.steps(place)
    assert rows[24]["loss_scale"] == 1.0 and rows[64]["loss_scale"] >= 2**10
    run("train", given, "--run.dir", place, "--train.total_samples", 80, folder=tmp_path)
    assert runs.steps(place)[80]["loss_scale"] == 1.0


def test_the_best_by_knn_stays_and_is_measured_by_its_link(tmp_path, photos):
    """At each evaluation that is the best so far, with checkpoints at no other moment; over a stop, too."""
    kept = {"every_samples": 0, "keep_last": 1, "keep_best": True}
    given, place = recipe(tmp_path, photos, checkpoint=kept, knn={"every_samples": 16}), tmp_path / "run"
    run("train", given, "--run.dir", place, "--train.total_samples", 48, "--train.log_every", 100, folder=tmp_path)
    run("train", given, "--run.dir", place, "--train.total_samples", 112, folder=tmp_path)
    top1 = {
        r["samples_seen"]: r["knn/top1"] for r in runs.read_metrics(place)[0] if "knn/top1" in r and r["samples_seen"]
    }
    best = max(top1, key=top1.get)
    assert list(top1) == [16, 32, 48, 64, 80, 96, 112]
    link = place / "checkpoints" / "best"
    assert link.resolve().name == f"samples-{best:012d}" and checkpoints(place) == sorted(
        {link.resolve().name, "samples-000000000112"}
    )
    assert [e["text"] for e in events(place, "best")][-1].endswith(f"{link.resolve().name}, kept as checkpoints/best.")
    text = run("eval", "knn", link, "--json", folder=tmp_path)
    scores = json.loads(text.strip().splitlines()[-1])
    assert abs(scores["score"] - top1[best]) < 1e-4
    assert scores["subject"] | {"samples_seen": best, "run": str(place)} == scores["subject"]
    assert "nor a checkpoint" in run("eval", "knn", link.parent, folder=tmp_path, status=2)


def stop_in_third_timing() -> None:
    """Called in a rank: rank 0 is told to stop while it is measured what runs fastest."""
    done = []

    def timed(*_: object) -> float:
        done.append(1)
        if len(done) == 3 and detect().rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    layout._time = timed


def test_all_ranks_leave_together_while_it_is_measured_what_runs_fastest(tmp_path, photos):
    given = recipe(tmp_path, photos, train={"memory_format": "auto"})
    stopped = start(
        "train", given, "--run.dir", tmp_path / "run", ranks=2, folder=tmp_path, console=stop_in_third_timing
    )
    assert stopped.wait() == [75, 75], stopped.text
    assert "Stopped by SIGTERM before training began" in stopped.text and not (tmp_path / "run").exists()


def _goes_on_after_a_kill(folder, given: dict, *words: str, samples: int = 1200) -> None:
    """kill -9 of fsdp on 2 ranks; zero2 on 3 ranks goes on to the end: as if never stopped."""
    few = {"knn": {"enabled": False}, "health": {"images": 0}, "run": {"prototype_images": 0}}
    given = {"checkpoint": {"every_samples": 96}, "parallel": {"engine": "fsdp"}} | given | few
    given["train"] = runs.RECIPE["train"] | {"global_batch": 12, "total_samples": samples}
    (folder / "given.yaml").write_text(json.dumps(given))
    words, place = ("train", str(folder / "given.yaml"), *words, "--run.dir"), folder / "run"
    run(*words, folder / "straight", folder=folder)
    first = start(*words, place, ranks=2, folder=folder)
    until(reaches(place, 96), lambda: first.text)
    for rank in range(2):
        first.kill(signal.SIGKILL, rank)
    first.wait()
    done = max(runs.steps(place))
    assert done < samples
    text = run(*words, place, "--parallel.engine", "zero2", ranks=3, folder=folder)
    begun = events(place, "resume")[0]["samples_seen"]
    assert 0 < begun <= done and f"samples-{begun:012d}" in text and "3 ranks (zero2, cpu)" in text
    assert_same_path(place, folder / "straight")


def test_a_method_from_outside_goes_on_after_a_kill(tmp_path, photos):
    """Nothing of the trainer knows the method."""
    plugins = json.dumps([str(runs.ROOT / "docs" / "examples" / f"my_{what}.py") for what in ("method", "backbone")])
    given = {"data": {"path": str(photos), "workers": 0}, "method": {"name": "colours"}, "views": runs.RECIPE["views"]}
    given |= {"model": {"name": "plain_convnet"}, "optim": {"name": "adamw", "lr": 0.001, "lr_batch": 0}}
    _goes_on_after_a_kill(tmp_path, given | {"schedule": runs.RECIPE["schedule"]}, "--run.plugins", plugins)


def test_a_student_and_its_teacher_go_on_after_a_kill(tmp_path, photos):
    """DINOv2: the teacher, masks and dropped paths are those of a run never stopped."""
    calm = {"optim": {"name": "sgd", "lr": 0.002, "lr_batch": 0}}
    _goes_on_after_a_kill(tmp_path, DINOV2 | {"data": {"path": str(photos), "workers": 0}} | calm)


def test_masked_pretraining_goes_on_after_a_kill(tmp_path, photos):
    """FCMAE: masks and dropped paths are those of a run never stopped; three ranks reconstruct what one did."""
    _goes_on_after_a_kill(tmp_path, FCMAE | {"data": {"path": str(photos), "workers": 0}}, samples=600)
    made, straight = (read_gallery(tmp_path / name)["reconstructions"] for name in ("run", "straight"))
    captions = [[(strip["caption"], strip["small"], len(strip["images"])) for strip in of] for of in (made, straight)]
    assert captions[0] == captions[1] and len(made) == 8
    assert "<h2>Reconstructions</h2>" in (tmp_path / "run" / "report.html").read_text()


def test_pretraining_goes_on_from_imported_weights(tmp_path, photos):
    """A run's network leaves by names of VISSL, comes in again, and its loss goes on from there; a frozen backbone
    waits."""
    few = {
        "knn": {"enabled": False},
        "checkpoint": {"every_samples": 0},
        "health": {"images": 0},
        "run": {"prototype_images": 0},
    }
    given = recipe(tmp_path, photos, train={"total_samples": 240}, **few)
    assert run_training(given, ["--run.dir", str(tmp_path / "before")]) == 0
    reader = TensorReader(tmp_path / "before" / "checkpoints" / checkpoints(tmp_path / "before")[-1])
    held = {n.removeprefix("model/"): reader.read(n) for n in reader.layout.tensors if n.startswith("model/")}
    trunk = {vissl(n.removeprefix("backbone.")): t for n, t in held.items() if n.startswith("backbone.")}
    heads = {f"0.projection_head.{n.removeprefix('head.')}": t for n, t in held.items() if n.startswith("head.")}
    heads |= {f"0.prototypes{n.split('.')[1]}.weight": t for n, t in held.items() if n.startswith("prototypes.")}
    torch.save(classy(trunk, heads), tmp_path / "x.torch")
    assert main(["import", str(tmp_path / "x.torch"), "--out", str(tmp_path / "imported")]) == 0

    words = ["--train.total_samples", "16", "--run.dir"]
    begun = ["--checkpoint.init_from", str(tmp_path / "imported"), "--train.freeze_backbone_samples", "8"]
    assert run_training(given, [*words, str(tmp_path / "random")]) == 0
    assert run_training(given, [*words, str(tmp_path / "goes_on"), *begun]) == 0
    random, goes_on = (runs.read_metrics(tmp_path / name)[0][0]["loss"] for name in ("random", "goes_on"))
    assert goes_on < 0.95 * random, (goes_on, random)
    (told,) = events(tmp_path / "goes_on", "start")
    assert f"Its weights are those of {tmp_path / 'imported'}" in told["text"] and told["load_bytes"] > 0
