"""A linear classifier of the training images' features, learned beside the network, which never sees it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.config import Config, Optim
from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, DataError, Problem
from seer_scale.evaluate.features import FeatureTable
from seer_scale.evaluate.knn import LabelledImages, why_unlabelled
from seer_scale.evaluate.metrics import share_right
from seer_scale.files import shown
from seer_scale.optim.optimizers import build_optimizer

NEW_SHARE = 0.01
"""Of an update, in the moving averages of moments."""
FLOOR = 1e-5
"""Added to variances, as a share of the mean square of all columns: BatchNorm's, whatever the features' scale."""


class Probe:
    """Softmax regression by AdamW, alike on all ranks; features come without a graph, so nothing flows back.

    labelled: the queries it is measured on. A training image of the same name as one of them teaches nothing.
    """

    def __init__(self, lr: float, classes: Sequence[str], width: int, labelled: LabelledImages, world: World):
        """classes: what it tells apart; width: of features, [N, width]."""
        self.classes, self._lr, self._world, self._labelled = list(classes), lr, world, labelled
        self._numbers = {name: i for i, name in enumerate(self.classes)}
        self.weight = torch.zeros(len(self.classes), width, device=world.device)
        self.bias = torch.zeros(len(self.classes), device=world.device)
        self._moments = torch.zeros(2 * width + 1, device=world.device)
        """`moments` of an update, averaged over the last ones."""
        pieces = {"weight": self.weight, "bias": self.bias}
        self._optimizer = build_optimizer(pieces, ("bias",), Optim(name="adamw", weight_decay=0.0))
        self._no_norms = torch.zeros(2, len(pieces), device=world.device)  # AdamW asks for none
        self._tally = torch.zeros(3, dtype=torch.float64, device=world.device)
        """Since the last metric line: the sum of losses, how many were right, how many there were."""

    @property
    def crc32(self) -> str:
        """Stands for what its state is: of which classes, and of which tensors."""
        return f"{zlib.crc32(repr([self.classes, *self.state()]).encode(errors='backslashreplace')):08x}"

    def state(self) -> dict[str, Tensor]:
        """By reference, for a checkpoint; alike on all ranks."""
        own = {"weight": self.weight, "bias": self.bias, "moments": self._moments} | self._optimizer.state
        return {f"probe/{name}": tensor for name, tensor in own.items()}

    def labels(self, source: Source, indices: Tensor) -> Tensor:
        """Of images of `source`, [N], on the device; -1 where one has none to teach."""
        classes, held_out = source.classes, self._held_out
        assert source.labels is not None, "else there is no probe"
        numbers = [
            -1 if label < 0 or source.name(i) in held_out else self._numbers.get(classes[label], -1)
            for i, label in zip(indices.tolist(), source.labels[indices.numpy()].tolist())
        ]
        labels = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._world.device.type == "cuda")
        return labels.to(self._world.device, non_blocking=True)

    @cached_property
    def _held_out(self) -> frozenset[str]:
        queries = self._labelled.queries
        return frozenset(queries.name(int(i)) for i in self._labelled.query_indices)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """One step on this rank's share of the batch, features [N, width] and labels [N] (-1: left out); skipped where
        any feature that counts is not finite. The first step gives moments alone. One all-reduce, no host
        synchronisation."""
        counts = (labels >= 0).to(torch.float32)
        features = features.float().masked_fill(counts[:, None] == 0, 0.0)
        x = standardised(features, self._moments)  # of the steps before: this one's are not reduced yet
        logits = x @ self.weight.T + self.bias
        target = F.one_hot(labels.clamp(min=0), len(self.classes))
        wrong = (logits.softmax(1) - target) * counts[:, None]  # the gradient at the logits
        loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none") * counts
        right = (logits.argmax(1) == labels) * counts
        sums = moments(features, counts).float()
        parts = [(wrong.T @ x).flatten(), wrong.sum(0), sums, torch.stack([loss.sum(), right.sum()])]
        flat = self._world.sum_(torch.cat(parts))
        *grads, sums, tallied = flat.split([len(part) for part in parts])
        num = sums[-1]
        skips = ~flat.isfinite().all() | (num == 0)
        weight, bias = (g / num.clamp(min=1) for g in grads)
        is_idle = skips | (self._moments[-1] == 0)
        self._optimizer.update([weight.view_as(self.weight), bias], self._lr, self._no_norms, is_idle.float())
        self._moments.copy_(torch.where(skips, self._moments, self._moments.lerp(sums, NEW_SHARE)))
        self._tally += torch.where(skips, 0.0, torch.cat([tallied, num[None]]).double())

    def take_metrics(self) -> dict[str, float]:
        """Loss and top-1 in percent over the training images since the last call, before each was learned from. Reads
        the device."""
        loss, right, num = self._tally.tolist()
        self._tally.zero_()
        return {"probe/loss": loss / num, "probe/train_top1": 100 * right / num} if num else {}

    @torch.no_grad()
    def measure(self, queries: FeatureTable, bank: Sequence[Tensor]) -> dict[str, float]:
        """Top-1 on kNN's queries, in percent, with its standard error. bank: `moments` of the features of the bank, of
        each batch of this rank. One all-reduce; every rank has the queries."""
        of = self._world.sum_(torch.stack(list(bank)).sum(0))
        logits = standardised(queries.features, of) @ self.weight.T + self.bias
        to_own = torch.tensor([self._numbers[name] for name in self._labelled.queries.classes], device=logits.device)
        return share_right("probe/top1", logits.argmax(1) == to_own[queries.labels])


def moments(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Of rows [N, D]: the sum of each column, that of its squares, and how many they are, float64 [2D + 1]; those of
    batches add up. counts [N]: 0 of rows that do not count, which are 0 themselves; None: all do."""
    wide, num = x.double(), x.new_ones(len(x)) if counts is None else counts
    return torch.cat([wide.sum(0), wide.square().sum(0), num.double().sum()[None]])


