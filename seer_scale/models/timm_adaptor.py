"""Any backbone of timm (pytorch-image-models) as a chain of units: `model.name timm/resnet50`.

timm's own module, built on the meta device, becomes the backbone: parameters and buffers keep timm's names. Its
BatchNorm becomes ours, so that groups of ranks share statistics and a recomputed block moves none twice; its blocks
become units, which take a list of tensors, one a resolution. A network whose blocks are not known here is one unit, and
its names begin with "net.". Nothing is dropped at random (dropout, stochastic depth), as a recomputed block would drop
otherwise.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale.errors import NOTHING, Problem, UserError, closest
from seer_scale.extras import how_to_install
from seer_scale.models.backbone import Backbone, StageMap, Tokens
from seer_scale.models.constructor import Constructor
from seer_scale.models.init import Init
from seer_scale.models.layers.norm import BatchNorm

TIMM_PREFIX = "timm/"
Steps = tuple[Sequence[str], list[list[str]], Sequence[str]]
"""What a forward goes through: names before the stages, of the blocks of each stage, and after them. A name is that of
a module, or of a method of the network."""


def build_timm(name: str) -> TimmBackbone:
    """timm's network of this name, without its classifier, on the meta device. Raises UserError."""
    net, constructor = _create(name, "meta")
    from timm.layers import DropPath

    for path, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm):
            parent, _, own = path.rpartition(".")
            setattr(net.get_submodule(parent), own, _batch_norm(module, f"{name}: its {path}"))
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    steps, width = _steps(net), net.head_hidden_size
    backbone: TimmBackbone = _mixed(net, TimmBackbone) if steps else Whole(net)
    backbone.timm_name, backbone.num_features = name, width
    backbone.steps = steps or ((), [["net"]], ())
    before, stages, after = backbone.steps
    for step in (*before, *after):
        module = attrgetter(step)(backbone)
        if isinstance(module, nn.Module) and any(module.children()) and any(p.ndim > 1 for p in module.parameters()):
            _mixed(module, OfLists)  # a lone convolution is small, and called as it is
    for block in (block for stage in stages for block in stage):
        _mixed(backbone.get_submodule(block), OfLists)
    backbone.inits = {n: constructor.played(p, f"{name}: its {n}") for n, p in backbone.named_parameters()}
    return backbone


def _create(name: str, device: str) -> tuple[Any, Constructor]:
    try:
        import timm
    except ImportError as error:
        rule = "it needs timm, which is not installed"
        raise UserError(Problem("model.name", name, rule, how_to_install("timm"))) from error
    short, constructor = name.removeprefix(TIMM_PREFIX), Constructor()
    if not timm.is_model(short):
        found = closest(short, timm.list_models())
        fix = f"did you mean {TIMM_PREFIX}{found}?" if found else "timm.list_models() names all there are"
        raise UserError(Problem("model.name", name, f"timm {timm.__version__} has no such network", fix))
    with torch.device(device), constructor:
        try:  # a position embedding for images of any size, where there is one
            return timm.create_model(short, num_classes=0, dynamic_img_size=True), constructor
        except TypeError:
            return timm.create_model(short, num_classes=0), constructor


def _steps(net: nn.Module) -> Steps | None:
    """Of the families that timm's networks for comparison are of; None for another."""
    from timm.models.convnext import ConvNeXt
    from timm.models.efficientnet import EfficientNet
    from timm.models.regnet import RegNet
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    def below(*paths: str) -> list[str]:
        return [f"{path}.{child}" for path in paths for child, _ in net.get_submodule(path).named_children()]

    if isinstance(net, ResNet):
        return ("conv1", "bn1", "act1", "maxpool"), [below(f"layer{s}") for s in (1, 2, 3, 4)], ("pooled",)
    if isinstance(net, RegNet):
        return ("stem",), [below(f"s{s}") for s in (1, 2, 3, 4)], ("final_conv", "pooled")
    if isinstance(net, ConvNeXt):
        stages = [[f"{stage}.downsample", *below(f"{stage}.blocks")] for stage in below("stages")]
        return ("stem",), stages, ("norm_pre", "pooled")
    if isinstance(net, EfficientNet):
        return ("conv_stem", "bn1"), [below(stage) for stage in below("blocks")], ("conv_head", "bn2", "pooled")
    if isinstance(net, VisionTransformer):
        return ("patch_embed", "_pos_embed", "patch_drop", "norm_pre"), [below("blocks")], ("norm", "pooled")
    return None


