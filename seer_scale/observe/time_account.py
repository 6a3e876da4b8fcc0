"""Where a run's time went: useful updates, waiting for data, stalls of checkpoints, starts, work that was lost; and
goodput.

All of it from what the run leaves: metrics.jsonl, with the lines that a restart abandoned, and launch/attempts.jsonl,
where a launcher has started it. A *life* is one process's part of the log, from its "start" or "resume" event on.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seer_scale.formatting import counted, duration
from seer_scale.observe.progress import read_progress
from seer_scale.observe.records import BEGINNINGS, read_records

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


RUNS = "running"


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
    """Of one that failed: from its end to the next update, in whatever life that came."""


@dataclass
class TimeAccount:
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    lives: list[Attempt] = field(default_factory=list)
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
        times = [life.recovered_s for life in self.lives if life.recovered_s is not None]
        return sum(times) / len(times) if times else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "total_s": self.total_s,
            "goodput": self.goodput,
            "mean_time_to_recover_s": self.mean_time_to_recover_s,
            "lives": [vars(life) for life in self.lives],
            "now": self.now,
        }


@dataclass
class Interval:
    """Updates between two metric lines."""

    seen: tuple[int, int]
    useful_s: float
    wait_s: float


def read_time_account(run_dir: Path) -> TimeAccount:
    """The ledger of a run, also while it runs; an empty one where nothing was logged."""
    ledger = TimeAccount()
    kept: list[Interval] = []
    is_gone = _is_gone(run_dir)
    timed = [r for r in read_records(run_dir) if isinstance(r.get("wall_time"), int | float)]
    lives, attempts = _lives(timed), _attempts(run_dir)
    silent, saved = _silent(lives, attempts), 0
    for number, records in enumerate(lives):
        following = lives[number + 1] if number + 1 < len(lives) else None
        life, stretches = _account(ledger.seconds, records, following, attempts, is_gone=is_gone)
        if ledger.lives:
            _resume(ledger, kept, life, silent)
        ledger.lives.append(life)
        kept += stretches
        saved = max(
            [
                saved if number else life.seen[0],
                *(r.get("saved") or 0 for r in records if r.get("event") == "checkpoint"),
            ]
        )
    if ledger.lives and ledger.lives[-1].cause not in ("done", "stopped", RUNS):
        _lose(ledger, kept, ledger.lives[-1], saved)  # what a next start will have to do again
    for stretch in kept:
        ledger.seconds["useful"] += stretch.useful_s
        ledger.seconds["data_wait"] += stretch.wait_s
    ledger.now = _now(ledger, None if is_gone else read_progress(run_dir))
    return ledger


def _now(ledger: TimeAccount, at: dict[str, Any] | None) -> dict[str, Any] | None:
    """at: what a process has said last that it does; of one that was killed it is left behind."""
    ended, runs = (ledger.lives[-1].ended, ledger.lives[-1].cause == RUNS) if ledger.lives else (0.0, False)
    if at is not None and at["time"] > ended:
        last = at["time"]
    elif runs:
        last = ended
    else:
        return None
    return (at or {"text": "Running"}) | {"silent_s": max(0.0, time.time() - last)}


def _silent(lives: list[list[dict]], attempts: list[dict]) -> list[tuple[float, float]]:
    """(begin, end) of starts that ended before they could log anything."""
    spoke = {records[0].get("attempt") for records in lives} - {None, ""}
    if lives and not spoke:  # of a version that did not say
        return []
    ends = {a.get("attempt"): a["time"] for a in attempts if a["event"] == "end"}
    begun = [(a["attempt"], a["time"]) for a in attempts if a["event"] == "begin" and "attempt" in a]
    return [(time, ends[attempt]) for attempt, time in begun if attempt not in spoke and attempt in ends]


def _is_gone(run_dir: Path) -> bool:
    """Whether the process that holds the run's lock, or held it last, was of this machine and is no more."""
    try:
        owner = re.match(r"pid (\d+) on (\S+?),", (Path(run_dir) / ".lock").read_text(errors="replace"))
    except OSError:
        return False
    if owner is None or owner[2] != socket.gethostname():
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and another user's
        pass
    return False


