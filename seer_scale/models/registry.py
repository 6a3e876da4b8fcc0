"""Backbones by name, and their initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, Protocol

import torch
from torch import nn

from seer_scale.errors import UserError, nearest
from seer_scale.models.norm import BatchNorm
from seer_scale.models.regnet import REGNETY, RegNetSpec, RegNetY
from seer_scale.rng import Init, draw

FREE = {f.name: f for f in fields(RegNetSpec) if f.name != "stem_width"}


def backbone_names() -> list[str]:
    """Every name `build_backbone` knows; `regnety` is the one whose generator is given freely."""
    return [*REGNETY, "regnety"]


def build_backbone(name: str, **free: Any) -> RegNetY:
    """The backbone `name`, on the current default device, its weights not yet drawn (see `initialise`).

    `regnety` takes depth, w0, wa, wm, group_width and, if wished, se_ratio. Raises UserError for a name or values that
    make no network.
    """
    if name in REGNETY:
        if free:
            raise UserError(f"{name} is fixed and takes no {', '.join(free)}: use regnety to choose freely.")
        return RegNetY(REGNETY[name])
    if name != "regnety":
        near = nearest(name, backbone_names())
        all_names = "" if near.startswith("known") else f" (known: {', '.join(backbone_names())})"
        raise UserError(f"There is no backbone {name}: {near}{all_names}")
    for key, value in free.items():
        if key not in FREE:
            raise UserError(f"regnety takes no {key}: {nearest(key, FREE)}")
        kind = int if FREE[key].type == "int" else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"regnety cannot have {key} {value!r}: it must be {FREE[key].type}.")
    if missing := [key for key, f in FREE.items() if f.default is MISSING and key not in free]:
        raise UserError(f"regnety also needs {', '.join(missing)}.")
    return RegNetY(RegNetSpec(**free))


class Initialised(Protocol):
    """A module that says how its parameters start."""

    def initialisers(self) -> dict[str, Init]:
        """How each parameter starts, by its name."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module."""

    def modules(self) -> Iterator[nn.Module]:
        """As nn.Module."""


@torch.no_grad()
def initialise(module: Initialised, seed: int) -> None:
    """Fill a module that has `initialisers()` from (seed, parameter name) and reset BatchNorm's buffers, in place.

    Parameters must be whole and real: neither sharded nor on the meta device. No collectives.
    """
    inits = module.initialisers()
    for name, parameter in module.named_parameters():
        parameter.copy_(draw(inits[name], parameter.shape, seed, name).view_as(parameter))
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.reset_running_stats()
