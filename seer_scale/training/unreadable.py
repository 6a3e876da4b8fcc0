"""Images that cannot be read, and whose place another has taken: a few on the console, all in a file of the rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from seer_scale.training.event_log import disk_may_fill

MAX_REMEMBERED = 1000
"""Images of which a rank knows that it has named them on the console."""
MAX_NAMED = 3
"""Images that one metric line names on the console."""


class UnreadableImages:
    """Those of this start. Each rank names its own; all ranks count all."""

    def __init__(self, run_dir: Path, rank: int):
        self._logs, self._rank = run_dir / "logs", rank
        self._named: set[str] = set()
        self._count = 0

    def add(self, sentences: Sequence[str], count: int) -> None:
        """Those since the last metric line. sentences: of this rank's; count: of all ranks."""
        self._count += count
        if not sentences:
            return
        new = [s for s in dict.fromkeys(sentences) if s not in self._named][:MAX_NAMED]
        if len(self._named) < MAX_REMEMBERED:
            self._named |= set(new)
            for sentence in new:
                print(f"Replaced an image that cannot be read: {sentence}", file=sys.stderr, flush=True)
        with disk_may_fill():
            self._logs.mkdir(exist_ok=True)
            with (self._logs / f"unreadable-{self._rank}.txt").open("a") as file:
                file.writelines(s + "\n" for s in sentences)

    def summary(self) -> str:
        """A sentence with a space before it; empty where all could be read."""
        if not self._count:
            return ""
        times = "once" if self._count == 1 else f"{self._count:,} times"
        where = self._logs / "unreadable-*.txt"
        return f" Another image took the place of one that cannot be read {times}: {where} name them."
