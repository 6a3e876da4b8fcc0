"""Methods as loops of lightly's modules have them, on our backbone and from our weights: what `learn` compares with."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.errors import Problem, UserError
from seer_scale.methods.base import Method
from seer_scale.methods.dinov2.method import DINOv2
from seer_scale.methods.dinov2.settings import DINOv2Settings
from seer_scale.methods.swav.method import SwAV
from seer_scale.methods.swav.settings import SwAVSettings
from seer_scale.models.backbone import Backbone
from seer_scale.models.layers.heads import DINOHead
from seer_scale.models.registry import build_backbone, reset_buffers


class Loop(nn.Module, ABC):
    """Its children are what `optim.clip_by part` clips apart."""

    @property
    @abstractmethod
    def measured(self) -> Backbone:
        """The network that is evaluated."""

    @abstractmethod
    def loss(self, views: Sequence[Tensor], samples_seen: int) -> Tensor:
        """0-dim, of the views [B, 3, S, S] of B images, each passed by itself as in lightly's examples."""

    def after_update(self, samples_seen: int) -> None:
        """samples_seen: before the update."""


class LightlySwAV(Loop):
    def __init__(self, ours: SwAV, config: Config):
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__()
        s = ours.config
        self.backbone = _copy(ours.backbone, config)
        self.head = SwaVProjectionHead(ours.backbone.num_features, s.hidden[0], s.embedding_dim)
        self.prototypes = SwaVPrototypes(s.embedding_dim, s.prototypes[0])
        self.criterion = SwaVLoss(s.temperature, s.iterations, s.epsilon)
        self.num_assigned = ours.num_assigned
        _copy_linear(ours.head, self.head)
        _copy_linear(ours.prototypes, self.prototypes)

    @property
    def measured(self) -> Backbone:
        return self.backbone

    def loss(self, views: Sequence[Tensor], samples_seen: int) -> Tensor:
        self.prototypes.normalize()
        scores = [self.prototypes(F.normalize(self.head(self.backbone(view)), dim=1)) for view in views]
        return self.criterion(scores[: self.num_assigned], scores[self.num_assigned :])


class LightlyDINO(Loop):
    """DINO: class tokens and a moving centre. It has no masked patches (iBOT), no KoLeo and no Sinkhorn."""

    def __init__(self, ours: DINOv2, config: Config):
        from lightly.loss import DINOLoss

        super().__init__()
        s = ours.config
        self.num_globals, self.momentum, self.temperature = (
            ours.num_globals, ours.teacher_momentum, ours.teacher_temperature,
        )  # fmt: skip
        self.student, self.student_head = _copy(ours.student, config), _dino_head(ours, "student_head")
        self.teacher, self.teacher_head = _copy(ours.teacher, config), _dino_head(ours, "teacher_head")
        for p in (*self.teacher.parameters(), *self.teacher_head.parameters()):
            p.requires_grad_(False)
        self.criterion = DINOLoss(s.prototypes, student_temp=s.temperature, center_momentum=s.center_momentum)

    @property
    def measured(self) -> Backbone:
        return self.teacher

    def loss(self, views: Sequence[Tensor], samples_seen: int) -> Tensor:
        with torch.no_grad():
            taught = [self.teacher_head(self.teacher(view)) for view in views[: self.num_globals]]
        found = [self.student_head(self.student(view)) for view in views]
        return self.criterion(taught, found, teacher_temp=self.temperature(samples_seen))

    def after_update(self, samples_seen: int) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, self.momentum(samples_seen))
        update_momentum(self.student_head, self.teacher_head, self.momentum(samples_seen))


def _copy(backbone: Backbone, config: Config) -> Backbone:
    """Built anew, as a copy would keep what an engine binds."""
    with torch.device("meta"):
        made = build_backbone(config.model.name, **config.model.explicit_keys())
    made.to_empty(device="cpu")
    reset_buffers(made)
    made.load_state_dict(backbone.state_dict())
    return made


