"""Projection heads between a backbone and a method."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.models.init import Constant, Init, Normal, Uniform
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.layers.precision import at_least_fp32
from seer_scale.models.layers.transformer import LINEAR_STD


class ProjectionHead(nn.Sequential):
    """Linear (BatchNorm) ReLU ... Linear: [N, in_dim] -> [N, dim].

    SEER: (8192, 8192) hidden, 256 out, no BatchNorm up to 10B; (4096, 4096) with BatchNorm for 8 to 32GF. BatchNorm
    sees all crops of a step together, as in the SwAV reference (main_swav.py, forward_head).
    """

    def __init__(self, in_dim: int, hidden: tuple[int, ...], dim: int, *, batch_norm: bool):
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(in_dim, width)] + [BatchNorm(width)] * batch_norm + [nn.ReLU(inplace=True)]
            in_dim = width
        super().__init__(*layers, nn.Linear(in_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def parts(self) -> dict[str, nn.Module]:
        """What can be sharded apart, in order of use; BatchNorm has vectors alone, which are not sharded."""
        return {name: module for name, module in self.named_children() if isinstance(module, nn.Linear)}

    def initialisers(self) -> dict[str, Init]:
        """torch's defaults for Linear, as data."""
        out: dict[str, Init] = {}
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                out[f"{name}.weight"] = out[f"{name}.bias"] = Uniform(1 / math.sqrt(module.in_features))
            elif isinstance(module, BatchNorm):
                out |= {f"{name}.weight": Constant(1.0), f"{name}.bias": Constant(0.0)}
        return out


class PrototypeScores(nn.Module):
    """Cosines with prototypes, each times a factor that is learned: torch's weight_norm of a Linear without bias,
    [N, dim] of unit length -> [N, K]."""

    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(prototypes, dim))
        self.scale = nn.Parameter(torch.empty(prototypes, 1))  # a matrix, as its rows belong to those of `direction`

    def forward(self, x: Tensor) -> Tensor:
        direction = at_least_fp32(self.direction)
        weight = direction * (at_least_fp32(self.scale) / direction.norm(dim=1, keepdim=True))
        return F.linear(x, weight.to(self.direction.dtype))


class DINOHead(nn.Module):
    """DINOv2's (layers/dino_head.py): Linear GELU ... Linear, unit length, PrototypeScores: [N, in_dim] -> [N, K]."""

    def __init__(self, in_dim: int, hidden: tuple[int, ...], bottleneck: int, prototypes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(in_dim, width), nn.GELU()]
            in_dim = width
        self.mlp = nn.Sequential(*layers, nn.Linear(in_dim, bottleneck))
        self.last_layer = PrototypeScores(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(at_least_fp32(self.mlp(x)), dim=1))

    def parts(self) -> dict[str, nn.Module]:
        """What can be sharded apart, in order of use."""
        linear = {f"mlp.{name}": m for name, m in self.mlp.named_children() if isinstance(m, nn.Linear)}
        return linear | {"last_layer": self.last_layer}

    def initialisers(self) -> dict[str, Init]:
        """Normal matrices of a deviation of 0.02; directions as torch draws a Linear's weights, their factors 1."""
        out: dict[str, Init] = {}
        for name, module in self.mlp.named_children():
            if isinstance(module, nn.Linear):
                out |= {f"mlp.{name}.weight": Normal(LINEAR_STD), f"mlp.{name}.bias": Constant(0.0)}
        bound = 1 / math.sqrt(self.last_layer.direction.shape[1])
        return out | {"last_layer.direction": Uniform(bound), "last_layer.scale": Constant(1.0)}
