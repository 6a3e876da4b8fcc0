"""Which of a run's categories each second goes to, measured as it passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Every second is charged to the innermost `spending` it passes in, and outside of all to "other"."""

    def __init__(self) -> None:
        self._categories = ["other"]
        self._since = time.time()
        self._spent: dict[str, float] = {}

    @property
    def category(self) -> str:
        """Of now."""
        return self._categories[-1]

    @contextmanager
    def spending(self, category: str) -> Iterator[None]:
        self._charge(time.time())
        self._categories.append(category)
        try:
            yield
        finally:
            self._charge(time.time())
            self._categories.pop()

    def take(self, now: float) -> dict[str, float]:
        """Category -> seconds since it was asked last; their sum is the time that has passed."""
        self._charge(now)
        spent, self._spent = self._spent, {}
        return spent

    def _charge(self, now: float) -> None:
        seconds, self._since = max(0.0, now - self._since), now
        if seconds:
            self._spent[self.category] = self._spent.get(self.category, 0.0) + seconds
