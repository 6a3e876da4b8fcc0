"""SwAV as its reference has it (main_swav.py): timm's RegNetY called once a resolution, distributed_sinkhorn,
torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.bench.reference import Part, PlainLoop, import_timm
from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.errors import Problem
from seer_scale.interop.names import TIMM_MODELS
from seer_scale.methods.swav.method import SwAV
from seer_scale.methods.swav.settings import SwAVSettings
from seer_scale.models.layers.norm import BatchNorm

SINGLE_RANK = World()


class Reference(nn.Module):
    """main_swav.py's multi-crop forward over timm's model, its head and prototypes."""

    def __init__(self, ours: SwAV, name: str):
        super().__init__()
        self.backbone = import_timm().create_model(TIMM_MODELS[name], num_classes=0)
        self.backbone.load_state_dict(ours.backbone.state_dict())
        layers: list[nn.Module] = []
        for layer in ours.head:
            if isinstance(layer, nn.Linear):
                layers.append(nn.Linear(layer.in_features, layer.out_features))
            elif isinstance(layer, nn.ReLU):
                layers.append(nn.ReLU(inplace=True))
            elif isinstance(layer, BatchNorm):
                layers.append(nn.BatchNorm1d(layer.num_features))
            else:
                raise TypeError(f"a projection head has a {type(layer).__name__}")
        self.head = nn.Sequential(*layers)
        self.head.load_state_dict(ours.head.state_dict())
        self.prototypes = nn.Linear(ours.config.embedding_dim, ours.config.prototypes[0], bias=False)
        self.prototypes.load_state_dict(ours.prototypes[0].state_dict())

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        z = self.head(torch.cat([self.backbone(v) for v in views]))
        z = F.normalize(z, dim=1, p=2)
        return z, self.prototypes(z)


@torch.no_grad()
def textbook_sinkhorn(scores: Tensor, epsilon: float, iterations: int, world: World = SINGLE_RANK) -> Tensor:
    """distributed_sinkhorn of main_swav.py. scores [B, K] of this rank -> codes [B, K]."""
    Q = torch.exp(scores / epsilon).t()
    K, B = Q.shape[0], Q.shape[1] * world.size
    Q /= world.sum_(Q.sum())
    for _ in range(iterations):
        Q /= world.sum_(Q.sum(dim=1, keepdim=True))
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).t()


def textbook_loss(scores: Tensor, config: Config) -> Tensor:
    """main_swav.py's loss over all crops. scores [V * B, K], crop-major."""
    s, batch = config.settings_as(SwAVSettings), config.train.global_batch
    scores = scores.float()
    none = scores.new_zeros(())
    loss, assigned = none, config.views.crops[0].num
    for crop in range(assigned):
        codes = textbook_sinkhorn(scores[batch * crop : batch * (crop + 1)].detach(), s.epsilon, s.iterations)
        others = [v for v in range(config.num_crops) if v != crop]
        terms = [
            (codes * F.log_softmax(scores[batch * v : batch * (v + 1)] / s.temperature, dim=1)).sum(1).mean()
            for v in others
        ]
        loss = loss - sum(terms, start=none) / len(others)
    return loss / assigned


class SwAVLoop(PlainLoop[SwAV]):
    model: Reference
    small = {
        "model": {"name": "regnety_200mf"},
        "views": {"crops": [{"num": 2, "size": 96}, {"num": 4, "size": 64}]},
        "swav": {"hidden": [512], "embedding_dim": 128, "prototypes": [32], "iterations": 3},
        "optim": {"name": "lars", "lr": 0.03, "lr_batch": 0},
    }

    def __init__(self, ours: SwAV, config: Config, device: torch.device):
        super().__init__(ours, config, device)
        self.model, optim = Reference(ours, config.model.name).to(device), config.optim
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.peak_lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )

    @staticmethod
    def sides(model: str) -> dict[str, Any]:
        return {"optim": {"name": "sgd", "lr": 0.03, "lr_batch": 0}, "swav": {"freeze_samples": 0}}

    @staticmethod
    def prototypes(num: int) -> dict[str, Any]:
        return {"prototypes": [num]}

    @staticmethod
    def problems(config: Config) -> Iterator[Problem]:
        name, prototypes = config.model.name, config.settings_as(SwAVSettings).prototypes
        if name not in TIMM_MODELS:
            fix = f"give --alone, or one of {', '.join(TIMM_MODELS)}"
            yield Problem("--model", name, "timm has none of that name", fix)
        if len(prototypes) > 1:
            fix = "give --alone, or --prototypes"
            yield Problem("swav.prototypes", prototypes, "the reference has one set of them", fix)

    @staticmethod
    def heads(config: Config) -> str:
        s = config.settings_as(SwAVSettings)
        widths = " x ".join(map(str, [*s.hidden, s.embedding_dim]))
        return f"head {widths}{' with BatchNorm' if s.batch_norm else ''}, prototypes {list(s.prototypes)}"

    @staticmethod
    def parts(method: SwAV, config: Config, views: Sequence[Tensor]) -> dict[str, Part]:
        linear = sum(
            m.in_features * m.out_features
            for part in (method.head, method.prototypes)
            for m in part.modules()
            if isinstance(m, nn.Linear)
        )
        features = torch.randn(
            sum(map(len, views)), method.backbone.num_features, device=views[0].device, requires_grad=True
        )

        def scores() -> Tensor:
            z = F.normalize(method.head(features).float(), dim=1)
            return torch.cat([prototypes(z) for prototypes in method.prototypes], 1)

        return {
            "backbone": Part(
                macs=sum(len(v) * method.backbone.num_macs((v.shape[2], v.shape[3])) for v in views),
                forward=lambda: torch.cat(method.backbone(list(views))),
            ),
            "head and prototypes": Part(macs=len(features) * linear, forward=scores),
        }

    def loss(self, views: list[Tensor], samples_seen: int) -> Tensor:
        with self.autocast():
            _, scores = self.model(views)
        return textbook_loss(scores, self.config)

    def after_step(self, samples_seen: int) -> None:
        weight = self.model.prototypes.weight
        weight.copy_(F.normalize(weight, dim=1))
