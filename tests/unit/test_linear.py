"""Linear classifiers side by side are those trained alone, and scikit-learn's; chosen without the test images; the same
on two ranks and after a kill. SVMs and few labels on the same images."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from seer_scale.distributed import World
from seer_scale.errors import ConfigError, DataError, UserError
from seer_scale.evaluate import context
from seer_scale.evaluate import heads as heads_module
from seer_scale.evaluate import logistic as logistic_module
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.draws import draws_of, listed, usual_shots
from seer_scale.evaluate.heads import CachedFeatures, Head, Heads, Plan, best, figures, losses, measure_heads, train
from seer_scale.evaluate.layers import Layers, fit_inputs, layers_of
from seer_scale.evaluate.logistic import logistic
from seer_scale.evaluate.metrics import average_precision
from seer_scale.evaluate.registry import task_class
from seer_scale.evaluate.run import read_settings
from seer_scale.evaluate.splits import DataSet, Split, check_targets, hold_out, open_data_set, stratified
from seer_scale.evaluate.subject import Subject, begin
from seer_scale.evaluate.task import Result
from seer_scale.evaluate.tasks import svm as svm_module
from seer_scale.models.registry import build_backbone
from seer_scale.observe.progress import Progress
from tests.conftest import write_photos
from tests.problems import refused
from tests.ranks import run_ranks
from tests.tiny import RECIPE, world_of
from tests.unit.test_sources import SHARED

SIZE = 24
QUICK = {"lr": "0.03,0.3", "weight_decay": "0,0.1", "global_batch": "8", "epochs": "4"}


def subject_of(folder: Path) -> Subject:
    keys = {k: v for k, v in RECIPE["model"].items() if k != "name"}
    model = build_backbone("regnety", **keys)
    begin(model, 0)
    return Subject(path=folder, model=model.eval(), fingerprint="0", weights="random", size=SIZE)


def evaluation_of(folder: Path, task: str = "linear", world: World = World(), **given: str) -> Evaluation:
    settings = read_settings(task, {"workers": "0", "data": str(folder), **given})
    return Evaluation(
        task=task, subject=subject_of(folder), options=settings, world=world, progress=Progress(active=False),
        folder=folder.parent / "eval",
    )  # fmt: skip


def measured(folder: Path, task: str = "linear", world: World = World(), **given: str) -> Result:
    evaluation = evaluation_of(folder, task, world, **given)
    result = task_class(task)(evaluation.options).measure(evaluation)
    evaluation.clean()
    return result


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Parts train (30 images) and test (15), of 3 classes."""
    root = tmp_path_factory.mktemp("linear") / "pictures"
    write_photos(root / "train", each=10)
    write_photos(root / "test", each=5)
    return root


