"""Units as an engine gathers them: those of the method, cut into parts where they are too large."""

from __future__ import annotations

from torch import nn

from seer_scale.config import Config
from seer_scale.errors import UserError


def sharded_units(method: nn.Module, config: Config) -> dict[str, nn.Module]:
    """Name -> module of what is gathered at once, at most parallel.max_unit_gib in the compute type; in forward order.

    Raises UserError where a layer alone is larger.
    """
    width = 4 if config.train.precision == "fp32" else 2
    most = int(config.parallel.max_unit_gib * 2**30 / width)
    units = split_units(method.units(), most)
    name, numel = largest(units)
    if numel > most and config.parallel.engine in ("auto", "fsdp", "zero3"):
        need = numel * width / 2**30
        raise UserError(f"parallel.max_unit_gib is {config.parallel.max_unit_gib:g}, but {name} cannot be split and takes {need:.3f} GiB in {config.train.precision}; nearest: {-(-need // 0.001) / 1000:g}.")
    return units


def split_units(units: dict[str, nn.Module], max_numel: int) -> dict[str, nn.Module]:
    """`units` with those of more than `max_numel` matrix elements replaced by their parts, "head" by "head.0", ...

    A unit without parts (the stem, a prototype set) stays, and so does a part that is still larger: see `largest`.
    """
    out: dict[str, nn.Module] = {}
    for name, unit in units.items():
        parts = unit.parts() if hasattr(unit, "parts") and matrix_numel(unit) > max_numel else {}
        out |= {f"{name}.{part}": module for part, module in parts.items()} or {name: unit}
    return out


def largest(units: dict[str, nn.Module]) -> tuple[str, int]:
    """The unit with the most matrix elements, and their number."""
    name = max(units, key=lambda name: matrix_numel(units[name]))
    return name, matrix_numel(units[name])


def matrix_numel(unit: nn.Module) -> int:
    """Elements in parameters of two and more dimensions: what is sharded and gathered."""
    return sum(p.numel() for p in unit.parameters() if p.ndim >= 2)
