"""Sinkhorn-Knopp assignment over all ranks (SwAV, arXiv 2006.09882, section 3.1 and listing 1).

Codes maximise <Q, S> + epsilon H(Q) with every prototype used equally. With S = scores / epsilon, one iteration
normalises the prototype sums over the global batch, then each sample's sum. The first runs in the log domain, shifted
by each prototype's global maximum; the rest are matrix-vector products on the stabilised matrix P, whose dual
scalings u (samples) and v (prototypes) are absorbed into P every few iterations. Right for any finite score: after a
row normalisation no entry of P exceeds 1 and a prototype that had mass 1 before it keeps at least 1/K, so a
prototype's sum stays within [1/K, B] an iteration and ABSORB of them keep u and v within fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.world import World

ABSORB = 4


@torch.no_grad()
def sinkhorn(scores: list[Tensor], epsilon: float, iterations: int, world: World) -> list[Tensor]:
    """Codes, each row summing to 1, for this rank's samples.

    scores: for each prototype set, fp32 [C, B, K] for C assigned crops of B local samples (B may differ by rank and
    may be 0). Returns the same shapes. Collectives: `iterations` + 1 all-reduces of sum(C * K) floats, whatever the
    number of crops and sets.
    """
    S = [s.float() / epsilon for s in scores]
    m = _reduce([_column_max(s) for s in S], dist.ReduceOp.MAX, world)
    sums = _reduce([(s - mx.unsqueeze(1)).exp_().sum(1) for s, mx in zip(S, m)], dist.ReduceOp.SUM, world)
    g = [-(mx + c.log()) for mx, c in zip(m, sums)]  # log of the prototypes' scaling, [C, K]
    P, u, v = _absorb(S, g)
    for i in range(1, iterations):
        sums = _reduce([torch.bmm(ub.unsqueeze(1), p).squeeze(1) for ub, p in zip(u, P)], dist.ReduceOp.SUM, world)
        v = [c.reciprocal() for c in sums]
        u = [torch.bmm(p, vk.unsqueeze(2)).squeeze(2).reciprocal() for p, vk in zip(P, v)]
        if i % ABSORB == 0:
            g = [x + vk.log() for x, vk in zip(g, v)]
            P, u, v = _absorb(S, g)
    return [p * ub.unsqueeze(2) * vk.unsqueeze(1) for p, ub, vk in zip(P, u, v)]


def _absorb(S: list[Tensor], g: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """P, u, v: prototypes scaled by exp(g), then samples normalised: that is a softmax, right for any score. u = v = 1."""
    P = [(s + gk.unsqueeze(1)).softmax(2) for s, gk in zip(S, g)]
    return P, [torch.ones_like(p[:, :, 0]) for p in P], [torch.ones_like(x) for x in g]


def _column_max(s: Tensor) -> Tensor:
    return s.amax(1) if s.shape[1] else s.new_full((s.shape[0], s.shape[2]), -torch.inf)


def _reduce(parts: list[Tensor], op: dist.ReduceOp, world: World) -> list[Tensor]:
    """One all-reduce for the [C, K] of all prototype sets."""
    if world.size == 1:
        return parts
    flat = torch.cat([p.flatten() for p in parts])
    dist.all_reduce(flat, op)
    return [x.view_as(p) for x, p in zip(flat.split([p.numel() for p in parts]), parts)]
