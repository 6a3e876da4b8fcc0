"""How parameters start: an initial value is a function of (its kind, seed, parameter name, index), equal for every
engine, rank count and device, so that a rank draws its own run of each parameter alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from seer_scale.rng import draw


@dataclass(frozen=True)
class Normal:
    """Initialise from N(0, std^2)."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Initialise from U(-bound, bound)."""

    bound: float


@dataclass(frozen=True)
class Constant:
    """Initialise with one value."""

    value: float


@dataclass(frozen=True)
class UnitRows:
    """Initialise rows from U(-bound, bound), then scale each to unit length (SwAV's prototypes)."""

    bound: float


PlayedStep = tuple[Any, ...]
"""(an in-place operation of torch's, the run of elements it is applied to or None for all, its numbers ...)."""


@dataclass(frozen=True)
class Played:
    """Initialise by elementwise operations, as another library's constructor does: the first of all elements, and it is
    fill_, uniform_ or normal_, as may be those after it."""

    steps: tuple[PlayedStep, ...]


Init = Normal | Uniform | Constant | UnitRows | Played


def initial_values(
    init: Init, shape: torch.Size | tuple[int, ...], seed: int, name: str, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """The elements [start, stop), in row-major order, of parameter `name`'s initial value: flat, fp32, on the CPU.

    Each is a function of (init, seed, name, index), for UnitRows also of the rest of its row, which is drawn with it.
    """
    stop = math.prod(shape) if stop is None else stop
    if isinstance(init, UnitRows):
        width = math.prod(shape[1:])
        first = start // width * width
        rows = initial_values(Uniform(init.bound), shape, seed, name, first, -(-stop // width) * width)
        return torch.nn.functional.normalize(rows.view(-1, width), dim=1).flatten()[start - first : stop - first]
    if isinstance(init, Played):
        return _play(init, shape, seed, name, start, stop)
    if isinstance(init, Constant):
        return torch.full((stop - start,), float(init.value))
    out = torch.from_numpy(draw(seed, "init", name, start=start, stop=stop))
    if isinstance(init, Uniform):
        return out.mul_(2 * init.bound).sub_(init.bound)
    # the inverse of the normal distribution, of numbers midway between those drawn: never infinite, at most 5.4 std
    return out.mul_(2).sub_(1 - 2**-24).erfinv_().mul_(init.std * math.sqrt(2))


def _or_default(numbers: list[float]) -> tuple[float, float]:
    """Of uniform_ and normal_, of which the last may be left out."""
    first, last = [*numbers, *[0.0, 1.0][len(numbers) :]]
    return first, last


def _play(
    init: Played, shape: torch.Size | tuple[int, ...], seed: int, name: str, start: int, stop: int
) -> torch.Tensor:
    out = initial_values(Constant(0), shape, seed, name, start, stop)
    for operation, run, *numbers in init.steps:
        first, last = (max(start, run[0]), min(stop, run[1])) if run else (start, stop)
        if first >= last:
            continue
        part = out[first - start : last - start]
        if operation == "uniform_":
            low, high = _or_default(numbers)
            drawn = initial_values(Uniform(1.0), shape, seed, name, first, last)
            part.copy_(drawn.mul_((high - low) / 2).add_((high + low) / 2))
        elif operation == "normal_":
            mean, std = _or_default(numbers)
            part.copy_(initial_values(Normal(std), shape, seed, name, first, last).add_(mean))
        else:
            getattr(part, operation)(*numbers)
    return out