def clouds(num: int, seed: int, classes: int = 4, width: int = 12) -> tuple[Tensor, np.ndarray]:
    """Overlapping normal clouds, whose columns have another mean and scale each."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    targets = rng.integers(0, classes, num)
    rows = centres[targets] + rng.normal(size=(num, width)) * 1.5
    return torch.from_numpy(3 + rows * np.arange(1, width + 1)).float(), targets


def layers_for(width: int, *names: str) -> Layers:
    half = width // 2
    columns = {"last": slice(0, width), "s3": slice(0, half), "s4": slice(half, width)}
    return Layers(None, names or ("last",), columns)  # type: ignore[arg-type]  # nothing is encoded


# ------------------------------------------------------------------------------------------------ heads by SGD


def test_many_heads_at_once_are_those_trained_alone(pictures, tmp_path):
    evaluation = evaluation_of(pictures)
    rows, targets = clouds(300, 0)
    layers = layers_for(12, "last", "s3", "s4")
    inputs = fit_inputs(layers, rows, "standardize")
    grid = [
        Head(layer, lr, decay) for layer in layers.names for lr in (0.01, 0.1, 0.5) for decay in (0, 0.01, 0.05, 0.2)
    ]
    plan = Plan(640, 32, "steps", 0.9, 0)
    data = CachedFeatures(evaluation, rows, targets)

    def trained(own: list[Head], folder: Path) -> Heads:
        folder.mkdir()
        return train(
            Heads(own, {n: layers.width(n) for n in layers.names}, 4), inputs, data, plan, evaluation, folder, ""
        )

    together = trained(grid, tmp_path / "all")
    assert together.heads == grid and len(grid) == 36
    for i, head in enumerate(grid[::7]):
        narrow = dataclasses.replace(inputs, layers=dataclasses.replace(layers, names=(head.layer,)))
        (tmp_path / str(i)).mkdir()
        alone = Heads([head], {head.layer: layers.width(head.layer)}, 4)
        train(alone, narrow, data, plan, evaluation, tmp_path / str(i), "")
        torch.testing.assert_close(
            together.scores(7 * i, inputs, rows), alone.scores(0, inputs, rows), atol=1e-5, rtol=0
        )
    first = [row["loss"] for row in measure_heads(together, inputs, rows, targets, evaluation)]
    assert len(set(first)) == 36, "each is another"
    evaluation.clean()


def test_sgd_ends_where_scikit_learn_does(pictures, tmp_path):
    """A weight decay is 1 / (C n): the same minimum, so the same figures to half a point; chosen or given."""
    evaluation = evaluation_of(pictures)
    rows, targets = clouds(400, 0)
    asked, truth = clouds(2000, 1)
    layers = layers_for(12)
    inputs = fit_inputs(layers, rows, "standardize")
    decays = (0.003, 0.03, 0.3)
    heads = Heads([Head("last", 0.1, d) for d in decays], {"last": 12}, 4)
    data = CachedFeatures(evaluation, rows, targets)
    train(heads, inputs, data, Plan(64 * 300, 64, "cosine", 0.9, 0), evaluation, tmp_path, "")
    for ours, decay in zip(measure_heads(heads, inputs, asked, truth, evaluation), decays):
        reference = logistic(inputs.of(rows, "last"), targets, 4, 1 / (decay * len(rows)))
        theirs = figures(reference.scores(inputs.of(asked, "last")), truth)
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=0.5)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.01)
        assert theirs["top1"] > 60, "there is something to learn"
    evaluation.clean()


def test_a_head_that_diverges_takes_no_other_with_it_and_is_not_chosen(pictures, tmp_path):
    evaluation = evaluation_of(pictures)
    rows, targets = clouds(200, 0)
    inputs = fit_inputs(layers_for(12), rows, "none")
    heads = Heads([Head("last", 1e-4, 0.0), Head("last", 1e30, 1.0)], {"last": 12}, 4)
    train(
        heads,
        inputs,
        CachedFeatures(evaluation, rows, targets),
        Plan(320, 32, "cosine", 0.9, 0),
        evaluation,
        tmp_path,
        "",
    )
    sound, broken = measure_heads(heads, inputs, rows, targets, evaluation)
    assert math.isfinite(sound["loss"]) and not math.isfinite(broken["loss"])
    assert best([broken, sound], False) == 1
    with refused("--lr", error=UserError):
        best([broken], False)
    evaluation.clean()


def test_of_those_within_a_standard_error_the_lowest_loss_is_chosen():
    def row(top1: float, loss: float, stderr: float = 2.0) -> dict[str, float]:
        return {"top1": top1, "top1_stderr": stderr, "loss": loss}

    assert best([row(50, 3), row(49, 1), row(47, 0.1)], False) == 1
    assert best([row(50, 3, 0.5), row(49, 1), row(47, 0.1)], False) == 0
    assert best([{"map": 30, "loss": 3}, {"map": 29, "loss": 1}], True) == 0


def test_labels_that_are_not_to_be_counted_cost_nothing():
    scores = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 0, -1], [0, -1, 1], [1, 1, 0], [-1, -1, -1], [0, 0, 1]], dtype=torch.int8)
    other = torch.where((targets < 0)[:, None], torch.full_like(scores, 50.0), scores)
    assert torch.equal(losses(scores, targets), losses(other, targets))
    one = torch.nn.functional.binary_cross_entropy_with_logits(scores[2, 0], targets[2].float(), reduction="sum")
    assert losses(scores[2:3, :1], targets[2:3]).item() == pytest.approx(one.item())
    of_class = torch.nn.functional.cross_entropy(scores[:, 1], torch.tensor([0, 1, 2, 0, 1]))
    assert losses(scores, torch.tensor([0, 1, 2, 0, 1]))[1].item() == pytest.approx(of_class.item())


def test_stages_are_what_forward_stages_gives_pooled(pictures):
    subject = subject_of(pictures)
    layers = layers_of(subject, ("s1", "s3+s4", "last"))
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = [m.mean((2, 3)) for m in subject.model.forward_stages(images)]
    inputs = fit_inputs(layers, layers.encode(images), "none")(layers.encode(images))
    torch.testing.assert_close(inputs["s1"], maps[0])
    torch.testing.assert_close(inputs["s3+s4"], torch.cat(maps[2:], 1))
    torch.testing.assert_close(inputs["last"], subject.encode(images))
    with refused("--layers", "s7", error=UserError):
        layers_of(subject, ("s7",))


# ------------------------------------------------------------------------------------------------ the task


def test_the_choice_never_looks_at_the_test_images(pictures, monkeypatch):
    def chosen(**given: str) -> tuple:
        result = measured(pictures, layers="last,s3", **QUICK, **given)
        own = [{k: v for k, v in row.items() if not k.startswith("test_")} for row in result.table]
        return own, [row["test_loss"] for row in result.table if "test_loss" in row]

    table, of_test = chosen()
    assert sum(row["chosen"] for row in table) == 1 and len(table) == 8

    def permuted(*given: object) -> DataSet:
        data = open_data_set(*given)
        others = np.roll(data.test.targets, 5)
        return dataclasses.replace(data, test=dataclasses.replace(data.test, targets=others))

    monkeypatch.setattr(context, "open_data_set", permuted)
    other_table, of_others = chosen()
    assert other_table == table and of_others != of_test


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_on_real_photographs_a_sweep_is_scikit_learns(tmp_path, monkeypatch):
    """CIFAR-10 by a backbone of random weights: the same decay is chosen on the same images held out, the same classes
    are found, and top-1 of 3,000 test images is within half a point, where the standard error of either is 0.8."""
    from sklearn.linear_model import LogisticRegression

    data = open_data_set(str(SHARED / "cifar10" / "train-*.tar"), str(SHARED / "cifar10" / "test-*.tar"), None)
    drawn = np.sort(np.random.default_rng(0).permutation(len(data.train))[:1500])
    data = dataclasses.replace(data, train=data.train.take(drawn))
    monkeypatch.setattr(Evaluation, "data_set", lambda self: data)
    decays = (0.001, 0.03, 1.0)
    options = {"weight_decay": ",".join(map(str, decays)), "lr": "0.1", "held_out": "0.2", "layers": "s1+s2+s3+s4"}
    evaluation = evaluation_of(tmp_path / "-", **options)
    ours = task_class("linear")(evaluation.options).measure(evaluation)
    layers = layers_of(evaluation.subject, evaluation.options.layers)
    train_x, test_x = (
        evaluation.features(split, encode=layers.encode, mark=layers.mark).features.double().numpy()
        for split in (data.train, data.test)
    )
    evaluation.clean()

    def scores(decay: float, on: np.ndarray, asked: np.ndarray) -> Tensor:
        model = LogisticRegression(C=1 / (decay * len(on)), max_iter=2000).fit(x[on], data.train.targets[on])
        return torch.from_numpy(model.decision_function(asked))

    fit, held = hold_out(data.train.targets, 10, 0.2, 0)
    mean, std = train_x[fit].mean(0), np.sqrt(train_x[fit].var(0) + 1e-5 * train_x[fit].var(0).mean())
    x, asked = (train_x - mean) / std, (test_x - mean) / std
    rows = [figures(scores(decay, fit, x[held]), data.train.targets[held]) for decay in decays]
    decay = decays[best(rows, False)]
    theirs = figures(scores(decay, np.arange(len(x)), asked), data.test.targets)
    chosen = next(row for row in ours.table if row["chosen"])
    assert chosen["weight_decay"] == decay
    assert ours.scores["linear/top1"] == pytest.approx(theirs["top1"], abs=0.5)
    assert [row["held_out_loss"] for row in ours.table[1:]] == pytest.approx(
        [row["loss"] for row in rows[1:]], rel=0.01
    )
    assert theirs["top1"] > 25, "there is something to learn"


def multi_label(pictures: Path) -> DataSet:
    """Each image has its class and, some of them, the next; one label is not to be counted."""
    data = open_data_set(str(pictures), "", None)

    def several(split: Split) -> Split:
        targets = (split.targets[:, None] == np.arange(3)).astype(np.int8)
        targets[::3] |= np.roll(targets[::3], 1, 1)
        targets[1, (split.targets[1] + 2) % 3] = -1
        return dataclasses.replace(split, targets=targets)

    return dataclasses.replace(data, train=several(data.train), test=several(data.test))


TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "sgd": ("linear", {**QUICK, "layers": "last,s3"}),
    "augmented": ("linear", {**QUICK, "augment": "true", "refit": "false"}),
    "lbfgs": ("linear", {"solver": "lbfgs", "c": "0.01,1"}),
    "several labels": ("linear", QUICK),
    "svm": ("svm", {"c": "1,10"}),
    "few labels": ("lowshot", {"shots": "20%,3", "draws": "2", "c": "0.01,1"}),
    "few labels by SGD": ("lowshot", {**QUICK, "solver": "sgd", "shots": "4", "draws": "1"}),
}


def all_tasks(rank: int, size: int, pictures: Path) -> dict[str, tuple[dict, list]]:
    plain, found = Evaluation.data_set, {}
    try:
        for name, (task, given) in TASKS.items():
            Evaluation.data_set = (lambda self: multi_label(pictures)) if name in ("several labels", "svm") else plain
            result = measured(pictures, task, world_of(rank, size), **given)
            found[name] = dict(result.scores), [dict(row) for row in result.table]
    finally:
        Evaluation.data_set = plain
    return found


def numbers(value: object) -> dict[str, float]:
    scores, table = value
    rows = {f"{i}/{k}": v for i, row in enumerate(table) for k, v in row.items() if isinstance(v, int | float)}
    return {k: -1.0 if v != v else v for k, v in (scores | rows).items()}


def test_two_processes_give_the_figures_of_one(pictures):
    alone = all_tasks(0, 1, pictures)
    for ranks in run_ranks(2, all_tasks, pictures):
        for name in TASKS:
            assert numbers(ranks[name]) == pytest.approx(numbers(alone[name]), abs=1e-3), name
    assert alone["sgd"][0]["linear/images"] == 15 and alone["svm"][0]["svm/map"] > 0
    assert "linear/map" in alone["several labels"][0]
    shots = {(row["shots"], row["draw"]): row["images"] for row in alone["few labels"][1]}
    assert shots == {("20%", 0): 6, ("20%", 1): 6, ("3", 0): 9, ("3", 1): 9}
    both = [row["top1"] for row in alone["few labels"][1] if row["shots"] == "3"]
    found = alone["few labels"][0]
    assert found["lowshot/3_top1"] == pytest.approx(np.mean(both))
    assert found["lowshot/3_top1_std"] == pytest.approx(np.std(both, ddof=1))


@pytest.mark.parametrize("name", ["lbfgs", "few labels"])
def test_fits_that_did_not_converge_are_counted_and_no_warning_is_raw(pictures, monkeypatch, name):
    task, given = TASKS[name]
    key, found = f"{task}/unconverged_fits", []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for most in (1000, 2):
            monkeypatch.setattr(logistic_module, "MAX_ITERATIONS", most)
            found.append(measured(pictures, task, **given))
    assert found[0].scores[key] == 0 and not found[0].warnings
    assert found[1].scores[key] == sum(row["unconverged_fits"] for row in found[1].table) > 1
    assert found[1].warnings[0].startswith(f"{found[1].scores[key]:.0f} fits of logistic")


@pytest.mark.parametrize("given", [QUICK, {**QUICK, "augment": "true"}], ids=["cached", "augmented"])
def test_a_killed_evaluation_goes_on_to_the_same_figures(pictures, given, monkeypatch):
    expected = measured(pictures, **given)
    monkeypatch.setattr(heads_module, "SAVE_EVERY_S", 0.0)
    if not (child := os.fork()):  # killed as the second sweep has begun
        saved, save_state = [], heads_module.save_state
        num = 20 if "augment" in given else 18

        def killed(*args: object) -> None:
            save_state(*args)
            saved.append(args)
            if len(saved) == num:
                os.kill(os.getpid(), signal.SIGKILL)

        heads_module.save_state = killed
        measured(pictures, **given)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    updates = []
    plain = heads_module.HeadsSGD.step
    monkeypatch.setattr(heads_module.HeadsSGD, "step", lambda self, closure: (updates.append(1), plain(self))[1])
    found = measured(pictures, **given)
    assert (dict(found.scores), list(found.table)) == (dict(expected.scores), list(expected.table))
    assert 0 < len(updates) < 14 + 15, "what was done is not done again"
    assert not (pictures.parent / "eval" / "unfinished").exists()


def test_svms_are_those_of_vissl(pictures, monkeypatch):
    """The published loop on the same features."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    data = multi_label(pictures)
    monkeypatch.setattr(Evaluation, "data_set", lambda self: data)
    found = measured(pictures, "svm", c="0.1,10")
    evaluation = evaluation_of(pictures, "svm")
    x, asked = (evaluation.features(s).features.double().numpy() for s in (data.train, data.test))
    x, asked = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, asked))
    evaluation.clean()
    for c, row in enumerate(found.table):
        wanted, truth = np.where(data.train.targets[:, c] == 1, 1, -1), data.test.targets[:, c]
        models = [LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0) for cost in (0.1, 10.0)]
        by_folds = [cross_val_score(m, x, wanted, cv=3, scoring="average_precision").mean() for m in models]
        model = models[int(np.argmax(by_folds))].fit(x, wanted)
        assert row["c"] == model.C and row["cross_validated_ap"] == pytest.approx(100 * max(by_folds), abs=0.1)
        expected = average_precision(model.decision_function(asked), truth, "interpolated")
        assert row["ap_interpolated"] == pytest.approx(expected, abs=1.0)


