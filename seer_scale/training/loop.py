"""The training loop: update after update, and what is due between two of them.

`samples_seen` is the only clock. Between two metric lines the host never reads a device value.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from seer_scale.config import Config
from seer_scale.data.batch import Batch
from seer_scale.data.transforms.on_device import micro_batches
from seer_scale.distributed import World
from seer_scale.observe.progress import Progress
from seer_scale.observe.run_log import RunLog
from seer_scale.optim.schedules import LearningRate, weight_decay
from seer_scale.parallel.engine import Engine
from seer_scale.timeouts import Timeouts
from seer_scale.training.batches import Batches
from seer_scale.training.checkpointing import Checkpointing
from seer_scale.training.clock import Clock
from seer_scale.training.data_history import newest_manifest
from seer_scale.training.evaluation import Evaluation
from seer_scale.training.event_log import LogEvent
from seer_scale.training.metric_window import MetricWindow, metric_line
from seer_scale.training.monitors import Monitors
from seer_scale.training.probe import Probe
from seer_scale.training.skips import SkipMonitor
from seer_scale.training.stop import StopRequest, StopRequested
from seer_scale.training.unreadable import UnreadableImages
from seer_scale.training.watchdog import Watchdog


@dataclass(kw_only=True)
class TrainingLoop:
    """What happens between two updates stands in `run`, in its order, which is the same on all ranks."""

    config: Config
    world: World
    run_dir: Path
    engine: Engine
    memory_format: torch.memory_format
    clock: Clock
    schedule: LearningRate
    batches: Batches
    skips: SkipMonitor
    monitors: Monitors
    unreadable: UnreadableImages
    checkpoints: Checkpointing
    evaluation: Evaluation
    probe: Probe | None
    stop: StopRequest
    log: RunLog
    log_event: LogEvent
    watchdog: Watchdog
    progress: Progress

    def __post_init__(self) -> None:
        self.window = MetricWindow(self.world, self.run_dir)
        self.num_micro_batches = self.config.num_micro_batches(self.world.size)
        self.compile_s = Timeouts.of(self.config).compile_s if self.config.train.compile else 0.0

    def run(self) -> None:
        """Updates until the end. Raises StopRequested where a stop is agreed before it."""
        self.window.reset()
        self._refresh(self.world.broadcast_object(newest_manifest(self.run_dir)))
        with self.batches:
            while batch := self.batches.next():
                if not self.clock.samples_seen:
                    self.evaluation.show_crops(batch)
                is_log_due, rates = self._is_log_due(), self._rates()
                stats, metrics = self._update(batch, rates["lr"], with_metrics=is_log_due)
                self.checkpoints.report_ended()
                if is_log_due:
                    self._log_metrics(rates, stats, metrics)
                with self.window.paused(), self.progress.spending("other"):
                    is_refreshed = is_log_due and not self.clock.at_end and self._refresh(self.window.newest_manifest)
                    if is_refreshed or self.checkpoints.is_due:
                        self._save()
                    if self.evaluation.is_due:
                        self.evaluation.measure("during")
                if not self.clock.at_end and (signal_name := self.stop.stop_signal(self.world)):
                    if self.window.updates:  # so that the log accounts for every image
                        self._log_metrics(rates, stats, {})
                    raise StopRequested(signal_name)

    def _update(
        self, batch: Batch, lr: float, *, with_metrics: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """One update: what the engine says of it, and the metrics of its loss, all on the device."""
        seen = self.clock.samples_seen
        with self.watchdog.patient(self.compile_s):
            self.compile_s = 0.0  # the first update compiles
            views = micro_batches(
                batch, self.config.views.crops, self.num_micro_batches, self.world.device, self.memory_format
            )
            loss, metrics, features = self.engine.gradients(views, samples_seen=seen, with_metrics=with_metrics)
        stats = self.engine.update(lr, seen)
        if self.probe and features is not None:
            self.probe.update(features, self.probe.labels(self.batches.source, batch.indices))
        self.watchdog.beat()
        self.clock.advance()
        self.progress.advance(self.clock.global_batch)
        self.window.waited_s += self.batches.waited_s
        self.window.add(batch, loss)
        self.skips.watch(self.clock.step, loss, stats["skipped"], stats["grad_norms"])
        return stats, metrics

    def _is_log_due(self) -> bool:
        """Whether the next update ends with a metric line: every log_every, at each checkpoint and evaluation, where
        the schedule judges the loss, and at the end."""
        config, clock = self.config, self.clock
        return (
            clock.step == 0
            or (clock.step + 1) % config.train.log_every == 0
            or clock.will_pass_multiple(config.checkpoint.every_samples)
            or clock.will_pass_multiple(config.knn.every_samples)
            or self.schedule.ends_window(clock.samples_seen)
            or clock.is_last_update
        )

    def _rates(self) -> dict[str, float]:
        """What of the next update follows a schedule, as a metric line has it."""
        seen = self.clock.samples_seen
        rates = {"lr": self.schedule(seen)}
        is_constant = self.config.optim.weight_decay_end is None
        return rates if is_constant else rates | {"weight_decay": weight_decay(self.config, seen)}

    def _log_metrics(
        self, rates: dict[str, float], stats: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]
    ) -> None:
        """One metric line, and what follows from it. Raises TrainingError where a monitor says that it is the last."""
        window = self.window
        line = metric_line(
            window, self.engine, self.clock, rates=rates, epoch=self.batches.epoch, stats=stats, metrics=metrics
        )
        self.skips.read()
        self.log.log(line.row | (self.probe.take_metrics() if self.probe else {}))
        self.unreadable.add(window.unreadable, line.unreadable)
        window.reset()
        seen = self.clock.samples_seen
        if self.schedule.observe(seen, line.loss_sum, line.loss_count):
            self.log_event(
                "plateau", f"The loss has stopped falling: the learning rate is now {self.schedule(seen):.4g}."
            )
        self.monitors.check(line.row | {"skipped_in_a_row": line.skipped_in_a_row})

    def _save(self) -> None:
        begin = time.perf_counter()
        self.checkpoints.save_in_step()
        self.window.stalled_s += time.perf_counter() - begin

    def _refresh(self, number: int) -> bool:
        if is_refreshed := self.batches.refresh(number):
            self.checkpoints.forget_newest()
        return is_refreshed