class TimmBackbone(Backbone):
    """Mixed into timm's network."""

    timm_name: str
    steps: Steps
    inits: dict[str, Init]
    forward_head: Callable[..., Tensor]

    def pooled_features(self, xs: list[Tensor]) -> list[Tensor]:
        return self._after_stages(self.forward_stages(xs)[-1])

    def _after_stages(self, xs: list[Tensor]) -> list[Tensor]:
        for name in self.steps[2]:
            xs = self._through([name], xs)
        return xs

    def tokens(
        self, xs: list[Tensor], masks: Sequence[Tensor | None] = (), draws: Sequence[Tensor] | None = None
    ) -> list[Tokens]:
        """The pooled features, no registers, and the positions of the last stage's map."""
        if not self.patch_map:
            return super().tokens(xs, masks, draws)
        maps = self.forward_stages(self.hide(xs, masks))[-1]
        pooled = self._after_stages(maps)
        return [Tokens(y, y.new_empty(len(y), 0, y.shape[1]), x.flatten(2).mT) for x, y in zip(maps, pooled)]

    @cached_property
    def patch_map(self) -> StageMap | None:  # a forward on the meta device, once
        return super().patch_map

    def _through(self, names: list[str], xs: list[Tensor]) -> list[Tensor]:
        step = attrgetter(names[0])(self)
        return self.forward_units(names, xs) if isinstance(step, (OfLists, BatchNorm)) else [step(x) for x in xs]

    def stage_maps(self) -> list[StageMap]:
        """None of a network whose stages are tokens, or not known here."""
        if isinstance(self, Whole):
            return []
        side = 256
        twin = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            maps = [xs[0] for xs in twin.forward_stages([torch.empty(1, 3, side, side, device="meta")])]
        names = [os.path.commonprefix([unit.split(".") for unit in units]) for units in self.stage_units()]
        return [StageMap(".".join(name), x.shape[1], side // x.shape[2]) for name, x in zip(names, maps) if x.ndim == 4]

    def forward_stages(self, xs: list[Tensor]) -> list[list[Tensor]]:
        before, stages, _ = self.steps
        for name in before:
            xs = self._through([name], xs)
        maps = []
        for units in stages:
            xs = self._through(units, xs)
            maps.append(xs)
        return maps

    def after_stages(self) -> list[str]:
        before, stages, _ = self.steps
        used = tuple(f"{name}." for names in (before, *stages) for name in names)
        return [name for name, _ in self.named_parameters() if not name.startswith(used)]

    def pooled(self, x: Tensor) -> Tensor:
        return self.forward_head(x, pre_logits=True)

    def shard_units(self) -> dict[str, nn.Module]:
        before, stages, after = self.steps
        steps = {name: attrgetter(name)(self) for names in (before, *stages, after) for name in names}
        return {name: step for name, step in steps.items() if isinstance(step, OfLists)}

    def stage_units(self) -> list[list[str]]:
        return self.steps[1]

    def initialisers(self) -> dict[str, Init]:
        """As timm's constructor makes each parameter, from numbers of ours."""
        return self.inits

    def reset_buffers(self) -> None:
        """Tables that a constructor computes, such as of relative positions: timm makes those anew that it does not
        save; the others are taken from a network that is built whole."""
        for module in self.modules():
            if make := getattr(module, "init_non_persistent_buffers", None):
                make()
        saved = self.state_dict()
        tables = {n: b for n, b in self.named_buffers() if n in saved and n.rpartition(".")[2] not in STATISTICS}
        if tables:
            made = dict(_create(self.timm_name, "cpu")[0].named_buffers())
            for name, table in tables.items():
                table.copy_(made[name.removeprefix("net.") if isinstance(self, Whole) else name])


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Whole(TimmBackbone):
    """A network that is one unit."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net


class OfLists(nn.Module):
    """Mixed into a module that takes a tensor: takes and gives a list of them."""

    of_tensor: Callable[[Tensor], Tensor]

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.of_tensor(x) for x in xs]


class BatchNormAct(BatchNorm):
    """timm's BatchNormAct2d: BatchNorm, then its activation."""

    act: Callable[[Tensor], Tensor]

    @overload
    def forward(self, xs: Tensor) -> Tensor: ...

    @overload
    def forward(self, xs: list[Tensor]) -> list[Tensor]: ...

    def forward(self, xs: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        if isinstance(xs, Tensor):
            return self.forward([xs])[0]
        return [self.act(y) for y in super().forward(xs)]


def _batch_norm(norm: _BatchNorm, whose: str) -> BatchNorm:
    if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
        rule = "has no weights or no running statistics, which is not supported"
        raise UserError(Problem(whose, NOTHING, rule, "choose another"))
    has_act = hasattr(norm, "act")
    ours = (BatchNormAct if has_act else BatchNorm)(norm.num_features, norm.eps, norm.momentum, device="meta")
    ours.weight, ours.bias = norm.weight, norm.bias
    if has_act:
        ours.act = norm.act
    return ours


def _mixed(module: nn.Module, mixin: Any) -> Any:
    cls: Any = type(module)
    module.__class__ = _mixture(cls, mixin)
    return module


@cache  # so that modules of one class stay so
def _mixture(cls: Any, mixin: Any) -> type:
    return type(cls.__name__, (mixin, cls), {"of_tensor": cls.forward} if mixin is OfLists else {})
