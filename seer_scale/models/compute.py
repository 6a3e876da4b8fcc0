"""What training costs in arithmetic."""

from __future__ import annotations

import torch

from seer_scale.config import Config
from seer_scale.models.registry import build_backbone


def training_flops(config: Config) -> int:
    """Floating-point operations that training takes for one image: two a multiply-accumulate of the backbone, forward
    over all crops and twice that backward. Heads, recomputation and passes without gradients are not counted. Raises
    UserError where the backbone cannot be built here."""
    with torch.device("meta"):
        backbone = build_backbone(config.model.name, **config.model.explicit_keys())
    return 6 * sum(crop.num * backbone.num_macs(crop.size) for crop in config.views.crops)
