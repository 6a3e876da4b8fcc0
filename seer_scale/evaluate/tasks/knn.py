"""accuracy of weighted k-nearest-neighbour classification of features

Wu et al., arXiv 1805.01978, section 3.4: several k and temperatures in one pass, exact by blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seer_scale.config import Knn
from seer_scale.config.fields import opt
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.knn import VOTE
from seer_scale.evaluate.nearest import nearest_neighbours, vote
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.task import Result, Task, TaskSettings
from seer_scale.observe.chart import Chart

BESIDE = (10, 20, 50, 100, 200)
"""Values of k that are measured beside the run's."""


@dataclass(frozen=True, kw_only=True)
class KnnSettings(TaskSettings):
    k: tuple[int, ...] = opt(
        (),
        "neighbours that vote; the first stands for the task; none = the run's, and 10, 20, 50, 100, 200 beside",
        ge=1,
    )
    temperature: tuple[float, ...] = opt(
        (),
        "weight of a neighbour is exp(cosine / temperature); the first stands for the task; none = the run's",
        gt=0,
    )
    faiss_from: int = opt(5_000_000, "images of the bank from which Faiss searches, exactly, too; 0 = never", ge=0)


@register_task("knn", KnnSettings)
class NearestNeighbours(Task[KnnSettings]):
    def measure(self, evaluation: Evaluation[KnnSettings]) -> Result:
        options = self.options
        data = evaluation.data_set(roles=VOTE)
        bank, asked = evaluation.features(data.train), evaluation.features(data.test)
        recipe = evaluation.subject.config.knn if evaluation.subject.config else Knn()
        temperatures = options.temperature or (recipe.temperature,)
        asked_k = options.k or (recipe.k, *BESIDE)
        main, *others = (min(k, len(bank.rows)) for k in asked_k)
        ks = sorted({main, *others})
        found = nearest_neighbours(bank.features, asked.features, ks[-1], evaluation, faiss_from=options.faiss_from)
        scores, table = {}, []
        for temperature in temperatures:
            for k in ks:
                row = vote(found, bank.targets, asked.targets, len(data.classes), k, temperature)
                table.append({"k": k, "temperature": temperature, **row})
        best = next(r for r in table if r["k"] == main and r["temperature"] == temperatures[0])
        for name in ("top1", "top1_stderr", "top5", "top5_stderr"):
            scores[f"knn/{name}"] = best[name]
        scores["knn/majority"] = 100 * float((asked.targets == _commonest(asked.targets)).mean())
        scores |= {"knn/queries": len(asked.rows), "knn/classes": len(data.classes)}
        curves = {
            f"temperature {t:g}": [(r["k"], r["top1"]) for r in table if r["temperature"] == t] for t in temperatures
        }
        plot = Chart(title="kNN", x="k", y="top-1, %", series=curves, log_x=True)
        protocol = f"{data.protocol} k is {main}, the temperature {temperatures[0]:g}."
        return Result(scores=scores, headline="knn/top1", protocol=protocol, table=table, plots=(plot,))


def _commonest(targets: np.ndarray) -> int:
    return int(np.bincount(targets).argmax())
