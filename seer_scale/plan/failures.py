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
checkpointing scheme, IEEE Transactions on Computers 46(8), 1997). Neither R nor L moves the best interval, but none may
be shorter than the save.

`tests/unit/test_failures.py` holds it against replays that draw failures and go from event to event. The aim, 97 %, is
the best effective training time that has been published.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json

HOUR_S = 3600
TARGET = 0.97
"""The best effective training time that has been published."""
GPUS, GPU_HOURS = 512, 50_700
"""GPU-hours between two failures: Llama 3's training (Dubey et al., 2024)."""
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
            problems = [_safe_too_soon("save_s", self.save_s, self.stall_s)]
        _refuse(problems)

    @property
    def down_s(self) -> float:
        """From a failure to the next useful step, if no other failure comes between."""
        return self.detect_s + self.restart_s


# ------------------------------------------------------------------------------------------------ the formula


def goodput(failures: Failures, interval_s: float) -> float:
    """The share of a long run's time that ends up in kept steps. Raises UserError."""
    _check_interval(failures, interval_s)
    return math.exp(_log_goodput(failures, interval_s))


def breakdown(failures: Failures, interval_s: float) -> dict[str, float]:
    """Shares of a long run's time, whose sum is 1: goodput, stalled (kept or not), work that was lost, down."""
    kept, up = goodput(failures, interval_s), math.exp(-failures.down_s / failures.mtbf_s)
    # in the mean M (exp(stall / M) - 1) / (exp(c / M) - 1) of a life of M is stalled
    stalled = (
        up
        * math.exp(-interval_s / failures.mtbf_s)
        * math.expm1(-failures.stall_s / failures.mtbf_s)
        / math.expm1(-(interval_s + failures.stall_s) / failures.mtbf_s)
    )
    return {"goodput": kept, "stalled": stalled, "lost": max(0.0, up - stalled - kept), "down": 1 - up}


def young(failures: Failures) -> float:
    """Young's first-order best interval in seconds, whatever a save takes (CACM 17(9), 1974)."""
    return math.sqrt(2 * failures.stall_s * failures.mtbf_s)


def daly(failures: Failures) -> float:
    """Daly's higher-order best interval in seconds, whatever a save takes (FGCS 22, 2006)."""
    half = failures.stall_s / (2 * failures.mtbf_s)
    return failures.mtbf_s if half >= 1 else young(failures) * (1 + math.sqrt(half) / 3 + half / 9) - failures.stall_s


def best_interval(failures: Failures, longest_s: float = math.inf) -> float:
    """Seconds of useful work between checkpoints, up to the longest that makes sense, at which `goodput` is highest; a
    golden section, it has one maximum."""

    def at(log_s: float) -> float:
        return max(failures.save_s, math.exp(log_s))

    ratio = (math.sqrt(5) - 1) / 2
    low = math.log(failures.save_s)
    high = math.log(max(failures.save_s, min(failures.mtbf_s, longest_s)))  # more than the MTBF is never best
    while high - low > 1e-8:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _log_goodput(failures, at(left)) < _log_goodput(failures, at(right)):
            low = left
        else:
            high = right
    ends = (failures.save_s, at(low), at(high))
    return max(ends, key=lambda s: _log_goodput(failures, s))


def _log_goodput(failures: Failures, interval_s: float) -> float:
    """The logarithm, which stays finite where no work is ever kept."""
    mtbf_s, cycle_s = failures.mtbf_s, interval_s + failures.stall_s
    return (
        math.log(interval_s / mtbf_s / -math.expm1(-cycle_s / mtbf_s))
        - (failures.down_s + failures.save_s - failures.stall_s + cycle_s) / mtbf_s
    )


def _check_interval(failures: Failures, interval_s: float, key: str = "interval_s") -> None:
    if not failures.save_s <= interval_s < math.inf:
        rule = f"one checkpoint at most is in flight, and a save takes {_shown(failures.save_s)}"
        raise UserError(Problem(key, interval_s, rule, failures.save_s))


# ------------------------------------------------------------------------------------------------ the target


