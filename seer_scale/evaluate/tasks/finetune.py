"""accuracy, or mean average precision, of the whole network trained on labels

By default as SEER's networks were fine-tuned (arXiv 2103.01988, section 4.1); finetuning.py has the loop. Nothing is
chosen: the figure is that of the last epoch, on images that were not looked at before. The network is kept.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.errors import NOTHING, DataError, Problem
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.finetuning import (
    Done,
    FinetuneSettings,
    Finetuning,
    check_processes,
    figures,
    new_classifier,
)
from seer_scale.evaluate.metrics import average_precisions, per_class_accuracy
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.splits import DataSet, Split, hold_out
from seer_scale.evaluate.task import Result, Task
from seer_scale.files import published
from seer_scale.formatting import counted
from seer_scale.interop.artefact import HEAD_KEY, OWN_FORMAT, WEIGHTS, About, Head, TensorInfo, write_artefact
from seer_scale.models.classifier import Classifier
from seer_scale.observe.chart import Chart

MIN_UPDATES = 100
"""Below so many a figure tells more of how few they were than of the weights they began with."""


@register_task("finetune", FinetuneSettings)
class Finetune(Task[FinetuneSettings]):
    def measure(self, evaluation: Evaluation[FinetuneSettings]) -> Result:
        options, subject = self.options, evaluation.subject
        check_processes(options, evaluation)
        data = evaluation.data_set()
        split, held = _parts(data.train, options)
        place = evaluation.work("train", split.mark, held.mark, evaluation.size, options.of_weights)
        finetuning = Finetuning(new_classifier(evaluation, data), split, held, options, evaluation, place)
        finetuning.train()
        table = evaluation.features(data.test, "test images", encode=finetuning.scores, mark=place.name)
        scores = {f"finetune/{k}": v for k, v in figures(table.features, table.targets).items()}
        scores |= {
            "finetune/train_loss": finetuning.done.epochs[-1]["train_loss"],
            "finetune/images": len(table.rows),
            "finetune/train_images": len(split),
            "finetune/classes": len(data.classes),
        }
        stem = options.stem(self.name, subject.weights)
        result = Result(
            scores=scores,
            headline="finetune/map" if data.train.multi_label else "finetune/top1",
            protocol=f"{data.protocol} {self._how(split, subject.weights)}",
            table=_per_class(data, table.features, table.targets),
            plots=_plots(finetuning.done, data.train.multi_label),
            warnings=self._warnings(len(split)),
            files=(f"{stem}/{WEIGHTS}",),
            more={"epochs": finetuning.done.epochs},
        )
        evaluation.world.barrier()
        if evaluation.world.is_main:
            keep_network(evaluation.folder / stem, finetuning.measured, evaluation, result)
        return result

    def _warnings(self, num: int) -> tuple[str, ...]:
        """Of `num` images to train on."""
        options = self.options
        updates, epochs = options.updates(options.epochs, num), math.ceil(MIN_UPDATES * options.global_batch / num)
        if updates >= MIN_UPDATES:
            return ()
        return (
            f"{counted(updates, 'update')} can hardly train a network: give a smaller --global-batch, or more --epochs "
            f"({epochs:,} make {MIN_UPDATES} updates of {options.global_batch} images).",
        )

    def _how(self, split: Split, weights: str) -> str:
        options = self.options
        begin = "from untrained weights" if weights == "random" else "from the pretrained weights"
        several = f" of {len(split):,} images" if options.part > len(split) else ""
        statistics = (
            f"statistics of {options.part:,} crops{several}"
            if options.statistics == "synchronised"
            else "statistics as they were"
        )
        which = f"the moving average of the weights ({options.ema:g} an update)" if options.ema else "the last weights"
        return (
            f"The whole network was trained on {len(split):,} of these for {counted(options.epochs, 'epoch')} {begin}, "
            f"BatchNorm by {statistics}; measured are {which}."
        )


def _parts(train: Split, options: FinetuneSettings) -> tuple[Split, Split]:
    """(what is trained on, what is held out). Raises DataError."""
    if len(train.classes) < 2:
        raise DataError(Problem("--data", NOTHING, "has one class only, and nothing to tell apart", "give two or more"))
    if not options.held_out:
        return train, train.take(np.empty(0, np.int64))
    rows, held = hold_out(train.targets, len(train.classes), options.held_out, options.seed)
    return train.take(rows), train.take(held)


def _per_class(data: DataSet, scores: Tensor, targets: np.ndarray) -> list[dict[str, Any]]:
    if data.train.multi_label:
        num, name, found = (targets == 1).sum(0), "average_precision", average_precisions(scores, targets)
    else:
        num, found = np.bincount(targets, minlength=len(data.classes)), per_class_accuracy(scores, targets)
        name = "accuracy"
    rows = zip(data.classes, num.tolist(), found.tolist(), strict=True)
    return [{"class": label, "images": n, name: figure} for label, n, figure in rows]


def _plots(done: Done, multi_label: bool) -> tuple[Chart, ...]:
    loss = {"training loss": [(row["epoch"], row["train_loss"]) for row in done.epochs]}
    plots = [Chart(title="Fine-tuning", x="epoch", y="loss of the training images", series=loss)]
    keys = ("held_out_map",) if multi_label else ("held_out_top1", "held_out_top5")
    curves = {key: [(row["epoch"], row[key]) for row in done.epochs] for key in keys if key in done.epochs[-1]}
    if curves:
        plots.append(Chart(title="Fine-tuning", x="epoch", y="of the held-out images, %", series=curves))
    return tuple(plots)


def keep_network(out: Path, network: Classifier, evaluation: Evaluation[Any], result: Result) -> None:
    """The trained network at the folder `out`, as an artefact whose tensors of the head are "head/weight" and
    "head/bias", and whose origin tells of its classes. Replaces what an earlier command left."""
    subject = evaluation.subject
    assert subject.about is not None, "it was opened from a path"
    head = Head(network.classes, network.multi_label, result.protocol)
    results = [{"task": "finetune", "samples_seen": subject.samples_seen or 0, "scores": dict(result.scores)}]
    origin = {**subject.about.origin, HEAD_KEY: dataclasses.asdict(head), "results": results}
    about = About(OWN_FORMAT, subject.about.model, eval_preprocessing(evaluation.size), origin)
    tensors = dict(network.backbone.state_dict())
    tensors |= {f"head/{name}": t for name, t in network.head.state_dict().items()}
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()}
    with published(out, replace=True) as aside:
        aside.mkdir()
        write_artefact(aside, about, infos, lambda name: tensors[name].detach().cpu())
