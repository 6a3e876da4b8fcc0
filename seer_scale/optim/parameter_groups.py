"""How updates treat each parameter: what a method declares as data, and engines and optimisers follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterGroup:
    """lr, weight_decay: multipliers of the recipe's. frozen: spans [first, end) of samples_seen in which updates leave it
    alone. normalized_rows: its rows, which are matrix rows, are brought back to unit length after every update.
    average_of: the name of the parameter it is a moving average of: it has no gradient and no optimiser state, and is held
    as its source is. clip: parameters of one name are clipped together (optim.clip_norm)."""

    lr: float = 1.0
    weight_decay: float = 1.0
    frozen: tuple[tuple[int, int], ...] = ()
    normalized_rows: bool = False
    average_of: str = ""
    clip: str = ""

    def is_frozen(self, samples_seen: int) -> bool:
        return any(first <= samples_seen < end for first, end in self.frozen)


def frozen_parameters(groups: Mapping[str, ParameterGroup], samples_seen: int) -> frozenset[str]:
    """Names of what the update after `samples_seen` samples leaves alone."""
    return frozenset(name for name, group in groups.items() if group.is_frozen(samples_seen))


def normalized_parameters(groups: Mapping[str, ParameterGroup]) -> tuple[str, ...]:
    return tuple(name for name, group in groups.items() if group.normalized_rows)
