"""The train batches of this rank, from the data that a run has now, and how it goes over to other data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path

from seer_scale.config import Config
from seer_scale.data.batch import Batch
from seer_scale.data.loading.listing import share
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sources import Source, open_source
from seer_scale.distributed import World
from seer_scale.errors import DataError, UserError
from seer_scale.formatting import counted
from seer_scale.timeouts import Timeouts
from seer_scale.training.clock import Clock
from seer_scale.training.data_history import DataHistory, manifest_of
from seer_scale.training.event_log import EventLog
from seer_scale.training.watchdog import Watchdog


class Batches:
    """This rank's batches from where the clock stands on. A context, which ends the loader processes.

    waited_s: seconds that the last `next` waited. was_read: whether an earlier start has read these data, so that
    what cannot be read now may be a passing fault.
    """

    def __init__(
        self, config: Config, world: World, run_dir: Path, history: DataHistory, clock: Clock, events: EventLog,
        watchdog: Watchdog, *, workers: int, was_read: bool = False,
    ):  # fmt: skip
        self.history, self.waited_s = history, 0.0
        self._config, self._world, self._run_dir, self._clock = config, world, run_dir, clock
        self._events, self._watchdog, self._workers, self._was_read = events, watchdog, workers, was_read
        self._loader: Generator[Batch, None, None] | None = None
        self._refused = 0

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def source(self) -> Source:
        return self.history.source

    @property
    def epoch(self) -> float:
        """Epochs seen, of the data at each time."""
        return self.history.sampler.progress(self._clock.samples_seen)

    def next(self) -> Batch | None:
        """The next one; None after the last. Raises DataError where too many images in a row cannot be read."""
        begin, self._loader = time.perf_counter(), self._loader or self._open()
        try:
            batch = next(self._loader, None)
        except DataError as problem:
            problem.single_rank, problem.retryable = True, self._was_read
            raise
        self.waited_s, self._was_read = time.perf_counter() - begin, True
        return batch

    def _open(self) -> Generator[Batch, None, None]:
        data, device = self._config.data, self._world.device.type
        return train_batches(
            self.source,
            dataclasses.replace(data, workers=self._workers),
            self._config.views,
            self.history.sampler,
            rank=self._world.rank,
            world_size=self._world.size,
            start=self._clock.samples_seen,
            stop=self._config.train.total_samples,
            pin=device == "cuda",
            on_device=data.on_device(device),
            log=partial(self._events.log_event_of_rank, "loader"),
        )

    def _close(self) -> None:
        if self._loader:
            self._loader.close()  # and its processes with it
        self._loader = None

    def refresh(self, number: int) -> bool:
        """Go on with manifest `number` of this run, if it is newer than the one in use; whether that was done.
        Collective. A manifest that cannot be used is told of, once."""
        if number <= max(self.history.refreshes, self._refused):
            return False
        path, before = manifest_of(self._run_dir, number), self.history

        def refreshed() -> DataHistory:
            return before.refreshed(open_source(str(path)), number, self._clock.samples_seen)

        try:
            with self._watchdog.patient(Timeouts.of(self._config).start_s):
                self.history = share(self._world, self._run_dir / "logs", refreshed, lambda history: [history.source])
        except UserError as problem:
            self._refused = number
            self._events.log_event(
                "refresh_failed", f"{path} cannot be used, so training goes on with the data as they are: {problem}"
            )
            return False
        self._close()
        old, new = dict(before.versions[-1].parts), dict(self.history.versions[-1].parts)
        added = sum(num for name, num in new.items() if name not in old)
        gone = sum(num for name, num in old.items() if name not in new)
        left = self.history.sampler.left(self._clock.samples_seen)
        self._events.log_event(
            "refresh",
            f"The data are those of {path} now: {counted(len(self.source), 'image')} in {counted(len(new), 'part')}, "
            f"{added:,} of them new, {gone:,} gone. Epoch {int(self.epoch)} goes on with {counted(left, 'image')}.",
            images=len(self.source),
            new=added,
            gone=gone,
        )
        return True
