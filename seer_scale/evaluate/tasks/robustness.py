"""accuracy on corrupted images of a classifier of clean ones

ImageNet-C's corruptions at five severities (corruptions.py). The classifier, kNN or logistic regression on features of
clean images, is made once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from seer_scale.config.fields import opt
from seer_scale.data.transforms.on_device import to_float
from seer_scale.errors import DataError, Problem, UserError, nearest
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.corruptions import CORRUPTIONS, LEFT_OUT, MIN_CORRUPTED_SIDE, SEVERITIES, corrupt
from seer_scale.evaluate.knn import TRAIN, VOTE
from seer_scale.evaluate.logistic import fitted, logistic, told_of_unconverged
from seer_scale.evaluate.metrics import share_right
from seer_scale.evaluate.nearest import nearest_neighbours, vote
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.splits import Split
from seer_scale.evaluate.table import Table, as_float64, by_blocks
from seer_scale.evaluate.task import Result, Task, TaskSettings
from seer_scale.files import to_json, write_whole
from seer_scale.formatting import counted
from seer_scale.observe.chart import Chart


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings(TaskSettings):
    corruptions: tuple[str, ...] = opt((), f"names, of {', '.join(CORRUPTIONS)}; none = all")
    severities: tuple[int, ...] = opt(SEVERITIES, "how strong", ge=1, le=5)
    classifier: Literal["knn", "linear"] = opt("knn", "of clean features: nearest neighbours, or logistic regression")
    k: int = opt(20, "neighbours that vote", ge=1)
    temperature: float = opt(0.07, "weight of a neighbour is exp(cosine / temperature)", gt=0)
    c: float = opt(1.0, "of logistic regression: inverse strength of its penalty, on standardised features", gt=0)

    def without_effect(self) -> dict[str, str]:
        idle = ("c",) if self.classifier == "knn" else ("k", "temperature")
        return super().without_effect() | dict.fromkeys(idle, f"with --classifier {self.classifier}")

    def problems(self) -> list[Problem]:
        unknown = [name for name in self.corruptions if name not in CORRUPTIONS]
        found = [
            Problem("corruptions", name, "there is no such corruption", nearest(name, CORRUPTIONS)) for name in unknown
        ]
        if not self.severities:
            found.append(Problem("severities", self.severities, "must name one at least", SEVERITIES))
        return found


@register_task("robustness", RobustnessSettings)
class Robustness(Task[RobustnessSettings]):
    def measure(self, evaluation: Evaluation[RobustnessSettings]) -> Result:
        options = self.options
        if evaluation.size < MIN_CORRUPTED_SIDE:
            rule = f"corruptions need {MIN_CORRUPTED_SIDE} pixels at least"
            raise UserError(Problem("--size", evaluation.size, rule, (MIN_CORRUPTED_SIDE,)))
        data = evaluation.data_set(roles=VOTE if options.classifier == "knn" else TRAIN)
        if data.train.multi_label:
            raise DataError(Problem("--data", data.name, "has several labels an image, and this task needs one"))
        accuracy, unconverged = self._classifier(
            evaluation, evaluation.features(data.train), len(data.classes), data.train.mark
        )
        clean = accuracy(evaluation.features(data.test))
        names = options.corruptions or tuple(CORRUPTIONS)
        table: list[dict[str, Any]] = [{"corruption": "none", "severity": 0, **clean}]
        place = evaluation.work("figures", data.train.mark, data.test.mark, evaluation.size, options.mark)
        paths = [place / f"{name}.json" for name in names]
        is_done = evaluation.world.from_main(lambda: [path.is_file() for path in paths])
        for i, name in enumerate(names):
            if not is_done[i]:
                corrupted = self._corrupted(evaluation, data.test, name, f"{name} ({i + 1} of {len(names)})")
                rows = [{"corruption": name, "severity": s, **accuracy(features)} for s, features in corrupted.items()]
                if evaluation.world.is_main:
                    write_whole(paths[i], to_json(rows) + "\n")
                evaluation.discard(*corrupted.values())  # all corruptions' would be 13 x 5 test sets
        evaluation.world.barrier()
        for path in paths:
            table += json.loads(path.read_text())
        return replace(self._result(clean, table, names, data.protocol), warnings=told_of_unconverged(unconverged))

    def _corrupted(
        self, evaluation: Evaluation[RobustnessSettings], split: Split, name: str, what: str
    ) -> dict[int, Table]:
        """By severity: each image is decoded once for all of them."""
        severities, seed = sorted(self.options.severities), self.options.seed

        def encode_pixels(pixels: Tensor, rows: np.ndarray) -> Tensor:
            corrupted = (corrupt(pixels, rows, name, severity, seed) for severity in severities)
            return torch.cat([evaluation.subject.encode(to_float(images)) for images in corrupted], 1)

        table = evaluation.features(split, what, encode_pixels=encode_pixels, mark=f"{name} {severities} {seed}")
        of_severity = table.features.chunk(len(severities), 1)
        return {s: replace(table, features=features) for s, features in zip(severities, of_severity)}

    def _classifier(
        self, evaluation: Evaluation[RobustnessSettings], bank: Table, classes: int, mark: str
    ) -> tuple[Callable[[Table], dict[str, float]], int]:
        """What gives top1 with its standard error, in percent; and how many fits did not converge. mark: of the bank's
        images. Collective, and so is what gives."""
        options = self.options
        if options.classifier == "knn":
            k = min(options.k, len(bank.rows))

            def by_vote(asked: Table) -> dict[str, float]:
                found = nearest_neighbours(bank.features, asked.features, k, evaluation)
                row = vote(found, bank.targets, asked.targets, classes, k, options.temperature)
                return {name: row[name] for name in ("top1", "top1_stderr")}

            return by_vote, 0

        mean, std = bank.features.mean(0), bank.features.std(0).clamp(min=1e-6)

        def standardised(rows: Tensor) -> Tensor:
            return (rows - mean) / std

        job = ("linear", lambda: logistic(as_float64(standardised, bank.features), bank.targets, classes, options.c))
        (head,) = fitted(
            [job], evaluation, evaluation.work("linear", options.c, mark, evaluation.size), "the classifier"
        )

        def by_head(asked: Table) -> dict[str, float]:
            scores = by_blocks(lambda part: head.scores(standardised(part)), asked.features)
            return share_right("top1", scores.argmax(1) == torch.from_numpy(asked.targets))

        return by_head, head.unconverged

    def _result(
        self, clean: dict[str, float], table: list[dict[str, Any]], names: tuple[str, ...], protocol: str
    ) -> Result:
        of = {name: [row for row in table if row["corruption"] == name] for name in names}
        errors = {name: 100 - float(np.mean([row["top1"] for row in rows])) for name, rows in of.items()}
        error, clean_error = float(np.mean(list(errors.values()))), 100 - clean["top1"]
        scores = {
            "robustness/top1": 100 - error,
            "robustness/clean_top1": clean["top1"],
            "robustness/clean_top1_stderr": clean["top1_stderr"],
            "robustness/error": error,
            "robustness/error_beyond_clean": error - clean_error,
        }
        scores |= {f"robustness/{name}": 100 - value for name, value in errors.items()}
        curves = {name: [(0, clean["top1"]), *((row["severity"], row["top1"]) for row in of[name])] for name in names}
        bars = {"mean over severities": [(name, 100 - value) for name, value in errors.items()]}
        plots = (
            Chart(title="Corrupted images", x="severity", y="top-1, %", series=curves),
            Chart(title="By corruption", x="", y="top-1, %", series=bars, kind="bars"),
        )
        severities = ", ".join(map(str, sorted(self.options.severities)))
        levels = "severity" if len(self.options.severities) == 1 else "severities"
        asked = f"{counted(len(names), 'corruption')} of ImageNet-C at {levels} {severities}"
        out = f" (without {' and '.join(LEFT_OUT)})" if names == tuple(CORRUPTIONS) else ""
        return Result(
            scores=scores, headline="robustness/top1", table=table, plots=plots,
            protocol=f"{protocol} {asked}{out}; errors are not divided by AlexNet's.",
        )  # fmt: skip
