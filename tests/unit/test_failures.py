"""The formula of goodput against replayed failures, published figures and its own limits; what the command prints.

`replay` shares nothing with the formula: it draws failures and goes from event to event.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seer_scale.errors import UserError
from seer_scale.plan import failures
from seer_scale.plan.failures import (
    Failures,
    best_interval,
    breakdown,
    daly,
    goodput,
    reaching,
    young,
)

LLAMA = Failures(mtbf_s=50_700 / 512 * 3600, stall_s=2, save_s=60, detect_s=600, restart_s=300)
"""One failure in 50,700 GPU-hours (Llama 3), on 512 GPUs."""
Z99 = 2.576

# (mtbf, stall, save, detect, restart, interval), from mild to failures oftener than checkpoints
GRID = [
    (10_000, 2, 60, 600, 300, 400),
    (10_000, 2, 60, 600, 300, 4_000),
    (2_000, 20, 300, 100, 50, 300),
    (1_000, 50, 50, 0, 200, 300),
    (500, 0, 400, 0, 0, 400),
    (500, 100, 250, 300, 500, 500),
    (300, 1, 290, 10, 20, 300),
    (200, 30, 60, 0, 10, 400),
]
some_failures = st.builds(
    lambda mtbf, stall, latency, detect, restart: Failures(
        mtbf_s=mtbf, stall_s=stall, save_s=stall + latency, detect_s=detect, restart_s=restart
    ),
    st.floats(100, 1e7),
    st.floats(0.1, 100),
    st.floats(0.1, 1e3),
    st.floats(0.1, 1e3),
    st.floats(0.1, 1e3),
)
longer = st.floats(1.1, 3)


def case(mtbf, stall, save, detect, restart) -> Failures:
    return Failures(mtbf_s=mtbf, stall_s=stall, save_s=save, detect_s=detect, restart_s=restart)


def within(differences: list[float]) -> bool:
    """Whether their mean is 0, at 99 %."""
    return abs(np.mean(differences)) <= Z99 * np.std(differences, ddof=1) / math.sqrt(len(differences))


# ------------------------------------------------------------------------------------------------ the replay


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One run as it happened: its seconds are kept, lost, stalled (the wait for the last save too) or down."""

    failures: int
    kept_s: float
    lost_s: float
    stalled_s: float
    down_s: float
    elapsed_s: float


def replay(f: Failures, interval_s: float, work_s: float, seed: int) -> Replay:
    """Go through one run until whole intervals of at least `work_s` are safe."""
    random, wanted = np.random.default_rng(seed), math.ceil(work_s / interval_s)
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
        failures=failures,
        kept_s=kept_s,
        lost_s=lost_s,
        stalled_s=spent["stall"],
        down_s=spent["down"],
        elapsed_s=now,
    )


def expected_s(f: Failures, interval_s: float, work_s: float) -> float:
    """Seconds a run is expected to take for whole intervals of at least `work_s`, the last save being waited for.

    Exact for any length: n intervals take n times what one takes in a long run, and M exp(R / M) (exp(L / M) - 1) once
    for the last save. It solves t(n) = E[min(T, n c + L)] + sum_j P(j intervals are safe at a failure T) (E[down] + t(n
    - j))."""
    share, up = goodput(f, interval_s), math.exp(-(f.down_s + f.save_s - f.stall_s) / f.mtbf_s)
    if min(share, up) == 0:
        return math.inf
    wait = f.mtbf_s * -math.expm1((f.stall_s - f.save_s) / f.mtbf_s) / up
    return math.ceil(work_s / interval_s) * interval_s / share + wait


@pytest.mark.parametrize("row", GRID, ids=str)
def test_formula_is_what_happens(row):
    f, interval_s = case(*row[:-1]), row[-1]
    done = [replay(f, interval_s, 100 * interval_s, seed) for seed in range(60)]
    took, shares = [r.elapsed_s for r in done], breakdown(f, interval_s)
    assert np.std(took) / math.sqrt(len(took)) < 0.02 * np.mean(took)  # the intervals are narrow
    assert within([t - expected_s(f, interval_s, 100 * interval_s) for t in took])
    # the last save, for which a run waits, is no part of a long run: 100 intervals beside it
    for share, spent in (("lost", "lost_s"), ("down", "down_s"), ("stalled", "stalled_s"), ("goodput", "kept_s")):
        assert np.mean([getattr(r, spent) for r in done]) / np.mean(took) == pytest.approx(
            shares[share], rel=0.05, abs=0.01
        )


