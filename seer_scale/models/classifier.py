"""A backbone with a linear head over named classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from seer_scale.errors import Problem, UserError
from seer_scale.formatting import counted
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Normal, initial_values
from seer_scale.models.layers.stateful import StatefulLayer

HEAD_STD = 0.01
LayerDecayBy = Literal["units", "blocks", "stages", "groups"]


class Classifier(nn.Module):
    """The head is drawn by `seed`, normal of the deviation head_std. multi_label: an image may have several of the
    classes. trains_backbone: False holds the backbone fixed, whose statistics do not move then. moves_statistics: False
    normalises by running statistics in training, too. transform: what an image needs before."""

    trains_backbone: bool = True
    moves_statistics: bool = True

    def __init__(
        self, backbone: Backbone, classes: Sequence[str], *, multi_label: bool = False, seed: int = 0,
        head_std: float = HEAD_STD,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.classes, self.multi_label = backbone, list(classes), multi_label
        device = next(backbone.parameters()).device
        self.head = nn.Linear(backbone.num_features, len(self.classes), device=device)
        with torch.no_grad():
            weight = initial_values(Normal(head_std), self.head.weight.shape, seed, "head.weight")
            self.head.weight.copy_(weight.view_as(self.head.weight))
            self.head.bias.zero_()

    @property
    def transform(self) -> object:
        return self.backbone.transform

    def forward(self, images: Tensor, feature_scale: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """Normalised images [N, 3, S, S] -> scores [N, classes], before softmax or sigmoid. feature_scale: [N,
        num_features], multiplies features (dropout). draws: [N, num_draws], of the backbone's dropped branches."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_backbone):
            (features,) = self.backbone([images], None if draws is None else [draws])
        return self.head(features if feature_scale is None else features * feature_scale)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if not self.trains_backbone:
            self.backbone.eval()
        elif not self.moves_statistics:
            for layer in self.backbone.modules():
                if isinstance(layer, StatefulLayer):
                    layer.eval()
        return self


def parameter_depths(backbone: Backbone, by: LayerDecayBy = "units") -> tuple[dict[str, int], int]:
    """(for each parameter how many units come before its own, the number of all), for layer decay: 0 is the stem. A
    parameter outside every unit goes with the one before it, and what follows the last with a head. by: counts blocks
    instead, the stem and what halves a map with the block after it, as ConvNeXt's "single"; or stages; or the twelve
    groups of ConvNeXt: stages, and the third by three blocks, nine times whatever its depth. Raises UserError where a
    backbone has no such groups."""
    stages = backbone.stage_units()
    if by == "groups":
        if len(stages) != 4:
            rule = f"they are of four stages, and this backbone has {counted(len(stages), 'stage')}"
            raise UserError(Problem("--layer-decay-by", by, rule, ("units", "stages")))
        third = _blocks(stages[2])
        threes = [[unit for block in third[i : i + 3] for unit in block] for i in range(0, max(27, len(third)), 3)]
        groups = [*stages[:2], *threes, stages[3]]
    elif by == "stages":
        groups = stages
    else:
        groups = [group for stage in stages for group in (_blocks(stage) if by == "blocks" else [[u] for u in stage])]
    depth_of = {unit: depth for depth, group in enumerate(groups, 1) for unit in group}
    depths, depth, top = {}, int(by == "blocks"), len(groups) + 1
    for name, _ in backbone.named_parameters():
        unit_depth = next((d for unit, d in depth_of.items() if name.startswith(f"{unit}.")), None)
        depth = unit_depth if unit_depth is not None else top if depth >= top - 1 else depth
        depths[name] = depth
    return depths, top


def _blocks(stage: list[str]) -> list[list[str]]:
    """The units of each block of a stage: what halves the map goes with the first."""
    first = 1 + stage[0].endswith(".down")
    return [stage[:first], *([unit] for unit in stage[first:])]


def layer_rates(backbone: Backbone, *, layer_decay: float = 1.0, patch_lr: float = 1.0) -> dict[str, float]:
    """What multiplies the rate of each parameter of a backbone, as in BEiT and DINOv2. Of one with n of the top's units
    still to come layer_decay^n: of a transformer of L blocks L + 1 for what comes before them, L - i for block i, 0 for
    the final norm and heads. Of the first convolution also patch_lr."""
    depths, top = parameter_depths(backbone)
    first = next((n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)
    if first is None and patch_lr != 1.0:
        rule = "it is for the first convolution, and the backbone has none"
        raise UserError(Problem("optim.patch_lr", patch_lr, rule, (1.0,)))
    return {
        name: layer_decay ** (top - depth) * (patch_lr if name.startswith(f"{first}.") else 1.0)
        for name, depth in depths.items()
    }
