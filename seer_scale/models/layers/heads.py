"""Projection heads between a backbone and a method."""

from __future__ import annotations

import math

from torch import Tensor, nn

from seer_scale.models.init import Constant, Init, Uniform
from seer_scale.models.layers.norm import BatchNorm


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
