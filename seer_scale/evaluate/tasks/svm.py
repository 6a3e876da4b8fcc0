"""mean average precision of linear SVMs on frozen features, as published for VOC07

VISSL's protocol (arXiv 1905.01235, SEER's table of VOC07): features of unit length, for each class a LinearSVC with the
cost that has the highest average precision in 3-fold cross-validation on the training images; positives weigh twice.
What is not to be counted is a negative when training, and left out of the test.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seer_scale.config.fields import opt
from seer_scale.errors import DataError, Problem
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.layers import fit_inputs, layer_problems, layers_of
from seer_scale.evaluate.logistic import sklearn_module, told_of_unconverged
from seer_scale.evaluate.metrics import average_precision, mean_of
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.table import as_float64, by_blocks
from seer_scale.evaluate.task import Result, Task, TaskSettings
from seer_scale.files import to_json, write_whole
from seer_scale.observe.chart import Chart

MAX_ITERATIONS_SVM = 2000


@dataclass(frozen=True, kw_only=True)
class SvmSettings(TaskSettings):
    c: tuple[float, ...] = opt(
        (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0), "costs to choose from, for each class", gt=0
    )
    folds: int = opt(3, "of the cross-validation by which they are chosen", ge=2)
    layer: str = opt(
        "last", "last (the pooled output), s1 ... s4 (a RegNetY's stages, pooled), or several, as in s3+s4"
    )

    def problems(self) -> list[Problem]:
        return layer_problems([self.layer], "layer")


@register_task("svm", SvmSettings)
class Svm(Task[SvmSettings]):
    def measure(self, evaluation: Evaluation[SvmSettings]) -> Result:
        options = self.options
        layers = layers_of(evaluation.subject, (options.layer,), "--layer")
        data = evaluation.data_set()
        train, test = (
            evaluation.features(split, encode=layers.encode, mark=layers.mark) for split in (data.train, data.test)
        )
        inputs = fit_inputs(layers, train.features, "l2")
        prepare = partial(inputs.of, name=options.layer)

        @cache
        def x() -> np.ndarray:  # where there is something to fit
            return as_float64(prepare, train.features).numpy()

        def scored(model: Any) -> np.ndarray:
            def of(rows: Tensor) -> Tensor:
                return torch.from_numpy(model.decision_function(prepare(rows).double().numpy()))

            return by_blocks(of, test.features).numpy()

        y, truth = (_of_several(table.targets, len(data.classes)) for table in (train, test))
        self._check(y, data.classes)
        place = evaluation.work("svm", data.train.mark, data.test.mark, layers.mark, evaluation.size, options.mark)
        paths = [place / f"class-{c}.json" for c in range(len(data.classes))]

        def fit(c: int) -> None:
            self._fit(paths[c], x(), y[:, c], scored, truth[:, c], options.seed)

        evaluation.complete(paths, fit, "fitting SVMs", "classes")
        table = [{"class": name, **json.loads(path.read_text())} for name, path in zip(data.classes, paths)]
        curves = {"map": "interpolated", "map_11point": "11point", "map_area": "area"}
        scores = {f"svm/{name}": mean_of(_column(table, f"ap_{curve}")) for name, curve in curves.items()}
        unconverged = sum(row["unconverged_fits"] for row in table)
        bars = [(row["class"], row["ap_interpolated"] or 0.0) for row in table]
        return Result(
            scores=scores
            | {
                "svm/images": len(test.rows),
                "svm/classes": len(data.classes),
                "svm/unconverged_fits": unconverged,
            },
            headline="svm/map",
            protocol=f"{data.protocol} A LinearSVC for each class, of {len(options.c)} costs by {options.folds}-fold "
            f"cross-validation, a fit of at most {MAX_ITERATIONS_SVM:,} iterations; the area under the envelope of "
            "precision, as VISSL.",  # how many end there tells of the weights, and the protocol does not
            warnings=told_of_unconverged(unconverged, "linear SVMs", MAX_ITERATIONS_SVM),
            table=table,
            plots=(Chart(title="Linear SVMs", x="class", y="average precision, %", series={"AP": bars}, kind="bars"),),
        )

    def _check(self, y: np.ndarray, classes: list[str]) -> None:
        for name, column in zip(classes, y.T):
            fewest = min(np.count_nonzero(column == 1), np.count_nonzero(column != 1))
            if fewest < self.options.folds:
                rule = f"has only {fewest} training images with it or without it, too few for so many folds"
                raise DataError(Problem(f"--folds of class {name}", self.options.folds, rule, "give more images"))

    def _fit(
        self, path: Path, x: np.ndarray, y: np.ndarray, scored: Callable[[Any], np.ndarray], truth: np.ndarray,
        seed: int,
    ) -> None:  # fmt: skip
        """Write what one class gives. scored: the test images' scores by a fitted model. converged: the fit that was
        tested has; unconverged_fits: how many have not, with those of the cross-validation."""
        svm, selection = sklearn_module("svm"), sklearn_module("model_selection")
        wanted = np.where(y == 1, 1, -1)

        def model(c: float) -> Any:
            return svm.LinearSVC(
                C=c, class_weight={1: 2, -1: 1}, penalty="l2", loss="squared_hinge", dual=True, tol=1e-4,
                max_iter=MAX_ITERATIONS_SVM, random_state=seed,
            )  # fmt: skip

        def has_converged(fit: Any) -> bool:
            return bool(fit.n_iter_ < MAX_ITERATIONS_SVM)

        with warnings.catch_warnings():  # they are counted instead
            warnings.simplefilter("ignore", sklearn_module("exceptions").ConvergenceWarning)
            tried = [
                selection.cross_validate(
                    model(c), x, wanted, cv=self.options.folds, scoring="average_precision", return_estimator=True
                )
                for c in self.options.c
            ]
            found = [folds["test_score"].mean() for folds in tried]
            c = self.options.c[int(np.argmax(found))]
            chosen = model(c).fit(x, wanted)
        given = scored(chosen)
        fits = [chosen, *(fit for folds in tried for fit in folds["estimator"])]
        row = {
            "c": c,
            "cross_validated_ap": 100 * max(found),
            "converged": has_converged(chosen),
            "unconverged_fits": sum(not has_converged(fit) for fit in fits),
        }
        row |= {f"ap_{curve}": average_precision(given, truth, curve) for curve in ("interpolated", "11point", "area")}
        write_whole(path, to_json(row) + "\n")


def _of_several(targets: np.ndarray, classes: int) -> np.ndarray:
    """int8 [n, classes], of a class each, too."""
    return targets if targets.ndim == 2 else (targets[:, None] == np.arange(classes)).astype(np.int8)


def _column(table: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if row[name] is None else row[name] for row in table])
