"""Sinkhorn-Knopp assignment over all ranks (SwAV, arXiv 2006.09882, section 3.1 and listing 1).

Codes maximise <Q, S> + epsilon H(Q) with every prototype used equally. With S = scores / epsilon, one iteration
normalises the prototype sums over the global batch, then each sample's sum. The first runs in the log domain, shifted
by each prototype's global maximum; the rest are matrix-vector products on the stabilised matrix P, whose dual
scalings u (samples) and v (prototypes) are absorbed into P every few iterations. Right for any finite score: after a
row normalisation no entry of P exceeds 1 and a prototype that had mass 1 before it keeps at least 1/K, so a
prototype's sum stays within [1/K, B] an iteration and ABSORB of them keep u and v within fp32.

Its time is that of moving matrices, so there is one besides the scores, written in place again and again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.distributed import World
from seer_scale.models.layers.precision import at_least_fp32

ABSORB = 4
ROWS_AT_ONCE = 16
SUMMED = 256


@torch.no_grad()
def sinkhorn(
    scores: list[Tensor],
    epsilon: float,
    iterations: int,
    world: World,
    rows: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Codes, each row summing to 1, for this rank's samples.

    scores: for each prototype set, fp32 [C, B, K] for C assigned crops of B local samples (B may differ by rank and
    may be 0). rows: for each set bool [B], which samples are real; what is padding takes no part, and has codes of
    zeros; None: all. Returns the same shapes. Collectives: `iterations` + 1 all-reduces of sum(C * K) floats, whatever
    the number of crops and sets.
    """
    S = [at_least_fp32(s) for s in scores]
    P = [torch.empty_like(s) for s in S]
    padding = [None if real is None else ~real[:, None] for real in rows or [None] * len(S)]
    m = _reduce([_column_max(s, pad) / epsilon for s, pad in zip(S, padding, strict=True)], dist.ReduceOp.MAX, world)
    for p, s, mx, pad in zip(P, S, m, padding):
        _shifted(s, epsilon, -mx, p).exp_()
        if pad is not None:
            p.masked_fill_(pad, 0.0)  # it may lie above the maximum
    real = _weights(P, padding)
    sums = _column_sums(real, P, world)
    g = [-(mx + c.log()) for mx, c in zip(m, sums)]  # log of the prototypes' scaling, [C, K]
    u = _absorb(S, epsilon, g, P, real)
    for i in range(1, iterations):
        sums = _column_sums(u, P, world)  # v is their reciprocal
        if i % ABSORB and i < iterations - 1:
            u = [
                w / torch.bmm(p, c.reciprocal().unsqueeze(2)).squeeze(2) for w, p, c in zip(real, P, sums, strict=True)
            ]
        else:
            g = [x - c.log() for x, c in zip(g, sums)]
            u = _absorb(S, epsilon, g, P, real)
    for p, pad in zip(P, padding):
        if pad is not None:
            p.masked_fill_(pad, 0.0)
    return P


def _absorb(S: list[Tensor], epsilon: float, g: list[Tensor], P: list[Tensor], real: list[Tensor]) -> list[Tensor]:
    """P: prototypes scaled by exp(g), then samples normalised: that is a softmax, right for any score. Returns u, 1 for
    what is real."""
    for s, gk, p in zip(S, g, P):
        torch.softmax(_shifted(s, epsilon, gk, p), 2, out=p)
    return real


def _weights(P: list[Tensor], padding: list[Tensor | None]) -> list[Tensor]:
    """[C, B] each: 1 for what is real, 0 for padding."""
    ones = [torch.ones_like(p[:, :, 0]) for p in P]
    return [w if pad is None else w.masked_fill_(pad[:, 0], 0.0) for w, pad in zip(ones, padding)]


def _shifted(s: Tensor, epsilon: float, by: Tensor, out: Tensor) -> Tensor:
    """s / epsilon + by, in one pass."""
    return torch.add(by.unsqueeze(1), s, alpha=1 / epsilon, out=out)


def _column_sums(u: list[Tensor], P: list[Tensor], world: World) -> list[Tensor]:
    """Of the samples of all ranks, scaled by u."""
    return _reduce([_weighted_sum(ub, p) for ub, p in zip(u, P)], dist.ReduceOp.SUM, world)


def _weighted_sum(u: Tensor, P: Tensor) -> Tensor:
    """[C, B] and [C, B, K] -> [C, K]. A CPU's product adds one row after the other, and a sum that has grown to B loses
    the last digits of what comes: parts are summed apart."""
    parts = [torch.bmm(ub.unsqueeze(1), p) for ub, p in zip(u.split(SUMMED, 1), P.split(SUMMED, 1))]
    return torch.cat(parts, 1).sum(1)


def _column_max(s: Tensor, padding: Tensor | None) -> Tensor:
    if not s.shape[1]:
        return s.new_full((s.shape[0], s.shape[2]), -torch.inf)
    # a few rows at a time stay in the cache: twice as fast on a CPU
    parts = s.split(ROWS_AT_ONCE, 1)
    if padding is None:
        return torch.stack([part.amax(1) for part in parts]).amax(0)
    masked = zip(parts, padding.split(ROWS_AT_ONCE))
    return torch.stack([part.masked_fill(pad, -torch.inf).amax(1) for part, pad in masked]).amax(0)


def _reduce(parts: list[Tensor], op: dist.ReduceOp.RedOpType, world: World) -> list[Tensor]:
    """One all-reduce for the [C, K] of all prototype sets."""
    if world.size == 1:
        return parts
    flat = torch.cat([p.flatten() for p in parts])
    dist.all_reduce(flat, op)
    return [x.view_as(p) for x, p in zip(flat.split([p.numel() for p in parts]), parts)]
