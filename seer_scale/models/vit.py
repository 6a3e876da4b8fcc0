"""Vision transformers (arXiv 2010.11929) as DINOv2 trains them (arXiv 2304.07193): pre-norm, LayerScale, registers
(arXiv 2309.16588), a mask token, and a table of positions that is resized, or DINOv3's rotary ones (arXiv 2508.10104).

The network takes a list of image tensors, one a resolution, and passes all of them through each unit once; what travels
from block to block is described in layers/transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import ImageSize, multiples_near, sides_of
from seer_scale.errors import Problem, UserError, nearest
from seer_scale.models.backbone import Backbone, StageMap, Tokens
from seer_scale.models.init import Constant, Init, Normal, Uniform
from seer_scale.models.layers.precision import at_least_fp32
from seer_scale.models.layers.transformer import (
    FFNS,
    LINEAR_STD,
    NORM_EPS,
    Block,
    drop_scales,
    packed,
    rope_table,
    transformer_initialisers,
    unpacked,
)

TOKEN_STD = 1e-6
"""Of the CLS token and the registers."""
OFFSET = 0.1
"""DINOv2 without registers resizes positions by (side + OFFSET) / side of the table."""


@dataclass(frozen=True)
class ViTSpec:
    """ffn: mlp or swiglu. positions: table or rope. image_size: in pixels, that the table of positions is made for.
    position_resize: of the table to other sizes, bicubic in fp32: offset (DINOv2 without registers), antialias (with
    registers, and timm), exact (transformers' Dinov2Model), or auto, which is offset without registers and antialias
    with them. drop_path: the rate at which branches are dropped, by image; drop_path_rule: constant over the blocks, or
    linear."""

    width: int
    depth: int
    heads: int
    patch: int
    ffn: str = "mlp"
    registers: int = 0
    positions: str = "table"
    image_size: int = 224
    position_resize: str = "auto"
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    drop_path_rule: str = "constant"

    @property
    def side(self) -> int:
        """Of the table of positions, in patches."""
        return self.image_size // self.patch

    @property
    def resize(self) -> str:
        """position_resize, decided."""
        by_registers = "antialias" if self.registers else "offset"
        return by_registers if self.position_resize == "auto" else self.position_resize


VIT_SIZES = {"small": (384, 12, 6, "mlp"), "base": (768, 12, 12, "mlp"), "large": (1024, 24, 16, "mlp"),
             "giant": (1536, 40, 24, "swiglu")}  # fmt: skip
"""Width, depth, heads and feed-forward network."""
VITS = {
    f"vit_{size}_patch{patch}": ViTSpec(width, depth, heads, patch, ffn)
    for size, (width, depth, heads, ffn) in VIT_SIZES.items()
    for patch in (14, 16)
}
VIT_SHAPE = ("width", "depth", "heads", "patch")
"""What the sizes of VITS fix, and `vit` takes."""
CHOICES = {
    "ffn": tuple(FFNS),
    "positions": ("table", "rope"),
    "position_resize": ("auto", "offset", "antialias", "exact"),
    "drop_path_rule": ("constant", "linear"),
}


def check_spec(spec: ViTSpec) -> None:
    """Raises UserError where the values make no vision transformer."""
    problems = []
    for name in (*VIT_SHAPE, "image_size"):
        if getattr(spec, name) < 1:
            problems.append(Problem(f"model.{name}", getattr(spec, name), "of a vit it must be at least 1"))
    problems += [
        Problem(f"model.{name}", getattr(spec, name), f"of a vit it must be one of {', '.join(known)}",
                nearest(getattr(spec, name), known))
        for name, known in CHOICES.items() if getattr(spec, name) not in known
    ]  # fmt: skip
    if problems:
        raise UserError(*problems)
    step, why = spec.heads, "(model.heads)"
    if spec.positions == "rope":
        step, why = 4 * spec.heads, "(4 * model.heads, for rotary positions)"
    for name, of, told in (("width", step, why), ("image_size", spec.patch, "(model.patch)")):
        if (value := getattr(spec, name)) % of:
            rule = f"of a vit it must be a multiple of {of} {told}"
            problems.append(Problem(f"model.{name}", value, rule, multiples_near(value, of)))
    if spec.registers < 0:
        problems.append(Problem("model.registers", spec.registers, "it must not be negative", (0,)))
    if not 0 <= spec.drop_path < 1:
        problems.append(Problem("model.drop_path", spec.drop_path, "it must be at least 0 and below 1", (0.0,)))
    if problems:
        raise UserError(*problems)


class Embedding(nn.Module):
    """Images to tokens: the CLS token, registers, then the patches."""

    def __init__(self, spec: ViTSpec):
        super().__init__()
        self.spec = spec
        width = spec.width
        # matrices, as what follows from rows is sharded by rows, and what is a vector elsewhere is a scale or a bias
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, width)) for _ in range(2))
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.empty(spec.registers, width))
        if spec.positions == "table":
            self.pos_embed = nn.Parameter(torch.empty(1 + spec.side**2, width))
        self.proj = PatchProjection(3, width, spec.patch, spec.patch)

    def forward(self, xs: list[Tensor], masks: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Images [N_r, 3, H_r, W_r], and of each resolution, if any, which of its patches are masked, bool [N_r, P_r]
        -> tokens [N_r, 1 + registers + P_r, D], fp32."""
        tables, out = [], []
        # the mask token takes part without masks, too: some engines await a gradient of every parameter
        cls = at_least_fp32(self.cls_token) + 0 * at_least_fp32(self.mask_token)
        for i, x in enumerate(xs):
            patches = at_least_fp32(self.proj(x))
            height, width = patches.shape[2:]
            patches = patches.flatten(2).transpose(1, 2)
            mask = masks[i] if masks else None
            if mask is not None:
                patches = torch.where(mask[:, :, None], at_least_fp32(self.mask_token), patches)
            own = cls
            if self.spec.positions == "table":
                places = self.places(height, width)
                own, patches = cls + places[:1], patches + places[1:]
            else:
                head_width = self.spec.width // self.spec.heads
                tables.append(rope_table(height, width, head_width, x.device))
            before = torch.cat([own, at_least_fp32(self.register_tokens)]) if self.spec.registers else own
            out.append(torch.cat([before.expand(x.shape[0], -1, -1), patches], 1))
        return out + tables

    def places(self, height: int, width: int) -> Tensor:
        """The table for the CLS token and height x width patches, [1 + height * width, D], fp32."""
        return resized_places(at_least_fp32(self.pos_embed), height, width, self.spec.resize)


def resized_places(table: Tensor, height: int, width: int, how: str) -> Tensor:
    """A table of positions of a CLS token and a square of patches, [1 + side^2, D], for height x width patches, as
    `ViTSpec.resize` says."""
    side = math.isqrt(len(table) - 1)
    if (height, width) == (side, side):
        return table
    cls, patches = table.split([1, side**2])
    # contiguous, as torch 2.14 resizes a channels-last map to a width of one wrongly where it antialiases
    grid = patches.unflatten(0, (side, side)).permute(2, 0, 1)[None].contiguous()
    if how == "offset":
        factors = (height + OFFSET) / side, (width + OFFSET) / side
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    else:
        grid = F.interpolate(grid, (height, width), mode="bicubic", antialias=how == "antialias")
    return torch.cat([cls, grid[0].flatten(1).T])


class PatchProjection(nn.Conv2d):
    """Non-overlapping patches to vectors; its weights are whatever memory held until drawn."""

    def reset_parameters(self) -> None:
        """Draws nothing: initial values come from `ViT.initialisers`."""


class FinalNorm(nn.LayerNorm):
    """LayerNorm of [N_r, T_r, D] each."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:  # type: ignore[override]  # a list, as units take
        return [super(FinalNorm, self).forward(x) for x in xs]


class ViT(Backbone):
    """A vision transformer without a head.

    Construction draws nothing and works on the meta device; `seer_scale.models.registry.initialise` fills the weights.
    """

    def __init__(self, spec: ViTSpec):
        super().__init__()
        check_spec(spec)
        self.spec = spec
        self.num_features = spec.width
        self.num_draws = 2 * spec.depth if spec.drop_path else 0
        rope = spec.positions == "rope"
        self.embed = Embedding(spec)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads, spec.ffn, i, rope=rope) for i in range(spec.depth))
        self.norm = FinalNorm(spec.width, NORM_EPS)

    @property
    def patch_map(self) -> StageMap:
        return StageMap("norm", self.spec.width, self.spec.patch)

    def tokens(
        self, xs: list[Tensor], masks: Sequence[Tensor | None] = (), draws: Sequence[Tensor] | None = None
    ) -> list[Tokens]:
        """After the final LayerNorm, fp32. The mask token stands for patches that are masked."""
        embedded = self.embed(xs, masks) if any(mask is not None for mask in masks) else self.embed(xs)
        between = [*packed(embedded[: len(xs)]), *embedded[len(xs) :]]
        if self.training and draws is not None and self.num_draws:
            linear = self.spec.drop_path_rule == "linear"
            between.append(drop_scales(torch.cat(list(draws)), self.spec.drop_path, linear=linear))
        for names in self.stage_units():
            between = self.forward_units(names, between)
        normed = self.norm(unpacked(between[0], [x.shape for x in embedded[: len(xs)]]))
        return [
            Tokens(x[:, 0], *x[:, 1:].split([self.spec.registers, x.shape[1] - 1 - self.spec.registers], 1))
            for x in normed
        ]

    def tokens_and_attention(self, images: Tensor) -> tuple[Tokens, Tensor]:
        attention, of_block = cast(Block, self.blocks[-1]).attn, list[Tensor]()
        # seen from within the forward, as an engine may have these weights at hand there alone
        hook = attention.qkv.register_forward_hook(lambda _, given, qkv: of_block.append(qkv.detach()))
        try:
            (tokens,) = self.tokens([images])
        finally:
            hook.remove()
        table = None
        if self.spec.positions == "rope":
            height, width = (side // self.spec.patch for side in images.shape[2:])
            table = rope_table(height, width, self.spec.width // self.spec.heads, images.device)
        q, k, _ = attention.split(at_least_fp32(of_block[0]).unflatten(0, (len(images), -1)), table)
        num = 1 + self.spec.registers
        weights = (q[:, :, :num] @ k.mT / math.sqrt(q.shape[3])).softmax(3)
        return tokens, weights[:, :, :, num:]

    def pooled_features(self, xs: list[Tensor]) -> list[Tensor]:
        """The CLS tokens."""
        return [tokens.cls for tokens in self.tokens(xs)]

    def features_of_draws(self, xs: list[Tensor], draws: Sequence[Tensor]) -> list[Tensor]:
        return [tokens.cls for tokens in self.tokens(xs, draws=draws)]

    def shard_units(self) -> dict[str, nn.Module]:
        """ "embed", "blocks.0", ..., "norm"; each takes and gives a list."""
        blocks = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        return {"embed": self.embed, **blocks, "norm": self.norm}

    def stage_units(self) -> list[list[str]]:
        """One stage: all blocks."""
        return [[f"blocks.{i}" for i in range(self.spec.depth)]]

    def after_stages(self) -> list[str]:
        return ["norm.weight", "norm.bias"]

    def resizer(self, name: str, shape: torch.Size) -> Callable[[Tensor], Tensor] | None:
        """Of the table of positions."""
        if name != "embed.pos_embed" or len(shape) != 2 or shape[1] != self.spec.width:
            return None
        side, how = self.spec.side, self.spec.resize
        is_square = shape[0] == 1 + math.isqrt(max(1, shape[0] - 1)) ** 2
        return (lambda table: resized_places(table, side, side, how)) if is_square else None

    def refuses(self, size: ImageSize) -> list[str]:
        patch = self.spec.patch
        return [
            f"{side} must be a multiple of its patches' {patch} pixels, as "
            + " or ".join(map(str, multiples_near(pixels, patch)))
            for side, pixels in sides_of(size).items()
            if pixels % patch or not pixels
        ]

    def initialisers(self) -> dict[str, Init]:
        """As DINOv2's: trunc-normal matrices (std 0.02), tokens near 0, the patches' convolution as torch starts it."""
        proj = Uniform(1 / math.sqrt(3 * self.spec.patch**2))
        inits: dict[str, Init] = {"embed.cls_token": Normal(TOKEN_STD), "embed.mask_token": Constant(0)}
        inits |= {"embed.register_tokens": Normal(TOKEN_STD)} if self.spec.registers else {}
        inits |= {"embed.pos_embed": Normal(LINEAR_STD)} if self.spec.positions == "table" else {}
        inits |= {"embed.proj.weight": proj, "embed.proj.bias": proj}
        return inits | transformer_initialisers(self, self.spec.layer_scale)