@pytest.mark.parametrize("length", [1, 2, 5])
def test_formula_is_exact_for_short_runs(length):
    f = case(500, 20, 350, 100, 100)
    took = [replay(f, 400, length * 400, seed).elapsed_s for seed in range(3000)]
    assert within([t - expected_s(f, 400, length * 400) for t in took])
    # the wait for the last save is seen: the long run's share alone is wrong
    assert not within([t - length * 400 / goodput(f, 400) for t in took])


def test_replay_by_hand(monkeypatch):
    gaps = iter([29, 4, 1000])
    monkeypatch.setattr(np.random, "default_rng", lambda seed: argparse.Namespace(exponential=lambda mean: next(gaps)))
    # work 0-20, stall to 22, work to 29, where the checkpoint that would be safe at 30 is lost; down to 33, and from
    # there to 41; work to 61, stall to 63, safe at 71, work to 83, the last save to 93
    r = replay(case(100, 2, 10, 5, 3), 20, 40, seed=0)
    assert (r.failures, r.kept_s, r.lost_s, r.stalled_s, r.down_s, r.elapsed_s) == (2, 40, 27, 2 + 2 + 10, 4 + 8, 93)


@settings(max_examples=50, deadline=None)
@given(some_failures, longer, st.floats(0.1, 20), st.integers(0, 9))
def test_replay_accounts_for_all_time(f, more, length, seed):
    interval_s = more * f.save_s
    assume(expected_s(f, interval_s, length * interval_s) < 1000 * f.mtbf_s)
    r = replay(f, interval_s, length * interval_s, seed)
    assert r.kept_s + r.lost_s + r.stalled_s + r.down_s == pytest.approx(r.elapsed_s)
    assert length * interval_s <= r.kept_s < (length + 1.001) * interval_s
    assert (
        min(r.lost_s, r.down_s) >= 0
        and (r.failures > 0) == (r.down_s > 0)
        and r == replay(f, interval_s, length * interval_s, seed)
    )


# ------------------------------------------------------------------------------------------------ the formula


@given(some_failures, longer, st.integers(1, 1000))
def test_blocking_checkpoints_are_daly_s(f, more, segments):
    f = replace(f, save_s=f.stall_s, detect_s=0)
    m, interval_s = f.mtbf_s, more * f.save_s
    # the complete cost function of Daly 2006: T = M e^(R/M) (e^((tau + delta)/M) - 1) T_s / tau
    total_s = m * math.exp(f.restart_s / m) * math.expm1((interval_s + f.stall_s) / m) * segments
    assert expected_s(f, interval_s, (segments - 0.5) * interval_s) == pytest.approx(total_s, rel=1e-9)
    assert goodput(f, interval_s) == pytest.approx(segments * interval_s / total_s, rel=1e-9)


