"""When a run will end: updates, evaluations and checkpoints estimated apart, from what this process has seen alone."""

from __future__ import annotations

from collections import deque
from typing import Any

MAX_LINES = 50
"""Metric lines over which the rate of updates is taken."""


class Eta:
    """Takes the rows of a log; knows nothing of other starts, which may have had other ranks, threads or neighbours.

    evaluate_every, checkpoint_every: samples between two of them, 0 for none but at the end.
    """

    def __init__(self, total_samples: int, *, evaluate_every: int = 0, checkpoint_every: int = 0):
        self._total, self._evaluate_every, self._checkpoint_every = total_samples, evaluate_every, checkpoint_every
        self._updates: deque[tuple[int, float]] = deque(maxlen=MAX_LINES)
        self._seen = 0
        self._warms_up = True
        self._evaluation_s = self._stall_s = 0.0

    def begin(self, samples_seen: int) -> None:
        """Training goes on from here."""
        self._seen = samples_seen

    def add(self, row: dict[str, Any]) -> None:
        """`throughput/img_per_s` is that of the updates alone, without evaluations and checkpoints."""
        self._evaluation_s = _positive(row, "time/evaluation_s") or self._evaluation_s
        self._stall_s = _positive(row, "time/checkpoint_stall_s") or self._stall_s
        if "step" not in row:
            return
        num, rate = row["samples_seen"] - self._seen, _positive(row, "throughput/img_per_s")
        self._seen = row["samples_seen"]
        if num > 0 and rate:
            if self._warms_up and self._updates:  # the first line has starting loaders and cold caches in it
                self._updates.clear()
                self._warms_up = False
            self._updates.append((num, num / rate))

    def seconds(self) -> float | None:
        """To the end of the run; None while no rate is known, or it says that the run does not move."""
        if not self._updates or not (left := max(0, self._total - self._seen)):
            return 0.0 if self._updates else None
        num, spent_s = map(sum, zip(*self._updates))
        pauses_s = self._evaluation_s * (self._left(self._evaluate_every) + 1) + self._stall_s * self._left(
            self._checkpoint_every
        )
        updates_s = left * spent_s / num
        return updates_s + pauses_s if updates_s < 1e9 else None

    @property
    def is_rough(self) -> bool:
        """Whether it is from the first line alone, in which loaders start and caches are cold."""
        return self._warms_up and len(self._updates) == 1

    def _left(self, every: int) -> int:
        """Multiples of `every` between here and the end."""
        return (self._total - 1) // every - self._seen // every if every else 0


def _positive(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return value if isinstance(value, int | float) and value > 0 else 0.0