def _account(
    seconds: dict[str, float], records: list[dict], following: list[dict] | None, attempts: list[dict], *, is_gone: bool
) -> tuple[Attempt, list[Interval]]:
    """One life: its stretches of updates; all other time goes to `seconds`."""
    first, last = records[0], records[-1]
    began, ready, end = first.get("began", first["wall_time"]), first["wall_time"], last["wall_time"]
    upto = _began(following) if following else float("inf")
    ends = [a for a in attempts if a["event"] == "end"]
    if first.get("attempt"):
        told = next((a for a in ends if a.get("attempt") == first["attempt"] and a["time"] >= began), None)
    else:
        told = next((a for a in ends if end <= a["time"] <= upto), None)
    kinds = [r["event"] for r in records if "event" in r]
    cause = next((k for k in ("done", "stop") if k in kinds), None)
    if told and cause is None:
        end = max(end, told["time"])
    is_over = following is not None or told is not None or is_gone
    seconds["start"] += ready - began
    stretches, at, step, seen, evaluated, waited, updated = (
        [],
        ready,
        first.get("step", 0),
        first["samples_seen"],
        0.0,
        0.0,
        None,
    )
    evaluating = None  # since when
    for row in records[1:]:
        if row.get("event") == "evaluation":
            evaluating = row["wall_time"]
        elif "knn/stage" in row and row["knn/stage"] != "after":  # which pictures follow
            evaluating = None
        evaluated += row.get("time/knn_s") or 0.0
        waited += row.get("waited_s") or 0.0
        if "step" not in row or "event" in row:
            continue
        dt = max(0.0, row["wall_time"] - at)
        updates_s = min(dt, (row.get("time/step_s") or 0.0) * max(0, row["step"] - step))
        wait_s = (row.get("time/data_wait_frac") or 0.0) * updates_s
        stall_s = min(dt - updates_s, row.get("time/checkpoint_stall_s") or 0.0)
        evaluation_s = min(dt - updates_s - stall_s, evaluated)
        seconds["stall"] += stall_s
        seconds["evaluation"] += evaluation_s
        seconds["other"] += dt - updates_s - stall_s - evaluation_s
        stretches.append(Interval((seen, row["samples_seen"]), updates_s - wait_s, wait_s))
        updated = updated or row["wall_time"] - max(0, row["step"] - step - 1) * (row.get("time/step_s") or 0.0)
        at, step, seen, evaluated, waited = row["wall_time"], row["step"], row["samples_seen"], 0.0, 0.0
    tail = max(0.0, end - at)
    life = Attempt(
        began,
        ready,
        end,
        (first["samples_seen"], seen),
        {"done": "done", "stop": "stopped"}.get(cause or "")
        or (told or {}).get("cause")
        or ("ended from outside" if is_over else RUNS),
        _on(first),
        updated,
    )
    if evaluating:
        evaluated = max(evaluated, end - evaluating)
    stall_s = min(tail, waited) if cause or not is_over else 0.0
    evaluation_s = min(tail - stall_s, evaluated)
    seconds["stall"] += stall_s
    seconds["evaluation"] += evaluation_s
    rest_s = tail - stall_s - evaluation_s
    if cause or not is_over:
        seconds["other"] += rest_s
    else:
        seconds["lost"] += rest_s
        life.lost_s = rest_s
    return life, stretches


def _on(first: dict) -> str:
    ranks = first.get("ranks")
    return f"{counted(ranks, 'rank')}, {first.get('engine', 'unknown')}" if ranks else ""


def _resume(ledger: TimeAccount, kept: list[Interval], life: Attempt, silent: list[tuple[float, float]]) -> None:
    """A life that begins before where others had come: what they did beyond is lost."""
    before, since = ledger.lives[-1], life.seen[0]
    between = sum(max(0.0, min(end, life.began) - max(begin, before.ended)) for begin, end in silent)
    ledger.seconds["start"] += between
    ledger.seconds["down"] += max(0.0, life.began - before.ended - between)
    if life.updated:
        for failed in reversed(ledger.lives):  # one that made no update has recovered nothing
            if failed.cause not in ("done", "stopped") and failed.recovered_s is None:
                failed.recovered_s = max(0.0, life.updated - failed.ended)
            if failed.updated:
                break
    _lose(ledger, kept, before, since)


