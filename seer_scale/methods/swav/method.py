"""SwAV: swapped prediction of online cluster assignments (arXiv 2006.09882; as used by SEER, arXiv 2103.01988)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.distributed import World, all_gather
from seer_scale.errors import Problem
from seer_scale.methods.base import Baseline, Features, LossOutput, Method
from seer_scale.methods.draws import ViewDraws
from seer_scale.methods.losses.sinkhorn import sinkhorn
from seer_scale.methods.registry import register_method
from seer_scale.methods.swav.settings import SwAVSettings
from seer_scale.models.backbone import Backbone
from seer_scale.models.init import Init, UnitRows
from seer_scale.models.layers.heads import ProjectionHead
from seer_scale.models.registry import build_backbone
from seer_scale.observe.metric_plot import MetricPlot
from seer_scale.optim.parameter_groups import ParameterGroup

UNDECIDED, NEAR_BASELINE = 0.95, 0.02
"""Codes of so high an entropy beside a loss so near ln K, as shares of ln K, say that nothing is being learned."""


class AssignmentInputs(NamedTuple):
    """What SwAV's codes are made of: embeddings [C, B, dim] of a micro-batch's assigned crops, their scores [C, B, K]
    and those of a share of the queue [C, Q, K], a prototype set each; fp32, detached."""

    embeddings: Tensor
    scores: list[Tensor]
    queued: list[Tensor]


@register_method("swav")
class SwAV(Method[AssignmentInputs, list[Tensor]]):
    """Backbone, projection head and prototype sets."""

    backbone: Backbone
    queue: Tensor

    def __init__(self, config: Config, world: World):
        super().__init__()
        self.config, self.world = config.settings_as(SwAVSettings), world
        self.num_crops, self.num_assigned = config.num_crops, config.views.crops[0].num
        self.global_batch = config.train.global_batch
        self.backbone = build_backbone(config.model.name, **config.model.explicit_keys())
        self.draws = ViewDraws(config, world, self.backbone.num_draws)
        s = self.config
        self.head = ProjectionHead(self.backbone.num_features, s.hidden, s.embedding_dim, batch_norm=s.batch_norm)
        self.prototypes = nn.ModuleList(nn.Linear(s.embedding_dim, k, bias=False) for k in s.prototypes)
        self.queue_since = 0
        """The sample from which on the queue has been filled."""
        if s.queue:
            self.register_buffer("queue", torch.zeros(self.num_assigned, s.queue, s.embedding_dim))

    # --- what it declares

    @property
    def feature_width(self) -> int:
        return self.backbone.num_features

    def shard_units(self) -> dict[str, nn.Module]:
        units = {f"backbone.{name}": unit for name, unit in self.backbone.shard_units().items()}
        return units | {"head": self.head} | {f"prototypes.{i}": p for i, p in enumerate(self.prototypes)}

    @property
    def fp32_units(self) -> frozenset[str]:
        return frozenset(f"prototypes.{i}" for i in range(len(self.prototypes)))

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Prototypes are unit vectors, and fixed for the first `freeze_samples`."""
        until = self.config.freeze_samples
        prototypes = ParameterGroup(normalized_rows=True, frozen=((0, until),) if until else ())
        return super().parameter_groups() | {f"{unit}.weight": prototypes for unit in self.fp32_units}

    def initialisers(self) -> dict[str, Init]:
        out: dict[str, Init] = {f"backbone.{k}": v for k, v in self.backbone.initialisers().items()}
        out |= {f"head.{k}": v for k, v in self.head.initialisers().items()}
        return out | {f"{unit}.weight": UnitRows(1 / math.sqrt(self.config.embedding_dim)) for unit in self.fp32_units}

    def state(self) -> dict[str, int]:
        return {"queue_since": self.queue_since}

    def load_state(self, saved: Mapping[str, Any], then: Mapping[str, Any], samples_seen: int) -> bool:
        """A queue of another length is filled anew."""
        is_same = then["swav"]["queue"] == self.config.queue
        self.queue_since = saved["queue_since"] if is_same else samples_seen
        return is_same and bool(self.config.queue)

    # --- the step

    def embed(self, views: list[Tensor], samples_seen: int, part: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """views: for each resolution [num * B, 3, H, W], crop-major. Returns unit vectors, fp32 [V, B, dim], and the
        features of the first crop [B, D], without a graph."""
        features = self.backbone(views, self.draws(views, samples_seen, part))
        z = F.normalize(self.head(torch.cat(features)).float(), dim=1)
        z = z.view(self.num_crops, -1, z.shape[1])
        return z, features[0][: z.shape[1]].detach()

    def loss(
        self,
        views: list[Tensor],
        *,
        samples_seen: int,
        part: tuple[int, int] = (0, 1),
        targets: list[Tensor] | None = None,
        with_metrics: bool = False,
    ) -> LossOutput:
        """Collectives: the backbone's; where it makes the codes itself, those of `targets`."""
        z, features = self.embed(views, samples_seen, part)
        with torch.autocast(z.device.type, enabled=False):
            scores, queued = self._score(z, samples_seen if targets is None else None)
            codes = self.targets([self._inputs(z, scores, queued)], samples_seen)[0] if targets is None else targets
            loss = torch.stack([self._swapped(s, q) for s, q in zip(scores, codes, strict=True)]).mean()
        return LossOutput(loss, self._batch_metrics(scores, codes) if with_metrics else {}, features)

    def prepare_targets(self, views: list[Tensor], *, samples_seen: int, part: tuple[int, int]) -> AssignmentInputs:
        z, _ = self.embed(views, samples_seen, part)
        with torch.autocast(z.device.type, enabled=False):
            return self._inputs(z, *self._score(z, samples_seen, part))

    def encode(self, images: Tensor) -> Features:
        features = self.backbone([images])[0]
        return Features(features.float(), F.normalize(self.head(features).float(), dim=1))

    def _inputs(self, z: Tensor, scores: list[Tensor], queued: list[Tensor]) -> AssignmentInputs:
        num = self.num_assigned
        return AssignmentInputs(z[:num].detach(), [s[:num].detach() for s in scores], queued)

    def _score(
        self, z: Tensor, samples_seen: int | None, part: tuple[int, int] = (0, 1)
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of the crops, [V, B, K] a set, and of this part's share of the queue, [C, Q_part, K] a set.

        One call a prototype set, so that a sharded set is gathered once.
        """
        c, (index, num) = self.config, part
        share = z.new_empty(self.num_assigned, 0, z.shape[2])
        if (
            c.queue
            and samples_seen is not None
            and samples_seen >= max(c.queue_from_samples, self.queue_since + c.queue)
        ):
            share = self.queue.tensor_split(self.world.size * num, dim=1)[self.world.rank * num + index]
        rows = torch.cat([z.flatten(0, 1), share.flatten(0, 1)])
        both = [p(rows).split([z.shape[0] * z.shape[1], share.shape[0] * share.shape[1]]) for p in self.prototypes]
        return [s.unflatten(0, z.shape[:2]) for s, _ in both], [
            q.detach().unflatten(0, share.shape[:2]) for _, q in both
        ]

    @torch.no_grad()
    def targets(self, inputs: Sequence[AssignmentInputs], samples_seen: int) -> list[list[Tensor]]:
        """Codes [C, B, K] a prototype set for each micro-batch, assigned over the whole global batch and the queue,
        which the batch then enters. Collectives: Sinkhorn's (iterations + 1 all-reduces); with a queue one all-gather.
        """
        sizes = [part.embeddings.shape[1] for part in inputs]
        sets = range(len(self.prototypes))
        scores = [
            torch.cat([part.scores[i] for part in inputs] + [part.queued[i] for part in inputs], dim=1) for i in sets
        ]
        codes = sinkhorn(scores, self.config.epsilon, self.config.iterations, self.world)
        if self.config.queue and self.training:
            self._enqueue(torch.cat([part.embeddings for part in inputs], dim=1))
        by_set = [q[:, : sum(sizes)].split(sizes, dim=1) for q in codes]
        return [list(of_part) for of_part in zip(*by_set, strict=True)]

    def _swapped(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy of each code with the prediction of every other crop. scores [V, B, K], codes [C, B, K]."""
        log_p = F.log_softmax(scores / self.config.temperature, dim=2)
        others = log_p.sum(0) - log_p[: self.num_assigned]
        return -(codes * others).sum(2).mean() / (self.num_crops - 1)

    @torch.no_grad()
    def _enqueue(self, z: Tensor) -> None:
        """The embeddings of the global batch, in sample order, enter at the front; the oldest leave. z [C, B, dim].

        Also those of an update that is then skipped, so that the queue fills by the samples seen; what is not finite
        enters as zeros, which prefer no prototype.
        """
        z = z.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.world.size > 1:
            z = all_gather(z).transpose(0, 1).flatten(1, 2)
        self.queue.copy_(torch.cat([z, self.queue[:, : self.queue.shape[1] - z.shape[1]]], dim=1))

    # --- what it says of itself

    @torch.no_grad()
    def _batch_metrics(self, scores: list[Tensor], codes: list[Tensor]) -> dict[str, Tensor]:
        """Means over this rank's samples; a mean over ranks makes them global."""
        out = {}
        for i, (s, q) in enumerate(zip(scores, codes, strict=True)):
            out[f"prediction.{i}"] = (s / self.config.temperature).softmax(2).mean((0, 1))
            out[f"code_entropy.{i}"] = -torch.special.xlogy(q, q).sum(2).mean()
        return out

    @property
    def baseline(self) -> Baseline:
        """A uniform prediction, averaged over the prototype sets."""
        return Baseline("ln K", sum(math.log(k) for k in self.config.prototypes) / len(self.config.prototypes))

    @property
    def anchors(self) -> str:
        return "prototypes.0.weight"

    @property
    def plots(self) -> tuple[MetricPlot, ...]:
        return (
            MetricPlot(
                "Prototypes in use",
                "Share of the prototypes the predictions are spread over. High is healthy; a fall towards 0 is "
                "collapse: every image goes to the same few.",
                "swav/prototype_use",
                "in use",
                unit="%",
                scale=100,
                limits=(0, 105),
            ),
            MetricPlot(
                "Entropy of the assignments",
                "How undecided the target of an image is. At 100 % it prefers no prototype to another and teaches "
                "nothing; near 0 it is sure of one.",
                "swav/assignment_entropy",
                "entropy",
                unit="% of ln K",
                scale=100,
                limits=(0, 105),
            ),
        )

    def metrics(self, means: Mapping[str, Tensor], loss: float) -> dict[str, float]:
        """Averaged over the prototype sets.

        swav/prototype_use: exp(entropy of the mean prediction) / K, the share of the prototypes in effective use;
        swav/assignment_entropy: mean entropy of a code / ln K, 1 where the codes say nothing; swav/below_ln_k: by how
        much the loss is below that of a network that has learned nothing.
        """
        below = {"swav/below_ln_k": self.baseline.loss - loss}
        if not means:
            return below
        use, entropy = [], []
        for i, k in enumerate(self.config.prototypes):
            p = means[f"prediction.{i}"].double()
            use.append(math.exp(-torch.special.xlogy(p, p).sum().item()) / k)
            entropy.append(means[f"code_entropy.{i}"].item() / math.log(k))
        return {
            "swav/prototype_use": sum(use) / len(use),
            "swav/assignment_entropy": sum(entropy) / len(entropy),
        } | below

    def health(self, row: Mapping[str, Any], config: Config) -> Problem | None:
        """A loss at ln K with codes that say nothing, past the warm-up, has learned nothing.

        A healthy loss passes ln K on its way down, but its codes are decided (an entropy of at most some 0.9 ln K).
        """
        ln_k, loss, train = self.baseline.loss, row["loss"], config.train
        begins = max(config.warmup_samples, self.config.freeze_samples, train.freeze_backbone_samples)
        past = begins + train.collapse_after * train.total_samples
        undecided = row.get("swav/assignment_entropy", 0.0) >= UNDECIDED
        if row["samples_seen"] < past or not undecided or not abs(loss / ln_k - 1) <= NEAR_BASELINE:
            return None
        return Problem(
            "loss",
            loss,
            f"that is ln K ({ln_k:.3f}): predictions are uniform, nothing is being learned",
            "try a smaller swav.epsilon (0.03), a lower optim.lr, fewer swav.prototypes, a longer "
            "swav.freeze_samples, or a larger train.global_batch or swav.queue",
        )
