"""iBOT's loss: masked tokens of the student's view and what the teacher, which saw them, makes of the same tokens
(arXiv 2111.07832; weighted as in DINOv2)."""

from __future__ import annotations

from torch import Tensor

from seer_scale.methods.losses.dino import log_probabilities
from seer_scale.models.layers.precision import at_least_fp32


def ibot_loss(logits: Tensor, targets: Tensor, counts: Tensor, num_crops: int, temperature: float) -> Tensor:
    """Of each crop the mean CE of its masked tokens, summed over crops and divided by num_crops; 0-dim, fp32 at least.

    logits: the student's, [M, K], of masked tokens packed one after the other and padded to a number M that does not
    depend on the masks. targets: the teacher's probabilities of these tokens, [M, K], without a graph. counts: [M], of
    each the number of masked tokens of its crop, 0 for padding (`Masks.counts`). num_crops: of all crops that
    could have been masked: in DINOv2, which masks half of them, a uniform prediction has a loss of half ln K.
    """
    wrong = -(at_least_fp32(targets) * log_probabilities(logits, temperature)).sum(1)
    return (wrong * (counts > 0) / counts.clamp(min=1)).sum() / num_crops