def _lose(ledger: TimeAccount, kept: list[Interval], life: Attempt, since: int) -> None:
    """What was done beyond `since` samples, at the latest by `life`, is lost."""
    for stretch in [s for s in kept if s.seen[1] > since]:
        begin, end = stretch.seen
        share = (end - max(begin, since)) / (end - begin)
        lost = share * (stretch.useful_s + stretch.wait_s)
        ledger.seconds["lost"] += lost
        life.lost_s += lost
        stretch.useful_s, stretch.wait_s, stretch.seen = (
            (1 - share) * stretch.useful_s,
            (1 - share) * stretch.wait_s,
            (begin, max(begin, since)),
        )
        if share == 1:
            kept.remove(stretch)


def _lives(records: list[dict]) -> list[list[dict]]:
    lives: list[list[dict]] = []
    for record in records:
        if "wall_time" not in record:
            continue
        if record.get("event") in BEGINNINGS:
            lives.append([])
        if lives:
            lives[-1].append(record)
    return lives


def _began(records: list[dict]) -> float:
    return records[0].get("began", records[0]["wall_time"])


def _attempts(run_dir: Path) -> list[dict]:
    """What the launcher has told of its starts; what is torn, or is none of its lines, is passed over."""
    out = []
    with suppress(OSError):
        for line in (Path(run_dir) / "launch" / "attempts.jsonl").read_bytes().splitlines():
            with suppress(ValueError):
                out.append(json.loads(line))
    kinds = {"event": str, "attempt": str, "time": int | float}
    return [a for a in out if isinstance(a, dict) and all(isinstance(a.get(k), kind) for k, kind in kinds.items())]


def text(ledger: TimeAccount) -> str:
    """The ledger for people."""
    now = (
        f"{ledger.now['text']}; the last sign of life was {duration(ledger.now['silent_s'])} ago." if ledger.now else ""
    )
    if not ledger.lives:
        return " ".join(["Nothing was logged yet.", *([now] if now else [])])
    total = ledger.total_s or 1.0
    lines = [
        (
            f"{duration(ledger.total_s)} from the first start, {len(ledger.lives)} "
            f"{'lives' if len(ledger.lives) > 1 else 'life'}; goodput {100 * ledger.goodput:.1f} % of the "
            f"{duration(ledger.total_s - ledger.seconds['down'])} it had machines"
        )
    ]
    lines += [f"  {'':28}{'':12}{'of it all':>10}"]
    lines += [
        f"  {words:28}{duration(ledger.seconds[cause]):>12}{100 * ledger.seconds[cause] / total:>8.1f} %"
        for cause, words in CATEGORIES.items()
        if ledger.seconds[cause] > 0
    ]
    if (mean := ledger.mean_time_to_recover_s) is not None:
        lines.append(f"  mean time to recover        {duration(mean):>12}")
    lines += [
        "",
        (
            f"  {'samples':>23}  {'lasted':>10}  {'lost':>9}  {'on':{ON}}  "
            f"{'0 to ' + duration(ledger.total_s):<{WIDTH}}  ended by"
        ),
    ]
    lines += [
        (
            f"  {life.seen[0]:>11,} {life.seen[1]:>11,}  {duration(life.ended - life.began):>10}  "
            f"{duration(life.lost_s):>9}  {life.on:{ON}}  {_bar(life, ledger)}  {life.cause}"
        )
        for life in ledger.lives
    ]
    if now:
        lines.insert(1, now)
    return "\n".join([*lines, "", f"  {START} starting, {RUNNING} running, {LOST} lost at its end, blank not running"])


START, RUNNING, LOST = "s=x"
ON, WIDTH = 20, 40
"""Columns of the table of lives: what each ran on, and its place in the run's time."""


def _bar(life: Attempt, ledger: TimeAccount) -> str:
    """A life's place in the run's time, of WIDTH characters, at least one of which it takes."""
    first, each = ledger.lives[0].began, (ledger.total_s or 1.0) / WIDTH

    def what(place: int) -> str:
        at = min(max(first + (place + 0.5) * each, life.began), life.ended)
        return LOST if life.lost_s and at > life.ended - life.lost_s else START if at < life.ready else RUNNING

    begin = min(round((life.began - first) / each), WIDTH - 1)
    end = min(max(round((life.ended - first) / each), begin + 1), WIDTH)
    return " " * begin + "".join(map(what, range(begin, end))) + " " * (WIDTH - end)
