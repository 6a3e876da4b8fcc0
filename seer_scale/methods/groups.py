"""How a recipe would have any method's parameters updated: on top of what the method declares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from seer_scale.config import Config
from seer_scale.methods.base import Method
from seer_scale.models.backbone import Backbone
from seer_scale.models.classifier import layer_rates
from seer_scale.optim.parameter_groups import ParameterGroup, frozen_until


def recipe_groups(method: Method[Any, Any], config: Config) -> dict[str, ParameterGroup]:
    """Of a method not yet sharded: train.freeze_backbone_samples, optim.layer_decay, patch_lr and clip_by (a part is
    what a parameter's name begins with). Raises UserError."""
    o, prefixes = config.optim, method.backbone_prefixes()
    groups = frozen_until(method.parameter_groups(), prefixes, config.train.freeze_backbone_samples)
    if o.layer_decay != 1.0 or o.patch_lr != 1.0:
        backbone = cast(Backbone, method.backbone)
        rates = layer_rates(backbone, layer_decay=o.layer_decay, patch_lr=o.patch_lr)
        for name, rate in ((f"{prefix}{inner}", rate) for prefix in prefixes for inner, rate in rates.items()):
            groups[name] = replace(groups[name], lr=groups[name].lr * rate)
    if o.clip_by == "part":
        groups = {name: replace(group, clip=name.partition(".")[0]) for name, group in groups.items()}
    return groups
