"""The traced update is the real one: the same operations, collectives and bytes as an update with values records."""

from __future__ import annotations

from dataclasses import astuple
from itertools import accumulate
from typing import Any

import pytest

from seer_scale.config import Config, resolve
from seer_scale.plan.accelerator import GPU
from seer_scale.plan.proof import Exchange, sequence
from seer_scale.plan.trace import Trace, trace, trace_with_values
from tests.ranks import run_ranks
from tests.tiny import RECIPE, sections, world_of

CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"single": {}},
    2: {
        "fsdp": {
            "parallel.engine": "fsdp",
            "parallel.activation_checkpoint": "every 1",
            "train.micro_batch": 2,
            "train.precision": "bf16",
        },
    },
}
"""By number of ranks. Not half precision on one: torch's description of its BatchNorm for CPUs keeps the batch's mean
and variance in that precision, its kernel in fp32; and of two ranks the statistics are synchronised."""


LIBRARIES = {
    "ddp": {"parallel.engine": "ddp", "train.micro_batch": 2},
    "fairscale": {"parallel.engine": "fairscale", "train.precision": "bf16"},
    "zero1": {"parallel.engine": "zero1"},
    "zero2": {"parallel.engine": "zero2", "train.micro_batch": 2},
    "zero3": {"parallel.engine": "zero3", "train.precision": "bf16"},
}
"""Whose code for tensors is in part C++ (DDP's reducer) or another on GPUs: collectives alone are compared."""


def config_of(case: str, size: int) -> Config:
    return resolve(RECIPE, sections(dict((CASES.get(size, {}) | LIBRARIES)[case])), world_size=size)


OF_THREADS, SOON = ("communication", "gathered units"), -2
"""What gloo's threads let go of a moment after a collective has ended, which may be in the next update: so of what is
there before only the state is compared."""
STATE = ("parameters", "optimiser state", "buffers")
Operations, Memory = list[tuple], list[tuple]


def described(found: Trace) -> tuple[Operations, Memory]:
    """In order, and what is held by when it comes and goes; but for what gloo itself does in a reduce-scatter, which
    sums a copy of all and then copies this rank's part out of it."""
    ops = found.ops
    assert ops == found.steps  # one stream
    own = [i for i, op in enumerate(ops) if op.name == "copy_" and ops[i - 1].name == "c10d._reduce_scatter_base_"]
    before = list(accumulate((i in own for i in range(len(ops))), initial=0))  # how many of them before each
    held = [
        (
            h.born - before[h.born],
            SOON if h.kind in OF_THREADS else h.freed - before[max(h.freed, 0)],
            h.nbytes,
            h.kind,
            h.unit,
        )
        for h, comes in found.changes
        if comes and h.born not in own and (0 < h.born < len(ops) or h.kind in STATE)
    ]
    return [astuple(op) for i, op in enumerate(ops) if i not in own], sorted(held)


def real(rank: int, size: int) -> dict[str, tuple[Operations, Memory]]:
    out = {}
    for case in CASES[size]:
        out[case] = described(trace_with_values(config_of(case, size), world_of(rank, size)))
    return out


@pytest.mark.parametrize("size", CASES)
def test_a_trace_is_what_an_update_with_values_records(size):
    for rank, of_rank in enumerate(run_ranks(size, real)):
        for case, (ops, held) in of_rank.items():
            found = described(trace(config_of(case, size), size, rank=rank, local_size=size, device="cpu"))
            assert found[0] == ops, case
            assert found[1] == held, case


def exchanged(rank: int, size: int, cases: list[str]) -> dict[str, list[Exchange]]:
    return {case: sequence(trace_with_values(config_of(case, size), world_of(rank, size), before=2)) for case in cases}


def traced_as_real(*cases: str) -> None:
    """With the paths of a GPU, which are those that a plan shows."""
    size = 2
    for rank, of_rank in enumerate(run_ranks(size, exchanged, list(cases))):
        for case, real_ones in of_rank.items():
            found = trace(config_of(case, size), size, rank=rank, local_size=size, device=GPU)
            assert real_ones and sequence(found) == real_ones, case


def test_the_collectives_of_libraries_are_those_of_real_ranks():
    traced_as_real("ddp", "fairscale")


@pytest.mark.long
def test_the_collectives_of_deepspeed_are_those_of_real_ranks():
    traced_as_real("zero1", "zero2", "zero3")
