"""Options of `seer-scale eval detect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seer_scale.config.fields import opt
from seer_scale.errors import NOTHING, Problem
from seer_scale.evaluate.task import TaskSettings


@dataclass(frozen=True, kw_only=True)
class DetectSettings(TaskSettings):
    """Mask R-CNN as published for COCO; a small set is trained for as many passes."""

    trains_network = True

    data: str = opt("", "a folder laid out as COCO's (annotations/instances_train*.json, train*/, and the same of val),"
                        " or the folder of the images that --annotations names")  # fmt: skip
    annotations: str = opt("", "COCO's JSON of the images to train on; empty = the one in --data")
    test: str = opt("", "folder of the images to test on; empty = the one in --data")
    test_annotations: str = opt("", "COCO's JSON of the images to test on; empty = the one in --data")
    size: int = opt(800, "short side of the images in testing", ge=32)
    max_size: int = opt(0, "longest side of the images; 0 = 5/3 of --size, as 1333 of 800", ge=0)
    train_sizes: tuple[int, ...] = opt(
        (), "short sides in training, one of which is drawn; empty = six from 0.8 of --size to all", ge=32
    )
    batch: int = opt(16, "images an update, over all processes", ge=1)
    schedule: Literal["1x", "2x"] = opt("1x", "passes over the training images: 1x is 12.3, 90,000 updates of COCO")
    iterations: int = opt(0, "updates; 0 = by --schedule", ge=0)
    lr: float = opt(0.02, "learning rate for a batch of 16; it scales with --batch", gt=0)
    warmup: int = opt(1000, "updates over which the rate rises; a tenth of all at most", ge=0)
    weight_decay: float = opt(1e-4, "weight decay, not of BatchNorm", ge=0)
    norm: Literal["frozen", "sync"] = opt(
        "frozen", "BatchNorm of the backbone: frozen, or trained by the statistics of a batch over all processes"
    )
    masks: bool = opt(True, "train and measure masks, where the annotations have them")
    width: int = opt(256, "channels of the feature pyramid and heads, whose hidden layer has four times as many; "
                          "on CPUs 64 is 10 times as fast", ge=8)  # fmt: skip
    regions: int = opt(512, "regions of an image that the heads are trained on; twice as many are tested", ge=8)
    precision: Literal["fp32", "bf16"] = opt("fp32", "of forward and backward, by autocast")

    def problems(self) -> list[Problem]:
        found = []
        if not self.data:
            found.append(Problem("data", NOTHING, "is missing", "give a folder laid out as COCO's"))
        if (self.annotations or self.test) and not self.test_annotations:
            rule = "is missing: COCO's JSON of the images to test on"
            found.append(Problem("test_annotations", NOTHING, rule, "give it, too"))
        if self.max_size and self.max_size < self.size:
            found.append(Problem("max_size", self.max_size, f"must be at least --size, {self.size}", (self.size,)))
        return found

    def without_effect(self) -> dict[str, str]:
        return super().without_effect() | ({"schedule": "with --iterations"} if self.iterations else {})

    @property
    def longest(self) -> int:
        return self.max_size or round(self.size * 1333 / 800)

    @property
    def sides(self) -> tuple[int, ...]:
        """Short sides in training: 640, 672, ..., 800 of 800."""
        return self.train_sizes or tuple(round(self.size * (0.8 + 0.04 * i)) for i in range(6))
