"""Backbones by name, and their initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from seer_scale.config import ImageSize
from seer_scale.errors import NOTHING, Problem, UserError, closest, nearest
from seer_scale.models.backbone import Backbone
from seer_scale.models.convnextv2 import CONVNEXT, CONVNEXTV2, ConvNeXtSpec, ConvNeXtV2, ConvNeXtV2Spec
from seer_scale.models.init import Init, initial_values
from seer_scale.models.regnet import REGNETY, RegNetSpec, RegNetY
from seer_scale.models.timm_adaptor import TIMM_PREFIX, build_timm
from seer_scale.models.vit import VIT_SHAPE, VITS, ViT, ViTSpec
from seer_scale.plugins import check_complete, check_name_free


@dataclass(frozen=True)
class Family:
    """Networks of one generator. sizes: those that have a name, and their spec. fixed: keys of a spec that a name
    stands for; others may be given with it. hidden: keys that no recipe has."""

    spec: Any
    build: Callable[[Any], Backbone]
    sizes: Mapping[str, Any]
    fixed: tuple[str, ...]
    hidden: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        return {f.name: f for f in fields(self.spec) if f.name not in self.hidden}


FAMILIES = {
    "regnety": Family(RegNetSpec, RegNetY, REGNETY, tuple(f.name for f in fields(RegNetSpec)), hidden=("stem_width",)),
    "vit": Family(ViTSpec, ViT, VITS, VIT_SHAPE),
    "convnext": Family(ConvNeXtSpec, ConvNeXtV2, CONVNEXT, ("width", "depths", "patch")),
    "convnextv2": Family(ConvNeXtV2Spec, ConvNeXtV2, CONVNEXTV2, ("width", "depths", "patch")),
}
"""By the name under which all keys are free."""
TYPES: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "tuple[int, ...]": (list, tuple)}
_REGISTERED: dict[str, Callable[[], Backbone]] = {}
F = TypeVar("F", bound=Callable[[], Backbone])


def register_backbone(name: str) -> Callable[[F], F]:
    """A decorator: this class, or function, makes the backbone `name` (`model.name`) when it is called without
    arguments, on the meta device. Raises ValueError where the name is taken."""

    def register(factory: F) -> F:
        if name in _known_sizes() or name in FAMILIES or name.startswith(TIMM_PREFIX):
            raise ValueError(f"there is a backbone {name} already")
        check_name_free(name, "backbone", factory, _REGISTERED.get(name))
        _REGISTERED[name] = factory
        return factory

    return register


def registered_names() -> list[str]:
    """Of the backbones that `register_backbone` brought."""
    return list(_REGISTERED)


def backbone_names() -> list[str]:
    """Every name `build_backbone` knows beside timm's; last those whose shape is given freely."""
    return [*_known_sizes(), *_REGISTERED, *FAMILIES]


def _known_sizes() -> dict[str, str]:
    """Names of networks of a given shape, and their family's."""
    return {size: name for name, family in FAMILIES.items() for size in family.sizes}


def build_backbone(name: str, **given: Any) -> Backbone:
    """The backbone `name`, on the current default device, its weights not yet drawn (see `initialise`); of timm/NAME on
    the meta device.

    `regnety` takes the keys of a `RegNetSpec` but stem_width, `vit` those of a `ViTSpec`, `convnext` those of a
    `ConvNeXtSpec`, `convnextv2` those of a `ConvNeXtV2Spec`; a size by name, such as `vit_SIZE`, those that its name
    leaves open. Raises UserError for a name or values that make no network.
    """
    fixed: Callable[[], Backbone] | None = _REGISTERED.get(name)
    if name.startswith(TIMM_PREFIX):
        fixed = partial(build_timm, name)
    if fixed:
        if given:
            raise UserError(
                Problem("model.name", name, f"it is fixed and takes no {', '.join(given)}", "leave them out")
            )
        check_complete(fixed, "model.name", name, "models/backbone.py")
        return fixed()
    of = _known_sizes().get(name, name)
    if of not in FAMILIES:
        near = f"did you mean {found}?" if (found := closest(name, backbone_names())) else ""
        known = f"known: {', '.join(backbone_names())}; timm/NAME for timm's, and --plugin brings others"
        raise UserError(Problem("model.name", name, f"there is no such backbone ({known})", near))
    family = FAMILIES[of]
    if name != of and (wrong := [key for key in given if key in family.fixed]):
        rule = f"it is fixed and takes no {', '.join(wrong)}"
        raise UserError(Problem("model.name", name, rule, f"use {of} to choose freely"))
    problems = []
    for key, value in given.items():
        if key not in family.keys:
            problems.append(Problem(f"model.{key}", NOTHING, f"is no key of {of}", nearest(key, family.keys)))
        elif not isinstance(value, TYPES[family.keys[key].type]) or isinstance(value, bool):
            problems.append(Problem(f"model.{key}", value, f"must be {family.keys[key].type}"))
    for key, field in family.keys.items():
        if name == of and field.default is MISSING and key not in given:
            problems.append(Problem(f"model.{key}", NOTHING, f"is missing, which model.name {of} needs"))
    if problems:
        raise UserError(*problems)
    return family.build(spec_of({"name": name, **given}))


def spec_of(model: Mapping[str, Any]) -> Any:
    """The spec, as `RegNetSpec`, that a section `model` of a recipe stands for; None of a network without."""
    given = {key: value for key, value in model.items() if key != "name"}
    of = _known_sizes().get(model["name"], model["name"])
    if of not in FAMILIES:
        return None
    sizes = FAMILIES[of].sizes
    return replace(sizes[model["name"]], **given) if model["name"] in sizes else FAMILIES[of].spec(**given)


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


def check_sizes(backbone: Backbone, sizes: Mapping[str, ImageSize]) -> list[Problem]:
    """The keys of a recipe whose sizes a backbone on the meta device does not take, once for each side."""
    return [
        Problem(key, size, f"the backbone does not take it: {why}")
        for key, size in sizes.items()
        for why in backbone.refuses(size)
    ]
