"""A sweep trains what is missing and nothing else, says what is, and its lines are those of least squares."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml

from seer_scale import cli
from seer_scale.config import load_recipe
from seer_scale.errors import EXIT_STOPPED, ConfigError, UserError
from seer_scale.evaluate.suite import items_of, read_suite
from seer_scale.launch import slurm
from seer_scale.launch.job import Job, process_mark
from seer_scale.sweep import run as module
from seer_scale.sweep.fit import fit_line, scaling
from seer_scale.sweep.points import LADDER, Asked, points_of
from seer_scale.sweep.results import Result, Score, result_of
from seer_scale.sweep.table import as_text, curves_of, draw, rows_of, to_dict
from seer_scale.training.start import run_training
from tests.unit.test_launch import job_of

# ------------------------------------------------------------------------------------------------ the line


def test_a_line_is_found_exactly():
    xs = [1e6, 1e7, 1e8, 1e9]
    line = fit_line(xs, [3 + 7 * np.log10(x) for x in xs])
    assert (line.a, line.b, line.runs, line.sizes) == (pytest.approx(3), pytest.approx(7), 4, 4)
    assert max(line.a_stderr, line.b_stderr, line.residual) < 1e-9
    assert line.at(1e12) == (pytest.approx(87), pytest.approx(0, abs=1e-9))


def test_errors_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    xs = np.repeat(10 ** rng.uniform(5, 8, 6), 2)  # two seeds a size
    ys = 2 + 4 * np.log10(xs) + rng.normal(0, 1.5, len(xs))
    line = fit_line(xs.tolist(), ys.tolist())
    design = np.stack([np.ones(len(xs)), np.log10(xs)], 1)
    inverse = np.linalg.inv(design.T @ design)
    a, b = inverse @ design.T @ ys
    s2 = ((ys - design @ [a, b]) ** 2).sum() / (len(xs) - 2)
    assert (line.a, line.b) == (pytest.approx(a), pytest.approx(b)) and line.sizes == 6
    assert (line.a_stderr, line.b_stderr) == tuple(pytest.approx(e) for e in np.sqrt(s2 * np.diag(inverse)))
    beyond = np.array([1, 9.5])
    value, stderr = line.at(10**9.5)
    assert value == pytest.approx(beyond @ [a, b])
    assert stderr == pytest.approx(np.sqrt(s2 * (1 + beyond @ inverse @ beyond)))


def test_the_largest_is_predicted_from_the_others_alone():
    xs, ys = [1e5, 1e6, 1e7, 1e7], [10.0, 20.0, 33.0, 35.0]
    made = scaling(xs, ys)
    assert made.held.x == 1e7 and made.held.predicted == pytest.approx(30) and made.held.measured == 34
    assert made.held.stderr is None, "two points leave no error"
    assert made.next.x == pytest.approx(1e8) and made.next.predicted == pytest.approx(made.line.at(1e8)[0])
    assert scaling(xs, ys, [1e6, 1e12, 1e9]).next.x == 1e9
    assert scaling(xs[:2], ys[:2]).held is None and scaling(xs[2:], ys[2:]) is None and scaling([], []) is None
    with pytest.raises(ValueError):
        fit_line([1e7, 1e7], [1.0, 2.0])


# ------------------------------------------------------------------------------------------------ the points


@pytest.fixture
def recipe(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, photos)


def write_recipe(folder: Path, photos: Path, name: str = "tiny.yaml", **train: int) -> str:
    given = {
        "data": {"path": str(photos), "workers": 0},
        "model": {"name": "regnety", "depth": 5, "w0": 16, "wa": 24.0, "wm": 2.0, "group_width": 8},
        "views": {"crops": [{"num": 2, "size": 16, "scale": [0.3, 1.0]}]},
        "swav": {"hidden": [16], "embedding_dim": 8, "prototypes": [12]},
        "optim": {"name": "sgd", "lr": 0.02, "lr_batch": 0},
        "train": {"total_samples": 32, "global_batch": 8, "threads": 1, "memory_format": "contiguous"} | train,
        "knn": {"size": 16, "k": 3, "enabled": False},
        "run": {"prototype_images": 0},
        "health": {"images": 0},
    }
    (folder / name).write_text(yaml.safe_dump(given))
    return str(folder / name)


def asked(*recipes: str, **more: object) -> Asked:
    return Asked(**{"recipes": recipes, "out": Path("out")} | more)


def test_a_ladder_widens_every_stage_and_nothing_else(recipe):
    widths = (1, 1.5, 2, 3.5)
    points = points_of(asked(recipe, widths=widths))
    assert [p.size for p in points] == [f"tiny-x{w:g}" for w in widths] and points[0].name == "tiny-x1-s0"
    for point, width in zip(points, widths):
        model = point.config.model
        assert (model.depth, model.w0, model.wa, model.wm) == (5, 16 * width, 24 * width, 2)
        assert model.group_width == 8 * width
        assert point.parameters / points[0].parameters == pytest.approx(width**2, rel=0.1)  # the stem stays
        assert point.run_dir == Path("out") / point.name and point.samples == 32
        assert point.compute == 6 * point.macs * 32
    assert points_of(asked(recipe, widths=[2.1]))[0].config.model.w0 == 32, "a multiple of 8"
    assert points[0].given["model"] | {"wa": 24.0} == load_recipe(recipe)["model"]


def test_the_shipped_ladder_goes_from_a_third_of_a_million_to_ten(photos):
    sizes = points_of(asked("cifar_laptop", widths=LADDER, overrides=["--data.path", str(photos)]))
    millions = [p.parameters / 1e6 for p in sizes]
    assert millions == pytest.approx([0.33, 0.74, 1.65, 3.99, 9.82], abs=0.01)


def test_seeds_and_images_are_points_of_their_own(recipe):
    points = points_of(asked(recipe, images=[12, 6], seeds=2, overrides=["--run.seed", "3"]))
    assert [p.name for p in points] == ["tiny-n6-s3", "tiny-n6-s4", "tiny-n12-s3", "tiny-n12-s4"]
    assert [(p.config.data.max_images, p.config.run.seed) for p in points] == [(6, 3), (6, 4), (12, 3), (12, 4)]


def test_equal_compute_gives_each_what_the_first_has(recipe):
    points = points_of(asked(recipe, widths=[1, 2, 4], equal="compute", overrides=["--train.total_samples", "800"]))
    assert points[0].samples == 800 > points[1].samples > points[2].samples
    for point in points:
        assert point.config.train.total_samples % 8 == 0
        assert abs(point.compute - points[0].compute) <= 6 * point.macs * 4  # half a batch


def test_recipes_of_other_lengths_are_refused_or_given_one(recipe, photos, tmp_path):
    longer = write_recipe(tmp_path, photos, "longer.yaml", total_samples=64)
    with pytest.raises(UserError, match="32 of tiny and 64 of longer; give --train.total_samples N, or --equal comp"):
        points_of(asked(recipe, longer))
    points = points_of(asked(recipe, longer, overrides=["--train.total_samples", "48"]))
    assert [p.samples for p in points] == [48, 48]
    near = write_recipe(tmp_path, photos, "near.yaml", total_samples=36)
    assert len(points_of(asked(recipe, near))) == 2, "less than a batch apart"


@pytest.mark.parametrize(
    "words, said",
    [
        (["tiny.yaml", "--widths", "1,two"], "--widths is 1,two, but must be positive numbers, each once; such as"),
        (["tiny.yaml", "--widths", "1,1"], "each once"),
        (["tiny.yaml", "--images", "8.5"], "--images is 8.5, but must be positive whole numbers"),
        (["tiny.yaml", "--images", "6,25"], "data.max_images is 25, but"),
        (["tiny.yaml", "--seeds", "0"], "--seeds is 0"),
        (["tiny.yaml", "--seeds", "1,2"], "must be how many"),
        (["tiny.yaml", "demo", "--widths", "1,2"], "they are of one recipe, and several are given; give one"),
        (["tiny.yaml", "--cluster", "slrum"], "--cluster is slrum, but must be local or slurm; nearest: slurm"),
        (["tiny.yaml", "--nodes", "2"], "--nodes has no effect with --cluster local; leave it out"),
        (["tiny.yaml", "--dry-run", "--table"], "--table has no effect with --dry-run"),
        (["tiny.yaml", "--table"], "--out is out, but there is no such folder"),
        (["tiny.yaml", "--tasks", "knnn"], "did you mean knn?"),
        (["tiny.yaml", "--equal", "time"], "--equal is time"),
        (["tiny.yaml", "tiny.yaml"], "two sizes would be called tiny"),
        (["tiny.yaml", "--run.dir", "x"], "each run has a folder of its own in --out"),
        (["tinny.yaml"], "tinny.yaml is no file"),
        (["fixed.yaml", "--widths", "2"], "the network of fixed.yaml is regnety_200mf, whose widths are fixed"),
        (["tiny.yaml", "--optim.lr", "-1"], "The sweep has 1 problem:\n  - optim.lr is -1"),
        (["tiny.yaml", "fixed.yaml", "--model.depth", "6"], "fixed-s0: model.name is regnety_200mf, but its shape is"),
        (["tiny.yaml", "--model.depth", "3"], "depth is 3, but of a RegNetY it must be at least 4"),
    ],
)
def test_bad_input(recipe, words, said, tmp_path):
    (tmp_path / "fixed.yaml").write_text(yaml.safe_dump(load_recipe(recipe) | {"model": {"name": "regnety_200mf"}}))
    with pytest.raises(UserError) as caught:
        cli.run(["sweep", *words, "--out", "out"])
    assert said in str(caught.value) and not Path("out").exists()


def test_a_folder_whose_name_the_launcher_would_split(recipe):
    with pytest.raises(UserError, match="splits at commas"):
        cli.run(["sweep", recipe, "--out", "a,b", "--dry-run"])


# ------------------------------------------------------------------------------------------------ the table


def results(recipe: str, accuracy: dict[tuple[float, int], float], seeds: int = 2) -> list[Result]:
    """Of three widths; accuracy of kNN by (width, seed), the others are not trained."""
    found = []
    for point in points_of(asked(recipe, widths=[1, 2, 4], seeds=seeds)):
        value = accuracy.get((float(point.size.partition("-x")[2]), point.seed))
        scores = {} if value is None else {"knn": Score(value=value, stderr=0.5)}
        found.append(Result(point=point, samples_seen=0 if value is None else 32, images=24, scores=scores))
    return found


def test_the_table_has_means_over_seeds_and_names_what_is_missing(recipe):
    items = read_suite("knn", {})
    known = {(1, 0): 20.0, (1, 1): 22.0, (2, 0): 30.0}
    made = results(recipe, known)
    text = as_text(made, items, 120)
    lines = text.splitlines()
    assert lines[1].endswith("21.00 ± 1.41 (deviation)") and lines[2].endswith("30.00 ± 0.50 (1 of 2 runs)")
    assert lines[3].endswith("  -") and "1.33  " in lines[1], "32 samples of 24 images"
    assert lines[-1] == "Missing (not trained): tiny-x2-s1, tiny-x4-s0, tiny-x4-s1"
    told = to_dict(made, items, "samples")
    assert list(told["missing"]) == ["tiny-x2-s1", "tiny-x4-s0", "tiny-x4-s1"]
    assert told["points"][0]["scores"] == {"knn": {"value": 20.0, "stderr": 0.5}}
    [parameters, compute] = told["curves"]
    assert (parameters["axis"], compute["axis"]) == ("parameters", "compute") and parameters["line"]["runs"] == 3
    assert parameters["next"]["x"] == made[-1].point.parameters, "the next size is the one that is missing"
    assert len(rows_of(made)) == 3
    job = job_of(Path("out"), job_id="7")
    part = dataclasses.replace(made[-1], samples_seen=16, training=job)
    assert part.lacks(items) == "16 of 32 samples, but queued or running"
    trained = dataclasses.replace(part, samples_seen=32)
    assert trained.lacks(items) == "trained, not evaluated by knn"
    waiting = dataclasses.replace(trained, evaluation=job)
    assert waiting.lacks(items) == "trained, not evaluated by knn, but queued or running"
    assert dataclasses.replace(made[0], evaluation=job).lacks(items) == ""


def test_the_plot_has_a_panel_for_each_axis(recipe, tmp_path):
    complete = {(w, s): 10.0 * w + s for w in (1, 2, 4) for s in (0, 1)}
    made = results(recipe, complete)
    text = as_text(made, read_suite("knn", {}), 1000)
    assert "Missing" not in text and "Without the largest, " in text and "40.50 ± 0.50 was measured (" in text
    assert [c.axis.name for c in curves_of(made, ["knn"])] == ["parameters", "compute"]
    assert draw(made, ["knn"], tmp_path / "a.svg") and draw(made, ["knn"], tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and len(drawn) < 40_000
    words = "".join(xml.etree.ElementTree.fromstring(drawn).itertext())
    assert "parameters" in words and "compute (FLOP)" in words and "accuracy, %" in words
    assert not draw(results(recipe, {}), ["knn"], tmp_path / "none.svg") and not (tmp_path / "none.svg").exists()


# ------------------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="module")
def swept(tmp_path_factory, photos):
    """Two sizes, trained and evaluated; (folder, words of the command)."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = write_recipe(folder, photos)
    tasks = folder / "tasks.yaml"
    tasks.write_text("- {task: knn, k: [3]}")
    words = [recipe, "--out", str(folder / "out"), "--widths", "1,1.5", "--tasks", str(tasks), "--data", str(photos)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # a launched run loads torch twice: tests of launch do that
        patch.setattr(module, "launch", lambda options: run_training(options.recipe, {}))
        patch.setattr("seer_scale.observe.report.write_report", lambda run_dir: run_dir / "report.html")  # seconds each
        assert cli.run(["sweep", *words]) == 0
    return folder, words


def forbidden(*_: object, **__: object) -> int:
    raise AssertionError("what is done is done")


def test_what_is_done_is_not_run_again(swept, monkeypatch, capsys):
    folder, words = swept
    monkeypatch.setattr(module, "launch", forbidden)
    monkeypatch.setattr(module, "run_suite", forbidden)
    capsys.readouterr()
    assert cli.run(["sweep", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "out" / "sweep.json").read_text()) and told["missing"] == {}
    assert [(p["name"], p["samples_seen"], p["images"]) for p in told["points"]] == [
        ("tiny-x1-s0", 32, 24),
        ("tiny-x1.5-s0", 32, 24),
    ]
    assert all(0 <= p["scores"]["knn"]["value"] <= 100 for p in told["points"]) and (folder / "out/sweep.svg").exists()
    assert cli.run(["sweep", *words, "--table"]) == 0 and "\ntiny-x1.5" in capsys.readouterr().out
    more = ["--widths" if word == "--widths" else "1,1.5,2" if word == "1,1.5" else word for word in words]
    assert cli.run(["sweep", *more, "--table"]) == 1
    assert "Missing (not trained): tiny-x2-s0" in capsys.readouterr().out
    assert cli.run(["sweep", *more, "--dry-run"]) == 0
    assert "1 run to train" in capsys.readouterr().out and not (folder / "out" / "tiny-x2-s0").exists()


def test_another_recipe_in_the_same_folder_is_refused(swept, monkeypatch):
    _, words = swept
    monkeypatch.setattr(module, "launch", forbidden)
    with pytest.raises(ConfigError) as caught:
        cli.run(["sweep", *words, "--optim.lr", "0.01", "--train.log_every", "3"])
    assert len(caught.value.problems) == 2
    assert "tiny-x1-s0 was begun with another recipe (optim.lr 0.02 -> 0.01); give" in str(caught.value)


def test_another_way_to_measure_measures_again_and_trains_nothing(swept, monkeypatch):
    """And what fails at one point leaves the others to be done."""
    _, words = swept
    measured = []

    def suite(path: Path, items: list, **_: object) -> None:
        measured.append((path.name, items[0][1].k))
        raise UserError("it fails")

    monkeypatch.setattr(module, "launch", forbidden)
    monkeypatch.setattr(module, "run_suite", suite)
    assert cli.run(["sweep", *words, "--seeds", "1"]) == 0 and measured == []
    Path(words[6]).with_name("other.yaml").write_text("- {task: knn, k: [1]}")
    other = [word.replace("tasks.yaml", "other.yaml") for word in words]
    assert cli.run(["sweep", *other]) == 1
    assert measured == [("tiny-x1-s0", (1,)), ("tiny-x1.5-s0", (1,))]


def test_a_stop_ends_the_sweep_and_a_failure_does_not(recipe, photos, monkeypatch):
    started: list[str] = []
    statuses = iter([1, EXIT_STOPPED])

    def launch(options: object) -> int:
        started.append(Path(options.recipe).stem)
        return next(statuses)

    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(module, "run_suite", forbidden)
    words = ["sweep", recipe, "--out", "out", "--widths", "1,2,4", "--data", str(photos)]
    assert cli.run(words) == EXIT_STOPPED and started == ["tiny-x1-s0", "tiny-x2-s0"]


def test_a_stop_in_an_evaluation_leaves_the_table_of_what_is_done(swept, monkeypatch, capsys):
    folder, words = swept

    def suite(path: Path, items: list, **_: object) -> None:
        raise KeyboardInterrupt

    Path(words[6]).with_name("five.yaml").write_text("- {task: knn, k: [5]}")
    monkeypatch.setattr(module, "launch", forbidden)
    monkeypatch.setattr(module, "run_suite", suite)
    capsys.readouterr()
    assert cli.main(["sweep", *(word.replace("tasks.yaml", "five.yaml") for word in words)]) == EXIT_STOPPED
    told = capsys.readouterr()
    assert "Missing (trained, not evaluated by knn): tiny-x1-s0, tiny-x1.5-s0" in told.out
    assert "The same command goes on" in told.err


def test_images_of_a_point_that_is_not_begun_are_those_it_will_have(recipe):
    items = read_suite("knn", {})
    for more in ({"overrides": ["--data.max_images", "16"]}, {"images": [16]}):
        [point] = points_of(asked(recipe, **more))
        assert (found := result_of(point, items)).images == 16 and found.epochs == 2
        assert as_text([found], items, 120).splitlines()[1].split()[4:6] == ["16", "2"]


# ------------------------------------------------------------------------------------------------ on SLURM


class Queue:
    """A SLURM that takes jobs and runs none: arrays as they were submitted, and the states of their tasks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.arrays: list[tuple[str, list[Job]]] = []
        self.states: dict[str, str] = {}
        monkeypatch.setattr(slurm, "check_installed", lambda: None)
        monkeypatch.setattr(slurm, "state", lambda job_id: self.states.get(job_id, ""))
        monkeypatch.setattr(slurm, "submit", self.submit)

    def submit(self, jobs: list[Job], dependency: str = "") -> list[Job]:
        number = len(self.arrays) + 1
        ids = [f"{number}_{n}" if len(jobs) > 1 else str(number) for n in range(len(jobs))]
        numbered = [dataclasses.replace(job, job_id=job_id) for job, job_id in zip(jobs, ids)]
        for job in numbered:
            job.write()
            self.states[job.job_id] = "PENDING"
        self.arrays.append((dependency, numbered))
        return numbered

    @property
    def newest(self) -> list[tuple[str, list[str]]]:
        """Since it was last asked: dependency and folders of each array."""
        found = [(dependency, [job.run_dir for job in jobs]) for dependency, jobs in self.arrays[self.told :]]
        self.told = len(self.arrays)
        return found

    told = 0


@pytest.fixture
def queue(monkeypatch):
    return Queue(monkeypatch)


@pytest.fixture
def slurm_words(recipe, photos, tmp_path):
    """Of a sweep over three sizes."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(PROFILE))
    of_slurm = ["--cluster", "slurm", "--profile", "p.yaml", "--nodes", "1"]
    return ["sweep", recipe, "--widths", "1,2,4", "--out", "new", "--tasks", "knn", "--data", str(photos), *of_slurm]


PROFILE = {
    "gpus_per_node": 2,
    "time": "2:00:00",
    "evaluation": {"gpus_per_node": 1, "time": "30", "partition": "small"},
}
SIZES = [f"tiny-x{w}-s0" for w in (1, 2, 4)]


def folders(*numbers: int, evaluation: bool = False) -> list[str]:
    return [str(Path("new", SIZES[n], "eval" if evaluation else "").absolute()) for n in numbers]


def test_a_dry_run_prints_the_scripts_of_training_and_evaluation(slurm_words, recipe, capsys, tmp_path):
    assert cli.run([*slurm_words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 runs to train" in said and said.count("#SBATCH --array=0-2%3") == 2
    training, evaluation = said.split("#!/bin/bash")[1:]
    assert "dependency" not in training and "--gpus-per-node=2" in training and "--time=120\n" in training
    for line in (
        "dependency=aftercorr:JOB1",
        "kill-on-invalid-dep=yes",
        "gpus-per-node=1",
        "time=30",
        "partition=small",
    ):
        assert f"#SBATCH --{line}\n" in evaluation, evaluation
    assert "# 1: new/tiny-x2-s0\n" in training and "# 1: new/tiny-x2-s0/eval\n" in evaluation
    code = [line for line in said.splitlines() if "PYTHONPATH=" in line]
    assert len(code) == 2 and len(set(code)) == 1, "one copy of the code for both"
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="--profile is missing"):
        cli.run(["sweep", recipe, "--out", "new", "--cluster", "slurm", "--dry-run"])


def test_an_evaluation_waits_for_its_training_and_nothing_is_in_the_queue_twice(slurm_words, queue, capsys):
    """Whatever state each is in, the same command puts into the queue what is missing of it."""
    assert cli.run(slurm_words) == 0
    assert queue.newest == [("", folders(0, 1, 2)), ("aftercorr:1", folders(0, 1, 2, evaluation=True))]
    assert "Missing (not trained, but queued or running): tiny-x1-s0, tiny-x2-s0, tiny-x4-s0" in capsys.readouterr().out
    told = json.loads(Path("new/sweep.json").read_text())["points"]
    assert [(p["training"], p["evaluation"]) for p in told] == [("1_0", "2_0"), ("1_1", "2_1"), ("1_2", "2_2")]
    assert cli.run(slurm_words) == 0 and queue.newest == []
    # the second has failed, with it its evaluation; of the third the evaluation was cancelled
    queue.states |= {"1_1": "FAILED", "2_1": "CANCELLED", "2_2": "CANCELLED"}
    assert cli.run(slurm_words) == 0
    assert queue.newest == [
        ("", folders(1)), ("afterok:3", folders(1, evaluation=True)), ("afterok:1_2", folders(2, evaluation=True))
    ]  # fmt: skip
    assert cli.run([*slurm_words, "--table"]) == 1 and queue.newest == []


def test_what_is_trained_is_evaluated_only(swept, queue, monkeypatch, tmp_path):
    """By an array that waits for nothing; and the recipe of that says what is measured."""
    folder, words = swept
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(PROFILE))
    items = tmp_path / "third.yaml"
    items.write_text("- {task: knn, k: [2]}\n- {task: lowshot, finetune: true, shots: [1], name: few}")
    more = [str(items) if word.endswith("tasks.yaml") else word for word in words]
    places = [str(Path(words[2], f"tiny-x{w}-s0", "eval").absolute()) for w in ("1", "1.5")]
    try:
        assert cli.run(["sweep", *more, "--cluster", "slurm", "--profile", "p.yaml", "--nodes", "1"]) == 0
        [(dependency, [first, second])] = queue.arrays
        assert (dependency, [first.run_dir, second.run_dir]) == ("", places)
        assert (first.ranks_per_node, first.node_counts, first.is_evaluation) == (1, [1], True)
        asked = yaml.safe_load(second.recipe.read_text())
        assert items_of(asked["tasks"], {}) == read_suite(str(items), {"data": words[-1]})
        assert cli.run(["sweep", *more, "--cluster", "slurm", "--profile", "p.yaml"]) == 0 and len(queue.arrays) == 1
        with pytest.raises(UserError, match="is the evaluation of a run, .*give the sweep's command again"):
            cli.run(["resubmit", places[0]])
    finally:
        for place in places:
            shutil.rmtree(Path(place) / "launch", ignore_errors=True)


def test_a_launcher_of_this_machine_is_left_to_train(slurm_words, queue):
    assert cli.run(slurm_words) == 0
    job = Job.of(folders(0)[0])
    dataclasses.replace(job, cluster="local", job_id="99", launcher=process_mark(os.getpid())).write()
    queue.states["2_0"] = "CANCELLED"
    assert cli.run(slurm_words) == 0 and len(queue.arrays) == 2
