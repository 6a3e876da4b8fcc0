"""How long anything may take: one table, from a recipe's two keys, that the watchdog and every process group are made
with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from seer_scale.config import Config


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds. The watchdog judges all but the first; 0 there is no limit.

    meet: until all ranks are there. update: between two updates (run.hang_timeout_s, which is at least ten times
    data.timeout_s, the time a loader may be stuck). lock: for what ran in this folder before to end. start: listing,
    verifying, building, loading. compile: a first update that compiles. save: a disk, for a checkpoint.
    """

    meet_s: float = 600.0
    update_s: float = 1200.0
    lock_s: float = 180.0
    start_s: float = 3600.0
    compile_s: float = 3600.0
    save_s: float = 3600.0

    @classmethod
    def of(cls, config: Config) -> Timeouts:
        return cls(update_s=config.run.hang_timeout_s)

    @property
    def groups(self) -> timedelta:
        """Of process groups: none in effect. A rank that waits for a lost one is ended by its own watchdog, in the time
        that what it does may take, and one that was stopped by SIGSTOP for an hour goes on."""
        return timedelta(days=365)