def standardised(x: Tensor, of: Tensor) -> Tensor:
    """Columns of x [N, D] to mean 0 and variance 1 over the rows whose moments are `of`, as by a BatchNorm without
    weights. A network in training (crops, statistics of a batch) gives features of other means and scales than the same
    one measured: a classifier of both must see neither."""
    mean, square = (of[:-1] / of[-1].clamp(min=1e-30)).chunk(2)
    variance = (square - mean.square()).clamp(min=0) + FLOOR * square.mean()
    return (x.float() - mean.float()) * variance.clamp(min=1e-30).rsqrt().float()


def build_probe(
    config: Config, width: int, source: Source, labelled: LabelledImages | None, world: World
) -> Probe | None:
    """The probe the recipe asks for, if it does. width: of the features the method's loss gives. Collective. Raises
    UserError."""
    if not config.probe.enabled:
        return None
    world.from_main(lambda: _check(config, width, source, labelled))  # it asks the file system
    assert labelled is not None, "else that was refused"
    return Probe(config.probe.lr, source.classes, width, labelled, world)


def _check(config: Config, width: int, source: Source, labelled: LabelledImages | None) -> None:
    if problem := check_features(config, width):
        raise ConfigError([problem])
    if source.is_stream:
        raise DataError(Problem("probe.enabled", True, "the images of a stream come without labels", False))
    if problem := why_unlabelled(config, source):
        fix = "give a data.path of one folder a class, as DIR/train with knn.queries DIR/test, or false"
        raise DataError(Problem("probe.enabled", True, f"{problem.key} {problem.rule}", fix))
    assert labelled is not None, "where data.path has labels, kNN has"
    if unknown := sorted(set(labelled.queries.classes) - set(source.classes)):
        rule = f"it has the class {shown(unknown[0])!r}, which the images that the probe learns from have not"
        fix = "use one set of classes for data.path and knn.queries, or probe.enabled false"
        raise DataError(Problem("knn.queries", config.knn.queries or NOTHING, rule, fix))


def check_features(config: Config, width: int) -> Problem | None:
    """Where the recipe asks for a probe of a method whose loss gives no features."""
    if not config.probe.enabled or width:
        return None
    rule = f"the loss of the method {config.method.name} gives no features to learn from"
    return Problem("probe.enabled", True, rule, False)
