"""What a recipe takes of so many GPUs: memory of each, time, whether it fits; before any is taken."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.formatting import amount, counted, memory_size, rough_duration, short_number
from seer_scale.formatting import rate as rate_of
from seer_scale.methods.registry import build_method
from seer_scale.plan import failures, proof
from seer_scale.plan.accelerator import GPU
from seer_scale.plan.bounds import check_largest_unit, with_parallel
from seer_scale.plan.devices import Device, known_devices
from seer_scale.plan.memory import Memory, memory_of
from seer_scale.plan.time import (
    SEER_DEVICE,
    SEER_GPUS,
    SEER_IMAGES,
    SEER_READINGS,
    SEER_UPDATE_S,
    StepTime,
    milliseconds,
    seer_config,
    seer_row,
    simulate,
)
from seer_scale.plan.trace import Sync, Trace, trace


@dataclass(frozen=True)
class Plan:
    """config: with the engine that is taken. gpus: ranks, one each. trace: of rank 0, of up to TRACED micro-batches.
    proved: ranks whose collectives were found to be the same."""

    config: Config
    gpus: int
    device: Device
    trace: Trace
    memory: Memory
    time: StepTime
    proved: tuple[int, ...] = ()

    @property
    def syncs(self) -> list[Sync]:
        return self.trace.syncs


def make_plan(config: Config, gpus: int, device: Device) -> Plan:
    """The plan of a recipe that was checked for so many ranks; of `parallel.engine auto` with the engine it would take.

    Raises UserError for what no update can be made of, or whose largest unit alone no such device holds, and for what
    makes the host wait or sums in half precision. That all ranks agree, `proved` shows.
    """
    method = build_method(config, World())
    check_largest_unit(method, config, gpus, device)
    if config.parallel.engine == "auto" and gpus > 1:
        return _plan_of_auto(config, gpus, device)
    return _plan(config, gpus, device)


def proved(plan: Plan) -> Plan:
    """The plan, once its update is traced as the last rank makes it, too: it exchanges what the first does, in the same
    order. Raises UserError with what would hang, or wait for the device."""
    others = [_trace(plan.trace.config, plan.gpus, plan.device, rank=plan.gpus - 1)] if plan.gpus > 1 else []
    proof.check([plan.trace, *others])
    return dataclasses.replace(plan, proved=(0, *(t.rank for t in others)))


def _trace(config: Config, gpus: int, device: Device, rank: int = 0) -> Trace:
    where = GPU if device.asynchronous else "cpu"
    return trace(config, gpus, rank=rank, local_size=min(gpus, device.gpus_per_node), device=where)


def _plan(config: Config, gpus: int, device: Device) -> Plan:
    num = config.num_micro_batches(gpus)
    of = [config] if num <= TRACED else [_with_micro_batches(config, gpus, n) for n in (TRACED - 1, TRACED)]
    traces = [_trace(c, gpus, device) for c in of]
    proof.check(traces[-1:])
    memory = memory_of(traces[-1], device, *((traces[0], num) if num > TRACED else ()))
    return Plan(config, gpus, device, traces[-1], memory, _time_of([simulate(t, device) for t in traces], num))


TRACED = 4
"""The most micro-batches that are traced: what any more take is what the last of them takes, each. From the third to
the fourth, as the second may be the first at which most is held elsewhere."""


def _with_micro_batches(config: Config, gpus: int, num: int) -> Config:
    """The recipe with another number of micro-batches of the same size."""
    batch = config.train.global_batch // config.num_micro_batches(gpus) * num
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=batch))


def _time_of(found: Sequence[StepTime], num: int) -> StepTime:
    """Of `num` micro-batches, from what was found for TRACED - 1 and TRACED; or the one there is."""
    if len(found) == 1:
        return found[0]
    fewer, more = (vars(f) for f in found)
    return dataclasses.replace(found[-1], **{k: _linear(fewer[k], more[k], num) for k in more})


def _linear(fewer: Any, more: Any, num: int) -> Any:
    """What grows by as much with each micro-batch; the rest as it is."""
    if isinstance(more, dict):
        return {k: _linear(fewer.get(k, 0), v, num) for k, v in more.items()}
    if isinstance(more, int | float):
        return more + (num - TRACED) * (more - fewer)
    return more


def _plan_of_auto(config: Config, gpus: int, device: Device) -> Plan:
    """Of ddp where it fits, which moves least; else of fsdp."""
    if config.parallel.replicate_degree == 1 and not config.parallel.shard_degree:
        plan = _plan(with_parallel(config, engine="ddp"), gpus, device)
        if plan.memory.fits:
            return plan
    return _plan(with_parallel(config, engine="fsdp"), gpus, device)


# ------------------------------------------------------------------------------------------------ what is said


def facts(
    plan: Plan,
    rate: float | None = None,
    failure: dict[str, Any] | None = None,
    published: Mapping[str, StepTime] | None = None,
) -> dict[str, Any]:
    """All figures of a plan, as JSON has them. published: what `plan_published` gives."""
    memory, time, samples = plan.memory, plan.time, plan.config.train.total_samples
    return {
        "engine": plan.trace.engine, "gpus": plan.gpus, "device": plan.device.name,
        "parameters": plan.trace.num_parameters, "precision": plan.config.train.precision,
        "images_a_gpu": plan.config.train.global_batch // plan.gpus,
        "micro_batches": plan.config.num_micro_batches(plan.gpus),
        "memory": {
            "fits": memory.fits, "cannot_fit": memory.cannot_fit, "total": memory.total,
            "capacity": memory.capacity, "room": memory.room,
            "kinds": memory.kinds, "peak_at": _peak_at(plan),
        },
        "time": {
            "update_s": time.seconds, "low_s": time.low, "high_s": time.high, "busy_s": time.busy,
            "exposed_s": time.exposed, "idle_s": time.idle, "images_per_s": time.images_per_s, "mfu": time.mfu,
            "updates": -(-samples // plan.config.train.global_batch), "days": time.days(samples),
            "gpu_hours": time.gpu_hours(samples), "loader_cores": time.loader_cores,
            "price": None if rate is None else time.price(samples, rate),
        },
        "collectives": len(plan.trace.collectives), "proved_ranks": list(plan.proved),
        "host_waits": [dataclasses.asdict(sync) for sync in plan.syncs],
        "assumptions": time.assumptions,
    } | ({"failures": failure} if failure else {}) | (_published_facts(published) if published else {})  # fmt: skip


def lines(plan: Plan, rate: float | None = None, published: Mapping[str, StepTime] | None = None) -> list[str]:
    """The plan as text. published: what `plan_published` gives."""
    return [
        headline(plan),
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan, rate),
        *_published_lines(plan, published),
        *_proof_lines(plan),
    ]


def headline(plan: Plan) -> str:
    """What is planned, on which devices."""
    config, micro = plan.config, plan.config.num_micro_batches(plan.gpus)
    parts = f", in {micro} micro-batches" if micro > 1 else ""
    return (
        f"{config.model.name}, {short_number(plan.trace.num_parameters)} parameters with its heads; "
        f"{plan.trace.engine} on {plan.gpus:,} x {plan.device.name}, {config.train.precision}, "
        f"{config.train.global_batch // plan.gpus} images each{parts}; recomputed: {recomputed(config)}"
    )


def verdict(memory: Memory) -> str:
    """Whether it fits, after how much of how much."""
    taken = f"{memory_size(memory.total)} of {memory_size(memory.capacity)}"
    if memory.fits:
        return f"{taken}: fits, {memory_size(memory.room)} to spare"
    if memory.cannot_fit:
        return f"{taken}: does NOT fit, by {memory_size(memory.lacking)} even without the allocator's slack"
    return f"{taken}: fits only as the allocator gives back its slack"


def where_most_is_held(plan: Plan) -> str:
    """Phase and unit."""
    at = _peak_at(plan)
    return f"{at['phase']}{' of ' * bool(at['unit'])}{at['unit']}"


def device_word(plan: Plan) -> str:
    """What one rank computes on, as it is called."""
    return "GPU" if plan.device.asynchronous else "rank"


def _memory_lines(plan: Plan) -> list[str]:
    return [
        f"{f'memory of a {device_word(plan)}':<18}{verdict(plan.memory)}",
        *(f"  {kind:<24}{memory_size(nbytes):>10}" for kind, nbytes in plan.memory.kinds.items()),
        f"  most is held in {where_most_is_held(plan)}",
    ]


def time_rows(plan: Plan) -> list[tuple[str, float]]:
    """Seconds of an update by kind, longest first; then those that only collectives take, and those that nothing
    does."""
    time = plan.time
    rows = sorted(time.busy.items(), key=lambda row: -row[1])
    return rows + [(NOT_HIDDEN, time.exposed)] * (plan.gpus > 1) + [(IDLE, time.idle)]


NOT_HIDDEN, IDLE = "not hidden, of these", "the device idles"


def _time_lines(plan: Plan, rate: float | None) -> list[str]:
    time, samples, device = plan.time, plan.config.train.total_samples, device_word(plan)
    price = "" if rate is None else f", {amount(time.price(samples, rate))} at {rate:g} a {device}-hour"
    updates = counted(-(-samples // plan.config.train.global_batch), "update")
    return [
        f"time of an update {speed(time)}",
        *(f"  {kind:<24}{milliseconds(seconds):>10}" for kind, seconds in time_rows(plan)),
        f"whole run         {samples:,} images in {rough_duration(86400 * time.days(samples))} ({updates}), "
        f"{amount(time.gpu_hours(samples))} {device}-hours{price}",
        f"loader            {counted(time.loader_cores, 'CPU core')} a {device}",
    ]


def speed(time: StepTime) -> str:
    """Of an update, with its interval."""
    return (
        f"{milliseconds(time.seconds)} ({milliseconds(time.low)} to {milliseconds(time.high)}), "
        f"{rate_of(time.images_per_s)} images/s, {time.mfu:.1%} MFU"
    )


def plan_published(config: Config) -> dict[str, StepTime]:
    """SEER's published update under both readings of its model, by recipe. Raises UserError for any other model."""
    if config.model.name not in SEER_READINGS.values():
        rule = f"is of one update of SEER's, whose model was not {config.model.name}"
        raise UserError(Problem("--published", NOTHING, rule, f"plan {' or '.join(SEER_READINGS)}"))
    return {name: _plan(seer_config(name), SEER_GPUS, known_devices()[SEER_DEVICE]).time for name in SEER_READINGS}


