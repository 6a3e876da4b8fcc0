"""DINOv2's section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from seer_scale.config import Config, MethodSettings, multiples_near, opt, register_settings, sides_of
from seer_scale.errors import NOTHING, Problem
from seer_scale.methods.image_groups import group_problem


@register_settings("dinov2")
@dataclass(frozen=True, kw_only=True)
class DINOv2Settings(MethodSettings):
    hidden: tuple[int, ...] = opt((2048, 2048), "widths of the heads' hidden layers", ge=1, of_network=True)
    bottleneck: int = opt(256, "width of what is compared with the class token's prototypes", ge=2, of_network=True)
    prototypes: int = opt(65536, "number of prototypes of the class token", ge=2, of_network=True)
    shared_head: bool = opt(False, "the class token's head is that of the patches, too", of_network=True)
    patch_bottleneck: int = opt(256, "width of what is compared with the patches' prototypes", ge=2, of_network=True)
    patch_prototypes: int = opt(65536, "number of prototypes of the patches", ge=2, of_network=True)
    dino_weight: float = opt(1.0, "weight of DINO's loss: class tokens of an image's views", ge=0)
    ibot_weight: float = opt(
        1.0, "weight of iBOT's loss: masked patches; 0 = none, and no head for them", ge=0, of_network=True
    )
    koleo_weight: float = opt(0.1, "weight of KoLeo's loss: class tokens spread out", ge=0)
    koleo_group: int = opt(16, "images among which KoLeo looks for a nearest neighbour", ge=2)
    temperature: float = opt(0.1, "softmax temperature of the student", gt=0)
    teacher_temperature: float = opt(0.07, "temperature of the teacher, once it is warm", gt=0)
    teacher_temperature_from: float = opt(0.04, "temperature of the teacher at sample 0", gt=0)
    teacher_temperature_samples: int = opt(0, "samples in which the teacher's temperature rises, linearly", ge=0)
    centering: Literal["sinkhorn", "softmax"] = opt(
        "sinkhorn", "how the teacher's targets use all prototypes: Sinkhorn over the global batch, or a moving centre"
    )
    iterations: int = opt(3, "Sinkhorn iterations", ge=1)
    center_momentum: float = opt(0.9, "momentum of the centre", ge=0, lt=1)
    teacher_momentum: float = opt(0.994, "momentum of the teacher, an average of the student, at sample 0", ge=0, le=1)
    teacher_momentum_end: float = opt(
        1.0, "momentum of the teacher at schedule.decay_samples, by a cosine from sample 0", ge=0, le=1
    )
    freeze_samples: int = opt(0, "the last layers of the heads stay fixed until this many samples were seen", ge=0)
    mask_share: float = opt(0.5, "share of the global crops that are masked", gt=0, le=1)
    mask_ratio: tuple[float, float] = opt(
        (0.1, 0.5), "share of a masked crop's patches that are masked, from and to", gt=0, lt=1, rising=True
    )
    mask_exact: bool = opt(False, "masks have an exact number of patches (DINOv3), else at most that (DINOv2)")
    gram_weight: float = opt(
        0.0, "weight of Gram anchoring (DINOv3): patches as alike as an earlier teacher finds", ge=0, of_network=True
    )
    gram_from_samples: int = opt(
        0,
        "Gram anchoring begins after so many samples, with the teacher of that time; 0 = at once, with that of "
        "checkpoint.init_from",
        ge=0,
    )
    gram_every_samples: int = opt(0, "samples after which the Gram teacher becomes the teacher of the time anew", ge=0)
    gram_refreshes: int = opt(0, "how often it does", ge=0)
    gram_scale: int = opt(
        2,
        "the Gram teacher sees global crops of views.crops[0].size, the others see them so many times smaller",
        ge=1,
    )

    def rules(self, config: Config, ranks: int) -> Iterator[Problem]:
        crops = config.views.crops
        if not (self.dino_weight or self.ibot_weight):
            yield Problem(
                "dinov2.dino_weight", 0.0, "nothing would be learned, as dinov2.ibot_weight is 0, too", (1.0,)
            )
        if self.dino_weight and crops and config.num_crops < 2:
            fix = "nearest: num: 2"
            yield Problem("views.crops", NOTHING, "makes 1 crop an image, but DINO compares at least 2", fix)
        total, last = config.train.total_samples, self.gram_from_samples + self.gram_refreshes * self.gram_every_samples
        ends = {"freeze_samples": self.freeze_samples, "teacher_temperature_samples": self.teacher_temperature_samples}
        ends |= {"gram_from_samples": self.gram_from_samples} if self.gram_weight else {}
        for key, samples in ends.items():
            if samples > total:
                fix = f"nearest: {total}, or less, as in {total // 10}"
                yield Problem(f"dinov2.{key}", samples, f"the run has {total} samples", fix)
        if self.gram_weight:
            yield from self._rules_of_gram(config)
        if self.gram_weight and self.gram_from_samples <= total < last:
            rule = f"the last would come after {last} samples, and the run has {total}"
            yield Problem("dinov2.gram_refreshes", self.gram_refreshes, rule, "fewer, or a smaller gram_every_samples")
        if self.koleo_weight and (problem := group_problem("dinov2.koleo_group", self.koleo_group, config, ranks)):
            yield problem

    def _rules_of_gram(self, config: Config) -> Iterator[Problem]:
        if not (self.gram_from_samples or config.checkpoint.init_from):
            rule = "at once there is no teacher to hold on to but one that checkpoint.init_from brings"
            yield Problem("dinov2.gram_from_samples", 0, rule, "give checkpoint.init_from, or a number of samples")
        if self.gram_refreshes and not self.gram_every_samples:
            rule = f"is 0, so dinov2.gram_refreshes {self.gram_refreshes} would fall together"
            yield Problem("dinov2.gram_every_samples", 0, rule, "give a number of samples")
        size, scale = config.views.crops[0].size if config.views.crops else 0, self.gram_scale
        for side, pixels in sides_of(size).items():
            if pixels % scale:
                rule = f"{side} must be a multiple of dinov2.gram_scale ({scale})"
                yield Problem("views.crops[0].size", size, rule, multiples_near(pixels, scale))

    def needs(self) -> dict[str, tuple[bool, str]]:
        has_ibot = (self.ibot_weight > 0, "a dinov2.ibot_weight")
        has_own_head = (self.ibot_weight > 0 and not self.shared_head, "a dinov2.ibot_weight and shared_head false")
        has_gram = (self.gram_weight > 0, "a dinov2.gram_weight")
        has_koleo = (self.koleo_weight > 0, "a dinov2.koleo_weight")
        is_rising = (self.teacher_temperature_samples > 0, "dinov2.teacher_temperature_samples")
        return {
            "shared_head": has_ibot, "mask_share": has_ibot, "mask_ratio": has_ibot, "mask_exact": has_ibot,
            "patch_bottleneck": has_own_head, "patch_prototypes": has_own_head, "koleo_group": has_koleo,
            "gram_from_samples": has_gram, "gram_scale": has_gram, "gram_refreshes": has_gram,
            "gram_every_samples": (self.gram_weight > 0 and self.gram_refreshes > 0, "dinov2.gram_refreshes"),
            "teacher_temperature_from": is_rising,
            "iterations": (self.centering == "sinkhorn", "dinov2.centering sinkhorn"),
            "center_momentum": (self.centering == "softmax", "dinov2.centering softmax"),
        }  # fmt: skip
