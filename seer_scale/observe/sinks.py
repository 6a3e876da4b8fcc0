"""Where metrics go: metrics.jsonl (the record), TensorBoard, and the console.

metrics.jsonl holds one JSON object a line, in the order things happened. A line with the key "event" tells of something
(kinds "start" and "resume" say from which samples_seen a process went on); every other line is a row of metrics.
`read_metrics` turns that history into the one path the weights really took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seer_scale.errors import NOTHING, ConfigError, Problem
from seer_scale.extras import how_to_install
from seer_scale.files import plain, shown, to_json
from seer_scale.formatting import countdown, rate
from seer_scale.observe.eta import Eta
from seer_scale.observe.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BEGINNINGS = ("start", "resume")
"""Kinds of events with which a process begins: what was logged beyond their samples_seen is abandoned."""

TAIL = 1 << 16  # bytes of an existing metrics.jsonl that hold its last values: about 150 lines


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among `lines`; a torn line is passed over."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("samples_seen"), int):
            yield record


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's log in the order they were written, also those that a restart abandoned."""
    path = Path(run_dir) / "metrics.jsonl"
    return list(_records(path.read_bytes().splitlines())) if path.exists() else []


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, events) of a run, also while it runs. A run without metrics.jsonl has neither.

    Rows are sorted by samples_seen, one for each: lines of the same samples_seen are merged and the later value wins.
    Rows of a stretch that a restart abandoned are dropped. Events are all kept, in the order they happened.
    """
    rows: dict[int, dict[str, Any]] = {}
    events = []
    for record in read_records(run_dir):
        samples = record["samples_seen"]
        if "event" in record:
            events.append(record)
            if record["event"] in BEGINNINGS:
                rows = {s: row for s, row in rows.items() if s <= samples}
        else:
            rows[samples] = rows.get(samples, {}) | record
    return [rows[s] for s in sorted(rows)], events


def _number(row: dict[str, Any], name: str) -> float | None:
    """A metric of a row; None where it is missing or was not finite."""
    value = row.get(name)
    return value if isinstance(value, int | float) else None


def compare(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether kNN figures of two rows are of one measurement, as far as they tell (logs of old do not)."""
    marks = [r["knn/measurement"] for r in (row, other) if r.get("knn/measurement")]
    return len(set(marks)) < 2


def check_installed(sinks: Sequence[str]) -> None:
    """That what run.sinks names can be imported. Raises ConfigError."""
    if missing := [sink for sink in sinks if not find_spec(sink)]:
        raise ConfigError(
            [
                Problem("run.sinks", NOTHING, f"needs the Python package {sink}, which is not installed", fix)
                for sink in missing
                for fix in [how_to_install(sink)]
            ]
        )


