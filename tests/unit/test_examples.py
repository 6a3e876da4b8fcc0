"""Every file in docs/examples runs as it stands there, on small settings."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

import seer_scale
from seer_scale.corpus.demo import write_demo_corpus
from tests.e2e.runs import RECIPE

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PLUGINS = {"my_method.py", "my_backbone.py"}
"""Run by test_plugins.py, which takes them to every command."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the demo's corpus, small, and a recipe of small crops; with one run of it."""
    folder = tmp_path_factory.mktemp("examples")
    write_demo_corpus(folder / "corpus", train=40, test=20)
    small = RECIPE | {"train": RECIPE["train"] | {"total_samples": 16}}
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    seer_scale.train(str(folder / "small.yaml"), folder / "corpus/train", run_dir=folder / "run")
    return folder


@pytest.fixture
def example(place, monkeypatch, capsys):
    """Runs an example in that folder, as `python docs/examples/NAME WORDS` does; what it printed."""

    def run(name: str, *words: str) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_train(example, place):
    small = ("train.py", "corpus/train", "--recipe", "small.yaml", "--run-dir", "longer", "--samples")
    assert "longer: 16 images seen, complete: True" in example(*small, "16")
    said = example(*small, "24")
    assert "longer: 24 images seen" in said and "after 24: kNN top-1" in said
    assert (place / "longer" / "report.html").is_file()


def test_look_at_views(example, place):
    words = ("look_at_views.py", "corpus/train", "--recipe", "small.yaml", "--epochs", "2", "--number", "3")
    example(*words, "--to", "recipe.png")
    example(*words, "--to", "strong.png", "--jitter", "1")
    one, other = (np.asarray(Image.open(place / name)) for name in ("recipe.png", "strong.png"))
    assert one.shape == other.shape and (one != other).any()
    assert (one[: len(one) // 2 - 4] != one[len(one) // 2 : -4]).any()


def test_nearest_neighbours(example, place):
    said = example("nearest_neighbours.py", "run", "corpus/test")
    assert "20 images" in said and said.count(".jpg") == 5 * (1 + 3)
    with np.load(place / "features.npz") as saved:
        assert len(saved["features"]) == len(saved["names"]) == len(saved["labels"]) == 20


def test_logistic_regression(example):
    assert "of 20 images; always the commonest class: 10.0 %" in example(
        "logistic_regression.py", "run", "corpus/train", "corpus/test"
    )


def test_compare_runs(example, place):
    said = example("compare_runs.py", "run", "run", "--to", "curves.png")
    assert said.count("after 16 images") == 2 and (place / "curves.png").is_file()
    with pytest.raises(SystemExit):
        example("compare_runs.py", "run", "--metric", "los")


def run_notebook(name: str, settings: dict) -> list:
    """What its cells show, in order, with what its first cell sets replaced by `settings`."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    names: dict = {"__name__": "notebook"}
    shown = []
    for number, source in enumerate(cell.source for cell in notebook.cells if cell.cell_type == "code"):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        if number == 0:
            assert settings.keys() <= names.keys()
            names |= settings
        if last:
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
    return shown


def test_first_steps(place, monkeypatch):
    monkeypatch.chdir(place)
    shown = run_notebook("first_steps.ipynb", {"RECIPE": "small.yaml", "SAMPLES": 16})
    sheet, trained, metrics, report, shapes, share = shown
    assert sheet._repr_png_()[:4] == b"\x89PNG" and trained == (16, True) and report.is_file()
    assert metrics[0][0] == 16 and [samples for samples, _ in metrics[1]] == [0, 16]
    assert shapes[1][0] == 20 and shapes[0][1] == shapes[1][1] and 0 <= share <= 1


def test_load_embed(place, monkeypatch):
    monkeypatch.chdir(place)
    settings = {"RUN": "run", "IMAGES": "corpus/test", "EXPORT": "exports/run"}
    (width, transform), (shape, _), sheet, out, difference = run_notebook("load_embed.ipynb", settings)
    assert shape == (20, width) and transform.size > 0 and sheet.size == (600, 400)
    assert (out / "README.md").is_file() and difference < 1e-5


def test_two_processes(place):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "two_processes.py")]
    words += ["corpus/train", "--recipe", "small.yaml", "--samples", "16", "--engine", "fsdp", "--run-dir", "two"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
    assert "two: 16 images seen on 2 ranks" in done.stdout, done.stdout + done.stderr


def test_slurm_dry_run(place):
    door = place / "bin" / "seer-scale"
    door.parent.mkdir()
    door.write_text(f'#!/bin/sh\nexec {sys.executable} -m seer_scale "$@"\n')
    door.chmod(0o755)
    env = os.environ | {"PATH": f"{door.parent}:{os.environ['PATH']}"}
    words = ["bash", str(EXAMPLES / "slurm_dry_run.sh"), "corpus/train"]
    done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "#SBATCH --partition=cpu" in done.stdout, done.stdout + done.stderr
    assert not (place / "runs" / "on_slurm").exists()


def test_none_is_left_out():
    """Of every file there a test above, or of plugins, bears the name; each says how it is run, and is short."""
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    files = {p for p in EXAMPLES.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {p.name for p in files if p.stem not in tested} == PLUGINS
    text = (Path(__file__).parent / "test_plugins.py").read_text()
    assert all(name in text for name in PLUGINS)
    for path in {p for p in files if p.suffix != ".ipynb"}:
        assert path.name in path.read_text(), f"{path.name} does not say how it is run"
        assert len(path.read_text().splitlines()) <= (80 if path.name in PLUGINS else 60), path.name
