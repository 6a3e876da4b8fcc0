"""What makes of visible maps the pixels of all patches: FCMAE's ConvNeXt V2 blocks on the last map (arXiv 2301.00808),
or SparK's U-Net on the maps of all stages (arXiv 2301.03580)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu6

from seer_scale.errors import Problem, UserError
from seer_scale.methods.losses.reconstruction import patches_of
from seer_scale.models.backbone import StageMap
from seer_scale.models.convnextv2 import CONVNEXT_STD, Block, ChannelNorm, PlainConv, PlainLinear, convnext_initialisers
from seer_scale.models.init import Constant, Init, Normal
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.layers.tiles import Travelling, on_canvas, visible_places
from seer_scale.models.regnet import Conv


class Decoder(nn.Module, ABC):
    @abstractmethod
    def forward(self, stages: Sequence[list[Tensor]], masks: list[Tensor], places: list[Tensor]) -> list[Tensor]:
        """Packed maps of each stage, as `Backbone.visible_stages` gives them, and what they are of -> of each
        resolution [N_r, h_r, w_r, pixels of a patch], as `patches_of` has them."""

    @abstractmethod
    def shard_units(self) -> dict[str, nn.Module]:
        """What an engine shards by, in order of use; each takes and gives a list."""

    def initialisers(self) -> dict[str, Init]:
        """How each parameter starts: as ConvNeXt V2, tokens as matrices."""
        tokens: dict[str, Init] = {n: Normal(CONVNEXT_STD) for n, _ in self.named_parameters() if is_token(n)}
        return convnext_initialisers(self) | tokens


def is_token(name: str) -> bool:
    return name.endswith("mask_token")


def with_token(x: Tensor, mask: Tensor, places: Tensor, token: Tensor) -> Tensor:
    """A packed map [N, K, t, t, C] -> a dense one [N, H, W, C] that is token [1, C] where tiles are masked."""
    known = on_canvas(x, mask.shape[1:], places)
    return torch.where(visible_places(known, mask)[..., None], known, token.to(known.dtype))


class Embed(nn.Module):
    """Visible places to the decoder's width, among mask tokens."""

    def __init__(self, width: int, decoder_width: int):
        super().__init__()
        self.proj = PlainLinear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_width))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Packed maps, masks and places -> dense maps [N_r, H_r, W_r, decoder_width] alone."""
        of_sizes = zip(*Travelling.of(xs)[:3], strict=True)
        return [with_token(self.proj(x), mask, places, self.mask_token) for x, mask, places in of_sizes]


class Predict(PlainLinear):
    """Places to pixels."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:  # type: ignore[override]  # a list, as units take
        return [super(Predict, self).forward(x) for x in xs]


class ConvNeXtDecoder(Decoder):
    """Of the last map alone. depth: blocks; pixels: of a patch."""

    def __init__(self, width: int, decoder_width: int, depth: int, pixels: int):
        super().__init__()
        self.embed = Embed(width, decoder_width)
        self.blocks = nn.ModuleList(Block(decoder_width, i) for i in range(depth))
        self.pred = Predict(decoder_width, pixels)

    def shard_units(self) -> dict[str, nn.Module]:
        return {"embed": self.embed, **{f"blocks.{i}": b for i, b in enumerate(self.blocks)}, "pred": self.pred}

    def forward(self, stages: Sequence[list[Tensor]], masks: list[Tensor], places: list[Tensor]) -> list[Tensor]:
        xs = self.embed([*stages[-1], *masks, *places])
        for block in self.blocks:
            xs = block(xs)
        return self.pred(xs)


