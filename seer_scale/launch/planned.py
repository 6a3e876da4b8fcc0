"""What is about to be submitted, planned first: what cannot fit is refused before it waits in a queue."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from seer_scale.config import merge
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.files import shown
from seer_scale.formatting import memory_size, rough_duration
from seer_scale.launch.job import Job
from seer_scale.training.start import resolve_given

Prepared = tuple[Job, dict[str, Any], list[str]]
"""What `prepare` makes of one run."""


def plan_all(prepared: Sequence[Prepared], gpu: str) -> list[Prepared]:
    """The runs with what is planned of each among their notes, on the fewest nodes it may get, and with the engine that
    `parallel.engine auto` would take. gpu: as `seer-scale plan --device` has it. Raises UserError with all that cannot
    fit."""
    from seer_scale.plan.devices import load_device
    from seer_scale.plan.plan import Plan, make_plan

    device, plans, problems, out = load_device(gpu), {}, [], []
    for job, recipe, notes in prepared:
        ranks = job.ranks_per_node * job.node_counts[0]
        key = json.dumps([recipe | {"run": None}, ranks], sort_keys=True, allow_nan=False)
        if key not in plans:
            print(f"seer-scale: planning {shown(job.name)} on {ranks} ranks ...", file=sys.stderr, flush=True)
            plans[key] = make_plan(resolve_given(recipe, {}, ranks, with_data=False), ranks, device)
        plan: Plan = plans[key]
        took = f"{memory_size(plan.memory.total)} of {memory_size(plan.memory.capacity)} of a {device.name}"
        if plan.memory.cannot_fit:
            fix = f"seer-scale plan --gpus {ranks} --device {gpu} says what does; --no-plan submits it all the same"
            problems.append(Problem(job.name, NOTHING, f"needs {took}, as planned", fix))
            continue
        if _is_auto(recipe) and ranks > 1:
            recipe = merge(recipe, {"parallel": {"engine": plan.trace.engine}})
        days = rough_duration(86400 * plan.time.days(plan.config.train.total_samples))
        told = f"Planned for {ranks} ranks: {plan.trace.engine}, {took}, {days} of training."
        out.append((job, recipe, [*notes, told]))
    if problems:
        raise UserError(*problems)
    return out if all(plan.memory.fits for plan in plans.values()) else [_giving_back(*one) for one in out]


def _giving_back(job: Job, recipe: dict[str, Any], notes: list[str]) -> Prepared:
    """With the environment in which the allocator gives back its slack, but for what the profile sets itself. All of an
    array have the environment of the first."""
    from seer_scale.plan.memory import GIVES_BACK

    environment = GIVES_BACK | job.profile["environment"]
    told = ", ".join(f"{name}={environment[name]}" for name in GIVES_BACK)
    told = f"It may fit only as the allocator gives back its slack: {told} in its environment."
    return dataclasses.replace(job, profile=job.profile | {"environment": environment}), recipe, [*notes, told]


def _is_auto(recipe: dict[str, Any]) -> bool:
    return (recipe.get("parallel") or {}).get("engine", "auto") == "auto"
