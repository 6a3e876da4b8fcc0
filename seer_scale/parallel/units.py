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
    most, whole = config.parallel.max_unit_gib, method.units()
    widths = {name: 4 if config.train.precision == "fp32" or name in method.fp32_units else 2 for name in whole}
    units: dict[str, nn.Module] = {}
    for name, unit in whole.items():
        units |= split_units({name: unit}, int(most * 2**30 / widths[name]))
    needs = {name: matrix_numel(unit) * (widths.get(name) or widths[name.rpartition(".")[0]]) / 2**30 for name, unit in units.items()}
    name, need = max(needs.items(), key=lambda n: n[1])
    if need > most and config.parallel.engine in ("auto", "fsdp", "zero3"):
        digits = 10.0 ** (math.floor(math.log10(need)) - 2)
        raise UserError(f"parallel.max_unit_gib is {most:g}, but {name} cannot be split and takes {need:.3g} GiB in {config.train.precision}; nearest: {math.ceil(need / digits) * digits:.3g}.")
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
