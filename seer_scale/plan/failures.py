"""What failures cost a long run: the share of its allocated time that ends up in kept, useful steps, and the best
checkpoint interval.

The model. After every `interval` of useful work a checkpoint begins: the step stalls for `stall`, then steps go on
while it is written, and `save` after its begin it is safe. One failure of the job comes at `mtbf` on average, at any
moment (exponential). It loses the work since the newest safe checkpoint; then `detect` (until a watchdog sees a hang,
say) and `restart` (requeue, start, load) pass, and a failure in them starts both over.

The formula. With M = mtbf, c = interval + stall and L = save - stall, the k-th checkpoint since the job came up is safe
k c + L after that. So sum_k exp(-(k c + L) / M) = exp(-L / M) / (exp(c / M) - 1) intervals are kept in the mean each
time the job comes up. It then takes M in the mean until it fails and, with the failures during restarts, M (exp(R / M)
- 1) until it is up again, R = detect + restart. As the exponential forgets, work kept over time taken, each in the
mean, is the share of a long run: goodput = (interval / M) exp(-(R + L) / M) / (exp(c / M) - 1). With L = 0 this is
Daly's complete cost function (A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22,
2006), his dump being the stall; with L it is Vaidya's (Impact of checkpoint latency on overhead ratio of a
checkpointing scheme, IEEE
Transactions on Computers 46(8), 1997). Neither R nor L moves the best interval, but none may be shorter than the save.

`replay` shares nothing with the formula: it draws failures and goes from event to event. The aim, 97 %, is the best
effective training time that has been published.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from seer_scale.errors import UserError
from seer_scale.files import to_json

HOUR_S, DAY_S = 3600, 86400
TARGET = 0.97
"""The best effective training time that has been published."""
GPUS, GPU_HOURS = 512, 50_700
"""GPU-hours between two failures: Llama 3's training (Dubey et al., 2024)."""
Z95 = statistics.NormalDist().inv_cdf(0.975)
FEWEST_RUNS, FEWEST_FAILURES = 30, 30
"""Of fewer, a mean is not yet normally distributed and its 95 % interval means nothing."""
MAX_EVENTS = 20_000_000
"""Of all replays: half a minute, about."""
SMALLEST, LARGEST = 1e-6, 1e18
"""Between these no figure overflows."""


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Seconds: mean time between failures of the whole job, and what checkpoints and failures take. Raises
    UserError."""

    mtbf_s: float
    stall_s: float
    save_s: float
    detect_s: float
    restart_s: float

    def __post_init__(self) -> None:
        problems = [
            p for x in fields(self) for p in _wrong(x.name, getattr(self, x.name), above=x.name in ("mtbf_s", "save_s"))
        ]
        if not problems and self.save_s < self.stall_s:
            problems = [
                f"A save of {_shown(self.save_s)} would end before its own stall of {_shown(self.stall_s)}, "
                f"but a checkpoint is safe no sooner than that; nearest save: {_shown(self.stall_s)}."
            ]
        _complain(problems)

    @property
    def down_s(self) -> float:
        """From a failure to the next useful step, if no other failure comes between."""
        return self.detect_s + self.restart_s


# ------------------------------------------------------------------------------------------------ the formula


def goodput(f: Failures, interval_s: float) -> float:
    """The share of a long run's time that ends up in kept steps. Raises UserError."""
    _check_interval(f, interval_s)
    return math.exp(_log_goodput(f, interval_s))


def breakdown(f: Failures, interval_s: float) -> dict[str, float]:
    """Shares of a long run's time, whose sum is 1: goodput, stalled (kept or not), work that was lost, down."""
    kept, up = goodput(f, interval_s), math.exp(-f.down_s / f.mtbf_s)
    # in the mean M (exp(stall / M) - 1) / (exp(c / M) - 1) of a life of M is stalled
    stalled = (
        up
        * math.exp(-interval_s / f.mtbf_s)
        * math.expm1(-f.stall_s / f.mtbf_s)
        / math.expm1(-(interval_s + f.stall_s) / f.mtbf_s)
    )
    return {"goodput": kept, "stalled": stalled, "lost": max(0.0, up - stalled - kept), "down": 1 - up}


