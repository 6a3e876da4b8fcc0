"""accuracy of linear classifiers on frozen features, or of the whole network fine-tuned, by few labels

1 %, 10 %, or so many images a class; the mean over several draws, and their deviation (SimCLR, arXiv 2002.05709, has
the lists of ImageNet). SEER's figures (arXiv 2103.01988) are of the whole network: --finetune.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from seer_scale.config.fields import opt
from seer_scale.errors import DataError, Problem
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.draws import Draw, DrawSettings, draws_of, readable
from seer_scale.evaluate.finetuning import (
    Finetuning,
    TrainingSettings,
    begins_with,
    check_processes,
    new_classifier,
    told_of_few_updates,
    told_of_statistics,
)
from seer_scale.evaluate.heads import CachedFeatures, Head, Heads, best, check_batch, figures, measure_heads, train
from seer_scale.evaluate.layers import Layers, fit_inputs, layers_of
from seer_scale.evaluate.logistic import logistic, sklearn_module, told_of_unconverged
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.splits import DataSet, hold_out
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.table import Rows, Table, as_float64, by_blocks
from seer_scale.evaluate.task import Result, Task
from seer_scale.evaluate.tasks.linear import HeadSettings, plan_of
from seer_scale.files import to_json, write_whole
from seer_scale.formatting import counted
from seer_scale.observe.chart import Chart

FOLDS = 3
SHARE_OF_ALL = 4
"""Where draws have a fourth of all images, features are made of all: other tasks need them, too."""
EPOCHS, MIN_SAMPLES = 70, 12_800
"""Of --finetune: VISSL's, and how many images it sees at least, where a draw has few: one pass of 1 % of ImageNet."""
WHOLE_NETWORK = "train the whole network, with options of its own, instead of a classifier on its features"


@dataclass(frozen=True, kw_only=True)
class LowshotSettings(HeadSettings, DrawSettings):
    finetune: bool = opt(False, WHOLE_NETWORK)
    solver: Literal["sgd", "lbfgs"] = opt("lbfgs", "scikit-learn's logistic regression, or heads by SGD as of linear")

    def without_effect(self) -> dict[str, str]:
        alone = self.solver == "lbfgs" or len(self.lr) * len(self.weight_decay) == 1
        return super().without_effect() | ({"held_out": "without several heads by --solver sgd"} if alone else {})


@dataclass(frozen=True, kw_only=True)
class LowshotFinetuneSettings(TrainingSettings, DrawSettings):
    """By default as VISSL fine-tunes SEER's networks on 1 % and 10 % of ImageNet and of Places205
    (configs/config/benchmark/semi_supervised), but for Nesterov's momentum."""

    finetune: bool = opt(True, WHOLE_NETWORK)
    epochs: int = opt(0, "passes over the images drawn; 0 = 70, and at least 12,800 images", ge=0)
    lr: float = opt(0.05, "learning rate of the head, for a global batch of 256", gt=0)
    weight_decay: float = opt(0.0, "weight decay", ge=0)
    steps: tuple[float, ...] = opt(
        (30 / 70,), "shares of the training after which the rate is divided by 10; [] = never", gt=0, lt=1
    )

    @property
    def least_epochs(self) -> int:
        return self.epochs or EPOCHS

    def of_images(self, num: int) -> LowshotFinetuneSettings:
        """With the number of epochs, of so many images."""
        epochs = max(EPOCHS, math.ceil(MIN_SAMPLES / num))
        return self if self.epochs else dataclasses.replace(self, epochs=epochs)


