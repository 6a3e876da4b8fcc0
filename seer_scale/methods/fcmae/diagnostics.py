"""What FCMAE says of itself: figures of a metric line, plots of them, and what they show to be wrong.

Masked pretraining of a network without Global Response Normalization ends in channels that are dead, saturated or alike
(arXiv 2301.00808, section 3): the figures are of the encoder's last maps at the places it sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.config import Config
from seer_scale.errors import Problem
from seer_scale.methods.base import Baseline, Reconstructions
from seer_scale.methods.fcmae.settings import FCMAESettings
from seer_scale.methods.losses.reconstruction import denormalised, images_of, patches_of
from seer_scale.models.layers.precision import at_least_fp32
from seer_scale.observe.metric_plot import MetricPlot, ReportSection

NO_BETTER, DIVERGED = 0.98, 1.1
"""Of what predicting each patch's mean costs: a loss above the first has learned nothing, above the second worse."""
DEAD, SATURATED = 0.02, 0.25
"""A channel is dead whose root mean square is at most this share of that of all channels; saturated, if it is not dead
and deviates from its mean by at most this share of it. In healthy runs none comes near: 0.25 and 1 at least."""
MOST, ONE_MAP = 0.5, 0.97
"""Channels of one of these kinds that are too many, as a share; a mean square cosine between channels that says that
all have one map (healthy runs: 0.5 of photographs, 0.8 of the simplest images)."""
LARGEST_HALF = torch.finfo(torch.float16).max


