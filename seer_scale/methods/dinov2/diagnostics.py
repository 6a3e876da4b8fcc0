"""What DINOv2 says of itself: figures of a metric line, plots of them, and what they show to be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.config import Config
from seer_scale.errors import Problem
from seer_scale.methods.dinov2.settings import DINOv2Settings
from seer_scale.methods.masking import Masks
from seer_scale.models.layers.precision import at_least_fp32
from seer_scale.observe.metric_plot import MetricPlot, ReportSection

ROWS_OF_ENTROPY = 256
"""Targets whose entropy is taken at once: of all, it would need another matrix of the size of the targets."""
TOLD_APART, UNIFORM = 0.003, 0.95
"""Targets that tell images apart by less than this share of the most that they could say nothing; those of so high an
entropy, as a share of ln K, are uniform, others the same for all images."""
NEAREST_SHARE = 0.05
"""A nearest neighbour among KoLeo's few images that is nearer than this share of the usual distance is a duplicate."""
FEW_IN_USE = 0.05
"""Prototypes in use, as a share of those that the targets of a batch could be spread over."""
TESTED_BATCH = 256
"""A global batch below which DINOv2 is not known to learn."""


def entropies(probabilities: Tensor) -> Tensor:
    """[N, K] -> [N], nats."""
    return torch.cat([torch.special.entr(p).sum(1) for p in probabilities.split(ROWS_OF_ENTROPY)])


@torch.no_grad()
def batch_metrics(
    terms: Mapping[str, Tensor], targets: Sequence[Tensor], masks: Masks | None, classes: Tensor
) -> dict[str, Tensor]:
    """What `figures` reads, once it is averaged over micro-batches and ranks. terms: of the loss, without weights.
    targets: of class tokens [N, K] and, with iBOT, of masked patches [M, K]. classes: the student's class tokens of the
    N global crops, [N, D]. Waits for no device."""
    out = {name: term.detach() for name, term in terms.items()} | {
        "entropy": entropies(targets[0]).mean(),
        "mean_target": targets[0].mean(0),
        "mean_token": F.normalize(at_least_fp32(classes), dim=1).mean(0),
    }
    if masks is not None:
        real = masks.counts > 0
        weights = real / masks.counts.clamp(min=1) / len(classes)  # iBOT's
        out["patch_entropy"] = (entropies(targets[1]) * weights).sum()
        out["masked_crops"] = weights.sum()
        out["masked_share"] = real.sum() / masks.masked.numel()
    return out


