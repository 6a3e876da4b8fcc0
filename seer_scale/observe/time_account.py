"""Where a run's time went: useful updates, waiting for data, stalls of checkpoints, starts, work that was lost; and
goodput.

Each line of metrics.jsonl tells what the time since the line before was spent on (see `stopwatch`): this sums it, an
attempt (one process's part of the log, from its "start" or "resume" event on) after the other. Updates beyond what the
next attempt went on from are lost, and so is what a killed process had not logged yet. launch/attempts.jsonl, where a
launcher has started the run, tells when and how attempts ended, and of those that logged nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seer_scale.formatting import counted
from seer_scale.observe.progress import is_gone, read_progress
from seer_scale.observe.records import START_EVENTS, Record, read_records

CATEGORIES = {
    "useful": "updates that count",
    "data_wait": "waiting for images",
    "stall": "waiting for checkpoints",
    "evaluation": "evaluation",
    "start": "starting and loading",
    "lost": "updates that were lost",
    "other": "the rest",
    "down": "not running (queue, restart)",
}
"""Everything a run's time is spent on, as people say it."""

STILL_RUNNING, DONE, STOPPED = "running", "done", "stopped"
"""How an attempt has ended, where nothing went wrong."""


@dataclass
class Interval:
    """Updates between two metric lines: samples_seen before and after, and what they took."""

    seen: tuple[int, int]
    useful_s: float
    wait_s: float

    def share_below(self, samples: float) -> float:
        """Of its samples, those up to `samples`."""
        begin, end = self.seen
        return min(1.0, max(0.0, (samples - begin) / (end - begin)))


@dataclass
class Attempt:
    """began, ready, ended: unix seconds. seen: samples when it began, and when it ended. cause: how it ended. on: what
    it ran on. updated: when its first update was done, as far as a metric line tells."""

    began: float
    ready: float
    ended: float
    seen: tuple[int, int]
    cause: str
    on: str = ""
    updated: float | None = None
    lost_s: float = 0.0
    recovered_s: float | None = None
    """Of one that failed: from its end to the next update, in whatever attempt that came."""
    intervals: list[Interval] = field(default_factory=list, repr=False)

    @property
    def has_failed(self) -> bool:
        return self.cause not in (STILL_RUNNING, DONE, STOPPED)


@dataclass
class TimeAccount:
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    attempts: list[Attempt] = field(default_factory=list)
    now: dict[str, Any] | None = None
    """Of a run that goes on: what it is at (see read_progress), and `silent_s`, seconds since its last sign of life."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Useful updates' share of the time in which the run held its machines."""
        held = self.total_s - self.seconds["down"]
        return self.seconds["useful"] / held if held else 0.0

    @property
    def mean_time_to_recover_s(self) -> float | None:
        """From a failure (not: a stop that was asked for) to the next update."""
        times = [a.recovered_s for a in self.attempts if a.recovered_s is not None]
        return sum(times) / len(times) if times else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "total_s": self.total_s,
            "goodput": self.goodput,
            "mean_time_to_recover_s": self.mean_time_to_recover_s,
            "attempts": [{k: v for k, v in vars(a).items() if k != "intervals"} for a in self.attempts],
            "now": self.now,
        }


def read_time_account(run_dir: Path, records: Iterable[Record] | None = None) -> TimeAccount:
    """Of a run, also while it runs; an empty one where nothing was logged. records: of its log, where they are read
    already."""
    lines = _lines_of_attempts(read_records(run_dir) if records is None else records)
    account, launches = TimeAccount(), _launches(run_dir)
    for number, own in enumerate(lines, 1):
        end = next((e for e in launches if _is_end_of(own[0], e)), None)
        is_over = number < len(lines) or end is not None or is_gone(own[0])
        account.attempts.append(_add(account.seconds, own, end or {}, is_over=is_over))
    if account.attempts:
        _add_time_between(account, _silent(lines, launches))
        _add_updates(account, max(lines[-1][0]["samples_seen"], *(line.get("saved") or 0 for line in lines[-1])))
    account.now = _now(account, read_progress(run_dir))
    return account


