"""KoLeo: features of a batch spread out, as each moves away from its nearest neighbour (Kozachenko and Leonenko's
estimate of entropy; arXiv 1806.03198, used by DINOv2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.models.layers.precision import at_least_fp32

KOLEO_EPS = 1e-8
"""Added to differences, distances and norms, as published; in fp16 it would be 0, and two equal features infinite."""


def koleo_loss(features: Tensor, group: int) -> Tensor:
    """-mean log distance to the nearest neighbour among `group` images, summed over the views; 0-dim, fp32 at least.

    features: [V, B, D] of any length. A group is so many images that follow one another in the global batch, so ranks
    and micro-batches that are made of whole groups (`group_problem`) change nothing; the released code looks for
    neighbours among a GPU's whole batch instead. The gradient goes through both of a pair. Raises ValueError where B
    is not a multiple of `group`, or that is below 2.
    """
    if group < 2 or features.shape[1] % group:
        raise ValueError(f"groups of {group} images, of at least 2, do not make up {features.shape[1]}")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(at_least_fp32(features), dim=2, eps=KOLEO_EPS).unflatten(1, (-1, group))
        with torch.no_grad():
            cosines = x @ x.mT
            cosines.diagonal(dim1=2, dim2=3).fill_(-torch.inf)
            nearest = cosines.argmax(3, keepdim=True)
        distances = F.pairwise_distance(x, x.gather(2, nearest.expand_as(x)), eps=KOLEO_EPS)
        return -(distances + KOLEO_EPS).log().mean((1, 2)).sum()
