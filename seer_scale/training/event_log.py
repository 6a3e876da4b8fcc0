"""What a run tells beside its metric lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from seer_scale.data.loading.pool import warn
from seer_scale.distributed import World
from seer_scale.errors import DataError
from seer_scale.observe.run_log import RunLog
from seer_scale.training.clock import Clock


class LogEvent(Protocol):
    def __call__(self, kind: str, text: str, **fields: Any) -> None:
        """One event of this kind: a sentence, and what of it programs read."""


class EventLog:
    """Events in a run's log, each at the sample the run is at."""

    def __init__(self, log: RunLog, clock: Clock, world: World):
        self._log, self._clock, self._world = log, clock, world

    def log_event(self, kind: str, text: str, **fields: Any) -> None:
        """What all ranks know; rank 0 writes it."""
        self._log.event(kind, text, samples_seen=self._clock.samples_seen, **fields)

    def log_event_of_rank(self, kind: str, text: str) -> None:
        """What this rank alone has seen."""
        if self._world.is_main:
            self.log_event(kind, text)
        else:
            warn(f"Rank {self._world.rank}: {text}")


@contextmanager
def disk_may_fill() -> Iterator[None]:
    """A full disk costs a picture, a line or the report, never the run."""
    try:
        yield
    except (OSError, DataError) as error:
        print(
            f"The report or a log cannot be written ({getattr(error, 'strerror', None) or error}): free some space, "
            "then run seer-scale report.",
            file=sys.stderr,
            flush=True,
        )
