"""What a run measures and shows of what it has learned, before, during and after training: kNN, the health of its
features, and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from seer_scale.config import Config
from seer_scale.data.batch import Batch
from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.evaluate.feature_health import HealthImages, feature_health
from seer_scale.evaluate.features import gather_features
from seer_scale.evaluate.gallery_pictures import (
    MIN_PATCHES,
    images_to_reconstruct,
    show_crops,
    show_neighbours,
    show_patches,
    show_prototypes,
    show_reconstructions,
)
from seer_scale.evaluate.knn import LabelledImages, Neighbours, knn
from seer_scale.evaluate.statistics import MAX_IMAGES, statistics_of_images
from seer_scale.formatting import counted, untrained_with
from seer_scale.methods.base import Features, PatchFeatures, Reconstructions
from seer_scale.observe.progress import Progress
from seer_scale.observe.records import compare, read_metrics
from seer_scale.observe.run_log import RunLog
from seer_scale.parallel.engine import Engine
from seer_scale.training.checkpointing import BestCheckpoint, Checkpointing
from seer_scale.training.clock import Clock
from seer_scale.training.event_log import LogEvent, disk_may_fill
from seer_scale.training.monitors import Monitors
from seer_scale.training.probe import Probe, moments


@dataclass(kw_only=True)
class Evaluation:
    """labelled: the images of kNN, health: those whose features are looked at; None: there are none. begins_anew:
    whether the run's weights were drawn, and are no other run's. between_batches: called before each batch, by all
    ranks alike: what it raises ends an evaluation, which may outlast the grace of a preemption. workers: loader
    processes of a rank. patch_side: in pixels, of the patches to be shown; 0: none are. All ranks call all methods
    alike.
    """

    config: Config
    world: World
    run_dir: Path
    engine: Engine
    clock: Clock
    labelled: LabelledImages | None
    health: HealthImages | None
    begins_anew: bool
    probe: Probe | None
    patch_side: int
    monitors: Monitors
    checkpoints: Checkpointing
    best: BestCheckpoint
    log: RunLog
    log_event: LogEvent
    progress: Progress
    between_batches: Callable[[], None]
    workers: int

    def __post_init__(self) -> None:
        self.measurement = measurement_of(self.config, self.labelled, self.health)

    @property
    def is_due(self) -> bool:
        return self.clock.passed_multiple(self.config.knn.every_samples) and not self.clock.at_end

    def measure(self, stage: Literal["before", "during", "after"]) -> None:
        """kNN, if there are labelled images, and the health of features; a checkpoint, if it is the best so far and
        these are kept."""
        if self.labelled is None and self.health is None:
            return
        begin = time.perf_counter()
        with self.progress.spending("evaluation"), self._statistics(stage) as images:
            figures, found = self._measure(stage, images)
        row: dict[str, Any] = {"samples_seen": self.clock.samples_seen, "evaluation/stage": stage, **self.measurement}
        row |= {"evaluation/statistics_images": images} if images else {}
        row |= figures | {"time/evaluation_s": time.perf_counter() - begin}
        self.log.log(row)
        self.monitors.check_evaluation(row)
        if self.labelled is None:
            return
        if self.best.active and self.clock.samples_seen:
            if self.best.add(self.clock.samples_seen, figures["knn/top1"]):
                self.checkpoints.save_in_step()
            self.best.mark()
        if stage != "during" and found and self.world.is_main:
            with disk_may_fill(), self.progress.spending("evaluation"):
                show_neighbours(self.run_dir, stage, self.labelled, found)

    @contextmanager
    def _statistics(self, stage: str) -> Iterator[int]:
        """Within, weights that nothing was trained of have BatchNorm statistics of some images, of how many is given;
        after it those that training begins with."""
        if stage != "before" or not self.begins_anew:
            yield 0
            return
        buffers = self.engine.buffers
        if self.labelled:
            source, indices = self.labelled.bank, self.labelled.bank_indices
        else:
            assert self.health is not None, "else there is nothing to measure"
            source, indices = self.health.source, self.health.indices
        buffers.keep()
        with buffers.unmoved():
            with self.progress.doing("taking BatchNorm statistics of images", min(len(indices), MAX_IMAGES)):
                images = statistics_of_images(
                    self.engine.method, self._encode, source, indices,
                    size=self.config.knn.size, workers=self.workers, world=self.world,
                )  # fmt: skip
            yield images

    def _measure(self, stage: str, statistics_images: int) -> tuple[dict[str, float], Neighbours | None]:
        """Figures, and the neighbours of kNN. The features of an image are made once: kNN's queries are looked at by
        both; of some a second view is encoded."""
        labelled, health, config = self.labelled, self.health, self.config.knn
        if labelled:
            source, indices, num_bank = labelled.queries, labelled.query_indices, len(labelled.bank_indices)
            of = f"kNN {stage} training, of {len(indices):,} images among {num_bank:,} (knn.enabled false does without)"
        else:
            assert health is not None, "else there is nothing to measure"
            source, indices, num_bank = health.source, health.indices, 0
            of = f"features {stage} training, of {counted(len(indices), 'image')} (health.images 0 does without)"
        self.log_event("evaluation", f"Measuring {of}. {untrained_with(statistics_images)}".rstrip())
        self.engine.average_buffers()
        how: dict[str, Any] = dict(workers=self.workers, world=self.world)
        num_pairs = len(health.pairs) if health else 0
        ordered = health.pairs_first(indices) if health else indices
        figures: dict[str, float] = {}
        found = None
        with self.progress.doing(f"measuring {stage} training", len(indices) + num_bank + num_pairs):
            table = gather_features(
                self._encode, source, ordered, num_pairs=num_pairs, size=config.size, batch=config.batch, **how
            )
            if health:
                figures |= feature_health(table, health)
            if labelled:
                bank: list[Tensor] = []
                see_bank = (lambda features: bank.append(moments(features))) if self.probe else None
                scores, found = knn(self._encode, labelled, config, queries=table, see_bank=see_bank, **how)
                figures |= scores | (self.probe.measure(table, bank) if self.probe else {})
        return figures, found

    def finish(self, source: Source) -> None:
        """What follows the last update, as far as no start before has done it."""
        rows, events = read_metrics(self.run_dir) if self.world.is_main else ([], [])
        here = [r for r in [*rows, *events] if r["samples_seen"] >= self.clock.samples_seen]
        done = {r.get("evaluation/stage") for r in here if compare(r, self.measurement)} | {
            r.get("event") for r in here
        }
        done = self.world.broadcast_object(done)
        if "after" not in done:
            self.measure("after")
        if "prototypes" not in done:
            self.show_prototypes(source)
        if "patches" not in done:
            self.show_patches(source)
        if "reconstructions" not in done:
            self.show_reconstructions(source)

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

    def show_patches(self, source: Source) -> None:
        """Pictures of what the patches of a few images hold, and of what a vision transformer attends to."""
        knn, num = self.config.knn, min(self.config.run.patch_images, len(source))
        if source.is_stream or not num or not self.patch_side or -(-knn.size // self.patch_side) < MIN_PATCHES:
            return
        with disk_may_fill(), self.progress.doing("looking at the patches of images", num):
            show_patches(
                self.run_dir, self._encode_patches, source,
                num=num, size=knn.size, batch=knn.batch, workers=self.workers, world=self.world,
            )  # fmt: skip
        of = counted(num, "image")
        self.log_event("patches", f"The report shows the patches of {of} (run.patch_images; 0 does without).")

    def show_reconstructions(self, source: Source) -> None:
        """Pictures of what a method makes of what it does not see: of images trained on, and of others."""
        size, config = self.engine.method.reconstruction_size, self.config
        if source.is_stream or not size or not config.run.patch_images:
            return
        shown = images_to_reconstruct(config, source, self.labelled)
        num = sum(len(images.indices) for images in shown)
        with disk_may_fill(), self.progress.doing("reconstructing images", num):
            show_reconstructions(
                self.run_dir, self._reconstruct, shown,
                size=size, batch=config.knn.batch, workers=self.workers, world=self.world,
            )  # fmt: skip
        own, *others = (len(images.indices) for images in shown)
        of_others = f"{sum(others):,} others" if others else "no others, as knn.queries or data.max_images would leave"
        of = f"{counted(own, 'image')} trained on and {of_others}"
        text = f"The report shows reconstructions of {of} (run.patch_images; 0 does without)."
        self.log_event("reconstructions", text)

    def _encode(self, images: torch.Tensor) -> Features:
        self._before_batch(images)
        return self.engine.encode(images)

    def _encode_patches(self, images: torch.Tensor) -> PatchFeatures:
        self._before_batch(images)
        return self.engine.encode_patches(images)

    def _reconstruct(self, images: torch.Tensor, numbers: list[int]) -> Reconstructions:
        self._before_batch(images)
        return self.engine.reconstruct(images, numbers)

    def _before_batch(self, images: torch.Tensor) -> None:
        self.between_batches()
        self.progress.advance(len(images) * self.world.size)


def measurement_of(config: Config, labelled: LabelledImages | None, health: HealthImages | None) -> dict[str, str]:
    """What a row of an evaluation says of how its figures were measured."""
    measurement = {"knn/measurement": labelled.measurement(config.knn)} if labelled else {}
    return measurement | ({"health/measurement": health.measurement(config.knn.size)} if health else {})
