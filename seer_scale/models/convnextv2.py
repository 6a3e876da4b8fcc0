"""ConvNeXt V2 (arXiv 2301.00808): depthwise 7 x 7 convolutions, LayerNorm, and an MLP with Global Response
Normalization, which keeps its channels from dying or saturating in masked pretraining. ConvNeXt, the first (arXiv
2201.03545), has LayerScale in its place.

Between units travels a list (`Travelling`): for each resolution a map [N_r, H_r, W_r, C], channels last, and what
decides what of it counts.

**Masked pretraining** (FCMAE) sees only some tiles of an image. Packed (`layers.tiles`), only these are computed.
Nothing but the depthwise convolution looks beyond a tile. That equals the dense network whose maps are set to 0 where
tiles are masked: after stem and downsampling, before a Global Response Normalization takes its norms, and where a
branch is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from seer_scale.config import ImageSize, sides_of
from seer_scale.errors import Problem, UserError
from seer_scale.models.backbone import Backbone, StageMap, Tokens
from seer_scale.models.init import Constant, Init, Normal
from seer_scale.models.layers.precision import at_least_fp32
from seer_scale.models.layers.tiles import (
    Travelling,
    convolved_canvas,
    convolved_windows,
    packed,
    visible_tiles,
    with_zeros,
)

CONVNEXT_STD, GRN_EPS, CONVNEXT_EPS = 0.02, 1e-6, 1e-6
STAGES, KERNEL = 4, 7
AT_ONCE = 256
"""Channels of a depthwise convolution on a CPU: oneDNN takes twice as long for the gradient of 512 together on maps of
14 x 14, and 20 ms more, whatever the batch, for that of 768."""


@dataclass(frozen=True)
class ConvNeXtV2Spec:
    """width: of the first stage; each of the others has twice the one before. depths: blocks of the four stages.
    patch: side of the stem's patches in pixels; three more halvings make a stride of 8 patch. drop_path: the rate at
    which the last block's branch is dropped, by image, rising linearly from 0 at the first."""

    width: int
    depths: tuple[int, ...]
    patch: int = 4
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))  # a recipe's are a list

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * 2**stage for stage in range(STAGES))

    @property
    def stride(self) -> int:
        return self.patch * 2 ** (STAGES - 1)


@dataclass(frozen=True)
class ConvNeXtSpec(ConvNeXtV2Spec):
    """Of the first ConvNeXt. layer_scale: what each branch is multiplied by, channel by channel, at first."""

    layer_scale: float = 1e-6


