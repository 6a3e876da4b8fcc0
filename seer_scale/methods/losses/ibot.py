"""iBOT's loss: masked tokens of the student's view and what the teacher, which saw them, makes of the same tokens
(arXiv 2111.07832; weighted as in DINOv2)."""

from __future__ import annotations

from torch import Tensor

from seer_scale.methods.losses.dino import at_least_fp32, log_probabilities


def ibot_loss(logits: Tensor, targets: Tensor, weights: Tensor, num_crops: int, temperature: float) -> Tensor:
    """sum weights CE / num_crops, 0-dim, fp32 at least.

    logits: the student's, [M, K], of masked tokens packed one after the other and padded to a number M that does not
    depend on the masks. targets: the teacher's probabilities of these tokens, [M, K], without a graph. weights: [M], 1
    over the number of masked tokens of a token's crop, 0 for padding (`Masks.weight`). num_crops: of all crops that
    could have been masked: in DINOv2, which masks half of them, a uniform prediction has a loss of half ln K.
    """
    wrong = -(at_least_fp32(targets) * log_probabilities(logits, temperature)).sum(1)
    return (wrong * weights).sum() / num_crops