@torch.no_grad()
def batch_metrics(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """What `figures` reads, once it is averaged over micro-batches and ranks. maps: of each resolution those of the
    last stage at the visible places, [N_r, P_r, C]. Waits for no device."""
    of_sizes = [_measures(at_least_fp32(x)) for x in maps]
    return {name: torch.stack([measures[name] for measures in of_sizes]).mean(0) for name in of_sizes[0]}


def _measures(x: Tensor) -> dict[str, Tensor]:
    """Cosines are of two channels' maps of one image, in the mean over all pairs and images."""
    unit = F.normalize(x, dim=1)
    return {
        "mean": x.mean((0, 1)),
        "square": x.square().mean((0, 1)),
        "norm": torch.linalg.vector_norm(x, dim=2).mean(),
        "largest": x.abs().amax(),
        "beyond_half": (x.abs() > LARGEST_HALF).float().mean(),
        "cosine": unit.mean(2).square().sum(1).mean(),
        "square_cosine": (unit @ unit.mT).square().sum((1, 2)).mean() / x.shape[2] ** 2,
    }


def figures(means: Mapping[str, Tensor], loss: float, baseline: Baseline | None) -> dict[str, float]:
    """Figures of a metric line; docs/health.md has what each is. baseline: None where patches are not normalised."""
    mean, square = means["mean"].double(), means["square"].double()
    size, deviation = square.sqrt(), (square - mean.square()).clamp(min=0).sqrt()
    dead = size <= DEAD * square.mean().sqrt()
    saturated = ~dead & (deviation <= SATURATED * mean.abs())
    unknown = 0.0 if square.isfinite().all() else math.nan
    out = {
        "feature_norm": means["norm"].item(),
        "feature_max": means["largest"].item(),
        "beyond_half": means["beyond_half"].item(),
        "dead_channels": dead.double().mean().item() + unknown,
        "saturated_channels": saturated.double().mean().item() + unknown,
        "channel_distance": (1 - means["cosine"].item()) / 2,
        "channel_overlap": means["square_cosine"].item(),
    } | ({"explained": 1 - loss / baseline.loss} if baseline else {})
    return {f"fcmae/{name}": value for name, value in out.items()}


def filled_in(predicted: Tensor, images: Tensor, masks: Tensor, side: int, *, normalised: bool) -> Reconstructions:
    """Of images [N, 3, H, W] and predictions of all their patches [N, h, w, pixels], normalised or not. What is visible
    is pasted in, as no loss is taken there. masks: bool [N, h, w]."""
    patches, values = patches_of(at_least_fp32(images), side), at_least_fp32(predicted)
    if normalised:
        values = denormalised(values, patches)
    of_mean = (patches - patches.mean(-1, keepdim=True)).square().mean(-1).clamp(min=torch.finfo(patches.dtype).tiny)
    return Reconstructions(
        seen=images_of(patches.masked_fill(masks[..., None], 0), side),
        filled=images_of(torch.where(masks[..., None], values, patches), side),
        errors=((values - patches).square().mean(-1) / of_mean).masked_fill(~masks, math.nan),
    )


def plots_of(settings: FCMAESettings) -> tuple[MetricPlot, ...]:
    explained = MetricPlot(
        "Explained of what is not seen",
        "Share of the variance within masked patches that predictions explain. At 0 they are no better than each "
        "patch's mean.",
        "fcmae/explained", "explained", unit="%", scale=100, limits=(0, 105),
    )  # fmt: skip
    shares = (
        MetricPlot(
            "Dead channels",
            "Channels of the encoder's last map that are 0 wherever it looks, beside the others.",
            "fcmae/dead_channels", "dead", unit="%", scale=100, limits=(0, 105),
        ),
        MetricPlot(
            "Saturated channels",
            "Channels that have nearly the same value, far from 0, wherever the encoder looks.",
            "fcmae/saturated_channels", "saturated", unit="%", scale=100, limits=(0, 105),
        ),
    )  # fmt: skip
    return (explained, *shares) if settings.normalise else shares


SECTIONS = (
    ReportSection(
        "What the encoder's channels hold",
        "Of its last map at the places it sees. Channels that all say the same cannot tell images apart; Global "
        "Response Normalization is there to keep them different.",
        (
            MetricPlot("Overlap of channels", "Mean square cosine of two channels' maps of an image: at 1 all have the "
                       "same map, up to sign and scale.", "fcmae/channel_overlap", "overlap", limits=(0, 1.05)),
            MetricPlot("Distance of channels", "(1 - cosine) / 2 of the same pairs: 0.5 where they are unrelated or "
                       "their signs are mixed, near 0 where all point the same way.", "fcmae/channel_distance",
                       "distance", limits=(0, 1.05)),
            MetricPlot("Norm of features", "Mean norm of the vector at a place.", "fcmae/feature_norm", "norm",
                       limits=(0, None)),
            MetricPlot("Largest feature", "Mean over ranks and micro-batches of each one's largest.",
                       "fcmae/feature_max", "largest", limits=(0, None)),
            MetricPlot("Features beyond fp16", "Share of the values beyond 65,504, the largest that fp16 holds.",
                       "fcmae/beyond_half", "beyond", unit="%", scale=100, limits=(0, 105)),
        ),
    ),
    ReportSection(
        "Reconstructions",
        "An image; what the network sees of it; what it makes of the rest, in the brightness and contrast that each "
        "patch really has, with what it sees pasted in; and the errors of patches: black is none, white that of the "
        "patch's mean or more, blue what it sees. Sharp edges are not to be expected: the mean of what may be there "
        "has the least error. Images that it was trained on, and others where there are some: those of knn.queries, "
        "or beyond data.max_images.",
        pictures="reconstructions",
    ),
)  # fmt: skip


# --- what they show to be wrong


def health(row: Mapping[str, Any], config: Config, baseline: Baseline | None) -> Problem | None:
    """What keeps a network from learning, once warm-up is over."""
    begins = config.warmup_samples + config.train.collapse_after * config.train.total_samples
    if row["samples_seen"] < begins:
        return None
    forms = (_too_large, _dead, _saturated, _alike) if "fcmae/feature_max" in row else ()
    found = next((problem for form in forms if (problem := form(row))), None)
    return found or (_learns_nothing(row, baseline) if baseline else None)


CALMER = "go back to a checkpoint from before, with a lower optim.lr or a longer schedule.warmup_samples"


def _too_large(row: Mapping[str, Any]) -> Problem | None:
    if not row["fcmae/beyond_half"] > 0:
        return None
    rule = f"features beyond {LARGEST_HALF:,.0f} are infinite in fp16, in which the network may be used later"
    return Problem("fcmae/feature_max", row["fcmae/feature_max"], rule, f"{CALMER}, or a higher optim.weight_decay")


def _dead(row: Mapping[str, Any]) -> Problem | None:
    share = row["fcmae/dead_channels"]
    if not share > MOST:
        return None
    rule = f"{100 * share:.0f} % of the encoder's channels are dead: 0 wherever it looks, beside the others"
    fix = f"{CALMER}, or use a network with Global Response Normalization (convnextv2)"
    return Problem("fcmae/dead_channels", round(share, 4), rule, fix)


def _saturated(row: Mapping[str, Any]) -> Problem | None:
    share = row["fcmae/saturated_channels"]
    if not share > MOST:
        return None
    rule = f"{100 * share:.0f} % of the encoder's channels are saturated: they have one value wherever it looks"
    return Problem("fcmae/saturated_channels", round(share, 4), rule, CALMER)


def _alike(row: Mapping[str, Any]) -> Problem | None:
    overlap = row["fcmae/channel_overlap"]
    if not overlap > ONE_MAP:
        return None
    rule = f"the encoder's channels all have the same map, up to sign and scale (healthy: below {ONE_MAP})"
    fix = f"{CALMER}, or use a network with Global Response Normalization (convnextv2)"
    return Problem("fcmae/channel_overlap", round(overlap, 4), rule, fix)


def _learns_nothing(row: Mapping[str, Any], baseline: Baseline) -> Problem | None:
    loss, of_mean = row["loss"], f"predicting the mean of each patch costs {baseline.loss:.3f}"
    if not loss >= NO_BETTER * baseline.loss:
        return None
    if loss > DIVERGED * baseline.loss:
        return Problem("loss", loss, f"{of_mean}: the run has diverged", CALMER)
    fix = "try a higher optim.lr (a lower one, where the loss was below), a lower fcmae.mask_ratio, or more samples"
    return Problem("loss", loss, f"{of_mean}: nothing is being learned", fix)