def _add(seconds: dict[str, float], own: list[Record], end: Record, *, is_over: bool) -> Attempt:
    """The attempt that logged the lines `own`. All time but that of its updates goes to `seconds`."""
    first, last = own[0], own[-1]
    kinds = {line.get("event") for line in own}
    cause = DONE if "done" in kinds else STOPPED if "stop" in kinds else ""
    ended = last["wall_time"] if cause else max(last["wall_time"], end.get("time", 0.0))
    cause = cause or end.get("cause") or ("ended from outside" if is_over else STILL_RUNNING)
    ranks, seen = first.get("ranks"), first["samples_seen"]
    on = f"{counted(ranks, 'rank')}, {first.get('engine', 'unknown')}" if ranks else ""
    attempt = Attempt(_began(first), first["wall_time"], ended, (seen, seen), cause, on)
    updates_s = 0.0  # since the last metric line
    for line in own:
        for category, spent_s in line.get("spent", {}).items():
            if category == "useful":
                updates_s += spent_s
            else:
                seconds[category] += spent_s
        if "step" in line and "event" not in line:
            wait_s = updates_s * (line.get("time/data_wait_frac") or 0.0)
            if not attempt.intervals:
                each_s = updates_s / max(1, line["step"] - first.get("step", 0))
                attempt.updated = line["wall_time"] - updates_s + each_s
            attempt.intervals.append(Interval((attempt.seen[1], line["samples_seen"]), updates_s - wait_s, wait_s))
            attempt.seen, updates_s = (seen, line["samples_seen"]), 0.0
    unlogged_s = updates_s + ended - last["wall_time"]
    if not attempt.has_failed:
        seconds["other"] += unlogged_s
    elif last.get("spending") == "evaluation":
        seconds["evaluation"] += unlogged_s
    else:
        seconds["lost"] += unlogged_s
        attempt.lost_s = unlogged_s
    return attempt


def _add_time_between(account: TimeAccount, silent: list[tuple[float, float]]) -> None:
    """The time between attempts, and when a failed one had recovered. silent: starts that logged nothing."""
    attempts = account.attempts
    for before, after in zip(attempts, attempts[1:]):
        start_s = sum(max(0.0, min(end, after.began) - max(begin, before.ended)) for begin, end in silent)
        account.seconds["start"] += start_s
        account.seconds["down"] += max(0.0, after.began - before.ended - start_s)
    for number, attempt in enumerate(attempts, 1):
        again = next((a.updated for a in attempts[number:] if a.updated), None)
        if attempt.has_failed and again:
            attempt.recovered_s = max(0.0, again - attempt.ended)


def _add_updates(account: TimeAccount, saved: int) -> None:
    """What later attempts went on from is useful, the rest lost. saved: samples of the newest checkpoint, from which
    the next attempt would go on."""
    kept: float = saved if account.attempts[-1].has_failed else float("inf")
    for attempt in reversed(account.attempts):
        for interval in attempt.intervals:
            share = interval.share_below(kept)
            lost_s = (1 - share) * (interval.useful_s + interval.wait_s)
            account.seconds["useful"] += share * interval.useful_s
            account.seconds["data_wait"] += share * interval.wait_s
            account.seconds["lost"] += lost_s
            attempt.lost_s += lost_s
        kept = min(kept, attempt.seen[0])


def _now(account: TimeAccount, at: dict[str, Any] | None) -> dict[str, Any] | None:
    """at: what a process has said last that it does; of one that was killed on another machine it is left behind."""
    last = account.attempts[-1] if account.attempts else None
    if at is not None and (last is None or at["time"] > last.ended):
        sign = at["time"]
    elif last and last.cause == STILL_RUNNING:
        sign = last.ended
    else:
        return None
    return (at or {"text": "Running"}) | {"silent_s": max(0.0, time.time() - sign)}


# --- what a run leaves


def _lines_of_attempts(records: Iterable[Record]) -> list[list[Record]]:
    attempts: list[list[Record]] = []
    for line in records:
        if not isinstance(line.get("wall_time"), int | float):
            continue
        if line.get("event") in START_EVENTS:
            attempts.append([])
        if attempts:
            attempts[-1].append(line)
    return attempts


def _began(first: Record) -> float:
    """When the process began whose log begins with `first`."""
    return float(first.get("began") or first["wall_time"])


def _launches(run_dir: Path) -> list[Record]:
    """What the launcher has told of its starts; what is torn, or is none of its lines, is passed over."""
    out = []
    with suppress(OSError):
        for line in (Path(run_dir) / "launch" / "attempts.jsonl").read_bytes().splitlines():
            with suppress(ValueError):
                out.append(json.loads(line))
    kinds = {"event": str, "attempt": str, "time": int | float}
    return [a for a in out if isinstance(a, dict) and all(isinstance(a.get(k), kind) for k, kind in kinds.items())]


def _is_end_of(first: Record, told: Record) -> bool:
    """Whether a launcher's line tells the end of the attempt whose log begins with `first`."""
    is_its = told["event"] == "end" and told["attempt"] == first.get("attempt")
    return is_its and told["time"] >= _began(first)


def _silent(lines: list[list[Record]], launches: list[Record]) -> list[tuple[float, float]]:
    """(begin, end) of starts that ended before they could log anything."""
    spoke = {own[0].get("attempt") for own in lines}
    ends = {a["attempt"]: a["time"] for a in launches if a["event"] == "end"}
    begun = [(a["attempt"], a["time"]) for a in launches if a["event"] == "begin"]
    return [(time, ends[attempt]) for attempt, time in begun if attempt not in spoke and attempt in ends]
