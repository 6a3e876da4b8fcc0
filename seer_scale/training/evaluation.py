"""What a run measures and shows of what it has learned: kNN before, during and after training, and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from seer_scale.config import Config
from seer_scale.data.batch import Batch
from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.evaluate.gallery_pictures import show_crops, show_neighbours, show_prototypes
from seer_scale.evaluate.knn import LabelledImages, Neighbours, knn
from seer_scale.methods.base import Features
from seer_scale.observe.progress import Progress
from seer_scale.observe.records import compare, read_metrics
from seer_scale.observe.run_log import RunLog
from seer_scale.parallel.engine import Engine
from seer_scale.training.checkpointing import BestCheckpoint, Checkpointing
from seer_scale.training.clock import Clock
from seer_scale.training.event_log import LogEvent, disk_may_fill


@dataclass(kw_only=True)
class Evaluation:
    """labelled: the images of kNN; None: there is none. between_batches: called before each batch, by all ranks alike:
    what it raises ends an evaluation, which may outlast the grace of a preemption. workers: loader processes of a rank.
    All ranks call all methods alike.
    """

    config: Config
    world: World
    run_dir: Path
    engine: Engine
    clock: Clock
    labelled: LabelledImages | None
    checkpoints: Checkpointing
    best: BestCheckpoint
    log: RunLog
    log_event: LogEvent
    progress: Progress
    between_batches: Callable[[], None]
    workers: int

    def __post_init__(self) -> None:
        self.measurement = measurement_of(self.labelled, self.config)

    @property
    def is_due(self) -> bool:
        return self.clock.passed_multiple(self.config.knn.every_samples) and not self.clock.at_end

    def measure(self, stage: Literal["before", "during", "after"]) -> None:
        """kNN, if there are labelled images; a checkpoint, if it is the best so far and these are kept."""
        if self.labelled is None:
            return
        with self.progress.spending("evaluation"):
            scores, found, seconds = self._knn(stage, self.labelled)
        self.log.log(
            {
                "samples_seen": self.clock.samples_seen,
                "knn/stage": stage,
                **self.measurement,
                **scores,
                "time/knn_s": seconds,
            }
        )
        if self.best.active and self.clock.samples_seen:
            if self.best.add(self.clock.samples_seen, scores["knn/top1"]):
                self.checkpoints.save_in_step()
            self.best.mark()
        if stage != "during" and self.world.is_main:
            with disk_may_fill(), self.progress.spending("evaluation"):
                show_neighbours(self.run_dir, stage, self.labelled, found)

    def _knn(self, stage: str, labelled: LabelledImages) -> tuple[dict[str, float], Neighbours, float]:
        """Figures, neighbours, and the seconds they took."""
        begin = time.perf_counter()
        queries, bank = len(labelled.query_indices), len(labelled.bank_indices)
        self.log_event(
            "evaluation",
            f"Measuring kNN {stage} training, of {queries:,} images among {bank:,} (knn.enabled false does without).",
        )
        self.engine.average_buffers()
        with self.progress.doing(f"measuring kNN {stage} training", queries + bank):
            scores, found = knn(self._encode, labelled, self.config.knn, workers=self.workers, world=self.world)
        return scores, found, time.perf_counter() - begin

    def finish(self, source: Source) -> None:
        """What follows the last update, as far as no start before has done it."""
        rows, events = read_metrics(self.run_dir) if self.world.is_main else ([], [])
        here = [r for r in [*rows, *events] if r["samples_seen"] >= self.clock.samples_seen]
        done = {r.get("knn/stage") for r in here if compare(r, self.measurement)} | {r.get("event") for r in here}
        done = self.world.broadcast_object(done)
        if "after" not in done:
            self.measure("after")
        if "prototypes" not in done:
            self.show_prototypes(source)

    def show_crops(self, batch: Batch) -> None:
        """What the network sees of the first images."""
        if self.world.is_main:
            with disk_may_fill():
                show_crops(self.run_dir, batch, self.config.views)

    def show_prototypes(self, source: Source) -> None:
        """Pictures of what prototypes collect, from a sample: all images would take as long as an epoch without
        training."""
        knn, num = self.config.knn, min(self.config.run.prototype_images, len(source))
        anchors = self.engine.method.anchors
        if source.is_stream or not num or not anchors:
            return
        begin, prototypes = time.perf_counter(), self.engine.whole(anchors)
        with disk_may_fill(), self.progress.doing("looking for the images nearest to the prototypes", num):
            show_prototypes(  # rank 0 writes after the last collective
                self.run_dir, self._encode, prototypes, source,
                num=num, size=knn.size, batch=knn.batch, workers=self.workers, world=self.world,
            )  # fmt: skip
        self.log_event(
            "prototypes",
            f"The report shows the images nearest to some prototypes, of {num:,} looked at in "
            f"{time.perf_counter() - begin:.0f} s (run.prototype_images; 0 does without).",
        )

    def _encode(self, images: torch.Tensor) -> Features:
        self.between_batches()
        self.progress.advance(len(images) * self.world.size)
        return self.engine.encode(images)


def measurement_of(labelled: LabelledImages | None, config: Config) -> dict[str, str]:
    """What a row of kNN figures says of how they were measured."""
    return {"knn/measurement": labelled.measurement(config.knn)} if labelled else {}
