"""What a detector finds, and average precision of it by COCO's own evaluation."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seer_scale.errors import UserError
from seer_scale.evaluate.context import Evaluation, accelerator_of
from seer_scale.evaluate.detection.coco import CocoSet
from seer_scale.evaluate.detection.model import Detector
from seer_scale.evaluate.detection.settings import DetectSettings
from seer_scale.evaluate.detection.training import read_image
from seer_scale.files import to_json, write_whole

SHARD_IMAGES = 64
"""Images whose detections are written together: what a kill can lose, on each rank."""
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first of COCO's twelve figures, in its order."""


class Images(Dataset[Tensor | UserError]):
    """uint8 [3, H, W]; what cannot be read is given as its error."""

    def __init__(self, coco: CocoSet):
        self.coco = coco

    def __getitem__(self, i: int) -> Tensor | UserError:
        try:
            return torch.from_numpy(read_image(self.coco, i).transpose(2, 0, 1).copy())
        except UserError as error:
            return error


def detect_all(
    detector: Detector, coco: CocoSet, categories: Sequence[int], evaluation: Evaluation[DetectSettings], place: Path
) -> list[dict[str, Any]]:
    """Detections of every image, in COCO's form of results, the same on any number of ranks; goes on where a kill left
    off. categories: of classes 1, 2, ... Collective. Raises UserError where an image cannot be read."""
    world, progress = evaluation.world, evaluation.progress
    shards = [
        (place / f"detections-{first:09d}.json", range(first, min(first + SHARD_IMAGES, len(coco))))
        for first in range(0, len(coco), SHARD_IMAGES)
    ]
    done = world.from_main(lambda: [path.is_file() for path, _ in shards])
    todo = [shard for shard, ready in zip(shards, done) if not ready]
    mine = todo[world.rank :: world.size]
    num = sum(len(rows) for _, rows in todo)
    accelerator = accelerator_of(world, "bf16" if evaluation.options.precision == "bf16" else "no")
    with progress.doing("detecting objects", len(coco), done=len(coco) - num), world.together():
        order = [i for _, rows in mine for i in rows]
        loader = iter(DataLoader(Images(coco), batch_size=None, sampler=order, num_workers=evaluation.workers))
        for path, rows in mine:
            found: list[dict[str, Any]] = []
            for i in rows:
                image = next(loader)
                if isinstance(image, UserError):
                    raise image
                with accelerator.autocast():
                    of_image = detector.detect(image.to(world.device))
                found += as_results(of_image, int(coco.ids[i]), categories)
                progress.advance(world.size)
            write_whole(path, to_json(found))
    return [one for path, _ in shards for one in json.loads(path.read_bytes())]


def as_results(found: dict[str, Tensor], image_id: int, categories: Sequence[int]) -> list[dict[str, Any]]:
    """What was found in one image: boxes as [x, y, width, height], masks as compressed run lengths."""
    from pycocotools import mask

    boxes = found["boxes"].float().cpu().numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    masks: list[Any] = [None] * len(boxes)
    if "masks" in found and len(boxes):
        pixels = (found["masks"][:, 0] > 0.5).byte().cpu().numpy().transpose(1, 2, 0)
        masks = mask.encode(np.asfortranarray(pixels))
    results = []
    for box, label, score, runs in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), masks):
        one = {"image_id": image_id, "category_id": categories[label - 1], "bbox": box, "score": score}
        if runs is not None:
            one["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
        results.append(one)
    return results


def ground_truth(coco: CocoSet) -> dict[str, Any]:
    """As pycocotools takes it; annotations are numbered from 1, as it takes number 0 for none."""
    annotations: list[dict[str, Any]] = []
    for i, image_id in enumerate(coco.ids.tolist()):
        for one in coco.annotations(i):
            whole = {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], "segmentation": []} | one
            annotations.append(whole | {"id": len(annotations) + 1, "image_id": image_id})
    sizes = zip(coco.ids.tolist(), coco.sizes.tolist())
    return {
        "images": [{"id": image_id, "height": height, "width": width} for image_id, (height, width) in sizes],
        "annotations": annotations,
        "categories": [{"id": category, "name": name} for category, name in coco.categories.items()],
    }


def evaluator() -> tuple[Any, Any]:
    """The classes COCO and COCOeval: faster-coco-eval's where it is installed, which has the same figures in a sixth of
    the time, else pycocotools'."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval


def average_precision(
    coco: CocoSet, results: list[dict[str, Any]], kind: Literal["box", "mask"]
) -> tuple[dict[str, float], dict[int, float]]:
    """(figures of SUMMARY, AP by category), in percent, by COCO's evaluation; without those that no object counts
    for."""
    COCO, COCOeval = evaluator()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth, found = COCO(), COCO()
        truth.dataset = ground_truth(coco)
        truth.createIndex()
        if results:
            found = truth.loadRes([dict(one) for one in results])
        else:  # loadRes takes no empty list
            found.dataset = truth.dataset | {"annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: 100 * float(value) for name, value in zip(SUMMARY, evaluation.stats) if value >= 0}
    by_category = {}
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [IoUs, recalls, categories], of all areas, 100 an image
    for k, category in enumerate(evaluation.params.catIds):
        of_one = precision[:, :, k]
        if (of_one > -1).any():
            by_category[category] = 100 * float(of_one[of_one > -1].mean())
    return figures, by_category
