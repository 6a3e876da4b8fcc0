"""accuracy of linear classifiers on frozen features by few labels

1 %, 10 %, or so many images a class; the mean over several draws, and their deviation (SimCLR, arXiv 2002.05709, has
the lists of ImageNet).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from seer_scale.config.fields import opt
from seer_scale.errors import DataError, Problem, missing_path
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.heads import CachedFeatures, Head, Heads, best, check_batch, figures, measure_heads, train
from seer_scale.evaluate.layers import Layers, fit_inputs, layers_of
from seer_scale.evaluate.logistic import logistic, sklearn_module
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.splits import Split, hold_out, stratified
from seer_scale.evaluate.table import Rows, Table, as_float64, by_blocks
from seer_scale.evaluate.task import Result, Task
from seer_scale.evaluate.tasks.linear import HeadSettings, plan_of
from seer_scale.files import shown, to_json, write_whole
from seer_scale.formatting import counted
from seer_scale.observe.chart import Chart

FOLDS = 3
SHARE_OF_ALL = 4
"""Where draws have a fourth of all images, features are made of all: other tasks need them, too."""


@dataclass(frozen=True, kw_only=True)
class LowshotSettings(HeadSettings):
    solver: Literal["sgd", "lbfgs"] = opt("lbfgs", "scikit-learn's logistic regression, or heads by SGD as of linear")
    shots: tuple[str, ...] = opt(
        (),
        "labels: a share of each class's training images, as in 1%, or images of each class, as in 5; none = 1%,10% "
        "where that leaves an image of each, else 5 for 1%",
    )
    draws: int = opt(5, "draws of each, by seed", ge=1)
    split_file: tuple[str, ...] = opt(
        (), "instead of shots: lists of file names, one a line, each a draw, such as SimCLR's 1percent.txt"
    )

    def problems(self) -> list[Problem]:
        rule = "must be a share of the images, such as 1%, or a number of images a class"
        found = [Problem("shots", shot, rule, ("1%", "5")) for shot in self.shots if amount_of(shot) is None]
        missing = [missing_path(path) for path in self.split_file if not os.path.exists(path)]
        return found + [Problem("split_file", p.key, f"it {p.rule}", p.nearest) for p in missing]


def usual_shots(train: Split) -> tuple[str, ...]:
    """1 % and 10 %, as published, where they leave an image of each class; else 5 of each class, or what there is."""
    least = int(np.bincount(train.targets, minlength=len(train.classes)).min())
    shares = tuple(f"{percent}%" for percent in (1, 10) if least * percent >= 100)
    return shares if "1%" in shares else (str(max(1, min(5, least))), *shares)


def amount_of(shot: str) -> float | int | None:
    """A share of a class's images, or a number of them; None of what is neither."""
    try:
        amount = float(shot[:-1]) / 100 if shot.endswith("%") else int(shot)
    except ValueError:
        return None
    return amount if 0 < amount and (isinstance(amount, int) or amount <= 1) else None


@dataclass(frozen=True)
class Draw:
    """indices: of the training split, ascending."""

    shot: str
    number: int
    indices: np.ndarray


