"""Backbones by name, and their initial weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, Protocol

import torch
from torch import nn

from seer_scale.errors import UserError, closest, nearest
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Init, initial_values
from seer_scale.models.regnet import REGNETY, RegNetSpec, RegNetY
from seer_scale.models.timm_adaptor import PREFIX, build_timm

GENERATOR_FIELDS = {f.name: f for f in fields(RegNetSpec) if f.name != "stem_width"}


def backbone_names() -> list[str]:
    """Every name `build_backbone` knows beside timm's; `regnety` is the one whose generator is given freely."""
    return [*REGNETY, "regnety"]


def build_backbone(name: str, **generator: Any) -> Backbone:
    """The backbone `name`, on the current default device, its weights not yet drawn (see `initialise`); of timm/NAME on
    the meta device.

    `regnety` takes depth, w0, wa, wm, group_width and, if wished, se_ratio. Raises UserError for a name or values that
    make no network.
    """
    if name.startswith(PREFIX):
        if generator:
            raise UserError(f"{name} is fixed and takes no {', '.join(generator)}: use regnety to choose freely.")
        return build_timm(name)
    if name in REGNETY:
        if generator:
            raise UserError(f"{name} is fixed and takes no {', '.join(generator)}: use regnety to choose freely.")
        return RegNetY(REGNETY[name])
    if name != "regnety":
        near = f"did you mean {found}? " if (found := closest(name, backbone_names())) else ""
        raise UserError(
            f"There is no backbone {name}: {near}(known: {', '.join(backbone_names())}; timm/NAME for timm's)"
        )
    for key, value in generator.items():
        if key not in GENERATOR_FIELDS:
            raise UserError(f"regnety takes no {key}: {nearest(key, GENERATOR_FIELDS)}")
        kind = int if GENERATOR_FIELDS[key].type == "int" else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"regnety cannot have {key} {value!r}: it must be {GENERATOR_FIELDS[key].type}.")
    if missing := [key for key, f in GENERATOR_FIELDS.items() if f.default is MISSING and key not in generator]:
        raise UserError(f"regnety also needs {', '.join(missing)}.")
    return RegNetY(RegNetSpec(**generator))


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
    """Fill a module that has `initialisers()` from (seed, parameter name) and reset its buffers, in place.

    Parameters must be whole and real: neither sharded nor on the meta device. No collectives.
    """
    inits = module.initialisers()
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_values(inits[name], parameter.shape, seed, name).view_as(parameter))
    reset_buffers(module)


def reset_buffers(module: nn.Module | Initialised) -> None:
    """As they are before any training, by the `reset_buffers` of the modules within."""
    for layer in module.modules():
        if reset := getattr(layer, "reset_buffers", None):
            reset()


def check_sizes(backbone: Backbone, sizes: Mapping[str, int]) -> list[str]:
    """Sentences on the keys of a recipe whose sizes in pixels a backbone on the meta device does not take."""
    asked = ((key, size, backbone.refuses(size)) for key, size in sizes.items())
    return [f"{key} is {size}, which the backbone does not take: {why}." for key, size, why in asked if why]
