"""Commands on a finished run, and torchrun in the place of our launcher."""

from __future__ import annotations

import json
import shutil
import socket
import sys

import pytest
import torch

from seer_scale.checkpoint.store import TensorReader
from seer_scale.cli import main
from seer_scale.launch.prepare import Request, prepare
from seer_scale.training.start import run_training
from tests.e2e import runs
from tests.e2e.runs import checkpoints, command, recipe


def scores(capsys, *words: object) -> dict:
    assert main(["eval", "knn", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def last_knn(run_dir) -> dict:
    return [r for r in runs.read_metrics(run_dir)[0] if "knn/top1" in r][-1]


def test_eval_gives_the_score_of_the_run(straight, photos, tmp_path, capsys):
    found = scores(capsys, straight)
    assert found["score"] == pytest.approx(last_knn(straight)["knn/top1"])
    assert found["subject"]["samples_seen"] == 160 and found["subject"]["checkpoint"] == checkpoints(straight)[-1]
    # images that are in the bank find themselves
    again = shutil.copytree(photos, tmp_path / "again")
    told = scores(capsys, straight, "--data", photos, "--test", again, "--k", 1, "--out", tmp_path / "eval")
    assert told["score"] == 100 and json.loads((tmp_path / "eval" / "knn.json").read_text()) == told
    assert main(["eval", "knn", str(straight)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"knn/top1 {found['score']:.2f} ± {found['scores']['knn/top1_stderr']:.2f} (")
    assert found["protocol"] in " ".join(text.split()) and f"Written: {straight}/eval/knn.json, knn.svg" in text
    assert main(["eval", "knn", str(straight), "--data", "/no/where"]) == 2
    assert "/no/where does not exist" in capsys.readouterr().err


def test_an_untrained_network_is_measured_with_statistics_of_images_and_trained_without(tmp_path, photos, capsys):
    """As eval measures it, on any number of processes; the run is that without a measurement, to the bit."""
    few = {"checkpoint": {"every_samples": 0}, "run": {"prototype_images": 0}, "train": {"total_samples": 24}}
    given, place = recipe(tmp_path, photos, **{**few, "train": runs.RECIPE["train"] | few["train"]}), tmp_path / "run"
    assert run_training(given, ["--run.dir", str(place)]) == 0
    blind = ["--run.dir", str(tmp_path / "blind"), "--knn.enabled", "false", "--health.images", "0"]
    assert run_training(given, blind) == 0
    one, other = (TensorReader(p / "checkpoints" / checkpoints(p)[-1]) for p in (place, tmp_path / "blind"))
    assert one.layout.tensors.keys() == other.layout.tensors.keys()
    assert all(torch.equal(one.read(n), other.read(n)) for n in one.layout.tensors)

    runs.run("train", given, "--run.dir", tmp_path / "pair", ranks=2, folder=tmp_path)
    capsys.readouterr()
    of_eval = scores(capsys, place, "--init", "random")
    bank = 24 - 5
    for folder in (place, tmp_path / "pair"):
        before = runs.read_metrics(folder)[0][0]
        assert before["evaluation/stage"] == "before" and before["evaluation/statistics_images"] == bank
        assert before["knn/top1"] == pytest.approx(of_eval["score"])
        assert sum("evaluation/statistics_images" in row for row in runs.read_metrics(folder)[0]) == 1
    told = f"Untrained, with BatchNorm statistics of {bank} images."
    assert told in of_eval["protocol"] and of_eval["subject"]["statistics_images"] == bank
    assert told in (place / "report.html").read_text()
    assert any(told in e.get("text", "") for e in runs.read_metrics(place)[1])
    again = ["--checkpoint.init_from", str(place), "--run.dir", str(tmp_path / "again")]
    assert run_training(given, again) == 0
    assert "evaluation/statistics_images" not in runs.read_metrics(tmp_path / "again")[0][0]
    capsys.readouterr()
    assert "Untrained" not in scores(capsys, place)["protocol"]


def test_eval_takes_the_device_it_is_given(straight, monkeypatch, capsys):
    """On a machine with a GPU, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scores(capsys, straight, "--device", "cpu")["device"] == "cpu"


def test_report(straight, capsys):
    (straight / "report.html").unlink()
    assert main(["report", str(straight)]) == 0
    assert capsys.readouterr().out.strip() == str(straight / "report.html")
    assert "kNN top-1" in (straight / "report.html").read_text()


def test_what_a_new_start_would_change_is_told_when_it_is_asked_for(straight, tmp_path, photos):
    given = recipe(tmp_path, photos)
    for more, told in (
        ((), []),
        (
            ("--optim.lr", "0.03"),
            [
                (
                    f"{straight} goes on from samples-000000000160, with optim.lr 0.02 -> 0.03. The learning rate "
                    "goes from 2e-05 to 3e-05, because of optim.lr."
                )
            ],
        ),
    ):
        assert (
            prepare(Request(recipe=given, overrides=["--run.dir", str(straight), "--knn.enabled", "true", *more]), [])[
                2
            ]
            == told
        )


def test_torchrun(tmp_path, photos):
    given, place = recipe(tmp_path, photos, train={"total_samples": 48}), tmp_path / "run"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ours = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        port,
        "-m",
        "seer_scale.cli",
    ]
    trained = command(*ours, "train", given, "--run.dir", place, folder=tmp_path)
    assert trained.wait() == 0, trained.text
    assert list(runs.steps(place)) == list(range(8, 49, 8)) and "on 24 images, 2 ranks (fsdp, cpu)" in trained.text
    scored = command(*ours, "eval", "knn", place, "--json", folder=tmp_path)
    assert scored.wait() == 0, scored.text
    found = [json.loads(line) for line in scored.text.splitlines() if line.startswith("{")]
    assert len(found) == 1 and found[0]["score"] == pytest.approx(last_knn(place)["knn/top1"])
