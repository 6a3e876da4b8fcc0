"""SwAV: swapped prediction of online cluster assignments (arXiv 2006.09882; as used by SEER, arXiv 2103.01988).

What an engine may ask of a method (the face all methods share): `forward`, `targets`, `units`, `initialisers`,
`fp32_units`, `unit_rows`, `frozen`, `summarise`, `backbone`. A method sees tensors and the world's collectives, never
the sharding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.methods.sinkhorn import sinkhorn
from seer_scale.models.heads import ProjectionHead
from seer_scale.models.registry import build_backbone
from seer_scale.rng import Init, UnitRows
from seer_scale.world import World, all_gather


@dataclass(frozen=True)
class Look:
    """What SwAV's codes are made of: embeddings [C, B, dim] of a micro-batch's assigned crops, their scores [C, B, K]
    and those of a share of the queue [C, Q, K], a prototype set each; fp32, detached."""

    embeddings: Tensor
    scores: list[Tensor]
    queued: list[Tensor]


class SwAV(nn.Module):
    """Backbone, projection head and prototype sets; build it on the meta device and let an engine materialise it."""

    def __init__(self, config: Config, world: World):
        super().__init__()
        self.config, self.world = config.swav, world
        self.num_crops, self.num_assigned = config.num_crops, config.views.crops[0].num
        self.global_batch = config.train.global_batch
        self.backbone = build_backbone(config.model.name, **config.model.free())
        s = config.swav
        self.head = ProjectionHead(self.backbone.num_features, s.hidden, s.dim, batch_norm=s.batch_norm)
        self.prototypes = nn.ModuleList(nn.Linear(s.dim, k, bias=False) for k in s.prototypes)
        self.queue_since = 0
        """The sample from which on the queue has been filled."""
        if s.queue:
            self.register_buffer("queue", torch.zeros(self.num_assigned, s.queue, s.dim))

    # --- what an engine asks

    def units(self) -> dict[str, nn.Module]:
        """Name -> module of what is gathered together, in forward order."""
        units = {f"backbone.{name}": unit for name, unit in self.backbone.units().items()}
        return units | {"head": self.head} | {f"prototypes.{i}": p for i, p in enumerate(self.prototypes)}

    @property
    def fp32_units(self) -> set[str]:
        """Units whose weights take part in fp32 whatever the precision of the rest."""
        return {f"prototypes.{i}" for i in range(len(self.prototypes))}

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Parameters whose rows are brought back to unit length after every update."""
        return tuple(f"prototypes.{i}.weight" for i in range(len(self.prototypes)))

    def frozen(self, samples_seen: int) -> frozenset[str]:
        """Parameters that the update after `samples_seen` samples leaves alone."""
        return frozenset(self.unit_rows if samples_seen < self.config.freeze_samples else ())

    def initialisers(self) -> dict[str, Init]:
        out: dict[str, Init] = {f"backbone.{k}": v for k, v in self.backbone.initialisers().items()}
        out |= {f"head.{k}": v for k, v in self.head.initialisers().items()}
        return out | {name: UnitRows(1 / math.sqrt(self.config.dim)) for name in self.unit_rows}

    @property
    def ln_k(self) -> float:
        """The loss of a model that has learned nothing: a uniform prediction, averaged over the prototype sets."""
        return sum(math.log(k) for k in self.config.prototypes) / len(self.config.prototypes)

    # --- the step

    def embed(self, views: list[Tensor]) -> Tensor:
        """views: for each resolution [num * B, 3, S, S], crop-major. Returns unit vectors, fp32 [V, B, dim]."""
        features = self.backbone(views)
        z = F.normalize(self.head(torch.cat(features)).float(), dim=1)
        return z.view(self.num_crops, -1, z.shape[1])

    def forward(
        self,
        views: list[Tensor],
        *,
        samples_seen: int | None = None,
        look: tuple[int, int] | None = None,
        targets: list[Tensor] | None = None,
        watch: bool = False,
    ):
        """The loss over this rank's images, and, with `watch`, tensors whose mean over ranks `summarise` reads.

        A sharded module has one entrance, so two other questions come through it. Without `samples_seen`, what
        evaluation looks at: the backbone's features [N, D] of the one resolution in `views` and the unit-length
        embeddings [N, dim]. With `look` (i, n), a `Look` at the i-th of this rank's n micro-batches, from which
        `targets` makes the codes that a second forward takes.
        Collectives: the backbone's; where it makes the codes itself, those of `targets`.
        """
        if samples_seen is None:
            features = self.backbone(views)[0]
            return features.float(), F.normalize(self.head(features).float(), dim=1)
        z = self.embed(views)
        with torch.autocast(z.device.type, enabled=False):
            scores, queued = self._score(z, samples_seen if targets is None else None, look or (0, 1))
            seen = Look(z[: self.num_assigned].detach(), [s[: self.num_assigned].detach() for s in scores], queued)
            if look:
                return seen
            codes = self.targets([seen], samples_seen)[0] if targets is None else targets
            loss = torch.stack([self._swapped(s, q) for s, q in zip(scores, codes)]).mean()
        return loss, self._watch(scores, codes) if watch else {}

    def _score(self, z: Tensor, samples_seen: int | None, part: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of the crops, [V, B, K] a set, and of this part's share of the queue, [C, Q_part, K] a set.

        One call a prototype set, so that a sharded set is gathered once.
        """
        c, (index, num) = self.config, part
        share = z.new_empty(self.num_assigned, 0, z.shape[2])
        if c.queue and samples_seen is not None and samples_seen >= max(c.queue_from_samples, self.queue_since + c.queue):
            share = self.queue.tensor_split(self.world.size * num, dim=1)[self.world.rank * num + index]
        rows = torch.cat([z.flatten(0, 1), share.flatten(0, 1)])
        both = [p(rows).split([z.shape[0] * z.shape[1], share.shape[0] * share.shape[1]]) for p in self.prototypes]
        return [s.unflatten(0, z.shape[:2]) for s, _ in both], [q.detach().unflatten(0, share.shape[:2]) for _, q in both]

    @torch.no_grad()
    def targets(self, looks: list[Look], samples_seen: int) -> list[list[Tensor]]:
        """Codes [C, B, K] a prototype set for each micro-batch, assigned over the whole global batch and the queue,
        which the batch then enters. Collectives: Sinkhorn's (iterations + 1 all-reduces); with a queue one all-gather.
        """
        sizes = [look.embeddings.shape[1] for look in looks]
        sets = range(len(self.prototypes))
        scores = [torch.cat([look.scores[i] for look in looks] + [look.queued[i] for look in looks], dim=1) for i in sets]
        codes = sinkhorn(scores, self.config.epsilon, self.config.iterations, self.world)
        if self.config.queue and self.training:
            self._enqueue(torch.cat([look.embeddings for look in looks], dim=1))
        by_set = [q[:, : sum(sizes)].split(sizes, dim=1) for q in codes]
        return [list(of_look) for of_look in zip(*by_set)]

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

    # --- watching itself

    @torch.no_grad()
    def _watch(self, scores: list[Tensor], codes: list[Tensor]) -> dict[str, Tensor]:
        """Means over this rank's samples; a mean over ranks makes them global."""
        out = {}
        for i, (s, q) in enumerate(zip(scores, codes)):
            out[f"prediction.{i}"] = (s / self.config.temperature).softmax(2).mean((0, 1))
            out[f"code_entropy.{i}"] = -torch.special.xlogy(q, q).sum(2).mean()
        return out

    def summarise(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Figures for the log, averaged over the prototype sets.

        swav/prototype_use: exp(entropy of the mean prediction) / K, the share of the prototypes in effective use;
        swav/assignment_entropy: mean entropy of a code / ln K, 1 where the codes say nothing.
        """
        use, entropy = [], []
        for i, k in enumerate(self.config.prototypes):
            p = means[f"prediction.{i}"].double()
            use.append(math.exp(-torch.special.xlogy(p, p).sum().item()) / k)
            entropy.append(means[f"code_entropy.{i}"].item() / math.log(k))
        return {"swav/prototype_use": sum(use) / len(use), "swav/assignment_entropy": sum(entropy) / len(entropy)}
