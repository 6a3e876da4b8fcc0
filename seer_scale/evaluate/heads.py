"""Linear classifiers on frozen features, trained side by side by SGD: many learning rates, weight decays and layers in
one pass over the images, each as if alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seer_scale.config import Crop, Data, Views
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.transforms.on_device import to_float
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.layers import Inputs, Layers
from seer_scale.evaluate.metrics import average_precisions, mean_of, per_class_accuracy, topk_accuracy
from seer_scale.evaluate.splits import Split
from seer_scale.evaluate.state import read_more, read_tensors, save_state
from seer_scale.evaluate.table import Rows, by_blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_EVERY_S = 20.0
LR_BATCH = 256
"""Images of the global batch for which learning rates are given; they scale with it."""
RATE_STEPS = (2 / 7, 4 / 7, 6 / 7)
"""Where "steps" divides the rate by ten: after 8, 16 and 24 of 28 epochs, as VISSL."""


@dataclass(frozen=True)
class Head:
    """lr: for a global batch of LR_BATCH images. weight_decay: of weights, not of biases."""

    layer: str
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Plan:
    """How heads are trained: `samples` images, `global_batch` an update over all ranks."""

    samples: int
    global_batch: int
    schedule: Literal["cosine", "steps"]
    momentum: float
    seed: int

    def rate(self, samples_seen: int) -> float:
        """The learning rate as a share of the first."""
        done = samples_seen / self.samples
        if self.schedule == "steps":
            return 0.1 ** sum(done >= step for step in RATE_STEPS)
        return 0.5 * (1 + math.cos(math.pi * done))


class Heads(nn.Module):
    """Linear classifiers that begin at zero, those of a layer as one product of matrices."""

    def __init__(self, heads: Sequence[Head], widths: Mapping[str, int], classes: int):
        super().__init__()
        self.layers = list(dict.fromkeys(head.layer for head in heads))
        groups = [[head for head in heads if head.layer == layer] for layer in self.layers]
        self.heads = [head for group in groups for head in group]
        self.weights = nn.ParameterList(
            torch.zeros(len(group), classes, widths[layer]) for layer, group in zip(self.layers, groups)
        )
        self.biases = nn.ParameterList(torch.zeros(len(group), classes) for group in groups)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Of each layer [n, width] -> scores [n, heads, classes]."""
        scores = [
            F.linear(features[layer], w.flatten(0, 1), b.flatten()).unflatten(1, b.shape)
            for layer, w, b in zip(self.layers, self.weights, self.biases)
        ]
        return torch.cat(scores, 1)

    def scores(self, index: int, inputs: Inputs, rows: Tensor | Rows) -> Tensor:
        """[n, classes] on the host, by head `index`, of rows that `Layers.encode` has made."""
        head = self.heads[index]
        group = self.layers.index(head.layer)
        within = [i for i, other in enumerate(self.heads) if other.layer == head.layer].index(index)
        w, b = self.weights[group][within].detach(), self.biases[group][within].detach()
        return by_blocks(lambda part: F.linear(inputs.of(part.to(w.device), head.layer), w, b).cpu(), rows)

    def groups(self) -> list[dict[str, Any]]:
        """For `HeadsSGD`."""
        found = []
        for layer, w, b in zip(self.layers, self.weights, self.biases):
            own = [head for head in self.heads if head.layer == layer]
            rates = torch.tensor([head.lr for head in own])
            decays = torch.tensor([head.weight_decay for head in own])
            found += [
                {"params": [w], "rates": rates, "decays": decays},
                {"params": [b], "rates": rates, "decays": 0 * decays},
            ]
        return found


def losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each head, [heads], of scores [n, heads, classes]: cross-entropy of targets [n], or the sum over
    classes of binary ones where targets are [n, classes], without those of -1."""
    n, heads = scores.shape[:2]
    if targets.ndim == 1:
        each = F.cross_entropy(scores.flatten(0, 1), targets.repeat_interleave(heads), reduction="none")
        return each.view(n, heads).mean(0)
    wanted = targets[:, None].expand_as(scores)
    each = F.binary_cross_entropy_with_logits(scores, wanted.clamp(min=0).to(scores.dtype), reduction="none")
    return torch.where(wanted >= 0, each, 0).sum(2).mean(0)


class HeadsSGD(torch.optim.Optimizer):
    """SGD with Nesterov's momentum, of parameters whose first dimension is heads, each with a rate and a decay."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float):
        super().__init__(groups, {"lr": 1.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none of ours is evaluated again
        for group in self.param_groups:
            for p in group["params"]:
                shape = (-1, *[1] * (p.ndim - 1))
                rates, decays = (group[name].to(p.device).view(shape) for name in ("rates", "decays"))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                gradient = torch.addcmul(p.grad, decays, p)
                velocity = state["momentum"].mul_(group["momentum"]).add_(gradient)
                p.addcmul_(gradient.add_(velocity, alpha=group["momentum"]), rates, value=-group["lr"])


# ------------------------------------------------------------------------------------------------ what is trained on


class TrainingSet(Protocol):
    def __len__(self) -> int: ...

    def batches(self, sampler: ElasticSampler, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows of `Layers.encode` and targets, on the device, of each global batch from sample `start`."""


@dataclass(frozen=True)
class CachedFeatures:
    """Rows [n, D] made once, on the host, and their targets."""

    evaluation: Evaluation[Any]
    rows: Tensor | Rows
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, sampler: ElasticSampler, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        world, targets = self.evaluation.world, torch.from_numpy(self.targets)
        for seen in range(start, stop, sampler.global_batch):
            indices = torch.from_numpy(sampler.slots(seen, world.rank, world.size)[2])
            yield self.rows[indices].to(world.device), targets[indices].to(world.device)


@dataclass(frozen=True)
class AugmentedImages:
    """Images of which each is cropped at random and mirrored anew every time; one forward serves all heads."""

    evaluation: Evaluation[Any]
    layers: Layers
    split: Split
    scale: tuple[float, float]

    def __len__(self) -> int:
        return len(self.split)

    @torch.no_grad()
    def batches(self, sampler: ElasticSampler, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        evaluation, targets = self.evaluation, torch.from_numpy(self.split.targets)
        world = evaluation.world
        crop = Crop(num=1, size=evaluation.size, scale=self.scale)
        views = Views(crops=(crop,), flip=0.5, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
        data = Data(path="-", workers=evaluation.workers, prefetch=2)
        for batch in train_batches(
            self.split.source, data, views, sampler, rank=world.rank, world_size=world.size, start=start, stop=stop
        ):
            parts = batch.views[0].split(evaluation.options.batch)
            rows = torch.cat([self.layers.encode(to_float(part.to(world.device))) for part in parts])
            yield rows, targets[batch.indices].to(world.device)


# ------------------------------------------------------------------------------------------------ training


def train(
    heads: Heads, inputs: Inputs, data: TrainingSet, plan: Plan, evaluation: Evaluation[Any], place: Path, what: str
) -> Heads:
    """Trains `heads`, which come back on the device; goes on from what `place` holds. Collective; gradients are
    averaged over ranks in one all-reduce an update."""
    world, accelerator = evaluation.world, evaluation.accelerator
    heads = heads.to(world.device)
    optimizer = HeadsSGD(heads.groups(), plan.momentum)
    path = place / "heads.safetensors"
    seen = resume(path, heads, optimizer) if world.from_main(lambda: bool(read_more(path))) else 0
    wrapped, prepared = accelerator.prepare(heads, optimizer)
    sampler = ElasticSampler([DataVersion(0, (("all", len(data)),))], plan.seed, plan.global_batch)
    saved = time.monotonic()
    with evaluation.progress.doing(f"training {what}", plan.samples, done=seen):
        for rows, targets in data.batches(sampler, seen, plan.samples):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(seen) * plan.global_batch / LR_BATCH
            update(wrapped, prepared, accelerator, inputs(rows), targets)
            seen += plan.global_batch
            evaluation.progress.advance(plan.global_batch)
            if world.is_main and (time.monotonic() - saved >= SAVE_EVERY_S or seen >= plan.samples):
                keep(path, heads, optimizer, seen)
                saved = time.monotonic()
    accelerator.free_memory()
    return heads


def update(
    heads: nn.Module, optimizer: HeadsSGD, accelerator: Accelerator, features: dict[str, Tensor], targets: Tensor
) -> Tensor:
    """One of all heads, which accelerate has prepared; their losses, [heads]."""
    optimizer.zero_grad()
    found = losses(heads(features), targets)
    accelerator.backward(found.sum())
    optimizer.step()
    return found.detach()


def keep(path: Path, heads: Heads, optimizer: HeadsSGD, samples_seen: int) -> None:
    tensors = {name: p.detach() for name, p in heads.named_parameters()}
    tensors |= {f"momentum/{name}": optimizer.state[p]["momentum"] for name, p in heads.named_parameters()}
    save_state(path, tensors, {"samples_seen": samples_seen})


@torch.no_grad()
def resume(path: Path, heads: Heads, optimizer: HeadsSGD) -> int:
    """Samples that what was kept has seen."""
    saved = read_tensors(path)
    for name, p in heads.named_parameters():
        p.copy_(saved[name])
        optimizer.state[p]["momentum"] = saved[f"momentum/{name}"].to(p.device)
    return int(read_more(path)["samples_seen"])


def num_samples(num: int, epochs: int, global_batch: int, at_least_updates: int = 0) -> int:
    """Whole global batches for so many epochs of `num` images."""
    return global_batch * max(-(-num * epochs // global_batch), at_least_updates)


def check_batch(global_batch: int, world_size: int) -> None:
    """Raises UserError where ranks have no equal parts of a global batch."""
    if global_batch % world_size:
        above = -(-global_batch // world_size) * world_size
        rule = f"must be a multiple of the number of processes, {world_size}"
        raise UserError(Problem("--global-batch", global_batch, rule, (above,)))


# ------------------------------------------------------------------------------------------------ figures


def figures(scores: Tensor, targets: np.ndarray) -> dict[str, float]:
    """Of one classifier's scores [n, classes]: "top1", "top5" with standard errors and "mean_class" in percent, or
    "map"; and the mean "loss"."""
    loss = losses(scores[:, None], torch.from_numpy(targets)).item()
    if targets.ndim == 2:
        finite = scores.isfinite().all()
        return {"map": mean_of(average_precisions(scores, targets)) if finite else math.nan, "loss": loss}
    return topk_accuracy(scores, targets) | {"mean_class": mean_of(per_class_accuracy(scores, targets)), "loss": loss}


def measure_heads(
    heads: Heads,
    inputs: Inputs,
    rows: Tensor | Rows,
    targets: np.ndarray,
    evaluation: Evaluation[Any],
    only: Sequence[int] = (),
) -> list[dict[str, float]]:
    """`figures` of each head (or of `only` these), on rows of `Layers.encode`; a rank measures whole heads, so nothing
    is padded. Collective; the same on every rank."""
    world, indices = evaluation.world, only or range(len(heads.heads))
    mine = {i: figures(heads.scores(i, inputs, rows), targets) for i in list(indices)[world.rank :: world.size]}
    found: dict[int, dict[str, float]] = {}
    for part in world.gather_objects(mine):
        found |= part
    return [found[i] for i in indices]


def best(rows: Sequence[Mapping[str, float]], multi_label: bool) -> int:
    """The number of the row with the highest mAP; or, of those whose top-1 is within a standard error of the highest,
    that with the lowest loss, which tells more where few images are held out. A classifier that has diverged is never
    it. Raises UserError where all have."""
    key = "map" if multi_label else "top1"
    sound = [i for i, row in enumerate(rows) if math.isfinite(row[key]) and math.isfinite(row["loss"])]
    if not sound:
        raise UserError(Problem("--lr", NOTHING, "is too high: every classifier has diverged", "give lower ones"))
    highest = max(sound, key=lambda i: rows[i][key])
    enough = rows[highest][key] - rows[highest].get("top1_stderr", 0.0)
    return min((i for i in sound if rows[i][key] >= enough), key=lambda i: rows[i]["loss"])
