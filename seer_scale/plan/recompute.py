"""Which units to recompute: those that save most memory for the time that their second forward takes.

One trace without recomputation says when each run of memory is held. Of a unit that is recomputed alone
(`parallel.activation_checkpoint units ...`), what its forward made goes as that forward ends, but for its output, which
the next unit takes, and is there again from the beginning of its backward. So the peak of any choice follows without
another trace. Chen et al., Training deep nets with sublinear memory cost, arXiv 1604.06174, place by a list.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from seer_scale.distributed import World
from seer_scale.methods.registry import build_method
from seer_scale.parallel.activation_checkpoint import EACH_ALONE
from seer_scale.plan.devices import Device
from seer_scale.plan.memory import block_of, find_peak, rounded
from seer_scale.plan.time import op_seconds
from seer_scale.plan.trace import Held, Trace

EVERY = "every 1"
"""All units, each alone."""


@dataclass(frozen=True)
class Saving:
    """What recomputing one unit saves in bytes, and the seconds an update that it costs; both of one rank."""

    unit: str
    nbytes: int
    seconds: float


class Recomputation:
    """What is to be gained of a trace without recomputation, on a device. savings: most bytes a second first."""

    def __init__(self, trace: Trace, device: Device):
        self._block = block_of(trace, device)
        names = _names(trace)
        forward: defaultdict[str, list[int]] = defaultdict(list)
        backward: defaultdict[str, list[int]] = defaultdict(list)
        seconds: defaultdict[str, float] = defaultdict(float)
        for i, op in enumerate(trace.ops):
            if op.unit not in names:
                continue
            if op.phase == "forward":
                forward[op.unit].append(i)
                seconds[names[op.unit]] += 0.0 if op.collective else op_seconds(op, device)
            elif op.phase == "backward":
                backward[op.unit].append(i)
        absences: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for held, comes in trace.changes:
            if comes and held.unit in names and (away := _absence(held, forward[held.unit], backward[held.unit])):
                absences[names[held.unit]].append((*away, rounded(held.nbytes, self._block)))
        self.units = list(dict.fromkeys(names.values()))
        """In order of use."""
        self._absences = dict(absences)
        self._events = [(held.born if comes else held.freed, 1, held.nbytes if comes else -held.nbytes)
                        for held, comes in ((_rounded(h, self._block), c) for h, c in trace.changes)]  # fmt: skip
        self._beside = find_peak(trace, self._block).nbytes - self._of_tensors(())
        micro = sum(1 for _ in _runs(forward[next(iter(forward))], backward[next(iter(forward))])) if forward else 1
        savings = [
            Saving(unit, sum(n for *_, n in absences[unit]) // max(1, micro), seconds[unit])
            for unit in self.units
            if absences[unit]
        ]
        self.savings = sorted(savings, key=lambda s: -s.nbytes / s.seconds)

    def peak(self, units: Collection[str]) -> int:
        """Bytes that a rank holds at most with these recomputed, as `find_peak` counts them."""
        return self._of_tensors(units) + self._beside

    def _of_tensors(self, units: Collection[str]) -> int:
        events = [*self._events]
        for unit in units:
            for gone, back, nbytes in self._absences.get(unit, ()):
                events += [(gone, 2, -nbytes), (back, 0, nbytes)]  # at once: what comes, before what goes
        events.sort(key=lambda event: event[:2])
        return int(np.cumsum([nbytes for *_, nbytes in events]).max())

    def seconds(self, units: Collection[str]) -> float:
        """What recomputing these adds to an update whose operations nothing hides."""
        return sum(s.seconds for s in self.savings if s.unit in units)

    def choose(self, limit: int) -> list[str] | None:
        """The units to recompute, in order of use, so that the peak is at most `limit` bytes, at the least cost that is
        found; None where not even all of them save enough."""
        if self.peak(()) <= limit:
            return []
        in_use = sorted(self.savings, key=lambda s: self.units.index(s.unit))
        orders = [self.savings, sorted(self.savings, key=lambda s: s.seconds), in_use]
        chosen = [units for order in orders if (units := self._shortest(order, limit)) is not None]
        if not chosen:
            return None
        best = min(chosen, key=self.seconds)
        return [unit for unit in self.units if unit in best]

    def _shortest(self, order: Sequence[Saving], limit: int) -> list[str] | None:
        """Of the beginning of this order that is long enough, what is needed."""
        units = [s.unit for s in order]
        num = bisect_left(range(len(units) + 1), True, key=lambda n: self.peak(units[:n]) <= limit)
        if num > len(units):
            return None
        kept = set(units[:num])
        for saving in sorted((s for s in order[:num]), key=lambda s: -s.seconds):
            if self.peak(kept - {saving.unit}) <= limit:
                kept.remove(saving.unit)
        return list(kept)

    def setting(self, units: Collection[str]) -> str:
        """As `parallel.activation_checkpoint` has these units."""
        if not units:
            return "none"
        if set(units) == set(self.units):
            return EVERY
        return " ".join([EACH_ALONE, *(unit for unit in self.units if unit in units)])


def _names(trace: Trace) -> dict[str, str]:
    """The units of a trace that can be recomputed, by what the recipe calls them."""
    method = build_method(trace.config, World())
    of_module = {id(module): name for name, module in method.shard_units().items()}
    return {
        of_module[id(sequence.shard_units()[name])]: name
        for sequence in method.checkpointed_sequences()
        for names in sequence.stage_units()
        for name in names
    }


def _rounded(held: Held, block: int) -> Held:
    return Held(rounded(held.nbytes, block), held.kind, held.phase, held.unit, held.stream, held.born, held.freed)


def _runs(forward: Sequence[int], backward: Sequence[int]) -> list[int]:
    """The first operation of each backward of a unit, one a micro-batch."""
    return [b for a, b in zip([-1, *backward], backward) if bisect_left(forward, a) < bisect_left(forward, b)]


def _absence(held: Held, forward: Sequence[int], backward: Sequence[int]) -> tuple[int, int] | None:
    """(from, until) how many operations a run of memory is away where its unit is recomputed; None: it stays."""
    if held.phase != "forward" or held.kind != "activations" or held.is_output:
        return None
    at = bisect_left(backward, held.born)
    if at == len(backward) or 0 <= held.freed <= backward[at]:
        return None
    back = backward[at]
    return forward[bisect_left(forward, back) - 1] + 1, back