def reaching(
    failures: Failures, interval_s: float, target: float = TARGET, longest_s: float = math.inf
) -> dict[str, Any]:
    """What reaches a goodput, each value with the others as they are and no interval above the longest; None where
    nothing does.

    `reached`: whether this interval does. `intervals_s`: the shortest and the longest that do. `down_s`: the longest
    detection and restart together, at this interval; `best_down_s`: at the best. `mtbf_s`: the shortest MTBF, at its
    own best interval, if one of up to LARGEST does.
    """
    best = best_interval(failures, longest_s)

    def reached(interval: float) -> bool:
        return _log_goodput(failures, interval) >= math.log(target)

    def longest_down(interval: float) -> float | None:
        down = failures.down_s + failures.mtbf_s * (_log_goodput(failures, interval) - math.log(target))
        return down if down >= 0 else None

    def reached_with(mtbf_s: float) -> bool:
        other = replace(failures, mtbf_s=mtbf_s)
        return _log_goodput(other, best_interval(other, longest_s)) >= math.log(target)

    rare = min(LARGEST, max(failures.mtbf_s, failures.save_s + failures.down_s))
    while rare < LARGEST and not reached_with(rare):
        rare = min(LARGEST, 2 * rare)
    often = rare if reached_with(rare) else None
    while often and reached_with(often):
        often /= 2
    return {
        "reached": reached(interval_s) and reached(best),
        "intervals_s": (
            _edge(reached, best, failures.save_s),
            _edge(reached, best, max(best, min(failures.mtbf_s, longest_s))),
        )
        if reached(best)
        else None,
        "down_s": longest_down(interval_s),
        "best_down_s": longest_down(best),
        "mtbf_s": often and _edge(reached_with, rare, often),
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


FAILURE_OPTIONS: dict[str, tuple[float | None, str]] = {
    "mtbf_hours": (None, "mean hours between two failures of the whole job, not of a node (instead of --gpu-hours)"),
    "gpus": (None, f"GPUs of the whole job (default: the recipe's ranks; without a recipe {GPUS})"),
    "gpu_hours": (
        None,
        "mean GPU-hours between two failures: hours a job ran x all its GPUs / its failures "
        f"(default: {GPU_HOURS:,}, as in Llama 3's training)",
    ),
    "stall": (2.0, "seconds a step stalls for a checkpoint"),
    "save": (60.0, "seconds from a checkpoint's begin until it is safe"),
    "detect": (600.0, "seconds until the job sees a failure"),
    "restart": (300.0, "seconds from there to the next useful step: requeue, start, load"),
    "images_per_second": (
        None,
        "images that the job trains on in a second, to print the interval as checkpoint.every_samples, too; with a "
        "recipe, those that are planned",
    ),
}
ABOVE_ZERO, WHOLE = ("mtbf_hours", "gpus", "gpu_hours", "save", "images_per_second"), ("gpus",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, (default, meaning) in FAILURE_OPTIONS.items():
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
    text, facts = weigh(args)
    return to_json(facts, indent=1) if args.json else text


def weigh(args: argparse.Namespace, run_s: float = math.inf) -> tuple[str, dict[str, Any]]:
    """The lines to print, and the figures. run_s: useful seconds of the whole run, which no interval exceeds. Raises
    UserError."""
    failures, given = _read(args)
    best = best_interval(failures, run_s)
    interval_s = given.get("interval", best)
    if "interval" in given and interval_s > max(run_s, failures.save_s):
        raise UserError(Problem("--interval", interval_s, f"the whole run takes {_shown(run_s)}", math.floor(run_s)))
    shares, reach = breakdown(failures, interval_s), reaching(failures, interval_s, longest_s=run_s)
    facts = asdict(failures) | {"interval_s": interval_s, "shares": shares}
    facts |= {"run_s": run_s} if run_s < math.inf else {}
    facts |= {
        "best_interval_s": {"ours": best, "young": young(failures), "daly": daly(failures)},
        "best_goodput": goodput(failures, best),
        "target": {"goodput": TARGET} | reach,
    }
    if "images_per_second" in given:
        facts["every_samples"] = round(min(interval_s, run_s) * given["images_per_second"])
    return "\n".join(_table(failures, facts)), facts


def _read(args: argparse.Namespace) -> tuple[Failures, dict[str, float]]:
    """(the model, the other values) of a command line. Raises UserError with every problem."""
    given: dict[str, float] = {}
    problems: list[Problem] = []
    texts = {
        name: getattr(args, name) for name in [*FAILURE_OPTIONS, *(["interval"] if args.interval != "best" else [])]
    }
    for name, text in texts.items():
        if text is None:
            continue
        try:
            given[name] = float(text)
        except ValueError:
            rule = f"must be a number{' or best' if name == 'interval' else ''}"
            problems.append(Problem(_option(name), text, rule))
            continue
        problems += _wrong(_option(name), given[name], above=name in ABOVE_ZERO, whole=name in WHOLE)
    if "mtbf_hours" in given and (twice := [_option(n) for n in ("gpus", "gpu_hours") if n in given]):
        rule = f"says how often the job fails, as {' and '.join(twice)} do{'es' * (len(twice) == 1)}, too"
        problems.append(Problem("--mtbf-hours", given["mtbf_hours"], rule, "leave one out"))
    _refuse(problems)
    mtbf_s = HOUR_S * given.get("mtbf_hours", given.get("gpu_hours", GPU_HOURS) / given.get("gpus", GPUS))
    if not SMALLEST <= mtbf_s <= LARGEST:
        rule = f"it makes {mtbf_s:g} s between two failures, which must be from {SMALLEST:g} to {LARGEST:g} s"
        problems += [Problem(_option(n), given[n], rule) for n in ("mtbf_hours", "gpus", "gpu_hours") if n in given]
    if given["save"] < given["stall"]:
        problems.append(_safe_too_soon("--save", given["save"], given["stall"]))
    _refuse(problems)
    failures = Failures(mtbf_s=mtbf_s, **{f"{n}_s": given[n] for n in ("stall", "save", "detect", "restart")})
    if "interval" in given:
        _check_interval(failures, given["interval"], "--interval")
    return failures, given


def _table(failures: Failures, facts: dict) -> list[str]:
    shares, best, interval_s = facts["shares"], facts["best_interval_s"], facts["interval_s"]
    lines = [
        (
            f"one failure in {_shown(failures.mtbf_s / HOUR_S, 'hours')}, seen after {_shown(failures.detect_s)}, "
            f"restarted in {_shown(failures.restart_s)}; a checkpoint stalls for {_shown(failures.stall_s)} and is "
            f"safe after {_shown(failures.save_s)}"
        ),
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
    if "run_s" in facts and best["ours"] >= facts["run_s"] * (1 - 1e-6):
        lines.insert(3, f"               the whole run takes {_shown(facts['run_s'])}: its last checkpoint is enough")
    if "every_samples" in facts:
        lines.append(f"in a recipe    --checkpoint.every_samples {facts['every_samples']}")
    return [*lines, f"aim            {_verdict(failures, facts)}"]


def _verdict(failures: Failures, facts: dict) -> str:
    target = facts["target"]
    name, mtbf_s = f"{100 * target['goodput']:g} %", target["mtbf_s"]
    rarer = f"one failure in {_shown((mtbf_s or LARGEST) / HOUR_S, 'hours')}"
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
            otherwise = f", or with {rarer} at its best interval" if mtbf_s else ""
            return (
                f"{name} is not reached, but would be with a detection and restart of {_shown(down_s)} together, not "
                f"{_shown(failures.down_s)}, at {place} interval{otherwise}"
            )
    takes = f": it takes {rarer}, at its best interval" if mtbf_s else f", nor with {rarer}"
    return f"{name} is not reached, nor would it be with no time at all for detection and restart{takes}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _shown(value: float, unit: str = "s") -> str:
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def _wrong(key: str, value: float, *, above: bool = False, whole: bool = False) -> list[Problem]:
    """What is wrong with a number, if anything."""
    least = 1 if whole and above else SMALLEST if above else 0
    if least <= value <= LARGEST and (not whole or value == int(value)):
        return []
    return [Problem(key, value, f"must be a {'whole ' * whole}number from {least:g} to {LARGEST:g}")]


def _safe_too_soon(key: str, save_s: float, stall_s: float) -> Problem:
    return Problem(key, save_s, f"a checkpoint is safe no sooner than its stall of {_shown(stall_s)} ends", stall_s)


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise UserError(*problems)
