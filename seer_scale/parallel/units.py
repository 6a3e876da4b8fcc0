"""Units as an engine gathers them: those of the method, cut into parts where they are too large, and joined where they
are so small that a gather of one alone would be waiting more than moving."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from torch import nn

from seer_scale.config import Config
from seer_scale.errors import Problem, UserError
from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES


@runtime_checkable
class Divisible(Protocol):
    """A unit that can be gathered in parts."""

    def parts(self) -> dict[str, nn.Module]:
        """What can be sharded apart, in order of use."""


def sharded_units(method: Method[Any, Any], config: Config) -> dict[str, nn.Module]:
    """Name -> module of what is gathered at once, at most parallel.max_unit_gib in the compute type; in forward order.

    Raises UserError where a layer alone is larger.
    """
    max_gib = config.parallel.max_unit_gib
    units: dict[str, nn.Module] = {}
    needs: dict[str, tuple[float, str]] = {}
    for name, unit in method.shard_units().items():
        dtype = compute_type(name, method, config)
        width = COMPUTE_DTYPES[dtype].itemsize
        parts = split_units({name: unit}, int(max_gib * 2**30 / width))
        units |= parts
        needs |= {part: (matrix_numel(module) * width / 2**30, dtype) for part, module in parts.items()}
    name, (need, dtype) = max(needs.items(), key=lambda n: n[1])
    if need > max_gib and config.parallel.engine in ("auto", "fsdp", "zero3"):
        digits = 10.0 ** (math.floor(math.log10(need)) - 2)
        rule = f"{name} cannot be split and takes {need:.3g} GiB in {dtype}"
        nearest = float(f"{math.ceil(need / digits) * digits:.3g}")
        raise UserError(Problem("parallel.max_unit_gib", max_gib, rule, nearest))
    return units


def joined_units(method: Method[Any, Any], config: Config) -> list[dict[str, nn.Module]]:
    """`sharded_units` as `fsdp` gathers them, in forward order: consecutive ones together, until they come to
    parallel.min_unit_mib in the compute type, and never to more than parallel.max_unit_gib.

    What is joined runs in the same forwards (the backbone without the head, both without prototypes), as FSDP2 counts
    the modules that have run to know when a gathered group is done with.
    """
    min_bytes, max_bytes = config.parallel.min_unit_mib * 2**20, config.parallel.max_unit_gib * 2**30
    groups: list[dict[str, nn.Module]] = []
    nbytes, last = 0, None
    for name, unit in sharded_units(method, config).items():
        dtype = compute_type(name, method, config)
        kind, more = (name.partition(".")[0], dtype), COMPUTE_DTYPES[dtype].itemsize * matrix_numel(unit)
        if kind != last or nbytes >= min_bytes or nbytes + more > max_bytes:
            groups.append({})
            nbytes, last = 0, kind
        groups[-1][name] = unit
        nbytes += more
    return groups


def compute_type(name: str, method: Method[Any, Any], config: Config) -> str:
    """Of a unit, or of a part of one: a key of COMPUTE_DTYPES."""
    is_fp32 = any(f"{name}.".startswith(f"{unit}.") for unit in method.fp32_units)
    return "fp32" if is_fp32 else config.train.precision


def split_units(units: dict[str, nn.Module], max_numel: int) -> dict[str, nn.Module]:
    """`units` with those of more than `max_numel` matrix elements replaced by their parts, "head" by "head.0", ...

    A unit without parts (the stem, a prototype set) stays, and so does a part that is still larger.
    """
    out: dict[str, nn.Module] = {}
    for name, unit in units.items():
        parts = unit.parts() if isinstance(unit, Divisible) and matrix_numel(unit) > max_numel else {}
        out |= {f"{name}.{part}": module for part, module in parts.items()} or {name: unit}
    return out


def matrix_numel(unit: nn.Module) -> int:
    """Elements in parameters of two and more dimensions: what is sharded and gathered."""
    return sum(p.numel() for p in unit.parameters() if p.ndim >= 2)
