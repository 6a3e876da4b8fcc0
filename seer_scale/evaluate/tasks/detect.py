"""average precision of objects found, boxes and masks, by a Mask R-CNN on the backbone

COCO's format and evaluation; trained by the published schedule, under accelerate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.detection.coco import CocoSet, find_pair, read_coco
from seer_scale.evaluate.detection.settings import DetectSettings
from seer_scale.evaluate.layouts import named_folder
from seer_scale.evaluate.registry import register_task
from seer_scale.evaluate.task import Result, Task
from seer_scale.extras import how_to_install
from seer_scale.formatting import counted
from seer_scale.observe.chart import Chart

MAX_BARS = 20
"""Classes that the plot shows: those with most objects."""


@register_task("detect", DetectSettings)
class Detect(Task[DetectSettings]):
    trains_backbone = True

    def measure(self, evaluation: Evaluation[DetectSettings]) -> Result:
        try:
            import pycocotools  # noqa: F401  # only whether it is there
            import torchvision  # noqa: F401
        except ImportError as error:
            rule = "is not installed, and detection needs it"
            raise UserError(Problem(str(error.name), NOTHING, rule, how_to_install(str(error.name)))) from error
        from seer_scale.evaluate.detection.model import Detector, levels_of
        from seer_scale.evaluate.detection.precision import average_precision, detect_all
        from seer_scale.evaluate.detection.training import Examples, iterations_of, train

        options, world, subject = self.options, evaluation.world, evaluation.subject
        if options.batch % world.size:
            near = -(-options.batch // world.size) * world.size
            rule = f"it must be shared out evenly among {counted(world.size, 'process')}"
            raise UserError(Problem("--batch", options.batch, rule, (near,)))
        levels = levels_of(subject.model, str(subject.path))
        with evaluation.progress.doing("reading annotations"):
            made: Callable[[], tuple[CocoSet, CocoSet]] = lambda: open_sets(options)  # noqa: E731
            trained, tested = evaluation.listed(made)
        masks = options.masks and trained.has_masks and tested.has_masks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            group = world.group("statistics", world.size)
            detector = Detector(subject.model, levels, len(trained.categories), options, masks=masks, group=group)
        where_from = {"data", "test", "annotations", "test_annotations", "workers", "name"}
        kept = {name: value for name, value in dataclasses.asdict(options).items() if name not in where_from}
        place = evaluation.work(sorted(kept.items()), trained.mark, tested.mark)
        losses = train(detector.to(world.device), Examples(trained, options, masks=masks), evaluation, place)
        results = detect_all(detector, tested, list(trained.categories), evaluation, place)

        kinds: tuple[Literal["box", "mask"], ...] = ("box", "mask") if masks else ("box",)
        with evaluation.progress.doing("measuring average precision"):
            measured = world.from_main(lambda: {kind: average_precision(tested, results, kind) for kind in kinds})
        scores = {f"detect/{kind}_{n}": v for kind, (figures, _) in measured.items() for n, v in figures.items()}
        table = by_class(tested, {kind: of for kind, (_, of) in measured.items()})
        shown = sorted(table, key=lambda row: -row["objects"])[:MAX_BARS]
        bars = {f"{kind} AP": [(row["name"], row[f"{kind}_ap"]) for row in shown] for kind in kinds}
        curve = [(row["iteration"], row["loss"]) for row in losses]
        num = int((trained.usable > 0).sum())
        total = iterations_of(options, num)
        of = f" with statistics of {counted(n, 'image')}" if (n := subject.statistics_images) else ""
        return Result(
            scores=scores | {"detect/images": len(tested), "detect/objects": int(tested.usable.sum())},
            headline="detect/box_ap",
            protocol=f"{'Mask' if masks else 'Faster'} R-CNN with a feature pyramid on the backbone, "
            f"{options.norm} BatchNorm{of}: {counted(total, 'update')} of {counted(options.batch, 'image')} out of "
            f"{num:,} with objects, short side {options.size} pixels. {told_of(trained)}",
            table=table,
            plots=(
                Chart(title="Detection by class", x="", y="AP, %", series=bars, kind="bars"),
                Chart(title="Training the detector", x="updates", y="loss", series={"loss": curve}),
            ),
            more={"losses": losses},
        )


def open_sets(options: DetectSettings) -> tuple[CocoSet, CocoSet]:
    """Those to train and to test on. Raises DataError."""
    data = named_folder(options.data, ("coco",))[1] or Path(options.data)
    of_train = (Path(options.annotations), data) if options.annotations else find_pair(data, "train")
    of_test = (
        find_pair(data, "val")
        if not options.test_annotations
        else (Path(options.test_annotations), Path(options.test or data))
    )
    trained, tested = read_coco(*of_train), read_coco(*of_test)
    if strange := [name for i, name in tested.categories.items() if trained.categories.get(i) != name]:
        rule = f"has {counted(len(strange), 'class')} that {trained.path} has not by id and name, such as {strange[0]}"
        raise DataError(Problem(tested.path, NOTHING, rule, "give both of one set of classes"))
    return trained, tested


def by_class(tested: CocoSet, measured: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """A row for each class that has objects in the test images."""
    num: dict[int, int] = {}
    for i in range(len(tested)):
        for one in tested.annotations(i):
            num[one["category_id"]] = num.get(one["category_id"], 0) + (not one.get("iscrowd"))
    return [
        {"name": name, "objects": num[i]} | {f"{kind}_ap": of[i] for kind, of in measured.items()}
        for i, name in tested.categories.items()
        if all(i in of for of in measured.values())
    ]


def told_of(coco: CocoSet) -> str:
    """What of the annotations was not trained on as it is."""
    words = {"crowds": "are crowds", "without_area": "have no area", "clipped": "were cut off at the edge"}
    parts = [f"{coco.counts[key]:,} {clause}" for key, clause in words.items() if coco.counts[key]]
    without = int((coco.usable == 0).sum())
    parts += [f"{without:,} images have none"] * bool(without)
    return f"Of the objects to train on {', '.join(parts)}." if parts else "All objects are trained on as they are."
