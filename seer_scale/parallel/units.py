"""Units as an engine gathers them: those of the method, cut into parts where they are too large."""

from __future__ import annotations

import math

from torch import nn

from seer_scale.config import Config
from seer_scale.errors import UserError


def sharded_units(method: nn.Module, config: Config) -> dict[str, nn.Module]:
    """Name -> module of what is gathered at once, at most parallel.max_unit_gib in the compute type; in forward order.

    Raises UserError where a layer alone is larger.
    """
    most, precision = config.parallel.max_unit_gib, config.train.precision
    units: dict[str, nn.Module] = {}
    needs: dict[str, tuple[float, str]] = {}
    for name, unit in method.units().items():
        dtype = "fp32" if name in method.fp32_units else precision
        width = 4 if dtype == "fp32" else 2
        parts = split_units({name: unit}, int(most * 2**30 / width))
        units |= parts
        needs |= {part: (matrix_numel(module) * width / 2**30, dtype) for part, module in parts.items()}
    name, (need, dtype) = max(needs.items(), key=lambda n: n[1])
    if need > most and config.parallel.engine in ("auto", "fsdp", "zero3"):
        digits = 10.0 ** (math.floor(math.log10(need)) - 2)
        raise UserError(f"parallel.max_unit_gib is {most:g}, but {name} cannot be split and takes {need:.3g} GiB in {dtype}; nearest: {math.ceil(need / digits) * digits:.3g}.")
    return units


def split_units(units: dict[str, nn.Module], max_numel: int) -> dict[str, nn.Module]:
    """`units` with those of more than `max_numel` matrix elements replaced by their parts, "head" by "head.0", ...

    A unit without parts (the stem, a prototype set) stays, and so does a part that is still larger.
    """
    out: dict[str, nn.Module] = {}
    for name, unit in units.items():
        parts = unit.parts() if hasattr(unit, "parts") and matrix_numel(unit) > max_numel else {}
        out |= {f"{name}.{part}": module for part, module in parts.items()} or {name: unit}
    return out


def matrix_numel(unit: nn.Module) -> int:
    """Elements in parameters of two and more dimensions: what is sharded and gathered."""
    return sum(p.numel() for p in unit.parameters() if p.ndim >= 2)
