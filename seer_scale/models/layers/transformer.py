"""Blocks of a vision transformer over the tokens of several resolutions.

What travels from block to block is a list. Its first is `packed`: the tokens of all resolutions as one matrix
[sum of N_r * T_r, D], fp32, as linear layers and LayerNorm take them; then for each resolution an empty tensor
[N_r, T_r, 0], which says where its tokens lie, as attention runs a resolution at a time; with rotary positions for each
resolution a table [2, P_r, D / heads] (sine, cosine) of its last P_r tokens; where paths are dropped a last matrix
[N, 2 * blocks] of what each image's branches are multiplied by, N being the sum of N_r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.models.init import Constant, Init, Normal

NORM_EPS = 1e-6
LINEAR_STD = 0.02
"""timm's truncated normal of this deviation is cut at a hundred deviations: it is the normal distribution."""
ROPE_BASE = 100.0


def packed(xs: Sequence[Tensor]) -> list[Tensor]:
    """Tokens [N_r, T_r, D] of each resolution as the first of what travels from block to block."""
    flat = [x.flatten(0, 1) for x in xs]
    return [torch.cat(flat) if len(xs) > 1 else flat[0], *(x.new_empty(*x.shape[:2], 0) for x in xs)]


def unpacked(tokens: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """[sum of N_r * T_r, C] as [N_r, T_r, C] each, of shapes that begin with N_r and T_r."""
    parts = tokens.split([n * t for n, t, *_ in shapes])
    return [part.unflatten(0, shape[:2]) for part, shape in zip(parts, shapes)]


class Layout(NamedTuple):
    """What travels beside the tokens. shapes: [N_r, T_r, 0] of each resolution. tables: of rotary positions, or none.
    scales: [N, 2 * blocks] or None."""

    shapes: list[torch.Size]
    tables: list[Tensor]
    scales: Tensor | None

    @classmethod
    def of(cls, xs: Sequence[Tensor], *, has_tables: bool) -> Layout:
        scales = xs[-1] if xs[-1].ndim == 2 else None
        inner = xs if scales is None else xs[:-1]
        num = len(inner) // 2 if has_tables else len(inner)
        return cls([x.shape for x in inner[:num]], list(inner[num:]), scales)

    def scaled(self, branch: Tensor, column: int) -> Tensor:
        """A branch [sum of N_r * T_r, D] times `scales[:, column]` of each image."""
        if self.scales is None:
            return branch
        of_images = self.scales[:, column].split([n for n, _, _ in self.shapes])
        of_tokens = [s[:, None].expand(-1, t).flatten() for s, (_, t, _) in zip(of_images, self.shapes)]
        return branch * torch.cat(of_tokens)[:, None]


class Linear(nn.Linear):
    """Its weights are whatever memory held until drawn."""

    def reset_parameters(self) -> None:
        """Draws nothing: initial values are those of `transformer_initialisers`."""


class Attention(nn.Module):
    """Self-attention within each image: tokens [sum of N_r * T_r, D] -> the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        tables: Sequence[Tensor | None] = layout.tables or [None] * len(layout.shapes)
        mixed = []
        for qkv, table in zip(unpacked(self.qkv(x), layout.shapes), tables):
            q, k, v = self.split(qkv, table)
            mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
        return self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0])

    def split(self, qkv: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[N, T, 3 * D] -> queries, keys, values [N, heads, T, D / heads]; the first two turned by a `rope_table`."""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The SiLU of one half of w12's output times the other half (arXiv 2002.05202), in as many parameters as an
    `Mlp`."""

    def __init__(self, width: int):
        super().__init__()
        hidden = swiglu_width(width)
        self.w12, self.w3 = Linear(width, 2 * hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


FFNS: dict[str, type[Mlp] | type[SwiGLU]] = {"mlp": Mlp, "swiglu": SwiGLU}


def swiglu_width(width: int) -> int:
    """Two thirds of 4 * width, up to a multiple of 8."""
    return -(-int(4 * width * 2 / 3) // 8) * 8


class LayerScale(nn.Module):
    """A factor a channel (arXiv 2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and feed-forward network, each scaled by channel and, where paths are dropped, by image.
    number: of this block, from 0."""

    def __init__(self, width: int, heads: int, ffn: str, number: int, *, rope: bool):
        super().__init__()
        self.number, self.rope = number, rope
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, NORM_EPS), Attention(width, heads), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, NORM_EPS), FFNS[ffn](width), LayerScale(width)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """The list of this module's docstring -> the same."""
        x, layout = xs[0], Layout.of(xs[1:], has_tables=self.rope)
        x = x + layout.scaled(self.ls1(self.attn(self.norm1(x), layout)), 2 * self.number)
        return [x + layout.scaled(self.ls2(self.mlp(self.norm2(x))), 2 * self.number + 1), *xs[1:]]

    def parts(self) -> dict[str, nn.Module]:
        """What can be sharded apart, in order of use; LayerNorm and LayerScale have vectors alone."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}


def transformer_initialisers(module: nn.Module, layer_scale: float) -> dict[str, Init]:
    """How the parameters of linear layers, LayerNorms and LayerScales within start."""
    inits: dict[str, Init] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, Linear):
            inits |= {f"{name}.weight": Normal(LINEAR_STD), f"{name}.bias": Constant(0)}
        elif isinstance(layer, nn.LayerNorm):
            inits |= {f"{name}.weight": Constant(1), f"{name}.bias": Constant(0)}
        elif isinstance(layer, LayerScale):
            inits[f"{name}.gamma"] = Constant(layer_scale)
    return inits


def rope_table(height: int, width: int, head_width: int, device: torch.device) -> Tensor:
    """DINOv3's axial rotary positions (arXiv 2508.10104) of height x width patches, whose centres lie in [-1, 1]: sine
    and cosine, [2, height * width, head_width], fp32."""
    sides = [(torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (height, width)]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
    periods = ROPE_BASE ** (torch.arange(head_width // 4, device=device) * 4 / head_width)
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)
    return torch.stack([angles.sin(), angles.cos()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys [N, heads, T, head_width], of which the last P are of patches, by a `rope_table` of P."""
    sine, cosine = table
    others, patches = x.split([x.shape[2] - len(sine), len(sine)], dim=2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-second, first], -1) * sine
    return torch.cat([others, turned.to(x.dtype)], 2)


def drop_scales(draws: Tensor, rate: float, *, linear: bool) -> Tensor:
    """Stochastic depth (arXiv 1603.09382) by image: uniform numbers [N, 2 * blocks] -> 0 where a branch is dropped,
    else 1 / (1 - its rate). linear: rates rise from 0 at the first block to `rate` at the last, else all are `rate`.

    (DINOv2 keeps a random subset of fixed size of the images of a rank, scaled by its share: equal in expectation, but
    another for another number of ranks.)"""
    rates = torch.linspace(0 if linear else rate, rate, draws.shape[1] // 2, device=draws.device).repeat_interleave(2)
    return (draws >= rates) / (1 - rates)
