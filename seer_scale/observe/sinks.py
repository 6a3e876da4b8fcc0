"""Where the lines of a run's log go: metrics.jsonl, which is the record, and the services that run.sinks names.

A sink that fails (a full disk, no network) costs a warning and its lines, never the run.
"""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.files import shown, to_json
from seer_scale.observe.records import START_EVENTS, Record, parsed, scalars
from seer_scale.observe.trackers import MLflow, WandB

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TAIL = 1 << 16
"""Bytes of an existing metrics.jsonl that hold its last values: about 150 lines."""
MAX_WAITING = 1000
"""Lines that may wait for a slow sink; further ones are dropped."""
SINK_CLOSE_S = 30.0
"""Seconds that the end of a run waits for what a slow sink still has to send."""


class Sink(Protocol):
    """Takes lines of plain values (see `records`), in their order, on rank 0. Any call may raise anything."""

    def row(self, row: Record) -> None:
        """A row of metrics, with samples_seen and wall_time; a value that was not finite is None."""

    def event(self, event: Record) -> None:
        """What happened."""

    def close(self) -> None:
        """No line follows."""


class JsonLines:
    """The record of a run; `recent` are the last lines an existing one holds. Raises OSError."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._fd).st_size
        start = max(0, size - TAIL)
        tail = os.pread(self._fd, size - start, start)
        whole = tail[: tail.rfind(b"\n") + 1]
        os.ftruncate(self._fd, start + len(whole))  # a last line torn by a kill goes
        self.recent = list(parsed(whole.splitlines()))

    def row(self, row: Record) -> None:
        """One line by one write: a reader, or a kill, sees all of it or none."""
        line = (to_json(row) + "\n").encode()
        size = os.fstat(self._fd).st_size
        if os.write(self._fd, line) < len(line):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    event = row

    def close(self) -> None:
        os.close(self._fd)


class TensorBoard:
    """Scalars by samples_seen, in RUN/tensorboard; a start purges what it abandons."""

    def __init__(self, run_dir: Path):
        self._folder = run_dir / "tensorboard"
        self._writer: SummaryWriter | None = None

    def row(self, row: Record) -> None:
        writer = self._writer or self._open()
        try:
            for name, value in scalars(row).items():
                writer.add_scalar(name, value, row["samples_seen"], walltime=row["wall_time"])
        except OSError:
            self._writer = None  # its thread does not survive an error: the next line opens another one
            raise

    def event(self, event: Record) -> None:
        if event["event"] in START_EVENTS:
            self.close()
            self._open(purge_from=event["samples_seen"] + 1)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        self._writer = None

    def _open(self, purge_from: int | None = None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # costs seconds

        try:
            self._writer = SummaryWriter(self._folder, purge_step=purge_from, flush_secs=10)
        except UnicodeError:
            raise UserError(f"the name of {shown(self._folder)} is not UTF-8") from None
        return self._writer


class Guarded:
    """A sink whose errors are told, once until it works again, and end nothing."""

    def __init__(self, name: str, sink: Sink):
        self._name, self._sink, self._failing = name, sink, False

    def row(self, row: Record) -> None:
        self._try(lambda: self._sink.row(row))

    def event(self, event: Record) -> None:
        self._try(lambda: self._sink.event(event))

    def close(self) -> None:
        self._try(self._sink.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
            self._failing = False
        except Exception as error:
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
            fix = ": free some space" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
            self.warn(f"cannot be written to ({reason}){fix}; the run goes on, unlogged there until that works again.")

    def warn(self, clause: str) -> None:
        if not self._failing:
            print(f"{self._name} {clause}", file=sys.stderr, flush=True)
        self._failing = True


class Background:
    """A sink that may wait for a network: a thread of its own calls it."""

    def __init__(self, sink: Guarded):
        self._sink = sink
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="sink", daemon=True)
        self._thread.start()

    def row(self, row: Record) -> None:
        self._put(lambda: self._sink.row(row))

    def event(self, event: Record) -> None:
        self._put(lambda: self._sink.event(event))

    def close(self) -> None:
        self._put(self._sink.close)
        self._put(None)
        self._thread.join(SINK_CLOSE_S)
        if self._thread.is_alive():
            self._sink.warn("is too slow: what it has not taken by now is left out.")

    def _put(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._sink.warn("is too slow: lines are left out.")

    def _work(self) -> None:
        while call := self._calls.get():
            call()


SINKS: dict[str, Callable[[Path], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
"""What run.sinks may name; each is made of the run's folder."""
SLOW_SINKS = {"wandb", "mlflow"}
"""Those that may wait for a network."""


def open_sinks(names: Sequence[str], run_dir: Path) -> list[Sink]:
    """Those of run.sinks; one that cannot be made is told and left out."""
    sinks: list[Sink] = []
    for name in dict.fromkeys(names):
        try:
            sink = Guarded(f"run.sinks {name}", SINKS[name](run_dir))
        except Exception as error:
            print(
                f"run.sinks {name} cannot be used ({error}); the run goes on without it.", file=sys.stderr, flush=True
            )
        else:
            sinks.append(Background(sink) if name in SLOW_SINKS else sink)
    return sinks


def check_installed(names: Sequence[str]) -> None:
    """That what run.sinks names can be imported. Raises ConfigError."""
    found = {name: find_spec(name) for name in names}
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]  # a folder is no package
    if missing:
        rule = "needs the Python package {}, which is not installed"
        raise ConfigError([Problem("run.sinks", NOTHING, rule.format(n), how_to_install(n)) for n in missing])
