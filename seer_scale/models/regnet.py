"""RegNetY: Radosavovic et al., "Designing Network Design Spaces" (arXiv 2003.13678), in the sizes of SEER
(arXiv 2103.01988 up to 256GF, arXiv 2202.08360 for 10B) and beyond. Parameter and buffer names are timm's, without its
head.

The network takes a list of image tensors, one a resolution, and passes the whole list through each unit once.

**Masked pretraining** (FCMAE) sees only some tiles of an image. Packed (`layers.tiles`), its K visible tiles stand one
below the other, as one map [N_r, C, K t, t], with channels last in memory. So 1 x 1 convolutions, also of stride 2,
BatchNorm, squeeze-and-excitation and shortcuts are as of any map, and of visible places alone; only the 3 x 3
convolutions know of tiles, and take windows. That equals the dense network that sees 0 in the place of masked pixels,
takes statistics of visible places, and whose maps are set to 0 elsewhere after each BatchNorm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from seer_scale.config import ImageSize, shape_of
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.models.backbone import Backbone, StageMap, Tokens
from seer_scale.models.init import Constant, Init, Normal
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.layers.tiles import Travelling, convolved_windows, packed, visible_places, visible_tiles


@dataclass(frozen=True)
class RegNetSpec:
    """The generator of a RegNetY: block j of `depth` has width w0 + wa * j, quantised to w0 * wm^k, in multiples of
    8."""

    depth: int
    w0: int
    wa: float
    wm: float
    group_width: int
    se_ratio: float = 0.25
    stem_width: int = 32


REGNETY: dict[str, RegNetSpec] = {
    "regnety_200mf": RegNetSpec(13, 24, 36.44, 2.49, 8),
    "regnety_400mf": RegNetSpec(16, 48, 27.89, 2.09, 8),
    "regnety_600mf": RegNetSpec(15, 48, 32.54, 2.32, 16),
    "regnety_800mf": RegNetSpec(14, 56, 38.84, 2.40, 16),
    "regnety_1_6gf": RegNetSpec(27, 48, 20.71, 2.65, 24),
    "regnety_3_2gf": RegNetSpec(21, 80, 42.63, 2.66, 24),
    "regnety_4gf": RegNetSpec(22, 96, 31.41, 2.24, 64),
    "regnety_6_4gf": RegNetSpec(25, 112, 33.22, 2.27, 72),
    "regnety_8gf": RegNetSpec(17, 192, 76.82, 2.19, 56),
    "regnety_12gf": RegNetSpec(19, 168, 73.36, 2.37, 112),
    "regnety_16gf": RegNetSpec(18, 200, 106.23, 2.48, 112),
    "regnety_32gf": RegNetSpec(20, 232, 115.89, 2.53, 232),
    "regnety_64gf": RegNetSpec(20, 352, 147.48, 2.40, 328),
    "regnety_128gf": RegNetSpec(27, 456, 160.83, 2.52, 264),
    "regnety_256gf": RegNetSpec(27, 640, 230.83, 2.53, 373),
    "regnety_10b": RegNetSpec(27, 1744, 620.83, 2.52, 1010),
}


def widened(spec: RegNetSpec, times: float) -> RegNetSpec:
    """`spec` with about so many times its parameters, by the rule that leads from SEER's 256GF to its 10B: depth and wm
    are kept, and w0, wa and the group width grow by the square root of `times`, w0 and the group width to multiples of
    8 (which tensor cores want; the 10B's 1010 is none)."""
    by = math.sqrt(times)
    w0, group_width = (8 * round(by * width / 8) for width in (spec.w0, spec.group_width))
    return replace(spec, w0=w0, wa=round(by * spec.wa, 2), group_width=group_width)


REGNETY |= {f"regnety_{n}b": widened(REGNETY["regnety_256gf"], n / 1.272) for n in (20, 40)}


def stage_plan(spec: RegNetSpec) -> tuple[list[int], list[int]]:
    """(widths, depths) of the four stages: the paper's rule, then each width snapped to a multiple of the group width.

    Raises UserError where the values make no RegNetY of four stages.
    """
    for name, holds, rule in (
        ("depth", spec.depth >= 4, "be at least 4"),
        ("w0", spec.w0 >= 8 and spec.w0 % 8 == 0, "be a positive multiple of 8"),
        ("wa", spec.wa >= 0, "not be negative"),
        ("wm", spec.wm > 1, "be above 1"),
        ("group_width", spec.group_width >= 1, "be at least 1"),
        ("se_ratio", 1 / 16 < spec.se_ratio <= 1, "be above 1/16 and at most 1"),
    ):
        if not holds:
            raise UserError(Problem(f"model.{name}", getattr(spec, name), f"of a RegNetY it must {rule}"))
    depths: dict[int, int] = {}
    for j in range(spec.depth):
        power = round(math.log((spec.w0 + spec.wa * j) / spec.w0) / math.log(spec.wm))
        width = 8 * round(spec.w0 * spec.wm**power / 8)
        depths[width] = depths.get(width, 0) + 1
    if len(depths) != 4:
        fix = "raise wa or depth, or lower wm" if len(depths) < 4 else "lower wa or depth, or raise wm"
        count = "1 stage width" if len(depths) == 1 else f"{len(depths)} stage widths"
        raise UserError(Problem(f"{spec}", NOTHING, f"makes {count} {list(depths)}, but a RegNetY has 4", fix))
    widths = []
    for width in depths:
        group = min(spec.group_width, width)
        widths.append(group * round(width / group))
    return widths, list(depths.values())


class Conv(nn.Conv2d):
    """A convolution that keeps its resolution up to its stride; its weights are whatever memory held until drawn."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Draws nothing: initial values come from `RegNetY.initialisers` through seer_scale.models.init."""

    def of_windows(self, x: Tensor, near: Tensor) -> Tensor:
        """As `forward`, of tiles one below the other; near: `layers.tiles.neighbours`."""
        before = self.kernel_size[0] // 2
        after = self.kernel_size[0] - self.stride[0] - before
        return stacked(convolved_windows(unstacked(x), near, before, after, self.weight, self.stride[0], self.groups))

    def num_macs(self, size: ImageSize) -> int:
        """Multiply-accumulates to make one output of this size."""
        per_pixel = self.kernel_size[0] ** 2 * self.in_channels // self.groups * self.out_channels
        return per_pixel * math.prod(shape_of(size))


def stacked(tiles: Tensor) -> Tensor:
    """[N, K, t, t, C] -> [N, C, K t, t], a view"""
    return tiles.flatten(1, 2).permute(0, 3, 1, 2)


def unstacked(x: Tensor) -> Tensor:
    """The way back from `stacked`."""
    return x.permute(0, 2, 3, 1).unflatten(1, (-1, x.shape[3]))


class ConvNorm(nn.Module):
    """Convolution and BatchNorm, of a list of [N_r, C, H_r, W_r], or of what travels in a masked network."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = Conv(in_channels, out_channels, kernel_size, stride, groups)
        self.bn = BatchNorm(out_channels)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Gives maps alone."""
        taken = Travelling.of(xs)
        if taken.places and self.conv.kernel_size > self.conv.stride:
            return self.bn([self.conv.of_windows(x, near) for x, near in zip(taken.maps, taken.near)])
        ys = [self.conv(x) for x in taken.maps]
        return self.bn(ys) if taken.places or not taken.masks else self._of_visible(ys, taken.masks)

    def _of_visible(self, ys: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        """BatchNorm of the visible places of dense maps, and 0 elsewhere."""
        maps = [y.movedim(1, 3) for y in ys]
        seen = [visible_places(x, mask) for x, mask in zip(maps, masks)]
        rows = self.bn([x[at] for x, at in zip(maps, seen)])  # [visible places, C] each
        return [torch.zeros_like(x).index_put((at,), row).movedim(3, 1) for x, at, row in zip(maps, seen, rows)]


class Stem(ConvNorm):
    """Convolution, BatchNorm, ReLU."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return Travelling.of(xs).with_maps([relu(x, inplace=True) for x in super().forward(xs)])


class SqueezeExcite(nn.Module):
    """Channel attention (arXiv 1709.01507), of a list of [N_r, C, H_r, W_r], or of what travels in a masked network."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = Conv(channels, hidden, bias=True)
        self.fc2 = Conv(hidden, channels, bias=True)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Gives maps alone."""
        taken, out = Travelling.of(xs), []
        for i, x in enumerate(taken.maps):
            means, mask = x.mean((2, 3), keepdim=True), taken.mask(i)
            if mask is not None:  # the mean of what is visible, the rest being 0
                means = means / mask.logical_not().to(x.dtype).mean((1, 2)).view(-1, 1, 1, 1)
            out.append(x * self.fc2(relu(self.fc1(means), inplace=True)).sigmoid())
        return out


class Block(nn.Module):
    """1x1, grouped 3x3, SE, 1x1, plus a shortcut; bottleneck ratio 1."""

    def __init__(self, in_width: int, width: int, stride: int, group_width: int, se_ratio: float):
        super().__init__()
        self.conv1 = ConvNorm(in_width, width)
        self.conv2 = ConvNorm(width, width, kernel_size=3, stride=stride, groups=width // group_width)
        self.se = SqueezeExcite(width, round(se_ratio * in_width))
        self.conv3 = ConvNorm(width, width)
        self.downsample = ConvNorm(in_width, width, stride=stride) if (in_width, stride) != (width, 1) else None

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """A list of maps, or what travels in a masked network -> the same."""
        taken = Travelling.of(xs)
        ys = [relu(y, inplace=True) for y in self.conv1(xs)]
        ys = [relu(y, inplace=True) for y in self.conv2(taken.with_maps(ys))]
        ys = self.se(taken.with_maps(ys))
        ys = self.conv3(taken.with_maps(ys))
        shortcuts = self.downsample(xs) if self.downsample is not None else taken.maps
        return taken.with_maps([relu(y.add_(shortcut), inplace=True) for y, shortcut in zip(ys, shortcuts)])

    def parts(self) -> dict[str, nn.Module]:
        """What can be sharded apart, in order of use; each takes a list once a pass."""
        return dict(self.named_children())


class RegNetY(Backbone):
    """The trunk of a RegNetY up to global average pooling.

    Construction draws nothing and works on the meta device; `seer_scale.models.registry.initialise` fills the weights.
    """

    def __init__(self, spec: RegNetSpec):
        super().__init__()
        widths, depths = stage_plan(spec)
        self.stem = Stem(3, spec.stem_width, kernel_size=3, stride=2)
        in_width = spec.stem_width
        for s, (width, depth) in enumerate(zip(widths, depths), 1):
            stage = nn.ModuleDict()
            for b in range(1, depth + 1):
                group_width = min(spec.group_width, width)
                stage[f"b{b}"] = Block(in_width, width, 2 if b == 1 else 1, group_width, spec.se_ratio)
                in_width = width
            self.add_module(f"s{s}", stage)
        self.num_features = in_width

    def pooled_features(self, xs: list[Tensor]) -> list[Tensor]:
        return [x.mean((2, 3)) for x in self._last_maps(xs)]

    def _last_maps(self, xs: list[Tensor]) -> list[Tensor]:
        for names in (["stem"], *self.stage_units()):
            xs = self.forward_units(names, xs)
        return xs

    def tokens(
        self, xs: list[Tensor], masks: Sequence[Tensor | None] = (), draws: Sequence[Tensor] | None = None
    ) -> list[Tokens]:
        """The pooled features, no registers, and the positions of the last stage's map."""
        maps = self._last_maps(self.hide(xs, masks))
        return [Tokens(x.mean((2, 3)), x.new_empty(len(x), 0, x.shape[1]), x.flatten(2).mT) for x in maps]

    def stage_maps(self) -> list[StageMap]:
        widths = [self.block(names[-1]).conv3.conv.out_channels for names in self.stage_units()]
        return [StageMap(f"s{s}", width, 2 ** (s + 1)) for s, width in enumerate(widths, 1)]

    @overload
    def forward_stages(self, xs: Tensor) -> list[Tensor]: ...

    @overload
    def forward_stages(self, xs: list[Tensor]) -> list[list[Tensor]]: ...

    def forward_stages(self, xs: list[Tensor] | Tensor) -> list[list[Tensor]] | list[Tensor]:
        """The feature maps after each stage, finest first: [N_r, width, H_r / 2^(s+1), W_r / 2^(s+1)] for s = 1 ...
        4."""
        if isinstance(xs, Tensor):
            return [maps[0] for maps in self.forward_stages([xs])]
        return self._stages(xs)

    def _stages(self, xs: list[Tensor]) -> list[list[Tensor]]:
        """The maps after each stage."""
        travelling, out = self.stem(xs), []
        for names in self.stage_units():
            travelling = self.forward_units(names, travelling)
            out.append(Travelling.of(travelling).maps)
        return out

    def visible_stages(
        self, xs: list[Tensor], masks: list[Tensor], places: list[Tensor], draws: Sequence[Tensor] | None = None
    ) -> list[list[Tensor]]:
        """In training, statistics are of visible places."""
        if not places:
            hidden = self.hide(xs, masks)
            return [[x.movedim(1, 3) for x in maps] for maps in self._stages(packed(hidden, masks, places))]
        tiles = [visible_tiles(x.movedim(1, 3), m.shape[1:], p) for x, m, p in zip(xs, masks, places)]
        stages = self._stages(packed([stacked(t) for t in tiles], masks, places))
        return [[unstacked(x) for x in maps] for maps in stages]

    def pooled_visible(self, maps: list[Tensor]) -> list[Tensor]:
        return [x.mean((1, 2, 3)) for x in maps]

    def shard_units(self) -> dict[str, nn.Module]:
        """What an engine shards and recomputes by, in order of use: "stem", "s1.b1", ...; each takes and gives a
        list."""
        blocks = {name: self.get_submodule(name) for stage in self.stage_units() for name in stage}
        return {"stem": self.stem, **blocks}

    def stage_units(self) -> list[list[str]]:
        """The names of the units of each stage."""
        return [[f"s{s}.{b}" for b, _ in self.get_submodule(f"s{s}").named_children()] for s in (1, 2, 3, 4)]

    def block(self, name: str) -> Block:
        """The unit of a stage that has this name."""
        return cast(Block, self.get_submodule(name))

    def refuses(self, size: ImageSize) -> list[str]:
        """Nothing: stages halve whatever is left."""
        return []

    def num_macs(self, size: ImageSize) -> int:
        """Multiply-accumulates of the convolutions in one forward of one image of this size."""
        height, width = (math.ceil(side / 2) for side in shape_of(size))
        total = self.stem.conv.num_macs((height, width))
        for block in (self.block(name) for names in self.stage_units() for name in names):
            total += block.conv1.conv.num_macs((height, width))
            height, width = (math.ceil(side / block.conv2.conv.stride[0]) for side in (height, width))
            total += block.conv2.conv.num_macs((height, width)) + block.conv3.conv.num_macs((height, width))
            total += block.se.fc1.num_macs(1) + block.se.fc2.num_macs(1)
            total += block.downsample.conv.num_macs((height, width)) if block.downsample is not None else 0
        return total

    def initialisers(self) -> dict[str, Init]:
        """How each parameter starts: He's normal over the fan out without division by groups; BatchNorm at identity."""
        inits: dict[str, Init] = {}
        for name, module in self.named_modules():
            if isinstance(module, Conv):
                inits[f"{name}.weight"] = Normal(math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
                if module.bias is not None:
                    inits[f"{name}.bias"] = Constant(0)
            elif isinstance(module, BatchNorm):
                inits[f"{name}.weight"], inits[f"{name}.bias"] = Constant(1), Constant(0)
        return inits
