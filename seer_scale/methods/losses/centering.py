"""The teacher's logits as probabilities, centred by a moving average: DINO's way to keep every prototype in use (arXiv
2104.14294, section 3.1). `sinkhorn` is the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seer_scale.distributed import World


@torch.no_grad()
def softmax_center(
    scores: Sequence[Tensor],
    centers: Sequence[Tensor],
    temperature: float,
    momentum: float,
    world: World,
    rows: Sequence[Tensor | None],
) -> list[Tensor]:
    """softmax((scores - center) / temperature) of this rank's rows; then the centres follow, in place.

    scores: for each set, such as class tokens and masked patches, fp32 [N, K], the logits; N may differ by rank. rows:
    for each set bool [N], which of them are real and not padding; None: all. centers: fp32 [K] each, zeros at first.
    center <- momentum center + (1 - momentum) mean over the real rows of all ranks, each with the same weight, however
    many a rank has (the released code takes the mean of the ranks' means of patches). A batch is centred by those
    before it alone. Where no rank has a row, or the mean is not finite, the centre stays. Collectives: one all-reduce
    of sum(K + 1) floats.
    """
    out = [((s - c) / temperature).softmax(1) for s, c in zip(scores, centers, strict=True)]
    parts = []
    for s, real in zip(scores, rows, strict=True):
        if real is None:
            real = torch.ones(len(s), dtype=torch.bool, device=s.device)
        total = torch.where(real[:, None], s, 0.0).sum(0)
        parts += [total, real.sum().to(s.dtype).view(1)]
    sums = world.sum_(torch.cat(parts)).split([part.numel() for part in parts])
    for center, total, count in zip(centers, sums[::2], sums[1::2], strict=True):
        moved = momentum * center + (1 - momentum) * total / count
        center.copy_(torch.where(moved.isfinite().all(), moved, center))
    return out
