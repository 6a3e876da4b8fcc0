"""Whether features stay healthy while a network trains, measured without labels.

RankMe (arXiv 2210.02885): the effective rank of features, exp of the entropy of their singular values. Alignment and
uniformity (arXiv 2005.10242): how near two views of an image are, and how evenly images are spread over the sphere.
docs/health.md says how to read them.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seer_scale.config import Config
from seer_scale.data.sources import Source
from seer_scale.evaluate.features import FeatureTable, draw_indices
from seer_scale.evaluate.knn import LabelledImages

MAX_PAIRS = 512
"""Images of which a second view is encoded."""
RANKME_EPS = 1e-7
UNIFORMITY_T = 2.0
SIMILARITY_ROWS = 1024
"""Rows of the matrix of similarities that are held at once."""


@dataclass(frozen=True)
class HealthImages:
    """Image numbers `indices` of `source`, ascending, and those of `pairs`, some of them, whose second view counts."""

    source: Source
    indices: np.ndarray
    pairs: np.ndarray

    def measurement(self, size: int) -> str:
        """Stands for what the figures depend on beside the network: only those of one measurement compare."""
        return f"{zlib.crc32(self.indices.astype(np.int64).tobytes(), len(self.source)):08x}-{size}"

    def pairs_first(self, indices: np.ndarray) -> np.ndarray:
        """`indices`, those of the pairs before the others."""
        return np.concatenate([self.pairs, np.setdiff1d(indices, self.pairs, assume_unique=True)])


def health_images(config: Config, source: Source, labelled: LabelledImages | None) -> HealthImages | None:
    """The images whose features are looked at: of kNN's queries, whose features are made anyway; without kNN of those
    trained on, the same each time. None where there are to be none, or the images come as a stream."""
    source, num = (labelled.queries, len(labelled.query_indices)) if labelled else (source, len(source))
    num = min(num, config.health.images)
    if not num or source.is_stream:
        return None
    return HealthImages(source, draw_indices(source, 0, num), draw_indices(source, 0, min(num, MAX_PAIRS)))


@torch.no_grad()
def feature_health(table: FeatureTable, images: HealthImages) -> dict[str, float]:
    """The figures of `images`, whose features are in the table. Not finite where the features are not. No collective:
    every rank has the table."""
    numbers = torch.from_numpy(images.indices.astype(np.int64)).to(table.numbers.device)
    chosen = torch.isin(table.numbers, numbers)
    features, embeddings = table.features[chosen].double(), table.embeddings[chosen].double()
    norms = features.norm(dim=1)
    return {
        "health/rankme": rankme(features),
        "health/rankme_embeddings": rankme(embeddings),
        "health/rankme_embeddings_limit": min(embeddings.shape),
        "health/feature_norm": norms.mean().item(),
        "health/feature_norm_std": (norms - norms.mean()).square().mean().sqrt().item(),
        "health/alignment": alignment(*table.pairs.unbind(1)),
        "health/uniformity": uniformity(embeddings),
        "health/images": len(features),
    }


def rankme(rows: Tensor) -> float:
    """exp of the entropy of the singular values of `rows` [N, D], as shares of their sum; between 1 and min(N, D).

    From the eigenvalues of the smaller of the two Gram matrices in float64, min(N, D) square. Its rounding, 1e-8 of the
    largest singular value, is below what eps adds.
    """
    if not rows.isfinite().all() or not len(rows):
        return math.nan
    x = rows.double()
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny) + RANKME_EPS
    return torch.special.entr(shares).sum().exp().item()


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean squared distance of the views [N, dim] of an image, of unit length: 0 is the same, 2 unrelated."""
    return (one.double() - other.double()).square().sum(1).mean().item()


def uniformity(embeddings: Tensor) -> float:
    """log of the mean over pairs of images of exp(-2 squared distance), of vectors [N, dim] of unit length: 0 where all
    are one, -4 where all are at right angles."""
    x, num = embeddings.double(), len(embeddings)
    if num < 2:
        return math.nan
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(SIMILARITY_ROWS):
        total += (2 * UNIFORMITY_T * (rows @ x.T - 1)).exp().sum()
    total -= (2 * UNIFORMITY_T * (x.square().sum(1) - 1)).exp().sum()  # each with itself
    return (total / (num * (num - 1))).log().item()