def figures(means: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures of a metric line, entropies in nats; docs/health.md has what each is.

    A cross-entropy is the entropy of the target and the KL divergence from it: `dino` = `teacher_entropy` + `kl`, as
    each target meets as many views. `target_information`, the entropy of the mean target less the mean entropy, is
    the mutual information of images and prototypes: 0 where all images have the same target, whatever that is.
    """
    target, token = (means[name].double().flatten() for name in ("mean_target", "mean_token"))
    own = {name: mean.item() for name, mean in means.items() if mean.numel() == 1}
    used = math.exp(torch.special.entr(target).sum().item())
    entropy = own.pop("entropy")
    out = {name: own[name] for name in own if name not in ("patch_entropy", "masked_crops")} | {
        "teacher_entropy": entropy,
        "kl": own["dino"] - entropy,
        "target_information": math.log(used) - entropy,
        "prototype_use": used / len(target),
        "feature_std": math.sqrt(max(1 - token.square().sum().item(), 0.0)),
    }
    if "ibot" in own:
        crops = own["masked_crops"] or math.nan
        out["patch_teacher_entropy"] = own["patch_entropy"] / crops
        out["patch_kl"] = (own["ibot"] - own["patch_entropy"]) / crops
    return {f"dinov2/{name}": value for name, value in out.items()}


def plots_of(settings: DINOv2Settings) -> tuple[MetricPlot, ...]:
    share = 100 / math.log(settings.prototypes)
    return (
        MetricPlot(
            "Entropy of the teacher",
            "How undecided the target of an image is: at 100 % it prefers no prototype to another and teaches nothing. "
            "DINO's loss is this entropy and the divergence beside it.",
            "dinov2/teacher_entropy", "entropy", unit="% of ln K", scale=share, limits=(0, 105),
        ),
        MetricPlot(
            "Divergence from the teacher",
            "What of DINO's loss the student could still learn. Near 0 from early on, there is nothing to learn.",
            "dinov2/kl", "KL", unit="nats", limits=(0, None),
        ),
        MetricPlot(
            "What targets tell apart",
            "By how much the target of an image differs from that of all. At 0 all images have the same target: "
            "collapse, whatever the loss is.",
            "dinov2/target_information", "information", unit="nats", limits=(0, None),
        ),
        MetricPlot(
            "Prototypes in use",
            "Share of the prototypes over which the targets of a batch are spread. Sinkhorn keeps it near 100 %.",
            "dinov2/prototype_use", "in use", unit="%", scale=100, limits=(0, 105),
        ),
        MetricPlot(
            "Spread of the features",
            "Of the student's class tokens, as vectors of unit length: near 1 they are spread over the sphere, at 0 "
            "all images look alike.",
            "dinov2/feature_std", "deviation", limits=(0, 1.05),
        ),
    )  # fmt: skip


def sections_of(settings: DINOv2Settings) -> tuple[ReportSection, ...]:
    plots = [
        MetricPlot("DINO, between global crops", "Class tokens of one global crop and another.", "dinov2/dino_global",
                   "cross-entropy", unit="nats"),
        MetricPlot("DINO, local to global", "Class tokens of local crops and of global ones.", "dinov2/dino_local",
                   "cross-entropy", unit="nats"),
    ]  # fmt: skip
    if settings.ibot_weight:
        plots += [
            MetricPlot("iBOT", "Masked patches and what the teacher makes of them. It may rise midway.", "dinov2/ibot",
                       "loss", unit="nats"),
            MetricPlot("Entropy of the teacher's patches", "Of the targets of masked patches.",
                       "dinov2/patch_teacher_entropy", "entropy", unit="nats"),
            MetricPlot("Divergence from the teacher's patches", "What of iBOT's cross-entropy is not that entropy.",
                       "dinov2/patch_kl", "KL", unit="nats"),
        ]  # fmt: skip
    if settings.koleo_weight:
        plots.append(
            MetricPlot("KoLeo", "Minus the log of the distance to the nearest neighbour, summed over the global crops. "
                       "Large where images are near-duplicates.", "dinov2/koleo", "loss")
        )  # fmt: skip
    if settings.gram_weight:
        plots.append(
            MetricPlot("Gram anchoring", "Cosines of all pairs of patches beside those of the Gram teacher; from "
                       "dinov2.gram_from_samples on.", "dinov2/gram", "loss")
        )  # fmt: skip
    return (ReportSection("The terms of the loss", "Before they are weighted and added.", tuple(plots)),)


# --- what they show to be wrong


def health(row: Mapping[str, Any], config: Config) -> Problem | None:
    """The form in which a run collapses, once warm-up and freezing of the heads are over."""
    settings, train = config.settings_as(DINOv2Settings), config.train
    begins = max(config.warmup_samples, settings.freeze_samples) + train.collapse_after * train.total_samples
    if row["samples_seen"] < begins or "dinov2/kl" not in row or not settings.dino_weight:
        return None
    forms = (_near_duplicates, _same_targets, _few_prototypes)
    return next((problem for form in forms if (problem := form(row, config, settings))), None)


def _near_duplicates(row: Mapping[str, Any], config: Config, settings: DINOv2Settings) -> Problem | None:
    if not settings.koleo_weight:
        return None
    nearest = math.exp(-row["dinov2/koleo"] / config.views.crops[0].num)  # the geometric mean of distances
    usual = math.sqrt(2) * row["dinov2/feature_std"]  # the root mean square over all pairs
    if not nearest < NEAREST_SHARE * usual:
        return None
    rule = (
        f"images of a batch are near-duplicates (the nearest is {nearest:.2g} away, others {usual:.2g}): KoLeo, "
        f"{settings.koleo_weight * row['dinov2/koleo']:.3g} of the loss beside DINO's "
        f"{settings.dino_weight * row['dinov2/dino']:.3g}, has gradients that drown the others"
    )
    fix = "remove duplicates from the images, or use a lower dinov2.koleo_weight"
    return Problem("dinov2/koleo", row["dinov2/koleo"], rule, fix)


def _same_targets(row: Mapping[str, Any], config: Config, settings: DINOv2Settings) -> Problem | None:
    entropy, ln_k = row["dinov2/teacher_entropy"], math.log(settings.prototypes)
    if not row["dinov2/target_information"] < TOLD_APART * math.log(_most_in_use(config, settings)):
        return None
    if entropy < UNIFORM * ln_k:
        used = row["dinov2/prototype_use"] * settings.prototypes
        rule = (
            f"all images have the same target, of {used:.2g} of {settings.prototypes} prototypes: the output is "
            f"constant (dinov2/feature_std is {row['dinov2/feature_std']:.2g})"
        )
        fixes = ["a lower optim.lr", "a higher dinov2.teacher_temperature"]
        if settings.centering == "softmax":
            fixes += ["a lower dinov2.center_momentum", "dinov2.centering sinkhorn"]
        fixes += [] if settings.koleo_weight else ["a dinov2.koleo_weight of 0.1"]
        fix = f"go back to a checkpoint from before, with {', '.join(fixes[:-1])} or {fixes[-1]}"
        return Problem("dinov2/teacher_entropy", round(entropy, 4), rule, fix)
    rule = f"that is ln K ({ln_k:.3f}): the teacher's targets are uniform and teach nothing"
    if row["samples_seen"] <= config.train.freeze_backbone_samples:
        rule += ", and while the backbone is frozen its features do not change that"
        fix = "shorten train.freeze_backbone_samples, or lower dinov2.teacher_temperature"
        return Problem("dinov2/teacher_entropy", round(entropy, 4), rule, fix)
    fix = "lower dinov2.teacher_temperature or optim.lr, or lengthen schedule.warmup_samples or dinov2.freeze_samples"
    if config.train.global_batch < TESTED_BATCH:
        fix = f"raise train.global_batch ({config.train.global_batch}) to {TESTED_BATCH} or, as published, 2048; {fix}"
    return Problem("dinov2/teacher_entropy", round(entropy, 4), rule, fix)


def _few_prototypes(row: Mapping[str, Any], config: Config, settings: DINOv2Settings) -> Problem | None:
    used, most = row["dinov2/prototype_use"] * settings.prototypes, _most_in_use(config, settings)
    if not used < FEW_IN_USE * most:
        return None
    rule = f"the targets of a batch are of {used:.2g} of {settings.prototypes} prototypes"
    fixes = ["a higher dinov2.teacher_temperature", *["dinov2.centering sinkhorn"] * (settings.centering == "softmax")]
    fix = f"try {' or '.join(fixes)}, and look in the report for what it tells images apart by"
    return Problem("dinov2/prototype_use", row["dinov2/prototype_use"], rule, fix)


def _most_in_use(config: Config, settings: DINOv2Settings) -> int:
    """Prototypes, or targets of a batch where these are fewer."""
    return min(settings.prototypes, config.train.global_batch * config.views.crops[0].num)
