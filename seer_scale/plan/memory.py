"""What a rank holds over an update, and when most: from a trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from seer_scale.plan.trace import Kind, Trace


@dataclass(frozen=True)
class Peak:
    """Where a rank holds most. op: how many operations there were before. kinds: bytes by what they are for; workspace:
    what the operation itself takes while it runs."""

    nbytes: int
    op: int
    kinds: dict[Kind, int]
    workspace: int


def rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def timeline(trace: Trace, block: int = 1) -> list[tuple[int, int, Kind]]:
    """(operations before, bytes, what for) of all that comes (+) and goes (-), in order, in multiples of `block`."""
    return [
        (held.born, rounded(held.nbytes, block), held.kind)
        if comes
        else (held.freed, -rounded(held.nbytes, block), held.kind)
        for held, comes in trace.changes
    ]


def find_peak(trace: Trace, block: int = 1) -> Peak:
    """block: what an allocator rounds to."""
    workspaces = [(i, op.workspace) for i, op in enumerate(trace.ops) if op.workspace]
    kinds: Counter[Kind] = Counter()
    now, peak = 0, Peak(-1, 0, {}, 0)
    for at, nbytes, kind in timeline(trace, block):
        while workspaces and workspaces[0][0] < at:
            op, own = workspaces.pop(0)
            if now + own > peak.nbytes:
                peak = Peak(now + own, op, dict(kinds), own)
        kinds[kind] += nbytes
        now += nbytes
        if now > peak.nbytes:
            peak = Peak(now, at, dict(kinds), 0)
    return Peak(peak.nbytes, peak.op, {kind: n for kind, n in peak.kinds.items() if n}, peak.workspace)