def test_svms_that_do_not_converge_are_counted(pictures, monkeypatch, recwarn):
    """As scikit-learn warns of them; the protocol is that of any weights."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    data = multi_label(pictures)
    monkeypatch.setattr(Evaluation, "data_set", lambda self: data)
    monkeypatch.setattr(svm_module, "MAX_ITERATIONS_SVM", 25)
    result = measured(pictures, "svm", c="0.001,1000")
    assert not [w for w in recwarn if issubclass(w.category, ConvergenceWarning)]
    evaluation = evaluation_of(pictures, "svm")
    x = evaluation.features(data.train).features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    evaluation.clean()

    def warned(work: Callable[[], object]) -> int:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
        return sum(issubclass(w.category, ConvergenceWarning) for w in told)

    for c, row in enumerate(result.table):
        wanted = np.where(data.train.targets[:, c] == 1, 1, -1)
        models = {
            cost: LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=25, random_state=0) for cost in (0.001, 1000.0)
        }
        folds = sum(warned(partial(cross_val_score, m, x, wanted, cv=3)) for m in models.values())
        last = warned(partial(models[row["c"]].fit, x, wanted))
        assert row["converged"] is (not last) and row["unconverged_fits"] == folds + last
    total = sum(row["unconverged_fits"] for row in result.table)
    assert result.scores["svm/unconverged_fits"] == total and 0 < total < 3 * 7
    (told,) = result.warnings
    assert told.startswith(f"{total} fits of linear SVMs did not converge in 25 iterations")
    assert "at most 25 iterations" in result.protocol and "converged" not in result.protocol


# ------------------------------------------------------------------------------------------------ what is drawn


def test_draws_are_of_each_class_and_others_by_another_seed():
    targets = np.repeat(np.arange(3), [10, 20, 40])
    drawn = stratified(targets, 3, 0.1, 0, seed=0)
    assert np.bincount(targets[drawn]).tolist() == [1, 2, 4] and np.all(np.diff(drawn) > 0)
    assert np.bincount(targets[stratified(targets, 3, 5, 0, seed=0)]).tolist() == [5, 5, 5]
    others = [stratified(targets, 3, 0.1, draw, seed=seed) for draw, seed in ((1, 0), (0, 1))]
    assert not any(np.array_equal(drawn, other) for other in others)
    fit, held = hold_out(np.array([0, 0, 1, 2, 2, 2]), 3, 0.5, 0)
    assert sorted([*fit, *held]) == list(range(6)) and 2 in fit and len(held) == 3
    assert len(hold_out(np.zeros((10, 2), np.int8), 2, 0.3, 0)[1]) == 3


def test_a_list_of_files_is_a_draw(pictures, tmp_path):
    names = [f"class{c}/{i}.jpg" for c in range(3) for i in (1, 2)]
    with_names = tmp_path / "flat"
    for c in range(3):  # names of files are unique, as ImageNet's are
        for part in ("train", "test"):
            folder = with_names / part / f"class{c}"
            folder.mkdir(parents=True)
            for file in sorted((pictures / part / f"class{c}").iterdir()):
                (folder / f"c{c}_{file.name}").write_bytes(file.read_bytes())
    (tmp_path / "two.txt").write_text("".join(f"c{n[5]}_{n.split('/')[1]}\n" for n in names))
    result = measured(with_names, "lowshot", split_file=str(tmp_path / "two.txt"), c="1")
    assert [row["images"] for row in result.table] == [6] and result.headline == "lowshot/two_top1"
    (tmp_path / "two.txt").write_text("c0_1.jpg\nnone.jpg\n")
    with refused("--split-file"):
        measured(with_names, "lowshot", split_file=str(tmp_path / "two.txt"))


@pytest.mark.parametrize("given", [{"c": "1"}, {"finetune": "true", "epochs": "1", "global_batch": "4"}])
def test_after_a_kill_a_list_that_was_edited_is_drawn_anew(pictures, tmp_path, given, monkeypatch):
    lists = {name: tmp_path / f"{name}.txt" for name in ("edited", "same")}
    given = {"split_file": ",".join(map(str, lists.values())), "size": "32", **given}
    lists["same"].write_text("".join(f"class{c}/{i}.jpg\n" for c in range(3) for i in (7, 8)))
    before = []

    def killed(self, table, *others):
        before.extend(table)
        raise KeyboardInterrupt

    lists["edited"].write_text("".join(f"class{c}/1.jpg\n" for c in range(3)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(task_class("lowshot"), "_result", killed)
        measured(pictures, "lowshot", **given)
    lists["edited"].write_text("".join(f"class{c}/4.jpg\n" for c in range(3)))
    gone_on = measured(pictures, "lowshot", **given).table
    assert gone_on == measured(pictures, "lowshot", **given).table
    assert gone_on[0]["loss" if "c" in given else "train_loss"] != before[0]["loss" if "c" in given else "train_loss"]
    train, rows = open_data_set(str(pictures), "", None).train, np.repeat(np.arange(30), 5)
    other = np.concatenate([rows[:1], rows[5:6], rows[2:]])  # of the same class, and none whose name and bytes are seen
    assert train.take(rows).mark != train.take(other).mark


def test_a_list_tells_images_of_one_name_apart_by_their_folders(pictures, tmp_path):
    train = open_data_set(str(pictures), "", None).train
    given = tmp_path / "list.txt"
    wanted = ["class2/1.jpg", "/elsewhere/train/class0/1.jpg", "./class1/3.jpg"]
    given.write_text("\n".join([*wanted, wanted[0], ""]))
    found = listed(given, train)
    assert [Path(train.source.name(i)).parts[-2:] for i in found] == [
        ("class0", "1.jpg"), ("class1", "3.jpg"), ("class2", "1.jpg"),
    ]  # fmt: skip
    (tmp_path / "1percent.txt").write_text(given.read_text())
    both = read_settings("lowshot", {"split_file": f"{tmp_path}/1percent.txt,{given}"})
    assert [(d.shot, len(d.indices)) for d in draws_of(both, train)] == [("1%", 3), ("list", 3)]
    twenty = tmp_path / "20.txt"
    twenty.write_text(given.read_text())
    assert [d.shot for d in draws_of(read_settings("lowshot", {"split_file": str(twenty)}), train)] == ["20"]
    twenty.write_text("class2/1.jpg\nclass0/1.jpg\n")
    with refused("--split-file", str(twenty), "list images of each class"):
        draws_of(read_settings("lowshot", {"split_file": str(twenty)}), train)
    alone = train.take(np.flatnonzero(train.targets == 0))
    given.write_text("other/1.jpg\n")
    assert listed(given, alone).tolist() == [1], "there is one of that name"
    for lines in ("1.jpg", "class9/1.jpg", "class0/x/1.jpg"):
        given.write_text(f"{lines}\nclass1/3.jpg\n")
        with refused("--split-file", str(given), "name their folders, too"):
            listed(given, train)
    given.write_text("a/1.jpg\nb/1.jpg\n")
    with refused("--split-file", str(given), "name each image once, by its folders"):
        listed(given, alone)


def test_bad_input_is_one_problem_before_work_begins(pictures):
    with refused("--shots", "1%", ("6%", "1")):
        measured(pictures, "lowshot", shots="1%")
    with refused("--shots", "11", ("10",)):
        measured(pictures, "lowshot", shots="11")
    with refused("--held-out", error=DataError):
        evaluation = evaluation_of(pictures)
        data = open_data_set(str(pictures), "", None)
        evaluation.data_set = lambda: dataclasses.replace(data, train=data.train.take(np.array([0, 10, 20])))
        task_class("linear")(evaluation.options).measure(evaluation)
    evaluation.clean()
    for task, given, keys in [
        ("linear", {"layers": "last,s0"}, ["--layers"]),
        ("linear", {"solver": "lbfgs", "augment": "true"}, ["--augment"]),
        ("linear", {"lr": "0", "held_out": "1"}, ["--lr", "--held-out"]),
        ("lowshot", {"shots": "0%,x,2"}, ["--shots", "--shots"]),
        ("lowshot", {"draws": "2", "split_file": "/no/list"}, ["--draws", "--split-file"]),
        ("svm", {"layer": "x"}, ["--layer"]),
    ]:
        with pytest.raises(ConfigError) as told:
            read_settings(task, given)
        assert [p.key for p in told.value.problems] == keys
    with refused("--global-batch", 5, (6,), error=UserError):
        heads_module.check_batch(5, 2)
    broken = dataclasses.replace(data.train, targets=np.where(data.train.targets == 2, 3, data.train.targets))
    with pytest.raises(DataError) as found:
        check_targets(broken)
    assert found.value.problems[0].value == 3
    split = multi_label(pictures).train
    check_targets(split)
    with pytest.raises(DataError):
        check_targets(dataclasses.replace(split, targets=split.targets[:, :2]))


def test_a_class_with_too_few_positives_for_the_folds(pictures, monkeypatch):
    data = multi_label(pictures)
    data.train.targets[:, 1] = 0
    monkeypatch.setattr(Evaluation, "data_set", lambda self: data)
    with refused("--folds of class class1", 3):
        measured(pictures, "svm")


def test_the_usual_shots_leave_an_image_of_each_class():
    def of(*counts: int) -> tuple[str, ...]:
        targets = np.repeat(np.arange(len(counts)), counts)
        return usual_shots(Split(None, targets, [str(c) for c in range(len(counts))]))

    assert (
        of(1300, 100) == ("1%", "10%") and of(1300, 99) == ("5", "10%") and of(9, 50) == ("5",) and of(3, 50) == ("3",)
    )


def test_a_rank_to_which_deepspeed_left_a_number_is_alone(monkeypatch):
    """As in a process that trained with it before."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    monkeypatch.setenv("LOCAL_RANK", "0")
    state._reset_state(reset_partial_state=True)
    assert context.accelerator_of(World()).num_processes == 1
    assert os.environ["LOCAL_RANK"] == "0"
