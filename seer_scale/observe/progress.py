"""What a process is at: a bar that moves on a terminal, elsewhere a line now and then where nothing else is said, and a
file in the run's folder by which others see that it lives."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seer_scale import console as consoles
from seer_scale.files import to_json, write_whole
from seer_scale.formatting import elapsed
from seer_scale.observe.stopwatch import Stopwatch

FIRST_S = 10.0
"""Seconds after which something that takes long is told for the first time."""
FILE = Path("logs") / "progress.json"


@dataclass
class Task:
    """unit: what is counted, of which `done` of `total` (0: unknown) are done. since, advanced: unix seconds."""

    what: str
    total: int = 0
    unit: str = "images"
    done: int = 0
    since: float = field(default_factory=lambda: time.time())
    advanced: float = field(default_factory=lambda: time.time())

    def text(self, now: float) -> str:
        of = f": {min(self.done, self.total):,} of {self.total:,} {self.unit}" if self.total else ""
        still = now - self.advanced
        idle = f", the last {elapsed(still)} ago" if self.total and self.done and still >= FIRST_S else ""
        return f"{self.what[:1].upper()}{self.what[1:]}{of}, for {elapsed(now - self.since)}{idle}"


class _Recorded(Console):
    """What is printed above the bar, by anyone, is kept as what is printed without one."""

    def print(self, *objects: Any, **how: Any) -> None:
        for said in objects:
            if isinstance(said, str | Text):
                consoles.record.add(str(said))
        super().print(*objects, **how)


class Progress:
    """Says what goes on; a context. With `active` False, which all ranks but one have, it does nothing.

    every_s: no more than so many seconds pass without a line where there is no terminal (0: nothing is ever said, nor
    written). run_dir: where to write FILE. to_stderr: for commands whose output is a result.
    """

    def __init__(
        self, run_dir: Path | None = None, *, active: bool = True, every_s: float = 60.0, to_stderr: bool = False
    ):
        self._file = run_dir / FILE if run_dir else None
        self._active, self._every_s, self._to_stderr = active, every_s, to_stderr
        self.display: Callable[[], RenderableType] | None = None
        """What else stands at the foot of a terminal."""
        self.stopwatch = Stopwatch()
        self._tasks: list[Task] = []
        self._live: Live | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_line = self._last_write = time.time()
        self._written: tuple[str, int] | None = None
        self._untold = False
        """No line since the newest task began."""

    def __enter__(self) -> Progress:
        if not self._active:
            return self
        stream = sys.stderr if self._to_stderr else sys.stdout
        # typeshed's TextIOBase is no IO[str], though it has all of one
        console = _Recorded(highlight=False, file=cast(TextIO, consoles.Console(stream, raw=True)))
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render, console=console, refresh_per_second=2, transient=self._to_stderr
            )
            self._live.start()
        if self._every_s:
            self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()
        if self._live:
            self._live.stop()
        self._live = self._thread = None
        if self._active and self._file:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    @property
    def on_terminal(self) -> bool:
        return self._live is not None

    @contextmanager
    def doing(
        self, what: str, total: int = 0, unit: str = "images", done: int = 0, *, category: str = ""
    ) -> Iterator[None]:
        """What is done within, told if it takes long. It may stand within another. category: what its time is charged
        to (see `time_account`), if not to that of what it stands within."""
        self._tasks.append(Task(what, total, unit, done))
        self._untold = True
        if self._live and len(self._tasks) == 1:  # what is short within it would only flicker
            self._live.refresh()
        try:
            with self.stopwatch.spending(category or self.stopwatch.category):
                yield
        finally:
            self._tasks.pop()

    def spending(self, category: str) -> AbstractContextManager[None]:
        """What is done within is charged to this category (see `time_account`)."""
        return self.stopwatch.spending(category)

    def advance(self, num: int) -> None:
        """So many more are done of what is being done."""
        if self._tasks:
            task = self._tasks[-1]
            task.done, task.advanced = task.done + num, time.time()

    def print(self, text: str) -> None:
        """A line, above the bar if there is one."""
        self._last_line, self._untold = time.time(), False
        if self._live:
            self._live.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr if self._to_stderr else sys.stdout, flush=True)

    def due(self, now: float) -> str | None:
        """The line that is to be said now, if any."""
        if not self._tasks or self._live:
            return None
        task = self._tasks[-1]
        limit_s = min(FIRST_S, self._every_s) if self._untold else self._every_s
        return f"{task.text(now)} ..." if now - max(self._last_line, task.since) >= limit_s else None

    def _beat(self) -> None:
        while not self._over.wait(min(1.0, self._every_s / 4)):
            now = time.time()
            with suppress(OSError):  # a console that is gone, or a full disk, of which the log tells
                if line := self.due(now):
                    self.print(line)
                self._write(now)

    def _write(self, now: float) -> None:
        task = self._tasks[-1] if self._tasks else None
        if self._file is None or task is None:
            return
        if now - self._last_write < self._every_s and self._written == (task.what, len(self._tasks)):
            return
        self._last_write, self._written = now, (task.what, len(self._tasks))
        write_whole(self._file, to_json(vars(task) | {"time": now, **process_of_now()}))

    def _render(self) -> RenderableType:
        """Called in a thread of its own."""
        parts: list[RenderableType] = []
        tasks, now = list(self._tasks), time.time()
        if tasks and (self.display is None or len(tasks) > 1):
            task = tasks[-1]
            grid = Table.grid(padding=(0, 2), expand=True)
            grid.add_column(ratio=1)
            grid.add_column(no_wrap=True)
            bar = ProgressBar(total=task.total or None, completed=task.done, pulse=not task.total)
            grid.add_row(bar, task.text(now))
            parts.append(grid)
        return Group(*parts, *([self.display()] if self.display else []))


def read_progress(run_dir: Path, now: float | None = None) -> dict[str, Any] | None:
    """What the process of a run was last at, as it wrote it: a Task's fields, `time` when it did, `text` for people.
    None where nothing is said, or by a process that is no more."""
    try:
        found = json.loads((Path(run_dir) / FILE).read_text())
        task = Task(**{f.name: found[f.name] for f in fields(Task)})
        return None if is_gone(found) else found | {"text": task.text(found["time"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # torn, or another's
        return None


def process_of_now() -> dict[str, Any]:
    """Who writes, for `is_gone`."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def is_gone(written: dict[str, Any]) -> bool:
    """Whether the process that wrote this was of this machine and is no more."""
    pid = written.get("pid")
    if written.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and another user's
        pass
    return False