class Densify(nn.Module):
    """Visible places normalised, among mask tokens, to the decoder's width by a convolution. batch_norm: normalised as
    a BatchNorm does, over the visible places of all images, instead of each by itself."""

    def __init__(self, width: int, decoder_width: int, kernel: int, *, batch_norm: bool):
        super().__init__()
        self.norm = BatchNorm(width) if batch_norm else ChannelNorm(width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.proj = PlainConv(width, decoder_width, kernel, padding=kernel // 2)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """As `Embed`."""
        taken = Travelling.of(xs)
        if isinstance(self.norm, BatchNorm):
            rows = self.norm([x.flatten(0, 3) for x in taken.maps])
            known = [y.view(x.shape) for x, y in zip(taken.maps, rows)]
        else:
            known = [self.norm(x) for x in taken.maps]
        of_sizes = zip(known, taken.masks, taken.places, strict=True)
        return [self.proj(with_token(x, mask, places, self.mask_token)) for x, mask, places in of_sizes]


class Upsampling(nn.ConvTranspose2d):
    """To twice the sides; its weights are whatever memory held until drawn."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=4, stride=2, padding=1)

    def reset_parameters(self) -> None:
        """Draws nothing: initial values are those of `UNetDecoder.initialisers`."""


class UNetBlock(nn.Module):
    """To twice the sides, then two 3 x 3 convolutions with BatchNorm, ReLU6 between them."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.up = Upsampling(width)
        self.conv1, self.bn1 = Conv(width, width, kernel_size=3), BatchNorm(width)
        self.conv2, self.bn2 = Conv(width, out_width, kernel_size=3), BatchNorm(out_width)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """[N_r, H_r, W_r, C] -> [N_r, 2 H_r, 2 W_r, C']"""
        ys = self.bn1([self.conv1(self.up(x.permute(0, 3, 1, 2))) for x in xs])
        ys = self.bn2([self.conv2(relu6(y)) for y in ys])
        return [y.permute(0, 2, 3, 1) for y in ys]


class UNetDecoder(Decoder):
    """From the last map, of twice the sides with each block, to which those of the other stages are added; of half the
    width with each block. stages: the encoder's, finest first. batch_norm: whether it normalises by batches, as the
    decoder then does what it takes."""

    def __init__(self, stages: Sequence[StageMap], width: int, *, batch_norm: bool):
        super().__init__()
        self.patch = stages[-1].stride
        ups = round(math.log2(self.patch))
        if 2**ups != self.patch:
            rule = f"it doubles maps up to pixels, and patches of {self.patch} are no power of 2"
            raise UserError(Problem("fcmae.decoder", "unet", rule, ("convnext",)))
        if width % 2**ups:
            rule = f"a U-Net halves it {ups} times, from patches of {self.patch} pixels to one"
            near = tuple(n for n in (width // 2**ups * 2**ups, (width // 2**ups + 1) * 2**ups) if n)
            raise UserError(Problem("fcmae.decoder_width", width, rule, near))
        widths = [width // 2**i for i in range(ups + 1)]
        of_blocks = zip(reversed(stages), widths[:ups])  # what is as fine as pixels comes too late
        self.densify = nn.ModuleList(
            Densify(s.channels, w, 3 if i else 1, batch_norm=batch_norm) for i, (s, w) in enumerate(of_blocks)
        )
        self.blocks = nn.ModuleList(UNetBlock(*pair) for pair in zip(widths, widths[1:]))
        self.pred = Predict(widths[-1], 3)

    def shard_units(self) -> dict[str, nn.Module]:
        units: dict[str, nn.Module] = {}
        for i, block in enumerate(self.blocks):
            units |= {f"densify.{i}": self.densify[i]} if i < len(self.densify) else {}
            units[f"blocks.{i}"] = block
        return units | {"pred": self.pred}

    def forward(self, stages: Sequence[list[Tensor]], masks: list[Tensor], places: list[Tensor]) -> list[Tensor]:
        xs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < len(self.densify):
                new = self.densify[i]([*stages[-1 - i], *masks, *places])
                xs = [x + y for x, y in zip(xs, new, strict=True)] if xs else new
            xs = block(xs)
        return [patches_of(x.permute(0, 3, 1, 2), self.patch) for x in self.pred(xs)]

    def initialisers(self) -> dict[str, Init]:
        """Convolutions to twice the sides: He's normal over the fan out, as the released code counts it."""
        inits = super().initialisers()
        for i, block in enumerate(self.blocks):
            up, name = cast(UNetBlock, block).up, f"blocks.{i}.up"
            fan_out = up.in_channels * math.prod(up.kernel_size)
            inits |= {f"{name}.weight": Normal(math.sqrt(2 / fan_out)), f"{name}.bias": Constant(0)}
        return inits
