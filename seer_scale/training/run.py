"""A run from a resolved recipe to checkpoints, a log and a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from seer_scale import console
from seer_scale.checkpoint.lock import RunLock
from seer_scale.checkpoint.saver import Saver
from seer_scale.config import Config
from seer_scale.data.loading.pool import warn
from seer_scale.data.transforms.native import MISSING, native
from seer_scale.distributed import World, limit_groups
from seer_scale.errors import EXIT_DONE, EXIT_STOPPED, Problem, TrainingError, UserError
from seer_scale.files import shown, write_whole
from seer_scale.formatting import counted
from seer_scale.observe.eta import Eta
from seer_scale.observe.progress import Progress
from seer_scale.observe.records import read_metrics
from seer_scale.observe.run_log import RunLog
from seer_scale.timeouts import Timeouts
from seer_scale.training.batches import Batches
from seer_scale.training.checkpointing import BestCheckpoint, Checkpointing, known_scores
from seer_scale.training.components import build_components
from seer_scale.training.evaluation import Evaluation, measurement_of
from seer_scale.training.event_log import EventLog, disk_may_fill
from seer_scale.training.loop import TrainingLoop
from seer_scale.training.monitors import EVALUATION_MONITORS, TOLD_ONCE_A_RUN, Monitors, monitors_of
from seer_scale.training.skips import SkipMonitor
from seer_scale.training.start_messages import notes, start_event
from seer_scale.training.stop import StopRequest, StopRequested
from seer_scale.training.unreadable import UnreadableImages
from seer_scale.training.watchdog import Watchdog


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
            run = TrainingRun(config, world, run_dir, stop, watchdog, progress, attempt)
        return run.run()


class TrainingRun:
    """Builds what a run consists of, and goes through its phases: start, evaluation, updates, last checkpoint,
    evaluation, report. All ranks alike."""

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
        self.config, self.world, self.run_dir, self.attempt = config, world, run_dir, attempt
        self.stop, self.watchdog, self.progress, self.folder = stop, watchdog, progress, run_dir / "checkpoints"
        self.made = build_components(config, world, run_dir, stop, progress)
        self.log = self._open_log()
        self.events = EventLog(self.log, self.made.clock, world)
        self.saver = Saver(
            self.folder,
            self.made.state(),
            world,
            keep_last=config.checkpoint.keep_last,
            keep_every_samples=config.checkpoint.keep_every_samples,
        )
        limit_groups(world)
        write_config(config, run_dir, world)
        best = self._best_checkpoint()
        self.monitors = self._build_monitors()
        self.batches = Batches(
            config,
            world,
            run_dir,
            self.made.history,
            self.made.clock,
            self.events,
            watchdog,
            workers=self.made.workers,
            was_read=self.made.origin.checkpoint is not None,
        )
        self.checkpoints = self._build_checkpointing(best)
        self.evaluation = self._build_evaluation(best)
        self.unreadable = UnreadableImages(run_dir, world.rank)
        self.loop = self._build_loop()

    def _open_log(self) -> RunLog:
        config, clock = self.config, self.made.clock
        return RunLog(
            self.run_dir,
            clock.end,
            self.made.engine.method.baseline,
            active=self.world.is_main,
            progress=self.progress,
            eta=Eta(
                clock.end, evaluate_every=config.knn.every_samples, checkpoint_every=config.checkpoint.every_samples
            ),
            sinks=config.run.sinks,
        )

    def _best_checkpoint(self) -> BestCheckpoint:
        """Collective."""
        made, keep_best = self.made, self.config.checkpoint.keep_best
        measurement = measurement_of(self.config, made.labelled, made.health)
        scores = known_scores(
            self.run_dir, self.folder, measurement, made.clock.samples_seen, self.world, active=keep_best
        )
        return BestCheckpoint(self.folder, self.world, self.events.log_event, scores, active=keep_best)

    def _build_monitors(self) -> Monitors:
        made = self.made
        fatal, by_event = monitors_of(
            self.config,
            made.engine.method,
            run_dir=self.run_dir,
            workers=made.workers,
            cores=made.cores,
            is_contended=bool(made.execution.contended),
        )
        told = made.origin.meta.get("told", [])
        return Monitors(fatal, by_event, EVALUATION_MONITORS, self.events.log_event, told=told)

    def _build_checkpointing(self, best: BestCheckpoint) -> Checkpointing:
        made, batches, monitors = self.made, self.batches, self.monitors
        found = made.origin.checkpoint

        def state_of_run() -> dict[str, Any]:  # holds no self: in a cycle, what a run holds would outlive it
            return {
                "data": batches.history.state(),
                "schedule": made.schedule.state,
                "probe": made.probe and made.probe.crc32,
                "told": sorted(monitors.told & TOLD_ONCE_A_RUN),
            }

        return Checkpointing(
            config=self.config,
            world=self.world,
            engine=made.engine,
            state=made.state,
            saver=self.saver,
            clock=made.clock,
            best=best,
            state_of_run=state_of_run,
            log_event=self.events.log_event,
            watchdog=self.watchdog,
            progress=self.progress,
            resumed_from=found if found is not None and found.parent == self.folder else None,
        )

    def _build_evaluation(self, best: BestCheckpoint) -> Evaluation:
        stop, world, watchdog = self.stop, self.world, self.watchdog

        def between_batches() -> None:
            stop.stop_if_agreed(world)
            watchdog.beat()

        return Evaluation(
            config=self.config,
            world=self.world,
            run_dir=self.run_dir,
            engine=self.made.engine,
            clock=self.made.clock,
            labelled=self.made.labelled,
            health=self.made.health,
            begins_anew=not (self.made.origin.checkpoint or self.made.origin.weights),
            probe=self.made.probe,
            patch_side=self.made.patch_side,
            monitors=self.monitors,
            checkpoints=self.checkpoints,
            best=best,
            log=self.log,
            log_event=self.events.log_event,
            progress=self.progress,
            between_batches=between_batches,
            workers=self.made.workers,
        )

    def _build_loop(self) -> TrainingLoop:
        made, engine = self.made, self.made.engine
        log_skip = partial(self.events.log_event_of_rank, "skipped")
        return TrainingLoop(
            config=self.config,
            world=self.world,
            run_dir=self.run_dir,
            engine=engine,
            memory_format=made.execution.memory_format,
            clock=made.clock,
            schedule=made.schedule,
            batches=self.batches,
            skips=SkipMonitor(list(engine.shapes), self.config.train.precision, self.world, log_skip),
            monitors=self.monitors,
            unreadable=self.unreadable,
            checkpoints=self.checkpoints,
            evaluation=self.evaluation,
            probe=made.probe,
            stop=self.stop,
            log=self.log,
            log_event=self.events.log_event,
            watchdog=self.watchdog,
            progress=self.progress,
        )

    def run(self) -> int:
        """The exit status: done, or stopped with its state saved."""
        clock, log_event = self.made.clock, self.events.log_event
        with self.log:
            with self.watchdog.patient(Timeouts.of(self.config).save_s):
                self._log_start()
            try:
                if not self.made.origin.checkpoint:
                    self.evaluation.measure("before")
                with self.progress.doing("training", clock.end, done=clock.samples_seen, category="useful"):
                    self.loop.run()
                self._save_last()
                self.evaluation.finish(self.batches.source)
                if self.config.checkpoint.keep_best:
                    self.saver.prune()
            except StopRequested as stop:
                left = (
                    "All samples were seen: start it again for what is left of its end, evaluation and pictures."
                    if clock.at_end
                    else "Start it again and it goes on."
                )
                log_event(
                    "stop",
                    f"Stopped by {stop} after {clock.samples_seen:,} samples; {self._save_at_stop()}. {left}"
                    f"{self.unreadable.summary()}",
                )
                self._report()
                return EXIT_STOPPED
            finally:
                self.saver.close()
            log_event(
                "done",
                f"Done: {clock.samples_seen:,} samples in {counted(clock.step, 'update')}.{self.unreadable.summary()}",
            )
            self._report()
        return EXIT_DONE

    def _log_start(self) -> None:
        config, world, made = self.config, self.world, self.made
        staging_bytes = max(world.gather_objects(self.saver.nbytes))
        kind, text, fields = start_event(
            config, world, self.run_dir, made, staging_bytes=staging_bytes, attempt=self.attempt
        )
        self.log.event(kind, text, **fields)
        for kind, text in notes(config, world, made):
            self.events.log_event(kind, text)
        if native() is None:
            self.events.log_event_of_rank("note", MISSING)

    def _save_last(self) -> None:
        """Raises TrainingError where that fails."""
        if self.checkpoints.save():
            return
        newest = self.checkpoints.newest
        goes_on = (
            f"it goes on from {newest.name}"
            if newest
            else "there is no checkpoint of this start, and without an older one it begins anew"
        )
        raise TrainingError(
            "The run is complete, but its last checkpoint could not be written: free some space and start it again; "
            f"{goes_on}."
        )

    def _save_at_stop(self) -> str:
        if not self.made.clock.samples_seen:
            return "there is nothing to save yet"
        saved = self.checkpoints.save()
        return (
            f"saved as {saved.name}"
            if saved
            else "its state could not be saved, so it goes on from the checkpoint before"
        )

    def _report(self) -> None:
        if self.world.is_main:
            from seer_scale.observe.report import headline, write_report  # loads matplotlib, which no other rank wants

            with disk_may_fill(), self.progress.doing("writing the report"):
                path = write_report(self.run_dir)
                if line := headline(read_metrics(self.run_dir)[0]):
                    print(line, flush=True)
                print(f"Report: {shown(path)}", flush=True)


def write_config(config: Config, run_dir: Path, world: World) -> None:
    """The resolved recipe, in the run's folder. Collective. Raises UserError."""
    problem, path, text = None, run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False)
    if world.is_main and not (path.exists() and path.read_text() == text):
        try:
            write_whole(path, text)
        except OSError as error:
            problem = Problem(
                "run.dir", run_dir, f"it cannot be written ({error.strerror})", "free some space, or choose another"
            )
    if problem := world.broadcast_object(problem):
        raise UserError(problem)
