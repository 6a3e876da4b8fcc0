"""How far a run is, and what it has come to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """samples_seen is the one clock of a run; step counts the updates, of global_batch images each. end: samples_seen
    after the last update."""

    global_batch: int
    end: int
    samples_seen: int = 0
    step: int = 0

    def advance(self) -> None:
        """One update was made."""
        self.samples_seen, self.step = self.samples_seen + self.global_batch, self.step + 1

    @property
    def at_end(self) -> bool:
        return self.samples_seen >= self.end

    @property
    def is_last_update(self) -> bool:
        """Whether the next update is the last."""
        return self.samples_seen + self.global_batch >= self.end

    def passed_multiple(self, every: int) -> bool:
        """Whether the last update reached or passed a multiple of `every` samples; 0: never."""
        return bool(every) and self.samples_seen // every != (self.samples_seen - self.global_batch) // every

    def will_pass_multiple(self, every: int) -> bool:
        """Whether the next update will."""
        return bool(every) and (self.samples_seen + self.global_batch) // every != self.samples_seen // every
