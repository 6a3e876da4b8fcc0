"""The command line answers each mistake with one sentence, and never with a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from seer_scale.cli import main
from seer_scale.config import recipe_names


@pytest.mark.parametrize(
    "words, part",
    [
        (["trian"], "'trian' is not a command; did you mean train?"),
        (["train"], "train needs a recipe first"),
        (["train", "--data.path", "x"], "train needs a recipe first"),
        (["eval", "knn"], "eval knn RUN"),
        (["eval", "linear", "x"], "eval knn RUN"),
        (["eval", "knn", "no/run"], "no/run is not a run's folder"),
        (["report"], "is not a run's folder"),
        (["report", "no/run"], "no/run is not a run's folder"),
        (["data", "dem", "x"], "did you mean demo?"),
        (["data", "demo", "--force"], "seer-scale data demo DIR"),
        (["data", "demo", "a", "b"], "'b' is not expected here: the command is seer-scale data demo DIR"),
        (["recipes", "zzz"], "'zzz' is not expected here: the command is seer-scale recipes"),
        (["recipes", "--jsn"], "'--jsn' is not expected here"),
        (["report", "folder", "extra"], "'extra' is not expected here: the command is seer-scale report RUN"),
        (["report", "folder"], "folder is not a run's folder (it has neither config.yaml nor metrics.jsonl)"),
        (["eval", "knn", "--json"], "eval knn RUN"),
        (["bench", "stop"], "seer-scale bench step"),
        (["bench", "checkpoint", "--gib", "x"], "argument --gib: invalid float value: 'x'; seer-scale bench checkpoint --help"),
        (["plan", "--failures", "--gpu", "512"], "unrecognized arguments: --gpu 512"),
        (["train", "no/tiny.yaml"], "There is no file no/tiny.yaml; nor any recipe beside it."),
        (["inspect", "no/run"], "There is no no/run: give a run's folder"),
        (["bench"], "one of step, data, engines"),
        (["data"], "one of inspect, pack, refresh, demo"),
        (["data", "refresh", "folder"], "seer-scale data refresh RUN --manifest FILE"),
    ],
)
def test_a_mistake_is_answered(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert main(words) == 2
    assert not any((tmp_path / "folder").iterdir()) and len(list(tmp_path.iterdir())) == 1
    told = capsys.readouterr().err
    assert told.startswith("seer-scale: ") and part in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        [], ["--help"], ["help"], ["train", "--help"], ["train", "demo", "-h"], ["recipes", "--help"], ["report", "-h"],
        ["report", "--help"], ["eval", "--help"], ["eval", "knn", "--help"], ["eval", "knn", "x", "-h"],
        ["data", "--help"], ["bench", "--help"],
    ],
)  # fmt: skip
def test_help(words, capsys):
    assert main(words) == 0
    assert "seer-scale train RECIPE" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["data", "demo"], ["data", "refresh"], ["data", "refresh", "runs/demo"]])
def test_help_of_one_command(words, capsys):
    assert main([*words, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"seer-scale {words[0]} {words[1]}")


def test_recipes(capsys):
    assert main(["recipes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == recipe_names() and all("Cost:" in text for text in told.values())
    assert main(["recipes"]) == 0


def test_interrupted(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("seer_scale.cli.recipes", interrupted)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err.startswith("Stopped at once")


def test_commands_start_in_a_moment():
    """Help and mistakes need no torch, whose import takes seconds."""
    code = "import sys; from seer_scale import cli; cli.main(['recipes']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
