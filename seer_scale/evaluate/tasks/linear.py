"""accuracy, or mean average precision, of linear classifiers on frozen features

Learning rates x weight decays x layers are trained side by side in one pass over the images (heads.py). The classifier
is chosen on a held-out part of the training images; the test images are looked at once, by what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
from torch import Tensor

from seer_scale.config.fields import opt
from seer_scale.errors import DataError, Problem
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.heads import (
    AugmentedImages,
    CachedFeatures,
    Head,
    Heads,
    Plan,
    TrainingSet,
    best,
    check_batch,
    figures,
    measure_heads,
    num_samples,
    train,
)
from seer_scale.evaluate.layers import Inputs, Layers, fit_inputs, layer_problems, layers_of
from seer_scale.evaluate.logistic import Linear as Fitted
from seer_scale.evaluate.logistic import fitted, logistic, told_of_unconverged
from seer_scale.evaluate.metrics import average_precisions, per_class_accuracy
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.splits import DataSet, Split, hold_out
from seer_scale.evaluate.table import Rows, Table, as_float64, by_blocks
from seer_scale.evaluate.task import Result, Task, TaskSettings
from seer_scale.formatting import counted
from seer_scale.observe.chart import Chart
from seer_scale.rng import numpy_generator

MIN_UPDATES = 1000
"""Of heads on cached features, where the number of epochs is not given: they cost little."""
SAMPLE = 16_384
"""Images whose features give mean and variance where images are augmented."""


@dataclass(frozen=True, kw_only=True)
class HeadSettings(TaskSettings):
    """How linear classifiers are trained."""

    solver: Literal["sgd", "lbfgs"] = opt("sgd", "sgd, or scikit-learn's logistic regression on cached features")
    lr: tuple[float, ...] = opt(
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "sgd: learning rates to choose from, for a global batch of 256", gt=0
    )
    weight_decay: tuple[float, ...] = opt((0.0, 5e-4, 5e-3, 0.03, 0.1, 0.3), "sgd: weight decays to choose from", ge=0)
    c: tuple[float, ...] = opt(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), "lbfgs: inverse strengths of the L2 penalty to choose from", gt=0
    )
    epochs: int = opt(0, "sgd: 0 = 28 with --augment, else 100, and at least 1,000 updates", ge=0)
    schedule: Literal["cosine", "steps"] = opt(
        "cosine", "sgd: of the learning rate, to 0; or divided by 10 at 2/7, 4/7 and 6/7 of the epochs, as VISSL"
    )
    momentum: float = opt(0.9, "sgd: Nesterov's", ge=0, lt=1)
    global_batch: int = opt(256, "sgd: images an update, over all processes", ge=1)
    normalize: Literal["standardize", "l2", "none"] = opt(
        "standardize", "features: each column to mean 0 and variance 1 over the training images, or rows to length 1"
    )
    held_out: float = opt(0.1, "share of the training images by which the classifier is chosen", gt=0, lt=1)

    def without_effect(self) -> dict[str, str]:
        of_sgd = ("lr", "weight_decay", "epochs", "schedule", "momentum", "global_batch")
        idle = dict.fromkeys(of_sgd, "with --solver lbfgs") if self.solver == "lbfgs" else {"c": "with --solver sgd"}
        return super().without_effect() | idle


@dataclass(frozen=True, kw_only=True)
class LinearSettings(HeadSettings):
    layers: tuple[str, ...] = opt(
        ("last",), "last (the pooled output), s1 ... s4 (a RegNetY's stages, pooled), or several joined, as in s3+s4"
    )
    augment: bool = opt(False, "random resized crops and flips, a forward an image and epoch; else features made once")
    crop_scale: tuple[float, float] = opt(
        (0.08, 1.0), "--augment: share of the image's area a crop covers", gt=0.0, le=1.0, rising=True
    )
    refit: bool = opt(True, "train what was chosen again on all training images, also those held out")

    def problems(self) -> list[Problem]:
        found = layer_problems(self.layers)
        if self.augment and self.solver == "lbfgs":
            found.append(Problem("augment", True, "lbfgs wants features that stay the same", ("--solver sgd",)))
        return found

    def without_effect(self) -> dict[str, str]:
        num = len(set(self.layers)) * (len(self.lr) * len(self.weight_decay) if self.solver == "sgd" else len(self.c))
        found = super().without_effect() | ({} if self.augment else {"crop_scale": "without --augment"})
        return found | (dict.fromkeys(("held_out", "refit"), "with one classifier") if num == 1 else {})


@register_task("linear", LinearSettings)
class LinearProbe(Task[LinearSettings]):
    def measure(self, evaluation: Evaluation[LinearSettings]) -> Result:
        options = self.options
        check_batch(options.global_batch, evaluation.world.size)
        layers = layers_of(evaluation.subject, tuple(dict.fromkeys(options.layers)))
        data = evaluation.data_set()
        test = evaluation.features(data.test, "test images", encode=layers.encode, mark=layers.mark)
        table, chosen = (self._sgd if options.solver == "sgd" else self._lbfgs)(evaluation, data, layers, test)
        for row in table:
            row.setdefault("chosen", False)
        main = next(row for row in table if row["chosen"])
        scores = {f"linear/{k.removeprefix('test_')}": v for k, v in main.items() if k.startswith("test_")}
        del scores["linear/loss"]
        scores |= {"linear/images": len(test.rows), "linear/classes": len(data.classes)}
        if options.solver == "lbfgs":
            scores["linear/unconverged_fits"] = sum(row["unconverged_fits"] for row in table)
        of_class = average_precisions if data.train.multi_label else per_class_accuracy
        more = {"per_class": dict(zip(data.classes, of_class(chosen, test.targets).tolist()))}
        headline = "map" if data.train.multi_label else "top1"
        return Result(
            scores=scores,
            headline=f"linear/{headline}",
            protocol=f"{data.protocol} {self._how(table)}",
            table=table,
            plots=(_plot(table, main["layer"], headline, options.solver),),
            warnings=told_of_unconverged(int(scores.get("linear/unconverged_fits", 0))),
            more=more,
        )

    def _how(self, table: Sequence[Mapping[str, Any]]) -> str:
        options = self.options
        kind = "logistic regression" if options.solver == "lbfgs" else "SGD head"
        if len(table) == 1:
            return f"One {kind}, on all training images."
        again = ", then trained again on all of them" if options.refit else ""
        return f"Chosen of {counted(len(table), kind)} on {options.held_out:.0%} of the training images{again}."

    # -------------------------------------------------------------------------------------------- SGD

    def _sgd(
        self, evaluation: Evaluation[LinearSettings], data: DataSet, layers: Layers, test: Table
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """(a row a head, the test scores of the one chosen)"""
        options = self.options
        grid = [Head(*each) for each in product(layers.names, options.lr, options.weight_decay)]
        whole, fit, held, sample = self._training_sets(evaluation, data.train, layers)
        inputs = fit_inputs(layers, sample, options.normalize)
        place = (data.train.mark, evaluation.size, options.mark)

        def trained(heads: Sequence[Head], on: TrainingSet, part: str) -> Heads:
            plan = plan_of(options, len(on), augment=options.augment)
            own = Heads(heads, {name: layers.width(name) for name in layers.names}, len(data.classes))
            what = f"{len(heads)} linear heads" if len(heads) > 1 else "a linear head"
            return train(own, inputs, on, plan, evaluation, evaluation.work(*place, part), what)

        rows: list[dict[str, Any]] = [asdict(head) for head in grid]
        heads, at = trained(grid, whole if len(grid) == 1 else fit, "whole" if len(grid) == 1 else "fit"), [0]
        if len(grid) > 1:
            for row, found in zip(rows, measure_heads(heads, inputs, *held, evaluation)):
                row |= {f"held_out_{k}": v for k, v in found.items()}
            at = _best_of_layers(rows, data.train.multi_label)
        numbers = at
        if len(grid) > 1 and options.refit:
            heads, at = trained([grid[i] for i in numbers], whole, "whole"), list(range(len(numbers)))
        for i, found in zip(numbers, measure_heads(heads, inputs, test.features, test.targets, evaluation, at)):
            rows[i] |= {f"test_{k}": v for k, v in found.items()}
        main = _best_of(rows, numbers, data.train.multi_label) if len(grid) > 1 else 0
        rows[numbers[main]]["chosen"] = True
        return rows, heads.scores(at[main], inputs, test.features)

    def _training_sets(
        self, evaluation: Evaluation[LinearSettings], train: Split, layers: Layers
    ) -> tuple[TrainingSet, TrainingSet, tuple[Tensor | Rows, np.ndarray], Tensor | Rows]:
        """(all training images, those without the held-out, the held-out features and targets, features that give mean
        and variance)"""
        options = self.options
        if not options.augment:
            table = evaluation.features(train, "training images", encode=layers.encode, mark=layers.mark)
            rows, held = _held_out(table.targets, train, options)
            kept = CachedFeatures(evaluation, Rows(table.features, rows), table.targets[rows])
            whole = CachedFeatures(evaluation, table.features, table.targets)
            return whole, kept, (Rows(table.features, held), table.targets[held]), kept.rows
        train = train.take(evaluation.readable(train))
        rows, held = _held_out(train.targets, train, options)
        of_held = evaluation.features(train.take(held), "images held out", encode=layers.encode, mark=layers.mark)
        drawn = np.sort(numpy_generator(options.seed, "sample").permutation(rows)[:SAMPLE])
        sample = evaluation.features(train.take(drawn), "a sample", encode=layers.encode, mark=layers.mark)
        augmented = [AugmentedImages(evaluation, layers, s, options.crop_scale) for s in (train, train.take(rows))]
        return augmented[0], augmented[1], (of_held.features, of_held.targets), sample.features

    # -------------------------------------------------------------------------------------------- scikit-learn

    def _lbfgs(
        self, evaluation: Evaluation[LinearSettings], data: DataSet, layers: Layers, test: Table
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """As `_sgd`, of logistic regressions."""
        options, classes = self.options, len(data.classes)
        table = evaluation.features(data.train, "training images", encode=layers.encode, mark=layers.mark)
        fit, held = _held_out(table.targets, data.train, options)
        inputs = fit_inputs(layers, Rows(table.features, fit), options.normalize)
        place = evaluation.work(data.train.mark, evaluation.size, options.mark)
        rows: list[dict[str, Any]] = [{"layer": name, "c": c} for name, c in product(layers.names, options.c)]

        def fits(of: Sequence[Mapping[str, Any]], on: np.ndarray, part: str) -> list[Fitted]:
            def fit(row: Mapping[str, Any]) -> Fitted:
                x = as_float64(partial(inputs.of, name=row["layer"]), Rows(table.features, on))
                return logistic(x, table.targets[on], classes, row["c"])

            jobs = [(f"{part}-{row['layer']}-{row['c']!r}", partial(fit, row)) for row in of]
            return fitted(jobs, evaluation, place, "logistic regressions")

        models = fits(rows, fit, "fit") if len(rows) > 1 else []
        for row, model in zip(rows, models):
            of_held = self._scores(model, inputs, Rows(table.features, held), row)
            found = figures(of_held, table.targets[held])
            row |= {f"held_out_{k}": v for k, v in found.items()} | {"unconverged_fits": model.unconverged}
        numbers = _best_of_layers(rows, data.train.multi_label) if models else [0]
        again = options.refit or not models
        chosen = fits([rows[i] for i in numbers], np.arange(len(table.rows)), "whole") if again else models
        scores = [
            self._scores(chosen[n if again else i], inputs, test.features, rows[i]) for n, i in enumerate(numbers)
        ]
        for n, (i, of_test) in enumerate(zip(numbers, scores)):
            rows[i] |= {f"test_{k}": v for k, v in figures(of_test, test.targets).items()}
            if again:
                rows[i]["unconverged_fits"] = rows[i].get("unconverged_fits", 0) + chosen[n].unconverged
        main = _best_of(rows, numbers, data.train.multi_label) if models else 0
        rows[numbers[main]]["chosen"] = True
        return rows, scores[main]

    @staticmethod
    def _scores(model: Fitted, inputs: Inputs, features: Tensor | Rows, row: Mapping[str, Any]) -> Tensor:
        return by_blocks(lambda part: model.scores(inputs.of(part, row["layer"])), features)


def plan_of(options: HeadSettings, num: int, augment: bool = False) -> Plan:
    """Of `num` training images."""
    epochs = options.epochs or (28 if augment else 100)
    updates = 1 if options.epochs or augment else MIN_UPDATES
    samples = num_samples(num, epochs, options.global_batch, updates)
    return Plan(samples, options.global_batch, options.schedule, options.momentum, options.seed)


def _held_out(targets: np.ndarray, train: Split, options: HeadSettings) -> tuple[np.ndarray, np.ndarray]:
    fit, held = hold_out(targets, len(train.classes), options.held_out, options.seed)
    if not len(held) or not len(fit):
        rule = f"leaves nothing to train on, or to choose by, of {len(targets)} images"
        raise DataError(Problem("--held-out", options.held_out, rule, "give more images a class"))
    return fit, held


def _held_figures(row: Mapping[str, Any]) -> dict[str, float]:
    prefix = "held_out_"
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def _best_of(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], multi_label: bool) -> int:
    """Which of `numbers` is the row with the best held-out figures."""
    return best([_held_figures(rows[i]) for i in numbers], multi_label)


def _best_of_layers(rows: Sequence[Mapping[str, Any]], multi_label: bool) -> list[int]:
    """For each layer the number of its best row."""
    found = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [i for i, row in enumerate(rows) if row["layer"] == layer]
        found.append(own[_best_of(rows, own, multi_label)])
    return found


def _plot(table: Sequence[Mapping[str, Any]], layer: str, headline: str, solver: str) -> Chart:
    x, key = ("C", "c") if solver == "lbfgs" else ("learning rate", "lr")
    shown = f"held_out_{headline}" if len(table) > 1 else f"test_{headline}"
    series: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        if row["layer"] == layer:
            name = f"weight decay {row['weight_decay']:g}" if key == "lr" else "logistic regression"
            series.setdefault(name, []).append((row[key], row[shown]))
    where = "held-out images" if len(table) > 1 else "test images"
    y = f"{'mAP' if headline == 'map' else 'top-1'} of {where}, %"
    return Chart(title=f"Linear classifiers on {layer}", x=x, y=y, series=series, log_x=True)
