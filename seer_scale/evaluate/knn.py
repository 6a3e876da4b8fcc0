"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978, section 3.4).

Cosine similarity; each of the k nearest bank images votes for its class with exp(similarity / temperature). The bank
streams past the queries: no bank feature is kept, and no similarity matrix larger than queries x batch is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seer_scale.config import Config, Knn
from seer_scale.data.order import permute
from seer_scale.data.sources import Source, open_source
from seer_scale.errors import CheckpointError, DataError
from seer_scale.evaluate.features import Represent, features, gather_rows
from seer_scale.world import World


@dataclass(frozen=True)
class Labelled:
    """Bank and query images; `classes` names the labels of both."""

    bank: Source
    bank_indices: np.ndarray
    queries: Source
    query_indices: np.ndarray
    classes: list[str]
    query_to_bank: np.ndarray
    """Label of a query class in the bank's numbering."""


@dataclass(frozen=True)
class Neighbours:
    """What kNN found for Q queries: image numbers [Q], bank image numbers and similarities [Q, k], nearest first."""

    queries: Tensor
    bank: Tensor
    similarity: Tensor


def labelled_images(config: Config, source: Source | None = None) -> Labelled | None:
    """The images kNN is to use; None where there are no labels and none were asked for. Raises DataError.

    source: data.path, already opened.
    """
    c = config.knn
    if not c.enabled:
        return None
    bank = open_source(c.bank) if c.bank else source or open_source(config.data.path, config.data.kind)
    if not bank.has_labels:
        if c.bank or c.queries:
            raise DataError(f"{c.bank or config.data.path} has no labels, but kNN needs them: sort the images into one folder a class, or set knn.enabled false.")
        return None
    if c.queries:
        queries, held = open_source(c.queries), 0
        if not queries.has_labels:
            raise DataError(f"knn.queries {c.queries} has no labels: sort the images into one folder a class.")
        asked = _drawn(queries, 0, c.limit_queries)
    else:
        queries, asked = bank, _drawn(bank, 0, min(math.ceil(len(bank) / 5), c.limit_queries or len(bank)))
        held = len(asked)
    kept = _drawn(bank, held, c.limit)
    unknown = sorted(set(queries.classes) - set(bank.classes))
    if unknown:
        raise DataError(f"The queries have the class {unknown[0]!r}, which the bank has not: use one set of classes for knn.bank and knn.queries.")
    query_to_bank = np.array([bank.classes.index(name) for name in queries.classes])
    return Labelled(bank, kept, queries, asked, list(bank.classes), query_to_bank)


def _drawn(source: Source, first: int, most: int) -> np.ndarray:
    """Image numbers at up to `most` (0: all) places from `first` on in a fixed shuffle, which cuts classes evenly."""
    n = len(source)
    return np.sort(permute(np.arange(first, min(n, first + most) if most else n), n, seed=0, epoch=0))


@torch.no_grad()
def knn(represent: Represent, images: Labelled, c: Knn, *, workers: int, world: World) -> tuple[dict[str, float], Neighbours]:
    """Top-1 and top-5 in percent, and the neighbours. Collective over all ranks; the same result on each."""
    options = dict(size=c.size, batch=c.batch, workers=workers, world=world)
    parts = [(f, y, i) for f, _, y, i in features(represent, images.queries, images.query_indices, **options)]
    f, y, ids = (gather_rows(torch.cat(column), world) for column in zip(*parts))
    if not len(ids):
        raise DataError(f"None of the {len(images.query_indices)} images that kNN is to classify can be read: check them, or set knn.enabled false.")
    _check_finite(f)
    order = ids.argsort()
    f, y, ids = torch.nn.functional.normalize(f[order], dim=1), y[order], ids[order]
    y = torch.from_numpy(images.query_to_bank).to(y.device)[y]

    nearest = f.new_full((len(f), 0), 0.0)
    found = labels = ids.new_empty((len(f), 0))
    for g, _, yb, ib in features(represent, images.bank, images.bank_indices, **options):
        similarity = f @ torch.nn.functional.normalize(g, dim=1).T
        nearest, found, labels = _best(
            c.k,
            torch.cat([nearest, similarity], 1),
            torch.cat([found, ib.expand(len(f), -1)], 1),
            torch.cat([labels, yb.expand(len(f), -1)], 1),
        )
    if world.size > 1:
        columns = (gather_rows(x.T.contiguous(), world).T for x in (nearest, found, labels))
        nearest, found, labels = _best(c.k, *columns)
    if not labels.shape[1]:
        raise DataError(f"None of the {len(images.bank_indices)} images of kNN's bank can be read: check them, or set knn.enabled false.")
    _check_finite(nearest)  # topk takes what is no number for the largest
    votes = f.new_zeros(len(f), len(images.classes)).scatter_add_(1, labels, (nearest / c.temperature).exp())
    ranked = votes.topk(min(5, votes.shape[1]), dim=1).indices == y[:, None]
    scores = {"knn/top1": 100 * ranked[:, 0].float().mean().item(), "knn/top5": 100 * ranked.any(1).float().mean().item()}
    return scores, Neighbours(ids, found, nearest)


def _check_finite(x: Tensor) -> None:
    """x: the same on all ranks, so that all raise."""
    if not x.isfinite().all():
        raise CheckpointError(
            "The features are not finite, so kNN means nothing: the weights or BatchNorm statistics are broken; "
            "use an earlier checkpoint."
        )


def _best(k: int, similarity: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The k most similar columns of each row, most similar first."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return top.values, *(x.gather(1, top.indices) for x in others)