@register_task("lowshot", LowshotSettings)
class Lowshot(Task[LowshotSettings]):
    def measure(self, evaluation: Evaluation[LowshotSettings]) -> Result:
        options, world = self.options, evaluation.world
        check_batch(options.global_batch, world.size)
        layers = layers_of(evaluation.subject, ("last",))
        data = evaluation.data_set()
        if data.train.multi_label:
            raise DataError(Problem("--data", data.name, "an image has several labels there, and a draw wants one"))
        draws = self._draws(data.train)
        union = np.unique(np.concatenate([draw.indices for draw in draws]))
        if len(union) * SHARE_OF_ALL > len(data.train):
            union = np.arange(len(data.train))
        test = evaluation.features(data.test, "test images")
        bank = evaluation.features(
            data.train if len(union) == len(data.train) else data.train.take(union), "the images drawn"
        )
        kept = {int(union[row]): i for i, row in enumerate(bank.rows)}  # of those that can be read
        place = evaluation.work("draws", data.train.mark, data.test.mark, options.mark)
        paths = [place / f"{draw.shot}-{draw.number}.json" for draw in draws]
        by_sgd = options.solver == "sgd"

        def classify(i: int) -> None:
            rows = np.array([kept[j] for j in draws[i].indices.tolist() if j in kept])
            self._check(draws[i], bank.targets[rows], data.train)
            found = self._by_sgd if by_sgd else self._by_lbfgs
            row = found(evaluation, layers, bank, rows, test, len(data.classes), paths[i].name)
            if not by_sgd or world.is_main:
                write_whole(paths[i], to_json(row) + "\n")

        evaluation.complete(paths, classify, "classifying by few labels", "draws", by_all=by_sgd)
        table = [
            {"shots": draw.shot, "draw": draw.number, "images": len(draw.indices), **json.loads(path.read_text())}
            for draw, path in zip(draws, paths)
        ]
        return self._result(table, data.protocol, len(test.rows), len(data.classes))

    # -------------------------------------------------------------------------------------------- what is drawn

    def _draws(self, train: Split) -> list[Draw]:
        options = self.options
        if options.split_file:
            found = [Draw(Path(p).stem, n, listed(Path(p), train)) for n, p in enumerate(options.split_file)]
        else:
            found = []
            for shot in options.shots or usual_shots(train):
                amount = amount_of(shot)
                assert amount is not None, "the settings have been checked"
                for number in range(options.draws):
                    rows = stratified(train.targets, len(train.classes), amount, number, seed=options.seed)
                    found.append(Draw(shot, number, rows))
        for draw in found:
            self._check(draw, train.targets[draw.indices], train)
        return found

    @staticmethod
    def _check(draw: Draw, targets: np.ndarray, train: Split) -> None:
        """Raises DataError where a class has no image, or fewer than asked for."""
        num = np.bincount(targets, minlength=len(train.classes))
        least = 1 if draw.shot.endswith("%") or not draw.shot.isdecimal() else int(draw.shot)
        if num.min() < least:
            name = train.classes[int(num.argmin())]
            rule = (
                f"of the class {name} there {'is' if num.min() == 1 else 'are'} {counted(num.min(), 'image')} in a draw"
            )
            raise DataError(Problem("--shots", draw.shot, rule, "give more of each, or images of each class"))

    # -------------------------------------------------------------------------------------------- classifiers

    def _by_lbfgs(
        self, evaluation: Evaluation[Any], layers: Layers, bank: Table, rows: np.ndarray, test: Table, classes: int,
        key: str,
    ) -> dict[str, Any]:  # fmt: skip
        """`figures` of the test images, and what was chosen, by cross-validation; no collectives."""
        features, targets = Rows(bank.features, rows), bank.targets[rows]
        inputs = fit_inputs(layers, features, self.options.normalize)
        prepare = partial(inputs.of, name=layers.names[0])
        x = as_float64(prepare, features)
        c = self._c(x.numpy(), targets, classes)
        model = logistic(x, targets, classes, c)
        return {"c": c, **figures(by_blocks(lambda part: model.scores(prepare(part)), test.features), test.targets)}

    def _c(self, x: np.ndarray, targets: np.ndarray, classes: int) -> float:
        """The strength with the lowest loss in cross-validation, of float64 [n, D]; the middle one where a class has a
        single image."""
        options = self.options
        folds = min(FOLDS, int(np.bincount(targets).min()))
        if len(options.c) == 1 or folds < 2:
            return options.c[len(options.c) // 2]
        split = sklearn_module("model_selection").StratifiedKFold(folds, shuffle=True, random_state=options.seed)
        found = []
        for c in options.c:
            loss = 0.0
            for fit, held in split.split(x, targets):
                model = logistic(torch.from_numpy(x[fit]), targets[fit], classes, c)
                scores = model.scores(torch.from_numpy(x[held]).float())
                loss += len(held) * figures(scores, targets[held])["loss"]
            found.append(loss)
        return options.c[int(np.argmin(found))]

    def _by_sgd(
        self, evaluation: Evaluation[Any], layers: Layers, bank: Table, rows: np.ndarray, test: Table, classes: int,
        key: str,
    ) -> dict[str, Any]:  # fmt: skip
        """As `_by_lbfgs`, chosen on a held-out part; collective."""
        options = self.options
        features, targets = Rows(bank.features, rows), bank.targets[rows]
        grid = [Head(layers.names[0], lr, decay) for lr in options.lr for decay in options.weight_decay]
        inputs = fit_inputs(layers, features, options.normalize)

        def trained(own: Sequence[Head], on: np.ndarray) -> Heads:
            part = CachedFeatures(evaluation, Rows(bank.features, rows[on]), targets[on])
            heads = Heads(own, {name: layers.width(name) for name in layers.names}, classes)
            place = evaluation.work("sgd", key, own, options.mark, len(on))
            return train(heads, inputs, part, plan_of(options, len(on)), evaluation, place, "linear heads")

        fit, held = hold_out(targets, classes, max(options.held_out, 1 / FOLDS), options.seed)
        number = len(grid) // 2
        if len(held) and len(grid) > 1:
            tried = trained(grid, fit)
            of_held = Rows(bank.features, rows[held]), targets[held]
            number = best(measure_heads(tried, inputs, *of_held, evaluation), multi_label=False)
        head = trained([grid[number]], np.arange(len(rows)))
        found = measure_heads(head, inputs, test.features, test.targets, evaluation)[0]
        return {"lr": grid[number].lr, "weight_decay": grid[number].weight_decay, **found}

    # -------------------------------------------------------------------------------------------- figures

    def _result(self, table: list[dict[str, Any]], protocol: str, images: int, classes: int) -> Result:
        scores: dict[str, float] = {}
        points: list[tuple[float, float]] = []
        shots = list(dict.fromkeys(row["shots"] for row in table))
        for shot in shots:
            own = [row for row in table if row["shots"] == shot]
            for name in ("top1", "top5", "mean_class"):
                values = np.array([row[name] for row in own])
                scores[f"lowshot/{shot}_{name}"] = values.mean()
                if len(values) > 1:
                    scores[f"lowshot/{shot}_{name}_std"] = values.std(ddof=1)
            points.append((own[0]["images"] / classes, scores[f"lowshot/{shot}_top1"]))
        scores |= {"lowshot/images": images, "lowshot/classes": classes}
        plot = Chart(title="Few labels", x="images a class", y="top-1, %", series={"top-1": points}, log_x=True)
        options = self.options
        kind = "logistic regressions" if options.solver == "lbfgs" else "linear heads by SGD"
        drawn = "as listed" if options.split_file else f"mean and deviation of {counted(options.draws, 'draw')}"
        return Result(
            scores={key: float(value) for key, value in scores.items()},
            headline=f"lowshot/{shots[0]}_top1",
            protocol=f"{protocol} Of the training images {', '.join(shots)}, {drawn}; {kind} on frozen features.",
            table=table,
            plots=(plot,),
        )


def listed(path: Path, train: Split) -> np.ndarray:
    """The training images that a list names by their file names, with as many folders as tell them apart: of images of
    one file name it is that whose path ends most alike. Raises DataError where none is there, or several are alike."""
    try:
        lines = {shown(line.strip()) for line in path.read_text().splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem("--split-file", str(path), f"it cannot be read ({error})")) from error
    named = {line: parts_of(line) for line in sorted(lines)}
    images: dict[str, list[tuple[int, list[str]]]] = {parts[-1]: [] for parts in named.values()}
    for i in range(len(train)):
        own = parts_of(train.source.name(i))
        if own[-1] in images:
            images[own[-1]].append((i, own))
    if missing := [line for line, parts in named.items() if not images[parts[-1]]]:
        rule = f"{counted(len(missing), 'image')} of its {len(named):,} are not among the training images"
        raise DataError(Problem("--split-file", str(path), rule, f"the first is {missing[0]}"))
    found: dict[int, str] = {}
    for line, parts in named.items():
        alike = images[parts[-1]]
        for depth in range(2, len(parts) + 1):
            alike = [(i, own) for i, own in alike if own[-depth:] == parts[-depth:]] or alike
        image, name = alike[0][0], train.source.name(alike[0][0])
        if len(alike) > 1:
            rule = f"its {line} may be any of {counted(len(alike), 'image')}, such as {name}"
            raise DataError(Problem("--split-file", str(path), rule, "name their folders, too"))
        if image in found:
            rule = f"its {found[image]} and {line} are both {name}"
            raise DataError(Problem("--split-file", str(path), rule, "name each image once, by its folders"))
        found[image] = line
    return np.array(sorted(found), np.int64)


def parts_of(name: str) -> list[str]:
    """Folders and file of a path, or of a tar and its member; one part at least."""
    return [part for part in name.replace("::", "/").split("/") if part not in ("", ".")] or [name]