def expected_s(f: Failures, interval_s: float, work_s: float) -> float:
    """Seconds a run is expected to take for whole intervals of at least `work_s`, the last save being waited for.

    Exact for any length: n intervals take n times what one takes in a long run, and M exp(R / M) (exp(L / M) - 1) once
    for the last save. It solves t(n) = E[min(T, n c + L)] + sum_j P(j intervals are safe at a failure T) (E[down] + t(n
    - j))."""
    _complain(_wrong("work_s", work_s, above=True))
    share, up = goodput(f, interval_s), math.exp(-(f.down_s + f.save_s - f.stall_s) / f.mtbf_s)
    if min(share, up) == 0:
        return math.inf
    wait = f.mtbf_s * -math.expm1((f.stall_s - f.save_s) / f.mtbf_s) / up
    return _intervals(interval_s, work_s) * interval_s / share + wait


def young(f: Failures) -> float:
    """Young's first-order best interval in seconds, whatever a save takes (CACM 17(9), 1974)."""
    return math.sqrt(2 * f.stall_s * f.mtbf_s)


def daly(f: Failures) -> float:
    """Daly's higher-order best interval in seconds, whatever a save takes (FGCS 22, 2006)."""
    half = f.stall_s / (2 * f.mtbf_s)
    return f.mtbf_s if half >= 1 else young(f) * (1 + math.sqrt(half) / 3 + half / 9) - f.stall_s


def best_interval(f: Failures) -> float:
    """Seconds of useful work between checkpoints at which `goodput` is highest; a golden section, it has one
    maximum."""

    def at(log_s: float) -> float:
        return max(f.save_s, math.exp(log_s))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(f.save_s), math.log(max(f.save_s, f.mtbf_s))  # more than the MTBF is never best
    while high - low > 1e-8:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _log_goodput(f, at(left)) < _log_goodput(f, at(right)):
            low = left
        else:
            high = right
    return max(f.save_s, at(low), key=lambda s: _log_goodput(f, s))


def _log_goodput(f: Failures, interval_s: float) -> float:
    """The logarithm, which stays finite where no work is ever kept."""
    m, cycle_s = f.mtbf_s, interval_s + f.stall_s
    return math.log(interval_s / m / -math.expm1(-cycle_s / m)) - (f.down_s + f.save_s - f.stall_s + cycle_s) / m


def _intervals(interval_s: float, work_s: float) -> int:
    """How many it takes; at least 1, as an interval may be longer than the work."""
    return math.ceil(work_s / interval_s)


def _check_interval(f: Failures, interval_s: float) -> None:
    if not f.save_s <= interval_s < math.inf:
        raise UserError(
            f"An interval of {_shown(interval_s)} cannot be with a save of {_shown(f.save_s)}: one checkpoint "
            f"at most is in flight; nearest: {_shown(f.save_s)}."
        )


