"""DINO's loss: the cross-entropy of what the student makes of one view of an image with what the teacher makes of
another (arXiv 2104.14294; over all pairs, as in DINOv2, arXiv 2304.07193, section 4).

It is linear in the target. So a student's view meets the sum of the targets it is compared with, once, and of all pairs
no more is kept for the backward pass than one matrix of log-probabilities a view.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.models.layers.precision import at_least_fp32


class DinoLoss(NamedTuple):
    """0-dim means over the images and over pairs of views. loss: all pairs, with equal weights. between_globals: a
    global view and another's target; local_to_global: a local view and a global one's target (0 without local views).
    """

    loss: Tensor
    between_globals: Tensor
    local_to_global: Tensor


def dino_loss(global_logits: Tensor, local_logits: Tensor, targets: Tensor, temperature: float) -> DinoLoss:
    """Of the student's logits, [G, B, K] of global views and [L, B, K] of local ones, and the teacher's probabilities
    [G, B, K] of the same global views, without a graph; temperature: the student's. In fp32 at least.

    G (G - 1) + G L pairs: 18 of 2 global and 8 local views, as a view is not compared with itself. Raises ValueError
    where there is no pair.
    """
    num, locals_ = len(global_logits), len(local_logits)
    between, apart = num * (num - 1), num * locals_
    if not between + apart:
        raise ValueError("DINO compares an image's views, and was given one")
    targets = at_least_fp32(targets)
    together = targets.sum(0)
    own = sum_of_products(together - targets, log_probabilities(global_logits, temperature))
    other = torch.zeros_like(own)
    for view in local_logits if apart else ():  # a plan cannot take nothing apart
        other = other + sum_of_products(together, log_probabilities(view, temperature))
    loss = (own + other) / (between + apart)
    return DinoLoss(loss, own / max(1, between), other / max(1, apart))


def sum_of_products(targets: Tensor, log_p: Tensor) -> Tensor:
    """-sum targets log_p, over views [V, B, K] or of one [B, K], a mean over images."""
    return -(targets * log_p).sum() / log_p.shape[-2]


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(at_least_fp32(logits) / temperature, dim=-1)
