"""The training run: from a resolved recipe to checkpoints, a log and a report.

`samples_seen` is the only clock. Between two metric lines the host never reads a device value.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from seer_scale import __version__, console
from seer_scale.checkpoint import store
from seer_scale.checkpoint.lock import RunLock
from seer_scale.checkpoint.saver import Saved, Saver
from seer_scale.config import Config, without_effect
from seer_scale.cores import rank_cores
from seer_scale.data.batch import Batch
from seer_scale.data.loading.listing import share
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.loading.pool import warn
from seer_scale.data.sources import Source, open_source
from seer_scale.data.sources.left_out import warning
from seer_scale.data.transforms.native import MISSING, native
from seer_scale.data.transforms.on_device import micro_batches
from seer_scale.distributed import World, limit_groups
from seer_scale.errors import EXIT_DONE, EXIT_STOPPED, DataError, StartStopped, TrainingError, UserError
from seer_scale.evaluate.gallery_pictures import show_crops, show_neighbours, show_prototypes
from seer_scale.evaluate.knn import Labelled, knn, labelled_images, why_unlabelled
from seer_scale.files import shown, write_whole
from seer_scale.formatting import counted, memory_size
from seer_scale.methods.base import Features
from seer_scale.methods.registry import build_method
from seer_scale.models.execution import choose_execution
from seer_scale.observe.eta import Eta
from seer_scale.observe.progress import Progress
from seer_scale.observe.sinks import RunLog, compare, read_metrics
from seer_scale.optim.schedules import LearningRate
from seer_scale.parallel import build_engine
from seer_scale.timeouts import Timeouts
from seer_scale.training import resume
from seer_scale.training.data_history import DataHistory, manifest_of, newest_manifest, open_data_history
from seer_scale.training.metric_window import MetricWindow
from seer_scale.training.skips import SkipMonitor
from seer_scale.training.stop import StopRequest
from seer_scale.training.watchdog import Watchdog

STARVED, STARVED_LINES = 0.05, 3
LOADED = time.time()
MAX_TOLD = 1000
"""Unreadable images that the console names; a log has all of them."""
FEWER_THREADS = "; train.threads or OMP_NUM_THREADS sets another number of threads."


def train(config: Config, world: World, run_dir: Path, stop: StopRequest, watchdog: Watchdog, attempt: str = "") -> int:
    """Run or go on until the samples are seen or a stop is agreed; returns the exit status. attempt: which start this
    is, where a launcher counts them. Collective."""
    timeouts = Timeouts.of(config)
    with watchdog.patient(timeouts.lock_s):
        lock = RunLock(run_dir, world, patience_s=timeouts.lock_s if attempt else 0.0)
    if not attempt:  # else the launcher keeps what ranks say
        console.record.keep(console.file_of(run_dir, world.rank))
    if lock.note:
        warn(lock.note)
    with lock, Progress(run_dir, active=world.is_main, every_s=config.run.heartbeat_s) as progress:
        with watchdog.patient(timeouts.start_s):
            trainer = Trainer(config, world, run_dir, stop, watchdog, progress, attempt)
        return trainer.run()


class Trainer:
    def __init__(
        self,
        config: Config,
        world: World,
        run_dir: Path,
        stop: StopRequest,
        watchdog: Watchdog,
        progress: Progress,
        attempt: str,
    ):
        self.config, self.world, self.run_dir, self.stop, self.watchdog, self.attempt = (
            config,
            world,
            run_dir,
            stop,
            watchdog,
            attempt,
        )
        self.progress = progress
        self.folder, self.timeouts = run_dir / "checkpoints", Timeouts.of(config)
        self.samples_seen = self.step = 0
        self.schedule = LearningRate(config)
        begin = time.perf_counter()
        with progress.doing("looking for a checkpoint and verifying it"):
            found = resume.find_checkpoint(config, run_dir, world)  # before anything is built
            weights = resume.find_weights(config, world) if config.checkpoint.init_from and not found else None
        self._verify_s = time.perf_counter() - begin
        method = build_method(config, world)
        part = resume.check_weights(config, weights, resume.state_of(method), world) if weights else ""
        saved = store.read_meta(found, world)["data"] if found else None
        with progress.doing(f"listing the images of {shown(config.data.path)}"):
            self.data_history, self.labelled = share(world, run_dir / "logs", partial(self._open, saved), _sources)
        self._refused_refresh, self._stall_s = 0, 0.0
        self.cores = rank_cores(world)
        self.workers = config.data.num_workers(self.cores)
        with progress.doing("measuring how the network runs fastest"):
            self.execution = choose_execution(method.backbone, config, world, self.cores, self._stop_start_if_agreed)
        with progress.doing("building the network"):
            self.engine = build_engine(method, config, world, loaded=resume.brought(config, found))
        self._told_of_health = False
        self._told_unreadable: set[str] = set()
        self._unreadable = 0
        self._starved = 0
        self._skips = SkipMonitor(
            list(self.engine.shapes), config.train.precision, world, partial(self._tell_of_rank, "skipped")
        )
        self.resumed_from = self._restore(found) if found else None
        self._initialised_from = (weights, part) if weights else None
        if weights:
            self._loaded = self._read(weights, prefixes=part)
        self.end = config.end(self.samples_seen)
        eta = Eta(self.end, evaluate_every=config.knn.every_samples, checkpoint_every=config.checkpoint.every_samples)
        self.log = RunLog(
            run_dir, self.end, method.baseline, active=world.is_main, progress=progress, eta=eta, sinks=config.run.sinks
        )
        self.saver = Saver(
            self.folder,
            self.engine.state(),
            world,
            keep_last=config.checkpoint.keep_last,
            keep_every_samples=config.checkpoint.keep_every_samples,
        )
        limit_groups(world)
        self._write_config()
        self._saved: tuple[int, Path] | None = None
        if self.resumed_from is not None and self.resumed_from.parent == self.folder:
            self._saved = self.samples_seen, self.resumed_from
        self._top1 = self._scored()

    def _open(self, saved: dict[str, Any] | None) -> tuple[DataHistory, Labelled | None]:
        with self.stop.ends("images were listed"):
            history = open_data_history(self.config, self.run_dir, saved)
            return history, labelled_images(self.config, history.source)

    @property
    def source(self) -> Source:
        return self.data_history.source

    def _write_config(self) -> None:
        problem, path, text = None, self.run_dir / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        if self.world.is_main and not (path.exists() and path.read_text() == text):
            try:
                write_whole(path, text)
            except OSError as error:
                problem = (
                    f"{self.run_dir} cannot be written ({error.strerror}): free some space, or choose another run.dir."
                )
        if problem := self.world.broadcast_object(problem):
            raise UserError(problem)

    # --- resume

    def _restore(self, path: Path) -> Path:
        meta = resume.check_resumable(path, self.config, self.world)
        then = meta["config"]
        goes_on = self.engine.method.load_state(meta["method"]["state"], then, meta["samples_seen"])
        memory = ("memory/",) if goes_on else ()
        prefixes = ("model/", "optim/", "scaler/", *memory)
        self._loaded = self._read(path, prefixes, remedy=resume.remedy(then, self.config))
        self.samples_seen, self.step = meta["samples_seen"], meta["step"]
        self.schedule.state |= meta["schedule"]
        self._told_of_health = meta["told_of_health"]
        if then["train"]["precision"] != self.config.train.precision:
            self.engine.scaler.restart()
        self._changed = resume.changes(then, self.config)
        self._rate_change = resume.rate_change(meta, self.config)
        return path

    def _read(
        self, path: Path, prefixes: str | tuple[str, ...], remedy: str = store.DEFAULT_REMEDY
    ) -> dict[str, float]:
        """Take over what of a checkpoint has names that begin so; what that took. Collective."""
        begin = time.perf_counter()
        with self.progress.doing(f"loading {shown(path)}"):
            nbytes = self.world.gather_objects(
                store.load(path, self.engine.state(), self.world, prefixes=prefixes, remedy=remedy)
            )
        self.engine.refresh()
        return {"load_s": time.perf_counter() - begin, "load_bytes": sum(nbytes), "load_bytes_most": max(nbytes)}

    def _log_start(self) -> None:
        c, w = self.config, self.world
        threads, each = self.execution.threads, " each" * (w.size > 1)
        where = f"{counted(w.size, 'rank')} ({self.engine.name}, {w.device.type}), {counted(threads, 'thread')}{each}"
        facts = dict(
            began=_process_began(),
            versions=_versions(w),
            attempt=self.attempt,
            step=self.step,
            ranks=w.size,
            engine=self.engine.name,
            device=w.device.type,
            samples_seen=self.samples_seen,
            end=self.end,
            labelled=self.labelled is not None,
            baseline=self.engine.method.baseline,
            plots=[dataclasses.asdict(plot) for plot in self.engine.method.plots],
            threads=threads,
            cores=self.cores,
            workers=self.workers,
            memory_format=str(self.execution.memory_format).removeprefix("torch."),
            accumulation=c.accumulation(w.size),
            parameters=sum(shape.numel() for shape in self.engine.shapes.values()),
            staging_bytes=max(w.gather_objects(self.saver.nbytes)),
        )
        copies = f" Checkpoints are copied to {memory_size(facts['staging_bytes'])} of memory a rank first."
        knn_told = f" kNN: {self.labelled.protocol}" if self.labelled else ""
        if w.is_main and not self.labelled and c.knn.enabled:  # it asks the file system
            knn_told = f" {why_unlabelled(c, self.source)}, so there is no kNN."
        read: dict[str, float] = {}
        if self.resumed_from:
            if self.samples_seen >= c.train.total_samples:
                fewer = f" train.total_samples asks for {c.train.total_samples:,}, fewer than this run has seen:"
                fewer += " nothing is undone."
                fewer *= self.samples_seen - c.train.total_samples >= c.train.global_batch  # batches are whole
                self.log.event(
                    "resume",
                    (
                        f"{self.resumed_from} is complete: all {self.samples_seen:,} samples were seen, so there "
                        f"is nothing to train.{fewer} More train.total_samples would go on."
                    ),
                    **facts,
                )
                return
            changed = f" Changed since: {', '.join(self._changed)}." if self._changed else ""
            changed += f" {self._rate_change}" if self._rate_change else ""
            data = (
                f" Its images are those of {manifest_of(self.run_dir, self.data_history.refreshes)}, not of data.path."
                if self.data_history.refreshes
                else ""
            )
            read = self._loaded | {"verify_s": self._verify_s}
            loaded = (
                f" Verified in {self._verify_s:.1f} s, then read {memory_size(read['load_bytes'])} in "
                f"{read['load_s']:.1f} s, {memory_size(read['load_bytes_most'])} at most a rank."
            )
            self.log.event(
                "resume",
                (
                    f"Going on from {self.resumed_from} with {counted(len(self.source), 'image')} on "
                    f"{where}.{changed}{data}{knn_told}{loaded}{copies}"
                ),
                **facts,
                **read,
            )
            return
        if self._initialised_from:
            (path, part), read = self._initialised_from, self._loaded
            is_part = part == resume.BACKBONE
            whose = (
                f"Its backbone is that of {path} and all else drawn anew"
                if is_part
                else f"Its weights are those of {path}"
            )
            took = (
                f"{memory_size(read['load_bytes'])} read in {read['load_s']:.1f} s, "
                f"{memory_size(read['load_bytes_most'])} at most a rank"
            )
            copies = f" {whose}: {took}.{copies}"
        started = (
            f"Training {c.model.name} ({facts['parameters'] / 1e6:,.1f}M parameters) on "
            f"{counted(len(self.source), 'image')}, {where}."
        )
        if w.is_main and read_metrics(self.run_dir)[0]:
            started = f"An earlier start left no checkpoint in {self.folder}, so training begins anew. {started}"
        compiles = " The first update compiles, which takes minutes." * c.train.compile
        self.log.event("start", started + knn_told + copies + compiles, **facts, **read)

    def _tell_notes(self) -> None:
        """What a user may want to change, after the line that a start begins with."""
        given = self.config.parallel.engine
        if given not in ("auto", self.engine.name):
            self._log_event(
                "note",
                f"There is one rank, so nothing is shared out: parallel.engine {given} computes as {self.engine.name} "
                "here.",
            )
        chosen = dataclasses.replace(self.config.parallel, engine=self.engine.name)
        if chosen != self.config.parallel:  # auto's choice, or one rank's
            for sentence in without_effect(dataclasses.replace(self.config, parallel=chosen)):
                self._log_event("note", sentence)
        train = self.config.train
        if self.end != train.total_samples and self.samples_seen < self.end:
            self._log_event(
                "note",
                (
                    f"train.total_samples is {train.total_samples:,}, and updates take {train.global_batch:,} images "
                    f"each: the run ends at {self.end:,}."
                ),
            )
        if not self.source.is_stream and len(self.source) < train.global_batch:
            times = train.global_batch / len(self.source)
            self._log_event(
                "few_images",
                f"There are {len(self.source):,} images, fewer than train.global_batch ({train.global_batch:,}): "
                f"each update sees an image {times:.1f} times, which teaches little; lower train.global_batch, or "
                "give more images.",
            )
        if self.labelled and self.config.knn.k > (voters := len(self.labelled.bank_indices)):
            self._log_event(
                "note",
                f"knn.k is {self.config.knn.k:,}, but {counted(voters, 'image')} can vote in kNN: all of them do, "
                "each time.",
            )
        if left_out := warning(self.source.left_out):
            self._log_event("note", left_out)
        if self.workers > self.cores:
            self._log_event(
                "note",
                f"data.workers is {self.workers}, but a rank may use {counted(self.cores, 'core')}: "
                "more loader processes than that help only where images come from URLs.",
            )
        if (threads := self.execution.threads) > self.cores:
            self._log_event(
                "note",
                f"There are {threads} CPU threads a rank (train.threads or OMP_NUM_THREADS), but a rank may use "
                f"{counted(self.cores, 'core')}: they stand in each other's way, and fewer are faster.",
            )
        if self.world.device.type == "cpu" and train.precision != "fp32":
            self._log_event(
                "note",
                "On this CPU, convolutions over maps of which part of their kernel sees padding alone are computed "
                f"in fp32, not {train.precision}: oneDNN leaves gradients of that part unset in half precision.",
            )
        if native() is None:
            self._tell_of_rank("note", MISSING)
        if self.execution.contended:
            self._log_event(
                "contended",
                f"The cores are contended: {self.execution.contended}. Updates are slower than they could be"
                f"{FEWER_THREADS if self.execution.threads > 1 else '.'}",
            )

    # --- the run

    def run(self) -> int:
        with self.log:
            with self.watchdog.patient(self.timeouts.save_s):
                self._log_start()
                self._tell_notes()
            try:
                if not self.resumed_from:
                    self._evaluate("before")
                with self.progress.doing("training", self.end, done=self.samples_seen):
                    self._train()
                if not self._save():
                    goes_on = (
                        f"it goes on from {self._saved[1].name}"
                        if self._saved
                        else "there is no checkpoint of this start, and without an older one it begins anew"
                    )
                    raise TrainingError(
                        "The run is complete, but its last checkpoint could not be written: free some space "
                        f"and start it again; {goes_on}."
                    )
                self._evaluate_at_end()
                if self.config.checkpoint.keep_best:
                    self.saver.prune()
            except StopRequested as stop:
                left = (
                    "Start it again and it goes on."
                    if self.samples_seen < self.end
                    else "All samples were seen: start it again for what is left of its end, evaluation and pictures."
                )
                self._log_event(
                    "stop",
                    f"Stopped by {stop} after {self.samples_seen:,} samples; {self._save_at_stop()}. {left}"
                    f"{self._replaced()}",
                )
                self._report()
                return EXIT_STOPPED
            finally:
                self.saver.close()
            self._log_event(
                "done", f"Done: {self.samples_seen:,} samples in {counted(self.step, 'update')}.{self._replaced()}"
            )
            self._report()
        return EXIT_DONE

    def _stop_if_agreed(self) -> None:
        reason = self.stop.stop_signal(self.world)
        if reason:
            raise StopRequested(reason)

    def _stop_start_if_agreed(self) -> None:
        """Collective. Raises StartStopped on all ranks."""
        if reason := self.stop.stop_signal(self.world):
            self.world.barrier()  # none leaves before all have heard it
            raise StartStopped(f"Stopped by {reason} before training began. Start it again and it goes on.")

    def _save_at_stop(self) -> str:
        if not self.samples_seen:
            return "there is nothing to save yet"
        saved = self._save()
        return (
            f"saved as {saved.name}"
            if saved
            else "its state could not be saved, so it goes on from the checkpoint before"
        )

    def _replaced(self) -> str:
        """A sentence on the images of this start that could not be read, if any."""
        if not (num := self._unreadable):
            return ""
        times = "once" if num == 1 else f"{num:,} times"
        where = self.run_dir / "logs" / "unreadable-*.txt"
        return f" Another image took the place of one that cannot be read {times}: {where} name them."

    def _log_event(self, kind: str, text: str, **fields: Any) -> None:
        self.log.event(kind, text, samples_seen=self.samples_seen, **fields)

    def _train(self) -> None:
        """Updates until the end. Raises StopRequested where a stop is agreed before it."""
        c, engine = self.config, self.engine
        window, begun = MetricWindow(self.world, self.run_dir), self.step
        self._refresh(self.world.broadcast_object(newest_manifest(self.run_dir)))
        batches, self._trained, accumulation = self._batches(window), False, c.accumulation(self.world.size)
        while batch := next(batches, None):
            seen = self.samples_seen
            if not seen and self.world.is_main:
                with _disk_may_fill():
                    show_crops(self.run_dir, batch, c.views)
            due = self._should_log(seen)
            lr = self.schedule(seen)
            with self.watchdog.patient(self.timeouts.compile_s if c.train.compile and self.step == begun else 0.0):
                parts = micro_batches(
                    batch, c.views.crops, accumulation, self.world.device, self.execution.memory_format
                )
                loss, metrics = engine.gradients(parts, samples_seen=seen, with_metrics=due)
            stats = engine.update(lr, seen)
            self.watchdog.beat()
            self.progress.advance(c.train.global_batch)
            self._trained = True
            self.samples_seen, self.step = seen + c.train.global_batch, self.step + 1
            window.add(batch, loss)
            self._skips.watch(self.step, loss, stats["skipped"], stats["grad_norms"])
            self._report_save(self.saver.ended())
            refreshed = False
            if due:
                self._log(window, lr, stats, metrics)
                refreshed = not self._is_last(seen) and self._refresh(window.newest_manifest)
            with window.paused():
                if refreshed:
                    batches.close()
                    batches = self._batches(window)
                if refreshed or self._passed_multiple(c.checkpoint.every_samples):
                    begin = time.perf_counter()
                    self._save(in_background=c.checkpoint.background)
                    window.stalled_s += time.perf_counter() - begin
                if self._passed_multiple(c.knn.every_samples) and not self._is_last(seen):
                    self._evaluate("during")
            reason = None if self._is_last(seen) else self.stop.stop_signal(self.world)
            if reason:
                if window.updates:  # so that the log accounts for every image
                    self._log(window, lr, stats, {})
                raise StopRequested(reason)

    def _batches(self, window: MetricWindow) -> Generator[Batch, None, None]:
        c, w = self.config, self.world
        batches = train_batches(
            self.source,
            dataclasses.replace(c.data, workers=self.workers),
            c.views,
            self.data_history.sampler,
            rank=w.rank,
            world_size=w.size,
            start=self.samples_seen,
            stop=c.train.total_samples,
            pin=w.device.type == "cuda",
            on_device=c.data.on_device(w.device.type),
            log=partial(self._tell_of_rank, "loader"),
        )
        with closing(batches):  # and its processes with it
            while True:
                begin = time.perf_counter()
                try:
                    batch = next(batches, None)
                except DataError as problem:
                    problem.single_rank, problem.retryable = True, self._trained or self.resumed_from is not None
                    raise
                window.waited_s += time.perf_counter() - begin
                if batch is None:
                    return
                yield batch

    def _refresh(self, number: int) -> bool:
        """Go on with manifest `number` of this run, if it is newer than the one in use; whether that was done."""
        if number <= max(self.data_history.refreshes, self._refused_refresh):
            return False
        path, then = manifest_of(self.run_dir, number), self.data_history

        def follow() -> DataHistory:
            return then.refreshed(open_source(str(path)), number, self.samples_seen)

        try:
            with self.watchdog.patient(self.timeouts.start_s):
                self.data_history = share(self.world, self.run_dir / "logs", follow, lambda history: [history.source])
        except UserError as problem:
            self._refused_refresh = number
            self._log_event(
                "refresh_failed", f"{path} cannot be used, so training goes on with the data as they are: {problem}"
            )
            return False
        self._saved = None
        before, now = dict(then.versions[-1].parts), dict(self.data_history.versions[-1].parts)
        epoch = int(self.data_history.sampler.progress(self.samples_seen))
        added = sum(num for name, num in now.items() if name not in before)
        gone = sum(num for name, num in before.items() if name not in now)
        self._log_event(
            "refresh",
            f"The data are those of {path} now: {counted(len(self.source), 'image')} in "
            f"{counted(len(now), 'part')}, {added:,} of them new, {gone:,} gone. "
            f"Epoch {epoch} goes on with {counted(self.data_history.sampler.left(self.samples_seen), 'image')}.",
            images=len(self.source), new=added, gone=gone,
        )  # fmt: skip
        return True

    def _is_last(self, seen: int) -> bool:
        return seen + self.config.train.global_batch >= self.end

    def _should_log(self, seen: int) -> bool:
        """Whether the update that begins at `seen` ends with a metric line: every log_every, at each checkpoint and
        evaluation, and where the schedule judges the loss."""
        c, after = self.config, seen + self.config.train.global_batch
        passes = any(n and after // n != seen // n for n in (c.checkpoint.every_samples, c.knn.every_samples))
        every = self.step == 0 or (self.step + 1) % c.train.log_every == 0
        return every or passes or self.schedule.ends_window(seen) or self._is_last(seen)

    def _passed_multiple(self, every: int) -> bool:
        """Whether the last update reached or passed a multiple of `every` samples."""
        return (
            bool(every) and self.samples_seen // every != (self.samples_seen - self.config.train.global_batch) // every
        )

    # --- what is due now and then

    def _log(
        self, window: MetricWindow, lr: float, stats: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]
    ) -> None:
        """One metric line: one reduction of device values, one of host counts. `metrics` may be empty."""
        scaler = self.engine.scaler
        means, counts = window.reduce(metrics)
        own = torch.stack(
            [stats["grad_norm"], stats["param_norm"], scaler.scale, scaler.skipped, scaler.longest_streak]
        )
        grad_norm, param_norm, scale, skipped, streak = own.tolist()
        self._skips.read()
        total, count = means.pop("loss_sum").item(), means.pop("loss_count").item()
        loss = total / count if count else math.nan
        row = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "epoch": self.data_history.sampler.progress(self.samples_seen),
            "loss": loss,
            "lr": lr,
            "loss_scale": scale,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "skipped": int(skipped),
            **window.timing(self.config.train.global_batch),
            "mem/peak_gib": _peak_gib(self.world),
            **self.engine.method.metrics(means, loss),
            "data/unreadable": counts[1],
            "data/fingerprint": counts[0],
        }
        self.log.log(row)
        self._tell_of_unreadable(window.unreadable, counts[1])
        window.reset()
        if self.schedule.observe(self.samples_seen, total, count):
            self._log_event(
                "plateau",
                f"The loss has stopped falling: the learning rate is now {self.schedule(self.samples_seen):.4g}.",
            )
        if streak >= self.config.train.max_skips:
            raise TrainingError(
                f"{int(streak)} updates in a row were skipped because gradients were not finite "
                f"(train.max_skips {self.config.train.max_skips}, loss scale {scale:g}): lower optim.lr, "
                "lengthen schedule.warmup_samples, or use train.precision bf16; the newest checkpoint stands."
            )
        if scale < self.config.train.min_loss_scale and self.engine.scaler.dynamic:
            raise TrainingError(
                f"The loss scale has fallen to {scale:g}, below train.min_loss_scale "
                f"{self.config.train.min_loss_scale:g}, because gradients overflow fp16 again and again: lower "
                "optim.lr, lengthen schedule.warmup_samples, or use train.precision bf16; the newest "
                "checkpoint stands."
            )
        if not self._told_of_health and (problem := self.engine.method.health(row, self.config)):
            self._told_of_health = True
            self._log_event("collapse", problem)
        self._watch_for_starvation(row["time/data_wait_frac"])

    def _tell_of_rank(self, kind: str, sentence: str) -> None:
        """What this rank alone has seen."""
        if self.world.is_main:
            self._log_event(kind, sentence)
        else:
            warn(f"Rank {self.world.rank}: {sentence}")

    def _tell_of_unreadable(self, sentences: list[str], num: int) -> None:
        """A few on the console, once; all of them, each time, in logs/unreadable-RANK.txt. num: of all ranks."""
        new = [s for s in dict.fromkeys(sentences) if s not in self._told_unreadable][:3]
        if len(self._told_unreadable) < MAX_TOLD:
            self._told_unreadable |= set(new)
            for sentence in new:
                print(f"Replaced an image that cannot be read: {sentence}", file=sys.stderr, flush=True)
        self._unreadable += num
        if sentences:
            with _disk_may_fill():
                logs = self.run_dir / "logs"
                logs.mkdir(exist_ok=True)
                with (logs / f"unreadable-{self.world.rank}.txt").open("a") as file:
                    file.writelines(s + "\n" for s in sentences)

    def _watch_for_starvation(self, share: float) -> None:
        """Three metric lines in a row that waited for data over STARVED of their time: say so once, and what to
        change."""
        workers, cores = self.workers, self.cores
        if (
            self._starved >= STARVED_LINES or not workers and cores < 2
        ):  # without a core to spare, the rank loads by itself
            return
        self._starved = self._starved + 1 if share > STARVED else 0
        if self._starved == STARVED_LINES:
            if self.execution.contended:
                more = "free the cores of what else runs on them, or store the images smaller"
            elif workers < cores:
                more = f"raise data.workers from {workers} to {cores}"
            else:
                more = "give each rank more cores, or store the images smaller"
            self._log_event(
                "starved",
                (
                    f"Updates wait for images {100 * share:.0f} % of their time: {more} (seer-scale bench data "
                    f"{shlex.quote(self.config.data.path)} --recipe {shlex.quote(str(self.run_dir / 'config.yaml'))} "
                    "says how many a core makes)."
                ),
            )

    def _save(self, *, in_background: bool = False) -> Path | None:
        """A checkpoint of this moment, after the one before is safe; its path, or None where none is there (yet).

        A failure is told in the log. Raises TrainingError for weights that are not finite: they must not take the
        place of good ones.
        """
        begin = time.perf_counter()
        with self.watchdog.patient(self.timeouts.save_s), self.progress.doing("waiting for the checkpoint before"):
            self._report_save(self.saver.wait())
        if not self._is_saved():
            if not self.engine.is_finite():
                raise TrainingError(
                    "Weights or running statistics are not finite any more, so they are not saved: lower "
                    "optim.lr or lengthen schedule.warmup_samples, and start again; it goes on from the newest "
                    "checkpoint."
                )
            self.engine.average_buffers()
            meta = {
                "samples_seen": self.samples_seen,
                "step": self.step,
                "data": self.data_history.state(),
                "schedule": self.schedule.state,
                "method": {"name": self.engine.method.name, "state": self.engine.method.state()},
                "told_of_health": self._told_of_health,
                "config": self.config.to_dict(),
                "world_size": self.world.size,
                "engine": self.engine.name,
                "seer_scale": __version__,
                "torch": torch.__version__,
                "time": time.time(),
            }
            self.saver.begin(self.engine.state(), meta)
            self._stall_s = time.perf_counter() - begin
            if in_background:
                return None
            with self.watchdog.patient(self.timeouts.save_s), self.progress.doing("saving a checkpoint"):
                saved = self.saver.wait()
            self._report_save(saved, waited_s=time.perf_counter() - begin)
        return self._saved[1] if self._saved and self._is_saved() else None

    def _is_saved(self) -> bool:
        return self._saved is not None and self._saved[0] == self.samples_seen

    def _report_save(self, saved: Saved | None, waited_s: float = 0.0) -> None:
        """Tell how a save has ended, if one has; waited_s: for how long nothing else went on."""
        if saved is None:
            return
        if saved.path is None:
            self._log_event("checkpoint_failed", saved.problem)
            self._top1.pop(saved.samples_seen, None)
            return
        self._saved = (saved.samples_seen, saved.path)
        self._mark_best()
        if saved.kept_old:
            self._log_event("retain_failed", saved.kept_old)
        self._log_event(
            "checkpoint", f"Saved {saved.path.name} in {saved.seconds:.1f} s, after {self._stall_s:.2f} s to copy it.",
            saved=saved.samples_seen, seconds=saved.seconds, stall_s=self._stall_s, waited_s=waited_s,
        )  # fmt: skip

    def _evaluate(self, stage: Literal["before", "during", "after"]) -> None:
        if self.labelled is None:
            return
        begin, c = time.perf_counter(), self.config.knn
        asked, bank = len(self.labelled.query_indices), len(self.labelled.bank_indices)
        self._log_event(
            "evaluation",
            f"Measuring kNN {stage} training, of {asked:,} images among {bank:,} (knn.enabled false does without).",
        )
        self.engine.average_buffers()
        with self.progress.doing(f"measuring kNN {stage} training", asked + bank):
            scores, found = knn(self._represent, self.labelled, c, workers=self.workers, world=self.world)
        self.log.log(
            {
                "samples_seen": self.samples_seen,
                "knn/stage": stage,
                **self._measurement,
                **scores,
                "time/knn_s": time.perf_counter() - begin,
            }
        )
        if self.config.checkpoint.keep_best and self.samples_seen:
            best = max(self._top1.values(), default=-math.inf)
            self._top1[self.samples_seen] = scores["knn/top1"]
            if self.world.broadcast_object(scores["knn/top1"] > best):  # sums on GPUs differ in their last digits
                self._save(in_background=self.config.checkpoint.background)
            self._mark_best()
        if stage != "during" and self.world.is_main:
            with _disk_may_fill():
                show_neighbours(self.run_dir, stage, self.labelled, found)

    @property
    def _measurement(self) -> dict[str, str]:
        """What a row of kNN figures says of how they were measured, for those of this start."""
        return {"knn/measurement": self.labelled.measurement(self.config.knn)} if self.labelled else {}

    def _scored(self) -> dict[int, float]:
        """kNN top-1 of the checkpoints there are, by samples_seen; of figures that compare with those to come."""
        scored: dict[int, float] = {}
        if self.world.is_main and self.config.checkpoint.keep_best:
            known = [r for r in read_metrics(self.run_dir)[0] if "knn/top1" in r and compare(r, self._measurement)]
            rows = {r["samples_seen"]: r["knn/top1"] for r in known}
            scored = {s: rows[s] for s in store.published(self.folder) if s in rows and s <= self.samples_seen}
        return self.world.broadcast_object(scored)

    def _mark_best(self) -> None:
        if self.world.is_main and self.config.checkpoint.keep_best:
            with _disk_may_fill():
                if name := store.mark_best(self.folder, self._top1):
                    top1 = self._top1[store.samples_of(name)]
                    self._log_event(
                        "best", f"The best kNN top-1 so far, {top1:.1f} %, is that of {name}, kept as checkpoints/best."
                    )

    def _represent(self, images: torch.Tensor) -> Features:
        """The engine's, with a stop between any two batches: an evaluation may outlast the grace of a preemption."""
        self._stop_if_agreed()
        self.watchdog.beat()
        self.progress.advance(len(images) * self.world.size)
        return self.engine.encode(images)

    def _show_prototypes(self) -> None:
        """Pictures of what prototypes collect, from a sample: all images would take as long as an epoch without
        training."""
        c, num, anchors = (
            self.config,
            min(self.config.run.prototype_images, len(self.source)),
            self.engine.method.anchors,
        )
        if self.source.is_stream or not num or not anchors:
            return
        begin, prototypes = time.perf_counter(), self.engine.whole(anchors)
        with _disk_may_fill(), self.progress.doing("looking for the images nearest to the prototypes", num):
            show_prototypes(  # rank 0 writes after the last collective
                self.run_dir, self._represent, prototypes, self.source,
                num=num, size=c.knn.size, batch=c.knn.batch, workers=self.workers, world=self.world,
            )  # fmt: skip
        self._log_event(
            "prototypes",
            f"The report shows the images nearest to some prototypes, of {num:,} looked at in "
            f"{time.perf_counter() - begin:.0f} s (run.prototype_images; 0 does without).",
        )

    def _evaluate_at_end(self) -> None:
        """What was not done by a start before."""
        rows, events = read_metrics(self.run_dir) if self.world.is_main else ([], [])
        here = [r for r in [*rows, *events] if r["samples_seen"] >= self.samples_seen]
        done = {r.get("knn/stage") for r in here if compare(r, self._measurement)} | {r.get("event") for r in here}
        done = self.world.broadcast_object(done)
        if "after" not in done:
            self._evaluate("after")
        if "prototypes" not in done:
            self._show_prototypes()

    def _report(self) -> None:
        if self.world.is_main:
            from seer_scale.observe.report import headline, write_report  # loads matplotlib, which no other rank wants

            with _disk_may_fill(), self.progress.doing("writing the report"):
                path = write_report(self.run_dir)
                if line := headline(read_metrics(self.run_dir)[0]):
                    print(line, flush=True)
                print(f"Report: {shown(path)}", flush=True)


def _sources(opened: tuple[DataHistory, Labelled | None]) -> list[Source]:
    history, labelled = opened
    return [history.source, *([labelled.bank, labelled.queries] if labelled else [])]


class StopRequested(Exception):
    """All ranks agreed to stop; the text is the signal's name."""


@contextmanager
def _disk_may_fill() -> Iterator[None]:
    """A full disk costs a picture, a line or the report, never the run."""
    try:
        yield
    except (OSError, DataError) as error:
        print(
            (
                f"The report or a log cannot be written ({getattr(error, 'strerror', None) or error}): free some "
                "space, then run seer-scale report."
            ),
            file=sys.stderr,
            flush=True,
        )


def _versions(world: World) -> dict[str, str]:
    """What a run was made with, for those who want to make it again."""
    device = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "seer_scale": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def _process_began() -> float:
    """Unix time (proc(5): field 22 of stat, in ticks since the machine began); without Linux, when this module was
    loaded."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return LOADED


def _peak_gib(world: World) -> float:
    """Peak memory of this rank: of the accelerator where there is one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