# ------------------------------------------------------------------------------------------------ the replay


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One run as it happened: its seconds are kept, lost, stalled (the wait for the last save too) or down."""

    goodput: float
    failures: int
    kept_s: float
    lost_s: float
    stalled_s: float
    down_s: float
    elapsed_s: float


def replay(f: Failures, interval_s: float, work_s: float, seed: int | Sequence[int]) -> Replay:
    """Go through one run until whole intervals of at least `work_s` are safe. Raises UserError."""
    _check_interval(f, interval_s)
    _complain(_wrong("work_s", work_s, above=True))
    random, wanted = np.random.default_rng(seed), _intervals(interval_s, work_s)
    spent = {"work": 0.0, "stall": 0.0, "down": 0.0}
    now, phase, until = 0.0, "work", interval_s
    failure, safe_at = random.exponential(f.mtbf_s), math.inf
    begun = safe = failures = 0
    unsafe_s = lost_s = 0.0
    while safe < wanted:
        event = min(failure, safe_at, until)
        spent[phase] += event - now
        unsafe_s += event - now if phase == "work" else 0.0
        now = event
        if now == failure:
            failures, failure = failures + 1, now + random.exponential(f.mtbf_s)
            lost_s, unsafe_s = lost_s + unsafe_s, 0.0
            begun, safe_at = safe, math.inf
            phase, until = "down", now + f.detect_s + f.restart_s
        elif now == safe_at:
            safe, safe_at, unsafe_s = begun, math.inf, unsafe_s - interval_s
        elif phase == "work":
            begun, safe_at = begun + 1, now + f.save_s
            phase, until = "stall", now + (f.save_s if begun == wanted else f.stall_s)
        else:
            phase, until = "work", now + interval_s
    kept_s = safe * interval_s
    return Replay(
        goodput=kept_s / now,
        failures=failures,
        kept_s=kept_s,
        lost_s=lost_s,
        stalled_s=spent["stall"],
        down_s=spent["down"],
        elapsed_s=now,
    )


def replays(f: Failures, interval_s: float, work_s: float, runs: int, seed: int) -> dict:
    """`runs` replays together: mean goodput (kept over mean elapsed time) with its 95 % interval, and whether the
    formula is in it."""
    done = [replay(f, interval_s, work_s, [seed, n]) for n in range(runs)]
    took, failures = [r.elapsed_s for r in done], sum(r.failures for r in done)
    mean, off = statistics.fmean(took), Z95 * statistics.stdev(took) / math.sqrt(runs)
    kept, formula = done[0].kept_s, done[0].kept_s / expected_s(f, interval_s, work_s)
    low, high = kept / (mean + off), kept / max(mean - off, kept)
    agrees = low <= formula <= high if failures >= FEWEST_FAILURES else None
    return {
        "runs": runs,
        "goodput": kept / mean,
        "low": low,
        "high": high,
        "formula": formula,
        "agrees": agrees,
        "failures": failures,
    }


# ------------------------------------------------------------------------------------------------ the target


def reaching(f: Failures, interval_s: float, target: float = TARGET) -> dict:
    """What reaches a goodput, each value with the others as they are; None where nothing does.

    `reached`: whether this interval does. `intervals_s`: the shortest and the longest that do. `down_s`: the longest
    detection and restart together, at this interval; `best_down_s`: at the best. `mtbf_s`: the shortest MTBF, at its
    own best interval.
    """
    best = best_interval(f)

    def reached(interval: float) -> bool:
        return _log_goodput(f, interval) >= math.log(target)

    def longest_down(interval: float) -> float | None:
        down = f.down_s + f.mtbf_s * (_log_goodput(f, interval) - math.log(target))
        return down if down >= 0 else None

    def reached_with(mtbf_s: float) -> bool:
        g = replace(f, mtbf_s=mtbf_s)
        return _log_goodput(g, best_interval(g)) >= math.log(target)

    rare = max(f.mtbf_s, f.save_s + f.down_s)
    while not reached_with(rare):
        rare *= 2
    often = rare
    while reached_with(often):
        often /= 2
    return {
        "reached": reached(interval_s) and reached(best),
        "intervals_s": (_edge(reached, best, f.save_s), _edge(reached, best, max(best, f.mtbf_s)))
        if reached(best)
        else None,
        "down_s": longest_down(interval_s),
        "best_down_s": longest_down(best),
        "mtbf_s": _edge(reached_with, rare, often),
    }


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where, on the way from a value that holds to another, values cease to hold."""
    if holds(outside):
        return outside
    while abs(inside / outside - 1) > 1e-6:
        middle = math.sqrt(inside * outside)
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


# ------------------------------------------------------------------------------------------------ the command