def _published_facts(published: Mapping[str, StepTime]) -> dict[str, Any]:
    planned = {
        name: {"update_s": time.seconds, "low_s": time.low, "high_s": time.high, "mfu": time.mfu}
        for name, time in published.items()
    }
    setting = {"update_s": SEER_UPDATE_S, "images": SEER_IMAGES, "gpus": SEER_GPUS, "device": SEER_DEVICE}
    return {"published": setting | {"planned": planned}}


def _published_lines(plan: Plan, published: Mapping[str, StepTime] | None) -> list[str]:
    """SEER's own row: under both readings of its model where these were planned."""
    if published:
        first, *more = seer_row(published)
        return [f"published         {first}", *(f"{'':18}{line}" for line in more)]
    if plan.config.model.name not in SEER_READINGS.values():
        return []
    theirs, ours = SEER_IMAGES / SEER_UPDATE_S / SEER_GPUS, plan.time.images_per_s / plan.gpus
    return [
        f"published         SEER: {milliseconds(SEER_UPDATE_S)} for {SEER_IMAGES:,} images on {SEER_GPUS} V100, "
        f"{rate_of(theirs)} images/s a GPU if its model was this one; planned here: {rate_of(ours)}; "
        "--published plans that update under both readings of its model"
    ]


def _proof_lines(plan: Plan) -> list[str]:
    """What was shown of the ranks, and the waits that no recipe changes."""
    waits = Counter((sync.what, sync.where.rpartition("site-packages/")[2]) for sync in plan.syncs)
    if len(plan.proved) > 1:
        first, last = plan.proved
        num = counted(len(plan.trace.collectives), "collective")
        said = [f"ranks {first} and {last:,} exchange the same {num} in one order"]
    else:
        said = ["of one rank alone"]
    said += ["no wait of the host"] if not waits else ["the engine's library makes the host wait:"]
    return [
        f"proof             {'; '.join(said)}",
        *(f"  {what} at {where}{f', {n} times' * (n > 1)}" for (what, where), n in waits.items()),
    ]


def _peak_at(plan: Plan) -> dict[str, str]:
    ops = plan.trace.ops
    op = ops[min(plan.memory.peak.op, len(ops) - 1)]
    return {"phase": op.phase, "unit": op.unit, "operation": op.name}


def recomputed(config: Config) -> str:
    """As a recipe has it."""
    setting = config.parallel.activation_checkpoint
    return setting if isinstance(setting, str) else str([list(ends) for ends in setting])


# ------------------------------------------------------------------------------------------------ failures


def failures_of(plan: Plan, given: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """What failures cost this very run: text, and the figures. given: options of `plan --failures` beside its own.
    Raises UserError."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    failures.add_arguments(parser)
    gpus = [] if "--mtbf-hours" in given else ["--gpus", str(plan.gpus)]
    args = parser.parse_args([*given, *gpus, "--images-per-second", repr(plan.time.images_per_s)])
    useful = plan.time.days(plan.config.train.total_samples)
    text, figures = failures.weigh(args, 86400 * useful)
    days = useful / figures["shares"]["goodput"]
    whole = f"whole run      {rough_duration(86400 * days)} with what failures and checkpoints cost"
    return f"{text}\n{whole}", figures | {"days": days}
