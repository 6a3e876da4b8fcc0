"""Backbones by name, and their initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from seer_scale.errors import NOTHING, Problem, UserError, closest, nearest
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Init, initial_values
from seer_scale.models.regnet import REGNETY, RegNetSpec, RegNetY
from seer_scale.models.timm_adaptor import TIMM_PREFIX, build_timm
from seer_scale.plugins import check_complete, check_name_free

GENERATOR_FIELDS = {f.name: f for f in fields(RegNetSpec) if f.name != "stem_width"}
_REGISTERED: dict[str, Callable[[], Backbone]] = {}
F = TypeVar("F", bound=Callable[[], Backbone])


def register_backbone(name: str) -> Callable[[F], F]:
    """A decorator: this class, or function, makes the backbone `name` (`model.name`) when it is called without
    arguments, on the meta device. Raises ValueError where the name is taken."""

    def register(factory: F) -> F:
        if name in REGNETY or name == "regnety" or name.startswith(TIMM_PREFIX):
            raise ValueError(f"there is a backbone {name} already")
        check_name_free(name, "backbone", factory, _REGISTERED.get(name))
        _REGISTERED[name] = factory
        return factory

    return register


def registered_names() -> list[str]:
    """Of the backbones that `register_backbone` brought."""
    return list(_REGISTERED)


def backbone_names() -> list[str]:
    """Every name `build_backbone` knows beside timm's; `regnety` is the one whose generator is given freely."""
    return [*REGNETY, *_REGISTERED, "regnety"]


def build_backbone(name: str, **generator: Any) -> Backbone:
    """The backbone `name`, on the current default device, its weights not yet drawn (see `initialise`); of timm/NAME on
    the meta device.

    `regnety` takes depth, w0, wa, wm, group_width and, if wished, se_ratio. Raises UserError for a name or values that
    make no network.
    """
    fixed: Callable[[], Backbone] | None = _REGISTERED.get(name)
    if name.startswith(TIMM_PREFIX):
        fixed = partial(build_timm, name)
    elif name in REGNETY:
        fixed = partial(RegNetY, REGNETY[name])
    if fixed:
        if generator:
            rule = f"is fixed and takes no {', '.join(generator)}"
            raise UserError(Problem("model.name", name, f"it {rule}", "use regnety to choose freely"))
        check_complete(fixed, "model.name", name, "models/backbone.py")
        return fixed()
    if name != "regnety":
        near = f"did you mean {found}?" if (found := closest(name, backbone_names())) else ""
        known = f"known: {', '.join(backbone_names())}; timm/NAME for timm's, and --plugin brings others"
        raise UserError(Problem("model.name", name, f"there is no such backbone ({known})", near))
    problems = []
    for key, value in generator.items():
        if key not in GENERATOR_FIELDS:
            fix = nearest(key, GENERATOR_FIELDS)
            problems.append(Problem(f"model.{key}", NOTHING, "is no key of regnety", fix))
            continue
        kind = int if GENERATOR_FIELDS[key].type == "int" else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            problems.append(Problem(f"model.{key}", value, f"must be {GENERATOR_FIELDS[key].type}"))
    for key, field in GENERATOR_FIELDS.items():
        if field.default is MISSING and key not in generator:
            problems.append(Problem(f"model.{key}", NOTHING, "is missing, which model.name regnety needs"))
    if problems:
        raise UserError(*problems)
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


def check_sizes(backbone: Backbone, sizes: Mapping[str, int]) -> list[Problem]:
    """The keys of a recipe whose sizes in pixels a backbone on the meta device does not take."""
    asked = ((key, size, backbone.refuses(size)) for key, size in sizes.items())
    return [Problem(key, size, f"the backbone does not take it: {why}") for key, size, why in asked if why]