@register_task("lowshot", LowshotSettings, finetune=LowshotFinetuneSettings)
class Lowshot(Task[LowshotSettings | LowshotFinetuneSettings]):
    def measure(self, evaluation: Evaluation[Any]) -> Result:
        options = self.options
        if isinstance(options, LowshotFinetuneSettings):
            check_processes(options, evaluation)
        else:
            check_batch(options.global_batch, evaluation.world.size)
        data = evaluation.data_set()
        if data.train.multi_label:
            raise DataError(Problem("--data", data.name, "an image has several labels there, and a draw wants one"))
        draws = draws_of(options, data.train)
        if isinstance(options, LowshotFinetuneSettings):
            rows = self._finetuned(evaluation, options, data, draws)
        else:
            rows = self._classified(evaluation, options, data, draws)
        about = [{"shots": draw.shot, "draw": draw.number} for draw in draws]
        return self._result([a | row for a, row in zip(about, rows)], data, evaluation.subject)

    def _classified(
        self, evaluation: Evaluation[Any], options: LowshotSettings, data: DataSet, draws: Sequence[Draw]
    ) -> list[dict[str, Any]]:
        """Figures of a classifier on frozen features, of each draw."""
        layers = layers_of(evaluation.subject, ("last",))
        union = np.unique(np.concatenate([draw.indices for draw in draws]))
        if len(union) * SHARE_OF_ALL > len(data.train):
            union = np.arange(len(data.train))
        test = evaluation.features(data.test, "test images")
        part = data.train if len(union) == len(data.train) else data.train.take(union)
        bank = evaluation.features(part, "the images drawn")
        union = union[bank.rows]  # of those that can be read
        draws = readable(draws, union, data.train)
        place = evaluation.work("draws", data.train.mark, data.test.mark, options.mark)
        paths = [place / f"{draw.stem}.json" for draw in draws]
        by_sgd = options.solver == "sgd"

        def classify(i: int) -> None:
            rows = np.searchsorted(union, draws[i].indices)
            found = self._by_sgd if by_sgd else self._by_lbfgs
            row = found(evaluation, options, layers, bank, rows, test, len(data.classes), paths[i].name)
            if not by_sgd or evaluation.world.is_main:
                write_whole(paths[i], to_json({"images": len(rows), **row, "tested": len(test.rows)}) + "\n")

        evaluation.complete(paths, classify, "classifying by few labels", "draws", by_all=by_sgd)
        return [json.loads(path.read_text()) for path in paths]

    def _finetuned(
        self, evaluation: Evaluation[Any], options: LowshotFinetuneSettings, data: DataSet, draws: Sequence[Draw]
    ) -> list[dict[str, Any]]:
        """Figures of the whole network, trained on each draw; networks are not kept."""
        world, nothing = evaluation.world, data.train.take(np.empty(0, np.int64))
        union = np.unique(np.concatenate([draw.indices for draw in draws]))
        draws = readable(draws, union[evaluation.readable(data.train.take(union))], data.train)
        test = data.test.take(evaluation.readable(data.test))
        marks = data.train.mark, data.test.mark
        place = evaluation.work("finetuned", *marks, evaluation.size, options.of_weights)
        paths = [place / f"{draw.stem}.json" for draw in draws]

        def finetune(i: int) -> None:
            split, aside = data.train.take(draws[i].indices), paths[i].with_suffix("")
            if world.is_main:
                aside.mkdir(exist_ok=True)
            own, network = options.of_images(len(split)), new_classifier(evaluation, data)
            training = Finetuning(network, split, nothing, own, evaluation, aside)
            training.train()
            with evaluation.progress.doing("measuring the test images"):
                scores, rows = training.scores_of(test)
            loss = training.done.epochs[-1]["train_loss"]
            row = {"images": len(split), "epochs": own.epochs, "train_loss": loss, "tested": len(rows)}
            if world.is_main:
                write_whole(paths[i], to_json(row | figures(scores, test.targets[rows])) + "\n")
                shutil.rmtree(aside)

        evaluation.complete(paths, finetune, "fine-tuning by few labels", "draws", by_all=True)
        return [json.loads(path.read_text()) for path in paths]

    # -------------------------------------------------------------------------------------------- classifiers

    def _by_lbfgs(
        self, evaluation: Evaluation[Any], options: LowshotSettings, layers: Layers, bank: Table, rows: np.ndarray,
        test: Table, classes: int, key: str,
    ) -> dict[str, Any]:  # fmt: skip
        """`figures` of the test images, and what was chosen, by cross-validation; no collectives."""
        features, targets = Rows(bank.features, rows), bank.targets[rows]
        inputs = fit_inputs(layers, features, options.normalize)
        prepare = partial(inputs.of, name=layers.names[0])
        x = as_float64(prepare, features)
        c, unconverged = self._c(options, x.numpy(), targets, classes)
        model = logistic(x, targets, classes, c)
        found = figures(by_blocks(lambda part: model.scores(prepare(part)), test.features), test.targets)
        return {"c": c, "unconverged_fits": unconverged + model.unconverged, **found}

    @staticmethod
    def _c(options: LowshotSettings, x: np.ndarray, targets: np.ndarray, classes: int) -> tuple[float, int]:
        """The strength with the lowest loss in cross-validation, of float64 [n, D], the middle one where a class has a
        single image; and how many of its fits did not converge."""
        folds = min(FOLDS, int(np.bincount(targets).min()))
        if len(options.c) == 1 or folds < 2:
            return options.c[len(options.c) // 2], 0
        split = sklearn_module("model_selection").StratifiedKFold(folds, shuffle=True, random_state=options.seed)
        found, unconverged = [], 0
        for c in options.c:
            loss = 0.0
            for fit, held in split.split(x, targets):
                model = logistic(torch.from_numpy(x[fit]), targets[fit], classes, c)
                scores = model.scores(torch.from_numpy(x[held]).float())
                loss += len(held) * figures(scores, targets[held])["loss"]
                unconverged += model.unconverged
            found.append(loss)
        return options.c[int(np.argmin(found))], unconverged

    def _by_sgd(
        self, evaluation: Evaluation[Any], options: LowshotSettings, layers: Layers, bank: Table, rows: np.ndarray,
        test: Table, classes: int, key: str,
    ) -> dict[str, Any]:  # fmt: skip
        """As `_by_lbfgs`, chosen on a held-out part; collective."""
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

    def _result(self, table: list[dict[str, Any]], data: DataSet, subject: Subject) -> Result:
        options, classes = self.options, len(data.classes)
        whole, tested = options.finetune, table[0]["tested"]
        scores: dict[str, float] = {}
        points: list[tuple[float, float]] = []
        shots = list(dict.fromkeys(row["shots"] for row in table))
        names = {shot: f"lowshot/{shot}{'_finetuned' * whole}" for shot in shots}
        for shot, prefix in names.items():
            own = [row for row in table if row["shots"] == shot]
            for name in ("top1", "top5", "mean_class"):
                values = np.array([row[name] for row in own])
                scores[f"{prefix}_{name}"] = values.mean()
                if len(values) > 1:
                    scores[f"{prefix}_{name}_std"] = values.std(ddof=1)
            points.append((own[0]["images"] / classes, scores[f"{prefix}_top1"]))
        scores |= {"lowshot/images": tested, "lowshot/classes": classes}
        unconverged = sum(row.get("unconverged_fits", 0) for row in table)
        if isinstance(options, LowshotSettings) and options.solver == "lbfgs":
            scores["lowshot/unconverged_fits"] = unconverged
        plot = Chart(title="Few labels", x="images a class", y="top-1, %", series={"top-1": points}, log_x=True)
        several = f"mean and deviation of {options.draws} draws" if options.draws > 1 else "one draw of each"
        drawn = "as listed" if options.split_file else several
        warnings = told_of_unconverged(unconverged)
        if isinstance(options, LowshotSettings):
            kind = "logistic regressions" if options.solver == "lbfgs" else "SGD heads"
            how = f"{kind} on frozen features"
        else:
            *others, last = dict.fromkeys(row["epochs"] for row in table)
            epochs = " or ".join([*map(str, others), counted(last, "epoch")])
            statistics = told_of_statistics(options, subject)
            for shot in shots:
                num = min(row["images"] for row in table if row["shots"] == shot)
                warnings += told_of_few_updates(options.of_images(num), num, f"Draws of {shot}: ")
            how = f"the whole network was trained on each draw for {epochs} {begins_with(subject)}"
            how += f"{statistics}; measured are the last weights"
        return Result(
            scores={key: float(value) for key, value in scores.items()},
            headline=f"{names[shots[0]]}_top1",
            protocol=f"{data.protocol} Of the training images {', '.join(shots)}, {drawn}; {how}.",
            table=[{k: v for k, v in row.items() if k != "tested"} for row in table],
            plots=(plot,),
            warnings=warnings,
        )
