"""The log of a run: rows of metrics and events, each to all sinks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.files import plain, shown
from seer_scale.observe.console_sink import ConsoleSink
from seer_scale.observe.eta import Eta
from seer_scale.observe.progress import Progress, process_of_now
from seer_scale.observe.records import START_EVENTS, Record
from seer_scale.observe.sinks import Guarded, JsonLines, Sink, open_sinks


class RunLog:
    """Held open by rank 0; with `active` False every call does nothing.

    `total_samples` is the length of the run in images, `baseline` a name and the loss of a network that has learned
    nothing. progress, eta: those of the run, where it has its own; they come and go with the log otherwise. sinks: as
    in run.sinks. What cannot be written (see `sinks`) is told and costs nothing else.
    """

    def __init__(
        self, run_dir: Path, total_samples: int, baseline: tuple[str, float] | None, *, active: bool,
        progress: Progress | None = None, eta: Eta | None = None, sinks: Sequence[str] = ("tensorboard",),
    ):  # fmt: skip
        self.run_dir, self.active = Path(run_dir), active
        self._total, self._baseline, self._names = total_samples, baseline, sinks
        self._eta = eta or Eta(total_samples)
        self._own_progress = progress is None
        self._progress = progress or Progress(active=active)
        self._samples_seen = 0
        self._sinks: list[Sink] = []

    def __enter__(self) -> RunLog:
        if not self.active:
            return self
        self.run_dir.mkdir(parents=True, exist_ok=True)
        record = JsonLines(self.run_dir / "metrics.jsonl")
        if record.recent:
            self._samples_seen = record.recent[-1]["samples_seen"]
        self._eta.begin(self._samples_seen)
        console = ConsoleSink(self._total, self._baseline, self._progress, self._eta)
        console.recall(record.recent)
        if self._own_progress:
            self._progress.__enter__()
        self._sinks = [
            Guarded(f"{shown(self.run_dir)}/metrics.jsonl", record),
            *open_sinks(self._names, self.run_dir),
            console,
        ]
        return self

    def __exit__(self, *_: object) -> None:
        if self._own_progress:
            self._progress.__exit__()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def log(self, metrics: dict[str, Any]) -> None:
        """One row: `metrics` by name, with samples_seen; wall_time (unix seconds) is added. knn/top1 is in percent."""
        if not self.active:
            return
        row = self._line(metrics)
        self._eta.add(row)
        for sink in self._sinks:
            sink.row(row)

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Tell what happened, in one sentence. Kinds "start" and "resume" take the samples_seen they begin from."""
        if not self.active:
            return
        event = self._line({"event": kind, "text": shown(text)} | fields)
        if kind in START_EVENTS:
            self._eta.begin(event["samples_seen"])
        for sink in self._sinks:
            sink.event(event)

    def eta_s(self) -> float | None:
        """Seconds to the end of the run; None while no rate is known."""
        return self._eta.seconds()

    def _line(self, fields: dict[str, Any]) -> Record:
        now, stopwatch = time.time(), self._progress.stopwatch
        spent = stopwatch.take(now)
        if fields.get("event") in START_EVENTS:
            spent = {"start": now - fields.get("began", now)}
            fields = process_of_now() | fields
        own = {"wall_time": now, "spent": spent, "spending": stopwatch.category}
        line: Record = plain({"samples_seen": self._samples_seen} | fields | own)
        self._samples_seen = line["samples_seen"]
        return line
