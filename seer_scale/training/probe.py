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
from seer_scale.evaluate.knn import LabelledImages, score, why_unlabelled
from seer_scale.files import shown
from seer_scale.optim.optimizers import build_optimizer


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
        pieces = {"weight": self.weight, "bias": self.bias}
        self._optimizer = build_optimizer(pieces, ("bias",), Optim(name="adamw", weight_decay=0.0))
        self._no_norms = torch.zeros(2, len(pieces), device=world.device)  # AdamW asks for none
        self._tally = torch.zeros(3, dtype=torch.float64, device=world.device)
        """Since the last metric line: the sum of losses, how many were right, how many there were."""

    @property
    def classes_crc32(self) -> str:
        """Stands for what its rows are."""
        return f"{zlib.crc32(repr(self.classes).encode(errors='backslashreplace')):08x}"

    def state(self) -> dict[str, Tensor]:
        """By reference, for a checkpoint; alike on all ranks."""
        own = {"weight": self.weight, "bias": self.bias} | self._optimizer.state
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
        any feature that counts is not finite. One all-reduce, no host synchronisation."""
        counts = (labels >= 0).to(torch.float32)
        x = _scaled(features)
        logits = x @ self.weight.T + self.bias
        target = F.one_hot(labels.clamp(min=0), len(self.classes))
        wrong = (logits.softmax(1) - target) * counts[:, None]  # the gradient at the logits
        loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none") * counts
        right = (logits.argmax(1) == labels) * counts
        tallied = torch.stack([loss.sum(), right.sum(), counts.sum()])
        flat = self._world.sum_(torch.cat([(wrong.T @ x).flatten(), wrong.sum(0), tallied]))
        *grads, tallied = flat.split([self.weight.numel(), self.bias.numel(), 3])
        num = tallied[2]
        skips = ~flat.isfinite().all() | (num == 0)
        weight, bias = (g / num.clamp(min=1) for g in grads)
        self._optimizer.update([weight.view_as(self.weight), bias], self._lr, self._no_norms, skips.float())
        self._tally += torch.where(skips, 0.0, tallied.double())

    def take_metrics(self) -> dict[str, float]:
        """Loss and top-1 in percent over the training images since the last call, before each was learned from. Reads
        the device."""
        loss, right, num = self._tally.tolist()
        self._tally.zero_()
        return {"probe/loss": loss / num, "probe/train_top1": 100 * right / num} if num else {}

    @torch.no_grad()
    def measure(self, queries: FeatureTable) -> dict[str, float]:
        """Top-1 on kNN's queries, in percent, with its standard error. No collective: every rank has the table."""
        logits = _scaled(queries.features) @ self.weight.T + self.bias
        to_own = torch.tensor([self._numbers[name] for name in self._labelled.queries.classes], device=logits.device)
        return score("probe/top1", logits.argmax(1) == to_own[queries.labels])


def _scaled(features: Tensor) -> Tensor:
    """To a root mean square of 1: norms change much while a network learns."""
    x = features.float()
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5


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
        fix = "give a data.path of one folder a class, or false"
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
