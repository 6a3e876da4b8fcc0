"""Activation checkpointing of units: forward keeps a unit's inputs, backward runs it again.

The second run takes BatchNorm's statistics from a tape of the first, so it repeats no collective and updates no
running statistics; nothing in a unit draws random numbers.
"""

from __future__ import annotations

from torch import nn
from torch.utils.checkpoint import checkpoint

from seer_scale.models.norm import StatsTape


def recompute(unit: nn.Module) -> None:
    """Make `unit` recompute its forward in the backward pass; call before sharding it."""
    forward = unit.forward

    def recomputing(xs):
        if not unit.training:
            return forward(xs)
        contexts = StatsTape().contexts
        return checkpoint(forward, xs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    unit.forward = recomputing