OPTIONS: dict[str, tuple[float | None, str]] = {
    "mtbf_hours": (None, "hours between two failures of the job, on average"),
    "gpus": (None, f"or: GPUs of the job (default: {GPUS})"),
    "gpu_hours": (None, f"and GPU-hours between two failures (default: {GPU_HOURS:,}, as in Llama 3's training)"),
    "stall": (2.0, "seconds a step stalls for a checkpoint"),
    "save": (60.0, "seconds from a checkpoint's begin until it is safe"),
    "detect": (600.0, "seconds until the job sees a failure"),
    "restart": (300.0, "seconds from there to the next useful step: requeue, start, load"),
    "days": (21.0, "days of useful steps in a replayed run"),
    "runs": (200, f"replayed runs, at least {FEWEST_RUNS}; 0 = the formula alone"),
    "seed": (0, "seed of the first run"),
    "images_per_second": (
        None,
        "images that the job trains on in a second, to tell the interval as checkpoint.every_samples",
    ),
}
ABOVE_ZERO, WHOLE = ("mtbf_hours", "gpus", "gpu_hours", "save", "days", "images_per_second"), ("gpus", "runs", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, (default, meaning) in OPTIONS.items():
        shown = "" if default is None else f" (default: {default:g})"
        parser.add_argument(_option(name), default=default, metavar="N", help=meaning + shown)
    parser.add_argument(
        "--interval",
        default="best",
        metavar="N",
        help="seconds of useful work between checkpoints, or best (default: best)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> str:
    """Weigh the run; returns the lines to print. Raises UserError."""
    f, given = _read(args)
    best = best_interval(f)
    interval_s = given.get("interval", best)
    shares, reach = breakdown(f, interval_s), reaching(f, interval_s)
    work_s, runs = given["days"] * DAY_S, given["runs"]
    _check_events(f, interval_s, given)
    found = replays(f, interval_s, work_s, runs, given["seed"]) if runs else None
    facts = asdict(f) | {"interval_s": interval_s, "shares": shares}
    facts |= {
        "best_interval_s": {"ours": best, "young": young(f), "daly": daly(f)},
        "best_goodput": goodput(f, best),
        "days": given["days"],
    }
    facts |= {"replay": found, "target": {"goodput": TARGET} | reach}
    if "images_per_second" in given:
        facts["every_samples"] = round(interval_s * given["images_per_second"])
    return to_json(facts, indent=1) if args.json else "\n".join(_table(f, facts))


def _read(args: argparse.Namespace) -> tuple[Failures, dict]:
    """(the model, the other values) of a command line. Raises UserError with every problem."""
    given, problems = {}, []
    texts = {name: getattr(args, name) for name in [*OPTIONS, *(["interval"] if args.interval != "best" else [])]}
    for name, text in texts.items():
        if text is None:
            continue
        try:
            given[name] = float(text)
        except ValueError:
            problems.append(
                f"{_option(name)} is {text!r}, but must be a number{' or best' if name == 'interval' else ''}."
            )
            continue
        problems += _wrong(_option(name), given[name], above=name in ABOVE_ZERO, whole=name in WHOLE)
    if "mtbf_hours" in given and (twice := [_option(n) for n in ("gpus", "gpu_hours") if n in given]):
        problems.append(
            f"--mtbf-hours and {' and '.join(twice)} are both given, but each says how often the job fails: "
            "leave one out."
        )
    if 0 < given.get("runs", 0) < FEWEST_RUNS:
        problems.append(
            f"--runs is {given['runs']:g}, but a 95 % interval needs at least {FEWEST_RUNS}; nearest: "
            f"{FEWEST_RUNS}, or 0 for the formula alone."
        )
    _complain(problems)
    hours = given.get("mtbf_hours", given.get("gpu_hours", GPU_HOURS) / given.get("gpus", GPUS))
    f = Failures(mtbf_s=hours * HOUR_S, **{f"{n}_s": given[n] for n in ("stall", "save", "detect", "restart")})
    if "interval" in given:
        _check_interval(f, given["interval"])
    return f, given | {n: int(given[n]) for n in ("runs", "seed")}


def _check_events(f: Failures, interval_s: float, given: dict) -> None:
    """Refuse a replay that would take minutes, or for ever."""
    takes_s = expected_s(f, interval_s, given["days"] * DAY_S)
    events = takes_s * (3 / (interval_s + f.stall_s) + 2 / f.mtbf_s)
    if given["runs"] * events > MAX_EVENTS:
        most = int(MAX_EVENTS / events)
        nearest = (
            f"{most}, or 0 for the formula alone"
            if most >= FEWEST_RUNS
            else "0, for the formula alone, or fewer --days"
        )
        raise UserError(
            f"--runs is {given['runs']}, but so many runs of {given['days']:g} days have more than {MAX_EVENTS:,} "
            f"checkpoints and failures to replay; nearest: {nearest}."
        )


def _table(f: Failures, facts: dict) -> list[str]:
    shares, best, found, interval_s = facts["shares"], facts["best_interval_s"], facts["replay"], facts["interval_s"]
    lines = [
        f"one failure in {_shown(f.mtbf_s / HOUR_S, 'hours')}, seen after {_shown(f.detect_s)}, restarted in "
        f"{_shown(f.restart_s)}; a checkpoint stalls for {_shown(f.stall_s)} and is safe after {_shown(f.save_s)}",
        (
            f"goodput        {_percent(shares['goodput'])} expected with a checkpoint every {_shown(interval_s)} "
            "of useful work"
        ),
        (
            f"best interval  {_shown(best['ours'])} ({_percent(facts['best_goodput'])}); Young: "
            f"{_shown(best['young'])}, Daly: {_shown(best['daly'])}"
        ),
        (
            f"the rest       {_percent(shares['stalled'])} in stalls, {_percent(shares['lost'])} in lost work, "
            f"{_percent(shares['down'])} in detection and restart"
        ),
    ]
    if "every_samples" in facts:
        lines.append(f"in a recipe    --checkpoint.every_samples {facts['every_samples']}")
    if found:
        lies = {
            True: "lies in it",
            False: "lies outside it",
            None: f"cannot be judged by {found['failures']} failures in all",
        }[found["agrees"]]
        lines.append(
            f"replay         {_percent(found['goodput'], 3)}, 95 % interval {_percent(found['low'], 3)} to "
            f"{_percent(found['high'], 3)}, in the mean of {found['runs']} runs of {facts['days']:g} days; the "
            f"formula, {_percent(found['formula'], 3)} at this length, {lies}"
        )
    return [*lines, f"aim            {_verdict(f, facts)}"]


def _verdict(f: Failures, facts: dict) -> str:
    target = facts["target"]
    name, rarer = f"{100 * target['goodput']:g} %", f"one failure in {_shown(target['mtbf_s'] / HOUR_S, 'hours')}"
    if target["reached"]:
        return (
            f"{name} is reached, and would still be with a detection and restart of {_shown(target['down_s'])} "
            f"together, with an interval of {_shown(target['intervals_s'][1])}, or with {rarer} at its best interval"
        )
    if target["intervals_s"]:
        return (
            f"{name} is not reached, but would be with an interval of {_shown(target['intervals_s'][0])} to "
            f"{_shown(target['intervals_s'][1])}"
        )
    for down_s, place in (target["down_s"], "this"), (target["best_down_s"], "the best"):
        if down_s is not None:
            return (
                f"{name} is not reached, but would be with a detection and restart of {_shown(down_s)} together, not "
                f"{_shown(f.down_s)}, at {place} interval, or with {rarer} at its best interval"
            )
    return (
        f"{name} is not reached, nor would it be with no time at all for detection and restart: it takes {rarer}, "
        "at its best interval"
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def _shown(value: float, unit: str = "s") -> str:
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def _wrong(name: str, value: float, *, above: bool = False, whole: bool = False) -> list[str]:
    """What is wrong with a number, as at most one sentence."""
    least = 1 if whole and above else SMALLEST if above else 0
    fits = least <= value <= LARGEST and (not whole or value == int(value))
    return (
        [] if fits else [f"{name} is {value:g}, but must be a {'whole ' * whole}number from {least:g} to {LARGEST:g}."]
    )


def _complain(problems: list[str]) -> None:
    if problems:
        raise UserError(*problems)
