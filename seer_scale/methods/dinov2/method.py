"""DINOv2: a student learns, of masked and cropped views, what its own moving average makes of whole ones (arXiv
2304.07193): DINO's loss of class tokens, iBOT's of masked patches, KoLeo's of class tokens that spread out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.methods.base import Baseline, Features, LossOutput, Method
from seer_scale.methods.dinov2.diagnostics import batch_metrics, figures, health, plots_of, sections_of
from seer_scale.methods.dinov2.patches import check_patches, grid_of, masking_of
from seer_scale.methods.dinov2.settings import DINOv2Settings
from seer_scale.methods.draws import ViewDraws, first_of_part, sent
from seer_scale.methods.losses.centering import softmax_center
from seer_scale.methods.losses.dino import dino_loss
from seer_scale.methods.losses.gram import gram_loss, reduced
from seer_scale.methods.losses.ibot import ibot_loss
from seer_scale.methods.losses.koleo import koleo_loss
from seer_scale.methods.losses.sinkhorn import sinkhorn
from seer_scale.methods.masking import Masks
from seer_scale.methods.registry import register_method
from seer_scale.models.backbone import Backbone, Tokens
from seer_scale.models.init import Init
from seer_scale.models.layers.heads import DINOHead
from seer_scale.models.layers.precision import at_least_fp32
from seer_scale.models.registry import build_backbone
from seer_scale.observe.metric_plot import MetricPlot, ReportSection
from seer_scale.optim.parameter_groups import ParameterGroup
from seer_scale.optim.schedules import cosine, linear

STUDENT, TEACHER, GRAM = "student", "teacher", "gram"


class Teaching(NamedTuple):
    """What the teacher makes of a micro-batch of B images with G global crops, at least fp32. sets: of class tokens
    [G * B, K] and, with iBOT, of masked patches [M, K]: scores, or, once made targets, probabilities. masks: of the
    global crops, on the device; None without iBOT. features: class tokens of the first crop, [B, D].
    anchors: the Gram teacher's patches [G * B, P, C], if there is one."""

    sets: list[Tensor]
    masks: Masks | None
    features: Tensor
    anchors: Tensor | None = None