class RunLog:
    """The log of a run, held open by rank 0; with `active` False every call does nothing.

    `total_samples` is the length of the run in images, `baseline` a name and the loss of a network that has learned
    nothing.
    A disk that is full stops the logging, with one sentence, and never the run. progress, eta: those of the run, where
    it has its own; they come and go with the log otherwise.
    """

    def __init__(
        self, run_dir: Path, total_samples: int, baseline: tuple[str, float], *, active: bool,
        progress: Progress | None = None, eta: Eta | None = None, sinks: Sequence[str] = ("tensorboard",),
    ):  # fmt: skip
        self.run_dir, self.total_samples, self.baseline, self.active = Path(run_dir), total_samples, baseline, active
        self._eta = eta or Eta(total_samples)
        self._latest: dict[str, Any] = {"samples_seen": 0}
        self._fd, self._silent = -1, False
        self._tensorboard: SummaryWriter | None = None
        self._no_tensorboard = "tensorboard" not in sinks
        self._own_progress = progress is None
        self._progress = progress or Progress(active=active)

    def __enter__(self) -> RunLog:
        if not self.active:
            return self
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.run_dir / "metrics.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._recall()
        self._progress.display = self._display
        if self._own_progress:
            self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._own_progress:
            self._progress.__exit__()
        if self._tensorboard:
            with self._whatever_the_disk():
                self._tensorboard.close()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._tensorboard = -1, None

    def log(self, metrics: dict[str, Any]) -> None:
        """One row: `metrics` by name, with samples_seen; wall_time (unix seconds) is added. knn/top1 is in percent."""
        if not self.active:
            return
        row = plain({"samples_seen": self._latest["samples_seen"]} | metrics | {"wall_time": time.time()})
        self._take_in(row)
        with self._whatever_the_disk():
            self._append(row)
            self._to_tensorboard(row)
        if not self._progress.on_terminal or "knn/top1" in row:  # which shows the others at its foot
            self._progress.print(self._sentence(row))

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Tell what happened, in one sentence. Kinds "start" and "resume" take the samples_seen they begin from."""
        if not self.active:
            return
        text = shown(text)
        event = {"event": kind, "text": text, "samples_seen": self._latest["samples_seen"]} | fields
        event = plain(event | {"wall_time": time.time()})
        if kind in BEGINNINGS:
            self._eta.begin(event["samples_seen"])
            self._latest["samples_seen"] = event["samples_seen"]
        with self._whatever_the_disk():
            self._append(event)
            if kind in BEGINNINGS:
                self._open_tensorboard(purge_from=event["samples_seen"] + 1)
        self._progress.print(text)

    def eta_s(self) -> float | None:
        """Seconds to the end of the run; None while no rate is known."""
        return self._eta.seconds()

    # -------------------------------------------------------------------------------------------- the record

    def _recall(self) -> None:
        """Heal a last line torn by a kill, and learn the recent values from the end of the file."""
        size = os.fstat(self._fd).st_size
        start = max(0, size - TAIL)
        tail = os.pread(self._fd, size - start, start)
        whole = tail[: tail.rfind(b"\n") + 1]
        os.ftruncate(self._fd, start + len(whole))
        for record in _records(whole.splitlines()):
            if record.get("event") in BEGINNINGS:
                self._latest["samples_seen"] = record["samples_seen"]
            elif "event" not in record:
                self._learn(record)
        for name in ("wall_time", "throughput/img_per_s"):  # of another start, which may have run on other ranks
            self._latest.pop(name, None)
        self._eta.begin(self._latest["samples_seen"])

    def _take_in(self, row: dict[str, Any]) -> None:
        self._learn(row)
        self._eta.add(row)

    def _learn(self, row: dict[str, Any]) -> None:
        self._latest |= row
        if "knn/top1" in row:
            self._latest["knn/samples"] = row["samples_seen"]

    def _append(self, record: dict[str, Any]) -> None:
        """One line by one write: a reader, or a kill, sees all of it or none."""
        line = (to_json(record) + "\n").encode()
        size = os.fstat(self._fd).st_size
        if os.write(self._fd, line) < len(line):
            os.ftruncate(self._fd, size)
            raise OSError("only part of a line could be written")

    @contextmanager
    def _whatever_the_disk(self) -> Iterator[None]:
        try:
            yield
            self._silent = False
        except OSError as error:
            if not self._silent:
                print(f"Metrics cannot be written to {shown(self.run_dir)} ({error.strerror or error}): free some "
                "space; "
                      "the run goes on, unlogged until then.", file=sys.stderr, flush=True)  # fmt: skip
            self._silent, self._tensorboard = True, None  # its thread does not survive an error: open another one

    def _open_tensorboard(self, purge_from: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds: rank 0 only

        if self._tensorboard:
            self._tensorboard.close()
        if self._no_tensorboard:
            return
        folder = self.run_dir / "tensorboard"
        try:
            self._tensorboard = SummaryWriter(folder, purge_step=purge_from, flush_secs=10)
        except UnicodeError:
            self._tensorboard, self._no_tensorboard = None, True
            self._progress.print(
                f"TensorBoard cannot write to {shown(folder)}, whose name is not UTF-8: the run goes on without it."
            )

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        if self._tensorboard is None:
            self._open_tensorboard()
        if self._tensorboard is None:
            return
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("samples_seen", "wall_time"):
                self._tensorboard.add_scalar(name, value, row["samples_seen"], walltime=row["wall_time"])

    # -------------------------------------------------------------------------------------------- the console

    def _values(self, row: dict[str, Any]) -> list[str]:
        """What a person wants of a row, in a few words each."""
        words = []
        if "loss" in row:
            loss = _number(row, "loss")
            name, of_nothing = self.baseline
            words.append(f"loss {'not finite' if loss is None else f'{loss:.3f}'} ({name} {of_nothing:.3f})")
        if (lr := _number(row, "lr")) is not None:
            words.append(f"lr {lr:.3g}")
        if (scale := _number(row, "loss_scale")) is not None and scale != 1:
            words.append(f"scale {scale:g}" if scale < 1 else f"scale {scale:.0f}")
        if skipped := _number(row, "skipped"):
            words.append(f"skipped {skipped:.0f}")
        if (top1 := _number(row, "knn/top1")) is not None:
            error, most = _number(row, "knn/top1_stderr"), _number(row, "knn/majority")
            spread = f" ± {error:.1f}" if error is not None else ""
            measured = row.get("knn/samples", row["samples_seen"])
            when = f" at {measured:,} samples" if measured != row["samples_seen"] else ""
            words.append(
                f"kNN top-1 {top1:.1f} %{spread}{when}"
                + (f" (commonest class {most:.1f} %)" if most is not None else "")
            )
        return words

    def _speed(self, row: dict[str, Any], idle_s: float = 0) -> list[str]:
        words, speed, eta = [], _number(row, "throughput/img_per_s"), self.eta_s()
        if speed is not None:
            words.append(f"{rate(speed)} img/s")
        if eta is not None:
            about = "about " * self._eta.is_rough
            words.append(f"ETA {about}{countdown(eta - idle_s)}")
        return words

    def _sentence(self, row: dict[str, Any]) -> str:
        speed = self._speed(row) if "step" in row else []
        return "  ".join([f"samples {row['samples_seen']:,}/{self.total_samples:,}", *self._values(row), *speed])

    def _display(self) -> Group:
        """Two lines at the foot of the terminal: how far, and how well."""
        latest = dict(self._latest)  # the display refreshes in a thread of its own
        samples, idle_s = latest["samples_seen"], time.time() - latest.get("wall_time", time.time())
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, self.total_samples), completed=samples)
        grid.add_row(bar, "  ".join([f"{samples:,}/{self.total_samples:,}", *self._speed(latest, idle_s)]))
        return Group(grid, Text("  ".join(self._values(latest)), style="dim", no_wrap=True, overflow="ellipsis"))