@pytest.mark.parametrize("mtbf_min, best_min", [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_published_intervals(mtbf_min, best_min):
    """Figures 3, 4 and 5 of Daly 2006: a dump of 5 minutes, a restart of 10."""
    f = case(mtbf_min * 60, 300, 300, 0, 600)
    assert daly(f) / 60 == pytest.approx(best_min, rel=0.006)
    assert young(f) / 60 == pytest.approx(math.sqrt(2 * 5 * mtbf_min))
    # a save of as long as the stall lets the interval be any that is longer
    assert best_interval(f) / 60 == pytest.approx(best_min, rel=0.01)
    assert daly(case(100, 300, 300, 0, 0)) == 100


@given(some_failures, longer)
def test_best_interval_is_best(f, more):
    best = best_interval(f)
    assert best >= f.save_s
    for other in (best * more, max(f.save_s, best / more)):
        assert goodput(f, best) >= goodput(f, other)
    if best > f.save_s * 1.01:  # a maximum inside, where the derivative is 0: e^(x + s) (1 - x) = 1
        x = best / f.mtbf_s
        assert math.log1p(-x) + x + f.stall_s / f.mtbf_s == pytest.approx(0, abs=1e-3 * x * x)
    if f.stall_s < 1e-3 * f.mtbf_s:
        assert best == pytest.approx(max(f.save_s, daly(f)), rel=1e-3)


@given(some_failures, longer, longer, st.sampled_from(["stall_s", "save_s", "detect_s", "restart_s", "mtbf_s"]))
def test_goodput_falls_with_each_time_and_rises_with_mtbf(f, more, times, key):
    assume(key != "stall_s" or f.stall_s * times <= f.save_s)
    other = replace(f, **{key: getattr(f, key) * times})
    interval_s = more * max(f.save_s, other.save_s)
    assume(interval_s < 10 * f.mtbf_s)  # beyond, a stall's share is lost in rounding
    here, there = goodput(f, interval_s), goodput(other, interval_s)
    assert (there > here) if key == "mtbf_s" else (there < here)


@given(some_failures, longer)
def test_shares_are_of_all_time(f, more):
    shares = breakdown(f, more * f.save_s)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert shares["down"] == pytest.approx(-math.expm1(-(f.detect_s + f.restart_s) / f.mtbf_s))


@given(some_failures, longer)
def test_without_failures_only_stalls_cost(f, more):
    f, interval_s = replace(f, mtbf_s=1e15), more * f.save_s
    assert goodput(f, interval_s) == pytest.approx(interval_s / (interval_s + f.stall_s), rel=1e-9)
    assert breakdown(f, interval_s)["stalled"] == pytest.approx(f.stall_s / (interval_s + f.stall_s), rel=1e-9)
    assert expected_s(f, interval_s, 3 * interval_s - 1e-6) == pytest.approx(3 * interval_s + 2 * f.stall_s + f.save_s)


def test_work_that_is_never_kept():
    f = case(0.5, 2, 60, 600, 300)
    assert goodput(f, 60) == 0 and expected_s(f, 60, 1) == math.inf and best_interval(f) == 60


# ------------------------------------------------------------------------------------------------ the target


@settings(max_examples=50, deadline=None)
@given(some_failures, longer)
def test_what_reaches_the_target(f, more):
    interval_s, target = more * f.save_s, 0.97
    told, best = reaching(f, interval_s, target), best_interval(f)
    assert told["reached"] == (goodput(f, interval_s) >= target)
    assert (told["intervals_s"] is not None) == (goodput(f, best) >= target)
    for edge in told["intervals_s"] or ():
        assert goodput(f, edge) == pytest.approx(target, abs=1e-5) or edge == f.save_s and goodput(f, edge) > target
    for key, interval in ("down_s", interval_s), ("best_down_s", best):
        if told[key] is None:
            assert goodput(replace(f, detect_s=0, restart_s=0), interval) < target
        else:
            assert goodput(replace(f, detect_s=told[key], restart_s=0), interval) == pytest.approx(target)
    g = replace(f, mtbf_s=told["mtbf_s"])
    assert goodput(g, best_interval(g)) == pytest.approx(target, abs=1e-5)


# ------------------------------------------------------------------------------------------------ the command


def told(*words: str) -> str:
    parser = argparse.ArgumentParser()
    failures.add_arguments(parser)
    return failures.run(parser.parse_args(words))


def test_defaults_reach_the_target():
    title, share, best, rest, target = told().splitlines()
    assert title.startswith("one failure in 99 hours") and target.split(maxsplit=1)[1].startswith("97 % is reached")
    assert float(share.split()[1]) == pytest.approx(100 * goodput(LLAMA, best_interval(LLAMA)), abs=0.005)
    assert goodput(LLAMA, best_interval(LLAMA)) > 0.97
    parts = [float(p) for p in re.findall(r"([\d.]+) %", share + rest)]
    assert len(parts) == 4 and sum(parts) == pytest.approx(100, abs=0.021)
    assert all(f"{word}" in best for word in ("Young: 1,194 s", "Daly: 1,193 s"))


def test_json_and_other_values():
    facts = json.loads(told("--mtbf-hours", "10", "--interval", "6000", "--json"))
    assert facts["interval_s"] == 6000 and facts["mtbf_s"] == 36_000
    assert not facts["target"]["reached"] and facts["shares"]["goodput"] < facts["best_goodput"]
    assert json.loads(told("--gpus", "1024", "--json"))["mtbf_s"] == pytest.approx(LLAMA.mtbf_s / 2)


def test_an_interval_in_samples():
    words = ("--interval", "1000", "--images-per-second", "12000")
    assert "--checkpoint.every_samples 12000000\n" in told(*words)
    assert json.loads(told(*words, "--json"))["every_samples"] == 12_000_000


@pytest.mark.parametrize(
    "words, verdict",
    [
        ("--interval 20000", "97 % is not reached, but would be with an interval of 71.3 s to 19,6"),
        (
            "--mtbf-hours 10",
            "not reached, but would be with a detection and restart of 658 s together, not 900 s, at this interval",
        ),
        ("--mtbf-hours 10 --interval 6000", "of 658 s together, not 900 s, at the best interval"),
        ("--mtbf-hours 10 --save 3000", "nor would it be with no time at all"),
    ],
)
def test_verdicts(words, verdict):
    assert verdict in told(*words.split())


@pytest.mark.parametrize(
    "words, found",
    [
        ("--mtbf-hours 0", [("--mtbf-hours", 0)]),
        ("--stall -1 --detect nan", [("--stall", -1), ("--detect", math.nan)]),
        ("--save 0", [("--save", 0)]),
        ("--save minute", [("--save", "minute")]),
        ("--interval often", [("--interval", "often")]),
        ("--interval 59", [("--interval", 59, 60)]),
        ("--save 1", [("--save", 1, 2)]),
        ("--mtbf-hours 9 --gpus 8", [("--mtbf-hours", 9)]),
        ("--mtbf-hours 9 --gpu-hours 8", [("--mtbf-hours", 9)]),
        ("--gpus 1.5", [("--gpus", 1.5)]),
        ("--save 1e19", [("--save", 1e19)]),
        ("--mtbf-hours 1e18", [("--mtbf-hours", 1e18)]),
        ("--gpu-hours 1e18 --gpus 1", [("--gpus", 1), ("--gpu-hours", 1e18)]),
        ("--gpus 1e15 --gpu-hours 1e-6 --save 1", [("--gpus", 1e15), ("--gpu-hours", 1e-6), ("--save", 1, 2)]),
    ],
)
def test_what_cannot_be(words, found):
    with pytest.raises(UserError) as error:
        told(*words.split())
    for problem, (key, value, *nearest) in zip(error.value.problems, found, strict=True):
        assert problem.key == key and [problem.nearest] * len(nearest) == nearest
        assert problem.value == value or math.isnan(problem.value) and math.isnan(value)


@pytest.mark.parametrize("words", ["--save 1e18", "--save 4e16"])
def test_a_target_that_no_mtbf_reaches(words):
    """The search ends at the largest figure there may be."""
    target = json.loads(told(*words.split(), "--json"))["target"]
    assert target["mtbf_s"] is None and not target["reached"] and target["best_down_s"] is None
    assert told(*words.split()).endswith("detection and restart, nor with one failure in 277,777,777,777,778 hours")


@pytest.mark.parametrize("words", ["--mtbf-hours 2.7e14 --restart 1e17", "--restart 1e18", "--detect 1e18"])
def test_a_target_that_only_a_shorter_restart_reaches(words):
    target = json.loads(told(*words.split(), "--json"))["target"]
    assert target["mtbf_s"] is None and 0 < target["down_s"] < 1e17
    assert told(*words.split()).endswith("at this interval")


def test_what_cannot_be_is_told_at_once():
    with pytest.raises(UserError) as error:
        Failures(mtbf_s=0, stall_s=-2, save_s=math.inf, detect_s=0, restart_s=math.nan)
    assert [p.key for p in error.value.problems] == ["mtbf_s", "stall_s", "save_s", "restart_s"]
    for call in (goodput, breakdown):
        with pytest.raises(UserError) as error:
            call(LLAMA, 59)
        assert (error.value.problems[0].key, error.value.problems[0].nearest) == ("interval_s", 60)
