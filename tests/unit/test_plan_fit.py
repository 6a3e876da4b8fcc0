"""What to recompute, the smallest change that fits, and the fastest of all that fit.

What a choice of units saves is held against real traces. The search is held to its rules on updates that are made up of
a few runs of memory, so that each kind of change is the smallest once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import pytest
import torch

from seer_scale.config import Config, load_recipe, resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.methods.registry import build_method
from seer_scale.parallel.activation_checkpoint import find_segments
from seer_scale.plan import search
from seer_scale.plan.bounds import least_gpus, least_held, memory_left, with_parallel
from seer_scale.plan.devices import Device, load_device
from seer_scale.plan.memory import memory_of
from seer_scale.plan.plan import Plan, make_plan
from seer_scale.plan.recompute import Recomputation
from seer_scale.plan.time import simulate
from seer_scale.plan.trace import Collective, Held, Op, Trace, trace
from tests.tiny import DINOV2, RECIPE, sections

GPUS, NODE = 8, 4
GIB = 2**30


def config_of(**overrides: object) -> Config:
    given = {"train.global_batch": 256, "train.precision": "bf16", "parallel.engine": "ddp"} | overrides
    return resolve(RECIPE, sections(given), world_size=GPUS)


def device_of(gib: float) -> Device:
    return dataclasses.replace(load_device("h100"), memory_bytes=int(gib * GIB), gpus_per_node=NODE)


# ------------------------------------------------------------------------------------------------ recomputation


@pytest.fixture(scope="module")
def traced() -> tuple[Config, Recomputation]:
    wide = {"model.w0": 32, "model.wa": 48.0, "train.global_batch": 32}  # so that views are not most of it
    config = resolve(RECIPE, sections(wide), world_size=1)
    return config, Recomputation(trace(config, 1), load_device("h100"))


def peak_and_seconds(config: Config, setting: object) -> tuple[int, float]:
    found = make_plan(with_parallel(config, activation_checkpoint=setting), 1, load_device("h100"))
    return found.memory.peak.nbytes, found.time.seconds


def test_what_recomputing_saves_is_what_a_trace_of_it_holds(traced):
    config, found = traced
    for units in (found.units, found.units[:1]):
        peak, _ = peak_and_seconds(config, found.setting(units))
        assert found.peak(units) == pytest.approx(peak, rel=0.03) and peak < 0.95 * found.peak(())
    peaks = [found.peak(units) for num in range(6) for units in [found.units[:num]]]
    assert peaks == sorted(peaks, reverse=True)


def test_the_choice_is_never_slower_at_equal_memory_than_the_first_stages(traced):
    config, found = traced
    num = [1, 1, 1, 2]
    assert sum(num) == len(found.units)
    for stages in (1, 2):
        ends = tuple(tuple(range(1, n + 1)) if i < stages else () for i, n in enumerate(num))
        peak, seconds = peak_and_seconds(config, ends)
        units = found.choose(peak)
        assert units is not None
        chosen, took = peak_and_seconds(config, found.setting(units))
        assert chosen <= peak and took <= seconds


def test_no_choice_of_units_is_cheaper_by_what_is_known_of_each(traced):
    _, found = traced
    subsets = [s for n in range(6) for s in itertools.combinations(found.units, n)]
    for limit in {found.peak(subset) for subset in subsets}:
        units = found.choose(limit)
        assert units is not None and found.peak(units) <= limit
        best = min(found.seconds(s) for s in subsets if found.peak(s) <= limit)
        assert found.seconds(units) <= 1.35 * best
    assert found.choose(min(found.peak(s) for s in subsets) - 1) is None
    assert found.choose(found.peak(())) == [] and found.setting([]) == "none"


# ------------------------------------------------------------------------------------------------ the search

STATE = {"ddp": 12.0, "single": 12.0, "fsdp": 12.0, "zero1": 8.0, "zero2": 7.0, "zero3": 12.0, "fairscale": 9.0}
"""GiB of weights, gradients and state; of fsdp and zero3 shared out among the ranks."""
OFFLOADED = {"zero2": 0.9, "zero3": 0.6}
ACTIVATIONS = 1 / 16
"""GiB an image and unit, which is recomputed, and half as much that is not."""
MOVED = {"ddp": 1, "fsdp": 2, "zero1": 2, "zero2": 3, "zero3": 4, "fairscale": 2}
"""Collectives an update."""


@cache
def stages() -> list[list[str]]:
    (sequence,) = build_method(config_of(), World()).checkpointed_sequences()
    return sequence.stage_units()


def made_up(config: Config, gpus: int, device: Device) -> Plan:
    """The plan of an update with a product of matrices a unit."""
    engine = "single" if gpus == 1 and not config.parallel.offload else config.parallel.engine
    recomputed = sum(find_segments(config.parallel.activation_checkpoint, stages()), [])
    units = sum(stages(), [])
    micro = config.num_micro_batches(gpus)
    images = config.train.global_batch // gpus // micro
    steps: list[Op] = []
    changes: list[tuple[Held, bool]] = []

    def op(phase: str, unit: str, collective: Collective | None = None) -> None:
        work = 0 if collective else images * 10**12
        steps.append(Op("mm", phase, unit, 0, work, 2**20, torch.bfloat16, 0, collective))  # type: ignore[arg-type]

    def hold(gib: float, unit: str = "", is_output: bool = False) -> Held:
        kind, phase = ("activations", "forward") if unit else ("parameters", "build")
        held = Held(int(gib * GIB), kind, phase, unit, 0, len(steps), -1, is_output)  # type: ignore[arg-type]
        changes.append((held, True))
        return held

    def free(held: Held) -> None:
        held.freed = len(steps)
        changes.append((held, False))

    share = gpus // config.parallel.replicate_degree if engine in ("fsdp", "zero3") else 1
    hold(OFFLOADED[engine] / (gpus / GPUS) if config.parallel.offload else STATE[engine] / share)
    for number in range(micro):
        for unit in units if micro > 1 and number == 0 else ():
            for _ in range(micro):
                op("targets", f"backbone.{unit}")
        alive: list[tuple[str, Held, Held | None]] = []
        for unit in units:
            name = f"backbone.{unit}"
            op("forward", name)
            inner = None if unit in recomputed else hold(ACTIVATIONS * images, name)
            alive.append((unit, hold(ACTIVATIONS / 2 * images, name, True), inner))
        for unit, output, inner in reversed(alive):
            name = f"backbone.{unit}"
            if inner is None:
                op("recompute", name)
                inner = hold(ACTIVATIONS * images, name)
            op("backward", name)
            free(inner)
            free(output)
    for _ in range(MOVED.get(engine, 0) + (config.parallel.replicate_degree > 1)):
        op("update", "", Collective("all-reduce", 2**28, torch.float32, tuple(range(gpus)), "default"))
    found = Trace(config, engine, gpus, 0, "gpu", steps, changes, [], [f"backbone.{u}" for u in units], {})  # type: ignore[arg-type]
    return Plan(config, gpus, device, found, memory_of(found, device), simulate(found, device))


@pytest.fixture
def planned(monkeypatch):
    """The configurations that were planned."""
    seen: list[Config] = []

    def planning(config: Config, gpus: int, device: Device) -> Plan:
        seen.append(config)
        return made_up(config, gpus, device)

    monkeypatch.setattr(search, "make_plan", planning)
    monkeypatch.setattr(search, "find_spec", lambda name: name)
    return seen


CHANGES = {  # GiB of the device: keys that make it fit
    24.0: {"parallel.activation_checkpoint"},
    16.0: {"train.micro_batch"},
    10.0: {"parallel.engine"},
    2.7: {"parallel.engine", "parallel.offload"},
}


@pytest.mark.parametrize("gib", CHANGES)
def test_the_smallest_change_that_fits(gib, planned):
    config, device = config_of(), device_of(gib)
    assert not made_up(config, GPUS, device).memory.fits
    found, tried = search.smallest_change(config, GPUS, device)
    assert tried == [GPUS] and found is not None and found.fits and found.gpus == GPUS
    assert CHANGES[gib] <= set(found.keys)
    later = set().union(*(keys for size, keys in CHANGES.items() if size < gib)) - CHANGES[gib]
    assert not later & set(found.keys)
    asked = resolve(config.to_dict(), found.words, world_size=GPUS)
    assert all(asked.get(key) == value for key, value in found.keys.items())
    assert made_up(asked, GPUS, device).memory == found.plan.memory


def test_more_gpus_are_the_last_change_and_double_in_whole_nodes(planned, monkeypatch):
    config = config_of(**{"parallel.engine": "fsdp"})
    found, tried = search.smallest_change(config, GPUS, device_of(2.0))
    assert found is not None and found.fits and found.gpus == tried[-1] > GPUS
    found, tried = search.smallest_change(config, GPUS, device_of(1.3))
    assert found is None and tried == [8, 16, 32, 64, 128, 256]
    assert "offload on 8, 16, 32, 64, 128, 256 GPUs" in search.change_lines(found, tried)[0]
    planned.clear()
    monkeypatch.setattr(search, "least_held", lambda method, config, engine, gpus: 4 * GIB * 32 // gpus)
    found, tried = search.smallest_change(config, GPUS, device_of(6.0))
    assert tried == [32] and found is not None  # on fewer nothing is traced
    assert planned and all(c.train.global_batch == config.train.global_batch for c in planned)


@pytest.mark.parametrize("engine,gpus", [("single", 1), ("ddp", GPUS), ("fsdp", GPUS)])
def test_what_a_rank_holds_at_least_is_what_a_trace_of_it_holds(engine, gpus):
    wide = {"model.w0": 64, "model.wa": 96.0, "parallel.engine": engine if gpus > 1 else "ddp", "train.global_batch": 8}
    config = config_of(**wide)
    method = build_method(config, World())
    memory = make_plan(config, gpus, load_device("h100")).memory
    state = memory.kinds["parameters"] + memory.kinds["optimiser state"]
    assert least_held(method, config, engine, gpus) == pytest.approx(1.5 * state, rel=0.05)  # gradients: a third of all


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero3"])
def test_of_a_teacher_a_rank_holds_weights_alone(engine):
    wide = {"model.width": 96, "dinov2.hidden": [256], "dinov2.koleo_weight": 0.0, "dinov2.koleo_group": 16}
    config = resolve(DINOV2, sections(wide | {"parallel.engine": engine}), world_size=2)
    held = least_held(build_method(config, World()), config, engine, 2)
    kinds = make_plan(config, 2, load_device("h100")).memory.kinds
    state = kinds["parameters"] + kinds["optimiser state"]
    assert held == pytest.approx(1.5 * state + kinds["moving averages"], rel=0.1)  # gradients: a third of the rest


def test_the_least_number_of_gpus_holds_the_state_and_no_smaller_one_does():
    config, device = config_of(**{"swav.hidden": [1_000_000], "parallel.engine": "fsdp"}), device_of(1.3)
    method = build_method(config, World())
    fits = [n for n in (2, 4, 8, 16, 32, 64) if least_held(method, config, "fsdp", n) <= memory_left(device, n)]
    assert least_gpus(method, config, device, above=1) == fits[0] > 2


@pytest.mark.parametrize("gib", [60, 12, 6])
def test_nothing_that_fits_is_faster_than_what_fit_gives_first(gib, planned, capsys):
    config, device = config_of(), device_of(gib)
    found = search.fit(config, GPUS, device)
    assert found[0].fits
    assert len(planned) == len(capsys.readouterr().err.splitlines())  # each is told
    fastest = math.inf
    for engine, size, setting in itertools.product(STATE, (0, 8, 1), ("none", "every 1")):
        if engine == "single":
            continue
        keys = {"parallel.engine": engine, "train.micro_batch": size, "parallel.activation_checkpoint": setting}
        plan = made_up(search.with_keys(config, keys), GPUS, device)
        fastest = min(fastest, plan.time.seconds) if plan.memory.fits else fastest
    assert found[0].plan.time.seconds <= fastest * (1 + 1e-9)
    assert [c.plan.time.seconds for c in found if c.fits] == sorted(c.plan.time.seconds for c in found if c.fits)


# ------------------------------------------------------------------------------------------------ what is written


def test_the_written_recipe_plans_to_the_same_figures(planned, tmp_path):
    config, device = config_of(), device_of(20)
    change = search.fit(config, GPUS, device)[0]
    path = tmp_path / "fitted.yaml"
    given = {**RECIPE, "train": {**RECIPE["train"], "global_batch": 256, "precision": "bf16"}}
    search.write_recipe(path, given, change)
    again = resolve(load_recipe(str(path)), world_size=GPUS)
    plan = made_up(again, GPUS, device)
    assert again.parallel.ranks == GPUS
    assert (plan.memory, plan.time.seconds) == (change.plan.memory, change.plan.time.seconds)
    assert f"{GPUS} x h100" in path.read_text()
    before = path.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        search.write_recipe(path, given, change)
    with pytest.raises(UserError, match="does not exist"):
        search.write_recipe(tmp_path / "nowhere" / "x.yaml", given, change)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_unit_larger_than_the_device_is_refused_before_any_trace(monkeypatch):
    monkeypatch.setattr("seer_scale.plan.plan.trace", lambda *args, **kwargs: pytest.fail("was traced"))
    huge = {"swav.hidden": [200_000_000], "parallel.engine": "fsdp", "parallel.max_unit_gib": 1000.0}
    for find in (search.fit, search.smallest_change):
        with pytest.raises(UserError) as error:
            find(config_of(**huge), GPUS, device_of(1))
        assert len(error.value.args) == 1 and "h100" in str(error.value)