@torch.no_grad()
def _copy_linear(ours: nn.Module, theirs: nn.Module) -> None:
    """Weights of each Linear. A bias that ours has not is 0, or stands before BatchNorm."""
    for mine, other in zip(_linear(ours), _linear(theirs), strict=True):
        own, their = mine.state_dict(), other.state_dict()
        for name, tensor in their.items():
            tensor.copy_(own[name]) if name in own else tensor.zero_()


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def _dino_head(ours: DINOv2, name: str) -> nn.Module:
    from lightly.models.modules import DINOProjectionHead

    s, head = ours.config, ours.get_submodule(name)
    assert isinstance(head, DINOHead)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its weight_norm is torch's old one
        made = DINOProjectionHead(
            ours.student.num_features, s.hidden[0], s.bottleneck, s.prototypes, norm_last_layer=False
        )
    _copy_linear(head.mlp, made.layers)
    made.last_layer.weight_v.copy_(head.last_layer.direction)
    made.last_layer.weight_g.copy_(head.last_layer.scale)
    return made


class Need(NamedTuple):
    """What a loop has of a recipe's key, if it is `holds`."""

    key: str
    value: object
    holds: bool
    has: str


def loop_of(ours: Method[Any, Any], config: Config) -> Loop:
    """With the weights of `ours`, whose engine has made them. Raises UserError for what lightly's modules have not."""
    check_lightly_has(config)
    return LightlyDINO(ours, config) if isinstance(ours, DINOv2) else LightlySwAV(ours, config)  # type: ignore[arg-type]


def check_lightly_has(config: Config) -> None:
    """Raises UserError for what the loop has not, or has another of."""
    photometrics = {how for kind in config.views.photometric for how in kind}
    o, solarize_p = config.optim, max(how.solarize_p for how in photometrics)
    needs = [
        Need("optim.name", o.name, o.name != "lars", "sgd or adamw"),
        Need("optim.layer_decay", o.layer_decay, o.layer_decay == 1, "1"),
        Need("optim.patch_lr", o.patch_lr, o.patch_lr == 1, "1"),
        Need("views.crops", f"of {len(photometrics)} photometrics", len(photometrics) == 1, "the same for all"),
        Need("views.solarize_p", solarize_p, not solarize_p, "0"),
        *(LOOP_NEEDS[config.method.name](config) if config.method.name in LOOP_NEEDS else ()),
    ]
    if config.method.name not in LOOP_NEEDS:
        raise UserError(
            Problem("method.name", config.method.name, "has no loop of lightly's modules", tuple(LOOP_NEEDS))
        )
    for key, value, holds, has in needs:
        if not holds:
            raise UserError(Problem(key, value, "the loop of lightly's modules has another", has))


def _needs_of_swav(config: Config) -> Iterator[Need]:
    s = config.settings_as(SwAVSettings)
    yield Need("swav.hidden", s.hidden, len(s.hidden) == 1, "one hidden layer")
    yield Need("swav.batch_norm", s.batch_norm, s.batch_norm, "true")
    yield Need("swav.prototypes", s.prototypes, len(s.prototypes) == 1, "one set")
    yield Need("swav.queue", s.queue, not s.queue, "0")


def _needs_of_dinov2(config: Config) -> Iterator[Need]:
    s = config.settings_as(DINOv2Settings)
    yield Need("dinov2.hidden", s.hidden, len(s.hidden) == 2 and len(set(s.hidden)) == 1, "two equal hidden layers")
    yield Need("dinov2.dino_weight", s.dino_weight, s.dino_weight == 1, "1")
    yield Need("dinov2.freeze_samples", s.freeze_samples, not s.freeze_samples, "0")
    yield Need("model.drop_path", config.model.drop_path, not config.model.drop_path, "0")


LOOP_NEEDS = {"swav": _needs_of_swav, "dinov2": _needs_of_dinov2}
