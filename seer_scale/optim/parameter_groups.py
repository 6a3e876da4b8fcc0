"""How updates treat each parameter: what a method declares as data, and engines and optimisers follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ParameterGroup:
    """lr, weight_decay: multipliers of the recipe's. frozen: spans [first, end) of samples_seen in which updates leave
    it alone. normalized_rows: its rows, which are matrix rows, are brought back to unit length after every update.
    average_of: the name of the parameter it is a moving average of, which may be one of a trained parameter itself: it
    has no gradient and no optimiser state, and is held as its source is. clip: parameters of one name are clipped
    together (optim.clip_norm)."""

    lr: float = 1.0
    weight_decay: float = 1.0
    frozen: tuple[tuple[int, int], ...] = ()
    normalized_rows: bool = False
    average_of: str = ""
    clip: str = ""

    def is_frozen(self, samples_seen: int) -> bool:
        return any(first <= samples_seen < end for first, end in self.frozen)


def frozen_until(
    groups: Mapping[str, ParameterGroup], prefixes: tuple[str, ...], samples: int
) -> dict[str, ParameterGroup]:
    """`groups`, but that updates leave alone what has a name that begins so, until this many samples were seen."""
    if not samples:
        return dict(groups)
    return {
        name: replace(group, frozen=(*group.frozen, (0, samples))) if name.startswith(prefixes) else group
        for name, group in groups.items()
    }


def check_groups(groups: Mapping[str, ParameterGroup], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError where a method declares what cannot be: a defect of the method."""
    if groups.keys() != shapes.keys():
        raise ValueError(f"Parameter groups and parameters differ in {sorted(groups.keys() ^ shapes.keys())}.")
    for name, group in groups.items():
        source = group.average_of
        if source and (source not in groups or _depth(groups, source) > 1 or shapes[source] != shapes[name]):
            raise ValueError(
                f"{name} cannot be a moving average of {source}: that must be a trained parameter of its shape, or a "
                f"moving average of one."
            )
        if group.normalized_rows and (source or len(shapes[name]) != 2):
            raise ValueError(f"{name} cannot have normalized rows: it must be a trained matrix.")


def _depth(groups: Mapping[str, ParameterGroup], name: str) -> int:
    """Of how many moving averages one is of another until a trained parameter; 3 where there is no end."""
    depth = 0
    while depth < 3 and (group := groups.get(name)) and group.average_of:
        name, depth = group.average_of, depth + 1
    return depth


def frozen_parameters(groups: Mapping[str, ParameterGroup], samples_seen: int) -> frozenset[str]:
    """Names of what the update after `samples_seen` samples leaves alone."""
    return frozenset(name for name, group in groups.items() if group.is_frozen(samples_seen))


def normalized_parameters(groups: Mapping[str, ParameterGroup]) -> tuple[str, ...]:
    return tuple(name for name, group in groups.items() if group.normalized_rows)
