"""When a run saves, what is told of a save, and which checkpoint is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seer_scale import __version__
from seer_scale.checkpoint import store
from seer_scale.checkpoint.saver import Saved, Saver
from seer_scale.config import Config
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.distributed import World
from seer_scale.errors import Problem, TrainingError
from seer_scale.observe.progress import Progress
from seer_scale.observe.records import compare, read_metrics
from seer_scale.parallel.engine import Engine
from seer_scale.timeouts import Timeouts
from seer_scale.training.clock import Clock
from seer_scale.training.event_log import LogEvent, disk_may_fill
from seer_scale.training.watchdog import Watchdog


class BestCheckpoint:
    """kNN top-1 by samples_seen, and the link checkpoints/best to the checkpoint with the highest. active: whether
    checkpoint.keep_best asks for it."""

    def __init__(self, folder: Path, world: World, log_event: LogEvent, scores: dict[int, float], *, active: bool):
        self.scores, self.active = scores, active
        self._folder, self._world, self._log_event = folder, world, log_event

    def add(self, samples_seen: int, top1: float) -> bool:
        """Whether it is the highest so far, as rank 0 says: sums on GPUs differ in their last digits. Collective."""
        best = max(self.scores.values(), default=-math.inf)
        self.scores[samples_seen] = top1
        return self._world.broadcast_object(top1 > best)

    def mark(self) -> None:
        """Let the link lead to the best of the checkpoints there are."""
        if self._world.is_main and self.active:
            with disk_may_fill():
                if name := store.mark_best(self._folder, self.scores):
                    top1 = self.scores[store.samples_of(name)]
                    self._log_event(
                        "best", f"The best kNN top-1 so far, {top1:.1f} %, is that of {name}, kept as checkpoints/best."
                    )


def known_scores(
    run_dir: Path, folder: Path, measurement: dict[str, str], samples_seen: int, world: World, *, active: bool
) -> dict[int, float]:
    """kNN top-1 of the checkpoints there are, up to samples_seen; of figures that compare with those to come.
    Collective. measurement: what those say of how they are measured."""
    scores: dict[int, float] = {}
    if world.is_main and active:
        rows = [r for r in read_metrics(run_dir)[0] if "knn/top1" in r and compare(r, measurement)]
        known = {r["samples_seen"]: r["knn/top1"] for r in rows}
        scores = {s: known[s] for s in store.published(folder) if s in known and s <= samples_seen}
    return world.broadcast_object(scores)


@dataclass(kw_only=True)
class Checkpointing:
    """The checkpoints of a run, one in flight at most.

    state: the tensors of a checkpoint, by reference. state_of_run: what its meta has beside what the engine and the
    clock say. resumed_from: the checkpoint in this folder that holds the state as it is. All ranks call `save` alike.
    """

    config: Config
    world: World
    engine: Engine
    state: Callable[[], store.State]
    saver: Saver
    clock: Clock
    best: BestCheckpoint
    state_of_run: Callable[[], dict[str, Any]]
    log_event: LogEvent
    watchdog: Watchdog
    progress: Progress
    resumed_from: Path | None = None

    def __post_init__(self) -> None:
        self._newest = (self.clock.samples_seen, self.resumed_from) if self.resumed_from else None
        self._stall_s = 0.0

    @property
    def newest(self) -> Path | None:
        """The newest one of this start, or the one that it went on from, with the data of now."""
        return self._newest[1] if self._newest else None

    @property
    def is_due(self) -> bool:
        return self.clock.passed_multiple(self.config.checkpoint.every_samples)

    def save(self, *, in_background: bool = False) -> Path | None:
        """A checkpoint of this moment, after the one before is safe; its path, or None where none is there (yet).

        A failure is told in the log. Raises TrainingError for weights that are not finite: they must not take the
        place of good ones.
        """
        with self.progress.spending("stall"):
            return self._save(in_background=in_background)

    def _save(self, *, in_background: bool) -> Path | None:
        begin = time.perf_counter()
        with self._waiting("waiting for the checkpoint before"):
            self._report(self.saver.wait())
        if not self._is_saved():
            if not self.engine.is_finite():
                raise TrainingError(
                    Problem(
                        "optim.lr",
                        self.config.optim.lr,
                        "weights or running statistics are not finite any more, so they are not saved",
                        "lower it or lengthen schedule.warmup_samples, and start again from the newest checkpoint",
                    )
                )
            self.engine.average_buffers()
            self.saver.begin(self.state(), self._meta())
            self._stall_s = time.perf_counter() - begin
            if in_background:
                return None
            with self._waiting("saving a checkpoint"):
                saved = self.saver.wait()
            self._report(saved)
        return self.newest if self._is_saved() else None

    def save_in_step(self) -> None:
        """As training goes on: in the background, where checkpoint.background says so."""
        self.save(in_background=self.config.checkpoint.background)

    def report_ended(self) -> None:
        """Tell how a save in the background has ended, once it has; without waiting."""
        self._report(self.saver.ended())

    def forget_newest(self) -> None:
        """The state has changed without an update: the next save is one."""
        self._newest = None

    def _meta(self) -> dict[str, Any]:
        method = self.engine.method
        return {
            "samples_seen": self.clock.samples_seen,
            "step": self.clock.step,
            "method": {"name": method.name, "state": method.state()},
            "export": {"prefix": method.export_prefix},
            "preprocessing": eval_preprocessing(self.config.knn.size)
            | {"training_sizes": [crop.size for crop in self.config.views.crops]},
            "config": self.config.to_dict(),
            "world_size": self.world.size,
            "engine": self.engine.name,
            "seer_scale": __version__,
            "torch": torch.__version__,
            "time": time.time(),
            **self.state_of_run(),
        }

    def _is_saved(self) -> bool:
        return self._newest is not None and self._newest[0] == self.clock.samples_seen

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        with self.watchdog.patient(Timeouts.of(self.config).save_s), self.progress.doing(what):
            yield

    def _report(self, saved: Saved | None) -> None:
        """Tell how a save has ended, if one has."""
        if saved is None:
            return
        if saved.path is None:
            self.log_event("checkpoint_failed", str(saved.problem))
            self.best.scores.pop(saved.samples_seen, None)
            return
        self._newest = (saved.samples_seen, saved.path)
        self.best.mark()
        if saved.kept_old:
            self.log_event("retain_failed", str(saved.kept_old))
        self.log_event(
            "checkpoint",
            f"Saved {saved.path.name} in {saved.seconds:.1f} s, after {self._stall_s:.2f} s to copy it.",
            saved=saved.samples_seen,
            seconds=saved.seconds,
            stall_s=self._stall_s,
        )
