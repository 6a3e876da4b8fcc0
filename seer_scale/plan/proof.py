"""What the traced updates of several ranks must fulfil for their run to work, and not to wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

from seer_scale.errors import NOTHING, ConfigError, Problem
from seer_scale.formatting import dtype_name, memory_size
from seer_scale.plan.trace import Collective, Trace

REDUCTIONS = {"all-reduce", "reduce-scatter", "reduce"}
SUMMING_OPS = {"", "sum", "avg", "premul_sum"}
BETWEEN_TWO = {"send", "recv"}
OF_RANKS = {"barrier": "leave it out", "a collective of what is on the host": "make it on the device"}
"""Waits for other ranks, and what to do instead."""
OF_LIBRARIES = ("/deepspeed/", "/fairscale/")
"""Engines that wait by themselves: docs/plan.md says so, and no recipe changes it."""


class Exchange(NamedTuple):
    """A collective as all its ranks must see it. group: what it is for; size: its ranks; root, op: as Collective's."""

    kind: str
    nbytes: int
    dtype: torch.dtype
    group: str
    size: int
    root: int = -1
    op: str = ""

    def __str__(self) -> str:
        size = memory_size(self.nbytes) if self.nbytes >= 2**20 else f"{self.nbytes} B"
        of = "".join([f", {self.op}" * bool(self.op), f", root {self.root}" * (self.root >= 0)])
        return f"{self.kind} of {size} of {dtype_name(self.dtype)} over {self.size} ranks{of}"


def exchange(collective: Collective) -> Exchange:
    c = collective
    return Exchange(c.kind, c.nbytes, c.dtype, c.group, len(c.ranks), c.root, c.op)


def sequence(trace: Trace) -> list[Exchange]:
    """What the rank exchanges in an update, in order. Ranks of which one differs wait for each other for ever."""
    return [exchange(c) for c in trace.collectives]


def check(traces: Sequence[Trace]) -> None:
    """traces: of ranks of one run. Raises ConfigError with all that would hang, or wait for the device, or lose digits:
    host synchronisations (but for those of DeepSpeed and fairscale), sums in half precision, collectives that are not
    the first rank's, and what two ranks send each other, as the other's trace need not be one of these."""
    kinds = (_waits, _half_sums, _between_two)
    problems = list(dict.fromkeys(p for trace in traces for kind in kinds for p in kind(trace)))
    if problems := problems + [p for trace in traces[1:] for p in _differences(traces[0], trace)]:
        raise ConfigError(problems, "The update")


def _waits(trace: Trace) -> Iterator[Problem]:
    for sync in trace.syncs:
        if any(part in sync.where for part in OF_LIBRARIES):
            continue
        fix = OF_RANKS.get(sync.what, "keep it there")
        if sync.what == "copy from the host":
            fix = "non_blocking=True, or make it on the device, as torch.full does"
        on = "other ranks" if sync.what in OF_RANKS else "the device"
        rule = f"makes the host wait for {on} in every update ({sync.what})"
        yield Problem(sync.where, NOTHING, rule, fix)


def _half_sums(trace: Trace) -> Iterator[Problem]:
    for c in trace.collectives:
        if c.kind in REDUCTIONS and c.op in SUMMING_OPS and c.dtype in (torch.float16, torch.bfloat16):
            rule = f"sums over ranks in {dtype_name(c.dtype)} ({c.kind}), which loses digits"
            yield Problem(c.where, NOTHING, rule, "give it .float()")


def _between_two(trace: Trace) -> Iterator[Problem]:
    for c in trace.collectives:
        if c.kind in BETWEEN_TWO:
            rule = f"exchanges with a single rank ({c.kind}), of which no plan shows that it does the same"
            yield Problem(c.where, NOTHING, rule, "a collective, such as dist.all_to_all_single")


def _differences(first: Trace, trace: Trace) -> Iterator[Problem]:
    for i, (a, b) in enumerate(zip_longest(first.collectives, trace.collectives)):
        if (a and exchange(a)) != (b and exchange(b)):
            one, other = (f"{exchange(c)} ({c.where})" if c else "none" for c in (a, b))
            rule = f"differ between ranks: the {i + 1}th of rank {first.rank} is {one}, of rank {trace.rank} {other}"
            yield Problem("collectives", NOTHING, rule, "the same on every rank, in one order")
            return
