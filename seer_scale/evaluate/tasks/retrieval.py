"""precision and recall of nearest-neighbour retrieval by features

Of labelled images: recall at k, R-precision and mAP at R (Musgrave et al., arXiv 2003.08505), in the train part, or
each image of the test part among the others. Of roxford5k and rparis6k: the revisited protocol (revisited.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from seer_scale.config.fields import opt
from seer_scale.data.transforms.on_device import to_float
from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.knn import named_classes
from seer_scale.evaluate.layouts import named_folder
from seer_scale.evaluate.metrics import mean_of
from seer_scale.evaluate.nearest import nearest_neighbours
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.revisited import REVISITED, SETUPS, open_revisited, revisited_scores, whole_images
from seer_scale.evaluate.splits import Split
from seer_scale.evaluate.table import Table
from seer_scale.evaluate.task import Result, Task, TaskSettings
from seer_scale.files import shown
from seer_scale.formatting import counted
from seer_scale.observe.chart import Chart

REVISITED_KS = (1, 5, 10)
GEM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(TaskSettings):
    gallery: Literal["train", "test"] = opt(
        "train", "where images of the test part are looked for: in the train part, or among the others of the test part"
    )
    k: tuple[int, ...] = opt((1, 2, 4, 8), "recall at these ranks", ge=1)
    pool: Literal["backbone", "gem"] = opt(
        "backbone", "the backbone's own features, or the generalised mean of its maps"
    )
    gem_p: float = opt(3.0, "power of the generalised mean", gt=0)
    scales: tuple[float, ...] = opt(
        (1.0,), "sizes of the image, as shares, whose features of unit length are added", gt=0
    )
    side: int = opt(1024, "of roxford5k and rparis6k: long side of whole images in pixels", ge=32)

    def without_effect(self) -> dict[str, str]:
        revisited = self.data.partition(":")[0] in REVISITED
        found = super().without_effect() | ({} if self.pool == "gem" else {"gem_p": "without --pool gem"})
        if not revisited:
            return found | {"side": "without --data roxford5k or rparis6k"}
        return found | dict.fromkeys(("gallery", "k"), "with images of a revisited set, taken whole")


@register_task("retrieval", RetrievalSettings)
class Retrieval(Task[RetrievalSettings]):
    def measure(self, evaluation: Evaluation[RetrievalSettings]) -> Result:
        word, root = named_folder(self.options.data, REVISITED)
        if self.options.pool == "gem" and not evaluation.subject.model.stage_maps():
            rule = "this backbone has no feature maps to pool"
            raise UserError(Problem("--pool", "gem", rule, ("backbone",)))
        if root is None:
            return self._labelled(evaluation)
        data = evaluation.data_set(partial(open_revisited, word, root))
        bank, asked = self._whole(evaluation, data.train), self._whole(evaluation, data.test)
        similarity, rows = nearest_neighbours(bank.features, asked.features, len(bank.rows), evaluation)
        return self._revisited(rows.numpy(), data.more["gnd"], data.protocol)

    # ------------------------------------------------------------------------------------------------ features

    def describe(self, evaluation: Evaluation[RetrievalSettings], images: Tensor) -> Tensor:
        """Normalised images [n, 3, H, W] -> [n, D]; of several scales the sum of unit vectors."""
        model, total = evaluation.subject.model, torch.zeros(())
        for scale in self.options.scales:
            sized = images if scale == 1 else interpolate(images, scale_factor=scale, mode="bilinear")
            if self.options.pool == "gem":
                maps = model.forward_stages([sized])[-1][0].float()
                p = self.options.gem_p
                found = maps.clamp(min=GEM_EPS).pow(p).mean((2, 3)).pow(1 / p)
            else:
                found = evaluation.subject.encode(sized)
            if len(self.options.scales) == 1:
                return found
            total = total.to(found.device) + normalize(found, dim=1)
        return total

    @property
    def mark(self) -> str:
        options = self.options
        plain = options.pool == "backbone" and options.scales == (1.0,)
        return "" if plain else f"{options.pool} {options.gem_p} {options.scales}"

    def _features(self, evaluation: Evaluation[RetrievalSettings], split: Split) -> Table:
        return evaluation.features(split, encode=partial(self.describe, evaluation), mark=self.mark)

    def _whole(self, evaluation: Evaluation[RetrievalSettings], split: Split) -> Table:
        """Of all images: the published figure counts each."""

        def encode(pixels: Tensor, _: np.ndarray) -> Tensor:
            return self.describe(evaluation, to_float(pixels))

        stream = partial(
            whole_images, encode, split.source, side=self.options.side, workers=evaluation.workers,
            device=evaluation.device,
        )  # fmt: skip
        return evaluation.features(split, stream=stream, mark=f"whole {split.name} {self.options.side} {self.mark}")

    # ------------------------------------------------------------------------------------------------ figures

    def _labelled(self, evaluation: Evaluation[RetrievalSettings]) -> Result:
        data = evaluation.data_set()
        if data.train.multi_label:
            raise DataError(Problem("--data", data.name, "has several labels an image, and retrieval needs one"))
        is_self = self.options.gallery == "test"
        asked = self._features(evaluation, data.test)
        bank = asked if is_self else self._features(evaluation, data.train)
        relevant = np.bincount(bank.targets, minlength=len(data.classes))[asked.targets] - is_self
        if not relevant.any():
            rule = "has no image whose class another one has, so there is nothing to find"
            raise DataError(Problem(data.name, NOTHING, rule, "give more images a class"))
        depth = min(len(bank.rows), max(int(relevant.max()), *self.options.k) + is_self)
        _, rows = nearest_neighbours(bank.features, asked.features, depth, evaluation)
        found = without_itself(rows.numpy()) if is_self else rows.numpy()
        hits = bank.targets[found] == asked.targets[:, None]
        counted_in = relevant > 0
        scores, table = retrieval_scores(hits[counted_in], relevant[counted_in], self.options.k)
        scores |= {"retrieval/queries": int(counted_in.sum()), "retrieval/gallery": len(bank.rows) - is_self}
        lost = int((~counted_in).sum())
        where = f"{len(asked.rows):,} images of {data.test.name}"
        where += " among the others" if is_self else f" in {len(bank.rows):,} of {data.train.name}"
        none = f"; {counted(lost, 'image')} with nothing to find left out" if lost else ""
        curve = [(row["k"], row["recall"]) for row in table]
        plot = Chart(title="Retrieval", x="k", y="recall at k, %", series={"recall": curve}, log_x=True)
        protocol = f"Retrieval by cosine of {where}, {shown(data.name)}; {named_classes(data.classes)}{none}."
        protocol += f" {evaluation.at_size}{data.without_images}"
        return Result(scores=scores, headline="retrieval/map_at_r", protocol=protocol, table=table, plots=(plot,))

    def _revisited(self, ranked: np.ndarray, gnd: list[dict[str, list[int]]], protocol: str) -> Result:
        names = ("map", *(f"mp@{k}" for k in REVISITED_KS))
        scores: dict[str, float] = {}
        table: list[dict[str, Any]] = []
        for setup in SETUPS:
            aps, precisions = revisited_scores(ranked, gnd, setup, REVISITED_KS)
            row: dict[str, Any] = {"setup": setup, "map": 100 * mean_of(aps), "queries": int((~np.isnan(aps)).sum())}
            row |= {f"mp@{k}": 100 * mean_of(column) for k, column in zip(REVISITED_KS, precisions.T)}
            table.append(row)
            scores |= {f"retrieval/{setup}_{name}": row[name] for name in names}
        bars = {row["setup"]: [(name, row[name]) for name in names] for row in table}
        plot = Chart(title="Retrieval, revisited", x="", y="%", series=bars, kind="bars")
        protocol += f" Whole images, long side {self.options.side}, scales {', '.join(map(str, self.options.scales))}."
        return Result(scores=scores, headline="retrieval/medium_map", protocol=protocol, table=table, plots=(plot,))


def without_itself(rows: np.ndarray) -> np.ndarray:
    """Neighbours int64 [Q, k + 1] of images among themselves -> [Q, k] without each one's own number; of one that
    so many equal ones stand before that it is not there, without the last."""
    is_own = rows == np.arange(len(rows))[:, None]
    is_own[~is_own.any(1), -1] = True
    return rows[~is_own].reshape(len(rows), -1)


def retrieval_scores(
    hits: np.ndarray, relevant: np.ndarray, ks: tuple[int, ...]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """In percent with standard errors, of neighbours' hits bool [Q, n], nearest first, and how many each query could
    have, int [Q], at most n and at least 1."""
    depth = np.arange(1, hits.shape[1] + 1)
    within = depth <= relevant[:, None]
    precision = np.cumsum(hits, 1) / depth
    figures = {
        "map_at_r": (precision * (hits & within)).sum(1) / relevant,
        "r_precision": (hits & within).sum(1) / relevant,
    }
    table = []
    for k in sorted({min(k, hits.shape[1]) for k in ks}):
        figures[f"recall@{k}"] = hits[:, :k].any(1).astype(float)
        table.append({"k": k, "recall": 100 * figures[f"recall@{k}"].mean()})
    scores = {}
    for name, of_query in figures.items():
        scores[f"retrieval/{name}"] = 100 * float(of_query.mean())
        scores[f"retrieval/{name}_stderr"] = 100 * float(of_query.std()) / math.sqrt(len(of_query))
    return scores, table