CONVNEXTV2_SIZES = {
    "atto": (40, (2, 2, 6, 2)), "femto": (48, (2, 2, 6, 2)), "pico": (64, (2, 2, 6, 2)), "nano": (80, (2, 2, 8, 2)),
    "tiny": (96, (3, 3, 9, 3)), "base": (128, (3, 3, 27, 3)), "large": (192, (3, 3, 27, 3)),
    "huge": (352, (3, 3, 27, 3)),
}  # fmt: skip
"""Width and depths of the published ones."""
CONVNEXTV2 = {f"convnextv2_{size}": ConvNeXtV2Spec(*shape) for size, shape in CONVNEXTV2_SIZES.items()}
CONVNEXT_SIZES = {
    "tiny": (96, (3, 3, 9, 3)), "small": (96, (3, 3, 27, 3)), "base": (128, (3, 3, 27, 3)),
    "large": (192, (3, 3, 27, 3)), "xlarge": (256, (3, 3, 27, 3)),
}  # fmt: skip
"""Of the first ConvNeXt."""
CONVNEXT = {f"convnext_{size}": ConvNeXtSpec(*shape) for size, shape in CONVNEXT_SIZES.items()}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of the channels at each place, as they lie last."""

    def __init__(self, width: int):
        super().__init__(width, CONVNEXT_EPS)


class PlainConv(nn.Conv2d):
    """Of maps with channels last; its weights are whatever memory held until drawn."""

    def reset_parameters(self) -> None:
        """Draws nothing: initial values are those of `ConvNeXtV2.initialisers`."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H', W', C']"""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv(PlainConv):
    """KERNEL x KERNEL of each channel by itself; of maps with channels last."""

    bias: Tensor

    def __init__(self, width: int):
        super().__init__(width, width, KERNEL, groups=width)

    def forward(self, x: Tensor, taken: Travelling | None = None, i: int = 0) -> Tensor:
        """[N, H, W, C] -> [N, H, W, C], or packed [N, K, t, t, C] -> the same, of the resolution i of what travels."""
        num = self.groups if x.device.type != "cpu" else AT_ONCE
        parts = zip(x.split(num, -1), self.weight.split(num), self.bias.split(num))
        if taken is not None and taken.places:
            out = [self._packed(y, w, taken, i) + b.to(y.dtype) for y, w, b in parts]
        else:
            out = [
                F.conv2d(y.permute(0, 3, 1, 2), w, b, padding=KERNEL // 2, groups=len(w)).permute(0, 2, 3, 1)
                for y, w, b in parts
            ]
        return out[0] if len(out) == 1 else torch.cat(out, -1)

    def _packed(self, x: Tensor, weight: Tensor, taken: Travelling, i: int) -> Tensor:
        """Of windows where a tile is wider than what they add, else of a canvas, which is as fast at half the width."""
        reach = KERNEL // 2
        if x.shape[2] <= 2 * reach:
            return convolved_canvas(x, taken.masks[i].shape[1:], taken.places[i], weight, len(weight))
        return convolved_windows(x, taken.near[i], reach, reach, weight, 1, len(weight))


class PlainLinear(nn.Linear):
    """Its weights are whatever memory held until drawn."""

    def reset_parameters(self) -> None:
        """Draws nothing: initial values are those of `ConvNeXtV2.initialisers`."""


class GlobalResponseNorm(nn.Module):
    """Channels of an image compete: each is scaled by its L2 norm over all places, relative to the mean of all
    channels' norms, beside what it was; identity at first (arXiv 2301.00808, section 4). Norms in fp32 at least."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, H, W, C], or packed [N, K, t, t, C] -> the same. mask: of a dense map; what it hides has no part in
        norms, and what is made of it means nothing."""
        rows = with_zeros(x, mask).flatten(1, -2)
        return _RespondGlobally.apply(rows, self.weight, self.bias).view(x.shape)


class _Context(FunctionCtx):
    """What autograd makes of a forward for its backward, to type checkers."""

    saved_tensors: tuple[Tensor, ...]


class _RespondGlobally(torch.autograd.Function):
    """[N, V, C], of V places each -> the same. Keeps nothing of the size of x but x, whatever its precision."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = at_least_fp32(x.new_empty(0)).dtype
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        relative = norms / (norms.mean(-1, keepdim=True) + GRN_EPS)
        ctx.save_for_backward(x, weight, norms, relative)
        return (x * (1 + weight * relative).to(x.dtype)).add_(bias.to(x.dtype))

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, norms, relative = ctx.saved_tensors
        # of a channel that is nearly off, one factor is huge, the other tiny; bf16 has the range of fp32
        kind = norms.dtype if x.dtype == torch.float16 else x.dtype
        wide = grad.to(kind)
        along = (wide * x).sum(1, keepdim=True, dtype=norms.dtype)
        d_relative = along * weight
        shared = norms.mean(-1, keepdim=True) + GRN_EPS
        d_norms = (d_relative - (d_relative * relative).mean(-1, keepdim=True)) / shared
        by_x = torch.where(norms > 0, d_norms / norms, 0)
        dx = (wide * (1 + weight * relative).to(kind)).addcmul_(x.to(kind), by_x.to(kind)).to(x.dtype)
        return dx, (along * relative).sum((0, 1)), wide.sum((0, 1), dtype=norms.dtype)


class Stem(nn.Module):
    """Non-overlapping patches to vectors, then LayerNorm."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.conv, self.norm = PlainConv(3, width, patch, patch), ChannelNorm(width)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Images [N_r, 3, H_r, W_r] in the place of maps -> maps [N_r, H_r / patch, W_r / patch, width], or packed."""
        taken, out = Travelling.of(xs), []
        for i, image in enumerate(taken.maps):
            x = image.permute(0, 2, 3, 1)
            if taken.places:
                x = visible_tiles(x, taken.masks[i].shape[1:], taken.places[i])
            out.append(with_zeros(self.norm(of_tiles(self.conv, x)), taken.mask(i)))
        return taken.with_maps(out)


class Downsample(nn.Module):
    """LayerNorm, then 2 x 2 places to one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = ChannelNorm(width), PlainConv(width, 2 * width, 2, 2)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        taken = Travelling.of(xs)
        maps = [of_tiles(self.conv, self.norm(x)) for x in taken.maps]
        return taken.with_maps([with_zeros(x, taken.mask(i)) for i, x in enumerate(maps)])


class Block(nn.Module):
    """Depthwise 7 x 7 convolution, LayerNorm, Linear, GELU, Global Response Normalization, Linear; beside a shortcut.
    number: of this block, from 0. is_first: of the first ConvNeXt, with LayerScale at the end instead."""

    def __init__(self, width: int, number: int, *, is_first: bool = False):
        super().__init__()
        self.number = number
        self.dw, self.norm = DepthwiseConv(width), ChannelNorm(width)
        self.fc1, self.grn = PlainLinear(width, 4 * width), None if is_first else GlobalResponseNorm(4 * width)
        self.fc2 = PlainLinear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width)) if is_first else None

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """The list of this module's docstring -> the same."""
        taken, out = Travelling.of(xs), []
        sizes = [x.shape[0] for x in taken.maps]  # len() would be a constant of a graph
        of_images = taken.scales[0][:, self.number].split(sizes) if taken.scales else [None] * len(sizes)
        for i, (x, scale) in enumerate(zip(taken.maps, of_images)):
            mask = taken.mask(i)
            y = F.gelu(self.fc1(self.norm(self.dw(x, taken, i))))
            y = self.fc2(y if self.grn is None else self.grn(y, mask))
            y = y if self.gamma is None else y * self.gamma
            y = y if scale is None else y * scale.view(-1, *[1] * (y.ndim - 1))
            out.append(x + with_zeros(y, mask))
        return taken.with_maps(out)

    def parts(self) -> dict[str, nn.Module]:
        """What can be sharded apart, in order of use."""
        return {"dw": self.dw, "fc1": self.fc1, "fc2": self.fc2}


def of_tiles(conv: PlainConv, x: Tensor) -> Tensor:
    """A convolution that does not look beyond a tile, of a dense or a packed map."""
    return conv(x) if x.ndim == 4 else conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class PooledNorm(ChannelNorm):
    """The mean over all places, then LayerNorm: [N_r, H_r, W_r, C] -> [N_r, C]."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:  # type: ignore[override]  # a list, as units take
        return [super(PooledNorm, self).forward(at_least_fp32(x.mean((1, 2)))) for x in xs]


class ConvNeXtV2(Backbone):
    """ConvNeXt V2, or V1 of a `ConvNeXtSpec`, up to its pooled and normalised features.

    Construction draws nothing and works on the meta device; `seer_scale.models.registry.initialise` fills the weights.
    """

    def __init__(self, spec: ConvNeXtV2Spec):
        super().__init__()
        check_convnext(spec)
        self.spec = spec
        self.num_features = spec.widths[-1]
        self.num_draws = sum(spec.depths) if spec.drop_path else 0
        self.stem = Stem(spec.width, spec.patch)
        number = 0
        for s, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True), 1):
            stage = nn.ModuleDict({} if s == 1 else {"down": Downsample(width // 2)})
            for b in range(1, depth + 1):
                stage[f"b{b}"] = Block(width, number, is_first=isinstance(spec, ConvNeXtSpec))
                number += 1
            self.add_module(f"s{s}", stage)
        self.norm = PooledNorm(self.num_features)

    def pooled_features(self, xs: list[Tensor]) -> list[Tensor]:
        return self.norm(self._stages(xs)[-1])

    def features_of_draws(self, xs: list[Tensor], draws: Sequence[Tensor]) -> list[Tensor]:
        return self.norm(self._stages(xs, draws)[-1])

    def visible_stages(
        self, xs: list[Tensor], masks: list[Tensor], places: list[Tensor], draws: Sequence[Tensor] | None = None
    ) -> list[list[Tensor]]:
        return self._stages(packed(xs, masks, places), draws)

    def pooled_visible(self, maps: list[Tensor]) -> list[Tensor]:
        return self.norm([x.flatten(1, 2) for x in maps])

    def _stages(self, xs: list[Tensor], draws: Sequence[Tensor] | None = None) -> list[list[Tensor]]:
        """The maps after each stage."""
        travelling, out = self.stem(xs), []
        if self.training and draws is not None and self.num_draws:
            travelling = [*travelling, self._scales(torch.cat(list(draws)))]
        for names in self.stage_units():
            travelling = self.forward_units(names, travelling)
            out.append(Travelling.of(travelling).maps)
        return out

    def _scales(self, draws: Tensor) -> Tensor:
        """Uniform numbers [N, blocks] -> 0 where a branch is dropped, else 1 / (1 - its rate) (arXiv 1603.09382)."""
        rates = torch.linspace(0, self.spec.drop_path, draws.shape[1], device=draws.device)
        return (draws >= rates) / (1 - rates)

    def tokens(
        self, xs: list[Tensor], masks: Sequence[Tensor | None] = (), draws: Sequence[Tensor] | None = None
    ) -> list[Tokens]:
        """The pooled features, no registers, and the places of the last stage's map."""
        maps = self._stages(self.hide(xs, masks), draws)[-1]
        pooled = self.norm(maps)
        return [Tokens(y, y.new_empty(len(y), 0, y.shape[1]), x.flatten(1, 2)) for x, y in zip(maps, pooled)]

    def stage_maps(self) -> list[StageMap]:
        spec = self.spec
        return [StageMap(f"s{s}", width, spec.patch * 2 ** (s - 1)) for s, width in enumerate(spec.widths, 1)]

    def forward_stages(self, xs: list[Tensor]) -> list[list[Tensor]]:
        return [[x.permute(0, 3, 1, 2) for x in maps] for maps in self._stages(xs)]

    def after_stages(self) -> list[str]:
        return ["norm.weight", "norm.bias"]

    def shard_units(self) -> dict[str, nn.Module]:
        """ "stem", "s1.b1", ..., "s2.down", ..., "norm"; each takes and gives a list."""
        units = {name: self.get_submodule(name) for stage in self.stage_units() for name in stage}
        return {"stem": self.stem, **units, "norm": self.norm}

    def stage_units(self) -> list[list[str]]:
        return [[f"s{s}.{b}" for b, _ in self.get_submodule(f"s{s}").named_children()] for s in range(1, STAGES + 1)]

    def refuses(self, size: ImageSize) -> list[str]:
        stride = self.spec.stride
        return [
            f"{side} must be at least {stride} pixels, {STAGES - 1} halvings of patches of {self.spec.patch}"
            for side, pixels in sides_of(size).items()
            if pixels < stride
        ]

    def initialisers(self) -> dict[str, Init]:
        """Normal matrices and kernels of a deviation of 0.02, biases 0; a Global Response Normalization that does
        nothing, or LayerScale."""
        scale = self.spec.layer_scale if isinstance(self.spec, ConvNeXtSpec) else 1.0
        scales = {n: Constant(scale) for n, _ in self.named_parameters() if n.endswith(".gamma")}
        return convnext_initialisers(self) | scales


def convnext_initialisers(module: nn.Module) -> dict[str, Init]:
    """How the parameters of convolutions, linear layers and norms within start."""
    inits: dict[str, Init] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            inits[f"{name}.weight"] = Normal(CONVNEXT_STD)
            inits |= {} if layer.bias is None else {f"{name}.bias": Constant(0)}
        elif isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            inits |= {f"{name}.weight": Constant(1), f"{name}.bias": Constant(0)}
        elif isinstance(layer, GlobalResponseNorm):
            inits |= {f"{name}.weight": Constant(0), f"{name}.bias": Constant(0)}
    return inits


def check_convnext(spec: ConvNeXtV2Spec) -> None:
    """Raises UserError where the values make no network."""
    problems = []
    if len(spec.depths) != STAGES or min(spec.depths, default=0) < 1:
        rule = f"of a ConvNeXt it must be the number of blocks of each of {STAGES} stages, at least 1"
        problems.append(Problem("model.depths", list(spec.depths), rule, "as in [2, 2, 6, 2]"))
    for name in ("width", "patch"):
        if getattr(spec, name) < 1:
            problems.append(Problem(f"model.{name}", getattr(spec, name), "of a ConvNeXt it must be at least 1"))
    if isinstance(spec, ConvNeXtSpec) and not spec.layer_scale > 0:
        problems.append(Problem("model.layer_scale", spec.layer_scale, "it must be above 0", (1e-6,)))
    if not 0 <= spec.drop_path < 1:
        problems.append(Problem("model.drop_path", spec.drop_path, "it must be at least 0 and below 1", (0.0,)))
    if problems:
        raise UserError(*problems)
