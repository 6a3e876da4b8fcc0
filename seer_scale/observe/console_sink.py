"""The console as a sink: a sentence a line, or two lines at the foot of a terminal that show the latest values."""

from __future__ import annotations

import time

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seer_scale.formatting import countdown, rate
from seer_scale.observe.eta import Eta
from seer_scale.observe.progress import Progress
from seer_scale.observe.records import START_EVENTS, Record


class ConsoleSink:
    """total_samples: the length of the run. baseline: a name and the loss of a network that has learned
    nothing, where it is known."""

    def __init__(self, total_samples: int, baseline: tuple[str, float] | None, progress: Progress, eta: Eta):
        self._total, self._baseline, self._progress, self._eta = total_samples, baseline, progress, eta
        self._latest: Record = {"samples_seen": 0}
        progress.display = self._display

    def recall(self, records: list[Record]) -> None:
        """Take over what another start has logged last; its speed was perhaps that of other ranks."""
        for record in records:
            if record.get("event") in START_EVENTS:
                self._latest["samples_seen"] = record["samples_seen"]
            elif "event" not in record:
                self._learn(record)
        for name in ("wall_time", "throughput/img_per_s"):
            self._latest.pop(name, None)

    def row(self, row: Record) -> None:
        self._learn(row)
        if not self._progress.on_terminal or "evaluation/stage" in row:  # which shows the others at its foot
            self._progress.print(self._sentence(row))

    def event(self, event: Record) -> None:
        if event["event"] in START_EVENTS:
            self._latest["samples_seen"] = event["samples_seen"]
        self._progress.print(event["text"])

    def close(self) -> None:
        """The progress display is closed by who opened it."""

    def _learn(self, row: Record) -> None:
        self._latest |= row
        if "knn/top1" in row:
            self._latest["knn/samples"] = row["samples_seen"]

    def _values(self, row: Record) -> list[str]:
        """What a person wants of a row, in a few words each."""
        words = []
        if "loss" in row:
            loss = _number(row, "loss")
            of_nothing = f" ({self._baseline[0]} {self._baseline[1]:.3f})" if self._baseline else ""
            words.append(f"loss {'not finite' if loss is None else f'{loss:.3f}'}{of_nothing}")
        if (lr := _number(row, "lr")) is not None:
            words.append(f"lr {lr:.3g}")
        if (scale := _number(row, "loss_scale")) is not None and scale != 1:
            words.append(f"scale {scale:g}" if scale < 1 else f"scale {scale:.0f}")
        if skipped := _number(row, "skipped"):
            words.append(f"skipped {skipped:.0f}")
        if (top1 := _number(row, "knn/top1")) is not None:
            error, most = _number(row, "knn/top1_stderr"), _number(row, "knn/majority")
            spread = f" ± {error:.1f}" if error is not None else ""
            measured = _number(row, "knn/samples")
            when = f" at {measured:,} samples" if measured not in (None, row["samples_seen"]) else ""
            commonest = f" (commonest class {most:.1f} %)" if most is not None else ""
            words.append(f"kNN top-1 {top1:.1f} %{spread}{when}{commonest}")
        if (top1 := _number(row, "probe/top1")) is not None:
            words.append(f"probe top-1 {top1:.1f} %")
        if (rank := _number(row, "health/rankme")) is not None:
            words.append(f"effective rank {rank:.0f}")
        return words

    def _speed(self, row: Record, idle_s: float = 0) -> list[str]:
        words, speed, eta = [], _number(row, "throughput/img_per_s"), self._eta.seconds()
        if speed is not None:
            words.append(f"{rate(speed)} img/s")
        if eta is not None:
            words.append(f"ETA {'about ' * self._eta.is_rough}{countdown(eta - idle_s)}")
        return words

    def _sentence(self, row: Record) -> str:
        speed = self._speed(row) if "step" in row else []
        return "  ".join([f"samples {row['samples_seen']:,}/{self._total:,}", *self._values(row), *speed])

    def _display(self) -> Group:
        """Two lines at the foot of the terminal: how far, and how well."""
        latest = dict(self._latest)  # the display refreshes in a thread of its own
        samples, idle_s = latest["samples_seen"], time.time() - latest.get("wall_time", time.time())
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, self._total), completed=samples)
        grid.add_row(bar, "  ".join([f"{samples:,}/{self._total:,}", *self._speed(latest, idle_s)]))
        return Group(grid, Text("  ".join(self._values(latest)), style="dim", no_wrap=True, overflow="ellipsis"))


def _number(row: Record, name: str) -> float | None:
    """A metric of a row; None where it is missing or was not finite."""
    value = row.get(name)
    return value if isinstance(value, int | float) else None
