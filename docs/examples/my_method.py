"""A method of your own, as a plugin: from an image's features it regresses the mean colours of its crops.

    seer-scale train photos_laptop --plugin docs/examples/my_method.py --method.name colours --data.path IMAGES

`--colours.weight 2` sets a key of its own, which `--help` lists. CONTRIBUTING.md explains each part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seer_scale.config import Config, MethodSettings, opt
from seer_scale.distributed import World
from seer_scale.errors import Problem
from seer_scale.methods.base import Baseline, Features, LossOutput, Method
from seer_scale.methods.registry import register_method
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Constant, Init, Normal
from seer_scale.models.registry import build_backbone


@dataclass(frozen=True, kw_only=True)
class ColoursSettings(MethodSettings):
    channels: int = opt(3, "colour channels that are regressed", ge=1, le=3, of_network=True)
    weight: float = opt(1.0, "of the loss", gt=0)

    def rules(self, config: Config, ranks: int) -> Iterator[Problem]:
        if self.weight > 10 * self.channels:
            yield Problem("colours.weight", self.weight, "must be at most ten a channel", 10 * self.channels)


@register_method("colours", ColoursSettings)
class Colours(Method[None, None]):
    backbone: Backbone

    def __init__(self, config: Config, world: World):
        super().__init__()
        self.settings, self.num_crops = config.settings_as(ColoursSettings), config.num_crops
        self.backbone = build_backbone(config.model.name, **config.model.explicit_keys())
        self.head = nn.Linear(self.backbone.num_features, self.settings.channels)

    def shard_units(self) -> dict[str, nn.Module]:
        return {f"backbone.{k}": unit for k, unit in self.backbone.shard_units().items()} | {"head": self.head}

    def initialisers(self) -> dict[str, Init]:
        inits = {f"backbone.{k}": v for k, v in self.backbone.initialisers().items()}
        return inits | {"head.weight": Normal(0.1), "head.bias": Constant(0)}

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        """Mean squared error of each crop's mean colour."""
        predicted = self.head(torch.cat(self.backbone(views))).float()
        wanted = torch.cat([crops.float().mean((2, 3)) for crops in views])[:, : self.settings.channels]
        error = F.mse_loss(predicted, wanted)
        return LossOutput(self.settings.weight * error, {"error": error.detach()} if with_metrics else {})

    def encode(self, images: Tensor) -> Features:
        features = self.backbone([images])[0].float()
        return Features(features, F.normalize(features, dim=1))

    @property
    def baseline(self) -> Baseline:
        return Baseline("the mean colour of all", self.settings.weight)

    def metrics(self, means: Mapping[str, Tensor], loss: float) -> dict[str, float]:
        return {"colours/error": means["error"].item()} if means else {}
