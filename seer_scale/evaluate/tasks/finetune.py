"""accuracy, or mean average precision, of the whole network trained on labels

By default as SEER's networks were fine-tuned (arXiv 2103.01988, section 4.1); finetuning.py has the loop. Nothing is
chosen: the figure is that of the last epoch, on images that were not looked at before. The network is kept.
"""

from __future__ import annotations

import dataclasses
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
    begins_with,
    check_processes,
    figures,
    new_classifier,
    told_of_few_updates,
    told_of_statistics,
)
from seer_scale.evaluate.layouts import word_of
from seer_scale.evaluate.metrics import average_precisions, per_class_accuracy
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.splits import DataSet, Split, hold_out
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.task import Result, Task
from seer_scale.files import published, shown
from seer_scale.formatting import counted
from seer_scale.interop.artefact import (
    FINETUNED_KEY,
    HEAD_KEY,
    INITIAL_KEY,
    OWN_FORMAT,
    WEIGHTS,
    About,
    Finetuned,
    Head,
    TensorInfo,
    write_artefact,
)
from seer_scale.interop.card import README, card
from seer_scale.interop.formats import target_of
from seer_scale.interop.weights import open_weights, public_name
from seer_scale.models.classifier import Classifier
from seer_scale.observe.chart import Chart


@register_task("finetune", FinetuneSettings)
class Finetune(Task[FinetuneSettings]):
    keeps_network, takes_recipes = True, True

    def measure(self, evaluation: Evaluation[FinetuneSettings]) -> Result:
        options, subject = self.options, evaluation.subject
        check_processes(options, evaluation)
        data = evaluation.data_set()
        data = dataclasses.replace(data, train=data.train.take(evaluation.readable(data.train)))
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
        stem, how = options.stem(self.name, subject.weights), self._how(split, subject)
        result = Result(
            scores=scores,
            headline="finetune/map" if data.train.multi_label else "finetune/top1",
            protocol=f"{data.protocol} {how}",
            table=_per_class(data, table.features, table.targets),
            plots=_plots(finetuning.done, data.train.multi_label),
            warnings=told_of_few_updates(options, len(split)),
            files=(f"{stem}/{WEIGHTS}", f"{stem}/{README}"),
            more={"epochs": finetuning.done.epochs},
        )
        evaluation.world.barrier()
        if evaluation.world.is_main:
            name = word_of(data.name) or public_name(data.name)
            images = f"{len(data.train):,} images of {shown(name)}, tested on {len(table.rows):,} others"
            scores = {result.headline: result.scores[result.headline], **result.scores}
            made = Finetuned(name, len(data.classes), f"Trained with {images}. {how}", scores, options.of_weights)
            keep_network(evaluation.folder / stem, finetuning.measured, evaluation, made)
        return result

    def _how(self, split: Split, subject: Subject) -> str:
        options = self.options
        statistics = told_of_statistics(options, subject, len(split))
        which = f"the moving average of the weights ({options.ema:g} an update)" if options.ema else "the last weights"
        return (
            f"The whole network was trained on {len(split):,} of these for {counted(options.epochs, 'epoch')} "
            f"{begins_with(subject)}{statistics}; measured are {which}."
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


def keep_network(out: Path, network: Classifier, evaluation: Evaluation[Any], made: Finetuned) -> None:
    """The trained network at the folder `out`, as an artefact with a model card, whose tensors of the head are
    "head/weight" and "head/bias", and whose origin tells of its classes. Replaces what an earlier command left."""
    subject = evaluation.subject
    assert subject.about is not None, "it was opened from a path"
    origin = dict(subject.about.origin)
    if subject.weights == "random":  # nothing of the pretraining is in it
        origin = {key: origin[key] for key in (INITIAL_KEY, "seer_scale") if key in origin}
    head = Head(network.classes, network.multi_label, made.protocol)
    origin |= {
        HEAD_KEY: dataclasses.asdict(head), "dtype": "fp32", "results": [],
        FINETUNED_KEY: [*origin.get(FINETUNED_KEY, []), dataclasses.asdict(made)],
    }  # fmt: skip
    about = About(OWN_FORMAT, subject.about.model, eval_preprocessing(evaluation.size), origin)
    tensors = dict(network.backbone.state_dict())
    tensors |= {f"head/{name}": t for name, t in network.head.state_dict().items()}
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()}
    with published(out, replace=True) as aside:
        aside.mkdir()
        write_artefact(aside, about, infos, lambda name: tensors[name].detach().cpu())
        weights = open_weights(aside)
        name = (subject.run_dir or subject.path).resolve().name
        text = card(f"{name}: {out.name}", weights, weights.about, target_of(OWN_FORMAT, weights))
        (aside / README).write_text(text)