@register_method("dinov2")
class DINOv2(Method[Teaching, Teaching]):
    """Student and teacher, each a backbone, a head of class tokens and, where patches have their own, one of patches.
    The teacher is what is exported and evaluated."""

    class_center: Tensor
    patch_center: Tensor

    def __init__(self, config: Config, world: World):
        super().__init__()
        s = config.settings_as(DINOv2Settings)
        self.config, self.recipe, self.world = s, config, world
        self.num_globals = config.views.crops[0].num
        self.student, self.teacher = (
            build_backbone(config.model.name, **config.model.explicit_keys()) for _ in (STUDENT, TEACHER)
        )
        self.gram = build_backbone(config.model.name, **config.model.explicit_keys()) if s.gram_weight else None
        check_patches(self.student, config)
        self.masking = masking_of(self.student, config) if s.ibot_weight else None
        self.grid = grid_of(self.student, config)
        self.draws = ViewDraws(config, world, self.student.num_draws)
        for who in (STUDENT, TEACHER):
            head = DINOHead(self.student.num_features, s.hidden, s.bottleneck, s.prototypes)
            self.add_module(f"{who}_head", head)
            if (patches := self.student.patch_map) and s.ibot_weight and not s.shared_head:
                width = patches.channels
                self.add_module(f"{who}_patch_head", DINOHead(width, s.hidden, s.patch_bottleneck, s.patch_prototypes))
        if s.centering == "softmax":
            self.register_buffer("class_center", torch.zeros(s.prototypes))
            if s.ibot_weight:
                self.register_buffer("patch_center", torch.zeros(self._patch_prototypes))

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]  # not another module, but one by its part
        return self.teacher

    @property
    def _patch_prototypes(self) -> int:
        return self.config.prototypes if self.config.shared_head else self.config.patch_prototypes

    def _heads(self, who: str) -> dict[str, DINOHead]:
        return {n: m for n, m in self.named_children() if n.startswith(f"{who}_") and isinstance(m, DINOHead)}

    # --- what it declares

    @property
    def feature_width(self) -> int:
        return self.teacher.num_features

    def _parts(self) -> dict[str, Backbone | DINOHead]:
        """The student's first, as its first unit's backward is the last of all."""
        student, teacher = self._heads(STUDENT), self._heads(TEACHER)
        of_gram = {} if self.gram is None else {GRAM: self.gram}
        return {STUDENT: self.student, **student, TEACHER: self.teacher, **teacher, **of_gram}

    def shard_units(self) -> dict[str, nn.Module]:
        units: dict[str, nn.Module] = {}
        for name, part in self._parts().items():
            of_backbone = part.shard_units().items() if isinstance(part, Backbone) else ()
            units |= {f"{name}.{unit}": module for unit, module in of_backbone} or {name: part}
        return units

    def checkpointed_sequences(self) -> list[Backbone]:
        return [self.student]

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """The teacher is a moving average of the student, the Gram teacher one of the teacher; the heads' last layers
        are fixed for the first `freeze_samples`."""
        out, until = {}, self.config.freeze_samples
        for name, _ in self.named_parameters():
            if name.startswith(TEACHER):
                out[name] = ParameterGroup(average_of=STUDENT + name.removeprefix(TEACHER))
            elif name.startswith(f"{GRAM}."):
                out[name] = ParameterGroup(average_of=TEACHER + name.removeprefix(GRAM))
            else:
                out[name] = ParameterGroup(frozen=((0, until),) if until and ".last_layer." in name else ())
        return out

    def initialisers(self) -> dict[str, Init]:
        return {f"{name}.{k}": v for name, part in self._parts().items() for k, v in part.initialisers().items()}

    # --- what it keeps

    def load_state(self, saved: Mapping[str, Any], then: Mapping[str, Any], samples_seen: int) -> bool:
        """Raises UserError where a Gram teacher would be anchored to that was never taken."""
        before, now = then["dinov2"]["gram_from_samples"], self.config.gram_from_samples
        if self.gram is not None and now <= samples_seen < before:
            rule = f"the checkpoint has {samples_seen} samples and was to keep its first Gram teacher after {before}"
            fix = f"nearest: {samples_seen + self.recipe.train.global_batch}"
            raise UserError(Problem("dinov2.gram_from_samples", now, rule, fix))
        return True

    # --- schedules

    def average_momentum(self, name: str, samples_seen: int) -> float:
        """The Gram teacher is the teacher as it was at certain samples."""
        if not name.startswith(f"{GRAM}."):
            return self.teacher_momentum(samples_seen)
        s, after = self.config, samples_seen + self.recipe.train.global_batch
        taken = [s.gram_from_samples + i * s.gram_every_samples for i in range(s.gram_refreshes + 1)]
        return 0.0 if any(samples_seen < at <= after for at in taken) else 1.0

    def teacher_momentum(self, samples_seen: int) -> float:
        s = self.config
        return cosine(samples_seen, s.teacher_momentum, s.teacher_momentum_end, self.recipe.decay_samples)

    def teacher_temperature(self, samples_seen: int) -> float:
        s, upto = self.config, self.config.teacher_temperature_samples
        return linear(samples_seen, s.teacher_temperature_from, s.teacher_temperature, upto)

    # --- the step

    def _scores(self, who: str, tokens: list[Tensor]) -> list[Tensor]:
        """Of class tokens [N, D] and, with iBOT, of masked patches [M, D]: [N, K] and [M, K]. A shared head runs
        once."""
        heads = list(self._heads(who).values())
        if len(heads) < len(tokens):
            return list(at_least_fp32(heads[0](torch.cat(tokens))).split([len(t) for t in tokens]))
        return [at_least_fp32(head(t)) for head, t in zip(heads, tokens, strict=True)]

    @torch.no_grad()
    def prepare_targets(self, views: list[Tensor], *, samples_seen: int, part: tuple[int, int]) -> Teaching:
        """The scores of the global crops, of which the teacher sees all. Collectives: the backbones'."""
        num, masks, anchors = len(views[0]) // self.num_globals, None, None
        (whole,) = self._seen(self.teacher, self._smaller(views[:1]))
        if self.gram is not None and samples_seen >= self.config.gram_from_samples:
            anchors = reduced(self.gram.tokens(views[:1])[0].patches, self.grid, self.config.gram_scale)
        if self.masking:
            first = first_of_part(self.recipe, self.world, part)
            masks = Masks(*sent(self.masking.draw(samples_seen, first, num), views[0].device))
        chosen = [_chosen(whole.patches, masks)] if masks else []
        return Teaching(self._scores(TEACHER, [whole.cls, *chosen]), masks, whole.cls[:num], anchors)

    def _seen(
        self, network: Backbone, views: list[Tensor], mask: Tensor | None = None, draws: Sequence[Tensor] | None = None
    ) -> list[Tokens]:
        """Class tokens and patches, of which a backbone without has none. mask: of the global crops."""
        if network.patch_map is not None:
            return network.tokens(views, [mask] + [None] * (len(views) - 1), draws)
        return [Tokens(x, *[x.new_empty(len(x), 0, x.shape[1])] * 2) for x in network(views, draws)]

    def _smaller(self, views: list[Tensor]) -> list[Tensor]:
        """What student and teacher see: of the global crops, which only the Gram teacher sees whole, areas' means."""
        scale = self.config.gram_scale if self.gram is not None else 1
        return views if scale == 1 else [F.avg_pool2d(views[0], scale), *views[1:]]

    @torch.no_grad()
    def targets(self, inputs: Sequence[Teaching], samples_seen: int) -> list[Teaching]:
        """Over the whole global batch. Collectives: those of `sinkhorn` (iterations + 1 all-reduces) or of
        `softmax_center` (one), of class tokens and patches together."""
        s, temperature = self.config, self.teacher_temperature(samples_seen)
        scores = [
            torch.cat(of_parts) if len(inputs) > 1 else of_parts[0]
            for of_parts in zip(*(part.sets for part in inputs), strict=True)
        ]
        rows: list[Tensor | None] = [None]
        if self.masking:
            rows.append(torch.cat([part.masks.counts > 0 for part in inputs if part.masks]))
        if s.centering == "sinkhorn":
            made = [p[0] for p in sinkhorn([x[None] for x in scores], temperature, s.iterations, self.world, rows)]
        else:
            centers = [self.class_center, self.patch_center] if self.masking else [self.class_center]
            made = softmax_center(scores, centers, temperature, s.center_momentum, self.world, rows)
        by_set = [p.split([len(part.sets[i]) for part in inputs]) for i, p in enumerate(made)]
        return [part._replace(sets=list(own)) for part, own in zip(inputs, zip(*by_set, strict=True), strict=True)]

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: Teaching | None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        """Collectives: the backbones'; where it makes the targets itself, those of `targets`."""
        s, device, num = self.config, views[0].device.type, self.num_globals
        if targets is None:
            inputs = [self.prepare_targets(views, samples_seen=samples_seen, part=part)]
            with torch.autocast(device, enabled=False):
                (targets,) = self.targets(inputs, samples_seen)
            del inputs  # scores over all prototypes, of gigabytes where there are many
        masks, draws = targets.masks, self.draws(views, samples_seen, part)
        tokens = self._seen(self.student, self._smaller(views), masks.masked if masks else None, draws)
        classes = [of_size.cls for of_size in tokens]
        chosen = [_chosen(tokens[0].patches, masks)] if masks else []
        scores = self._scores(STUDENT, [torch.cat(classes), *chosen])
        with torch.autocast(device, enabled=False):
            batch = len(targets.features)
            of_crops, probabilities = scores[0].unflatten(0, (-1, batch)), targets.sets[0].unflatten(0, (num, batch))
            dino = dino_loss(of_crops[:num], of_crops[num:], probabilities, s.temperature)
            loss = s.dino_weight * dino.loss
            terms = {"dino": dino.loss, "dino_global": dino.between_globals, "dino_local": dino.local_to_global}
            if masks is not None:
                terms["ibot"] = ibot_loss(scores[1], targets.sets[1], masks.counts, num * batch, s.temperature)
                loss = loss + s.ibot_weight * terms["ibot"]
            if s.koleo_weight:
                terms["koleo"] = koleo_loss(classes[0].unflatten(0, (num, batch)), s.koleo_group)
                loss = loss + s.koleo_weight * terms["koleo"]
            if targets.anchors is not None:
                terms["gram"] = gram_loss(tokens[0].patches, targets.anchors)
                loss = loss + s.gram_weight * terms["gram"]
            metrics = {}
            if with_metrics:
                metrics = batch_metrics(terms, targets.sets, masks, classes[0]) | self._scheduled(samples_seen)
        return LossOutput(loss, metrics, targets.features)

    def encode(self, images: Tensor) -> Features:
        features = self.backbone([images])[0].float()
        return Features(features, F.normalize(features, dim=1))

    # --- what it says of itself

    @property
    def baseline(self) -> Baseline:
        """Uniform predictions: of class tokens ln K, of patches as much of it as crops are masked."""
        s = self.config
        ibot = s.ibot_weight * s.mask_share * math.log(self._patch_prototypes) if s.ibot_weight else 0.0
        return Baseline("uniform predictions", s.dino_weight * math.log(s.prototypes) + ibot)

    @property
    def plots(self) -> tuple[MetricPlot, ...]:
        return plots_of(self.config)

    @property
    def report_sections(self) -> tuple[ReportSection, ...]:
        return sections_of(self.config)

    def _scheduled(self, samples_seen: int) -> dict[str, Tensor]:
        """Beside the tensors of a metric line what follows a schedule; filled in, as a copy would wait."""
        now = {"teacher_temperature": self.teacher_temperature, "teacher_momentum": self.teacher_momentum}
        full = partial(torch.full, (), dtype=torch.float64, device=self.world.device)
        return {name: full(value(samples_seen)) for name, value in now.items()}

    def metrics(self, means: Mapping[str, Tensor], loss: float) -> dict[str, float]:
        return figures(means) if means else {}

    def health(self, row: Mapping[str, Any], config: Config) -> Problem | None:
        return health(row, config)


def _chosen(patches: Tensor, masks: Masks) -> Tensor:
    """[N, P, D] -> the masked ones, [M, D]."""
    return patches.flatten(0, 1).index_select(0, masks.places)
