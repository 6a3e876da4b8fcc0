"""Targets of DINO on two ranks are those of one, however unevenly the samples lie: 2 + 2, 1 + 3, all on one rank."""

from __future__ import annotations

import pytest
import torch

from seer_scale.bench.collectives import CollectiveCounter
from seer_scale.distributed import World
from seer_scale.methods.losses.centering import softmax_center
from seer_scale.methods.losses.sinkhorn import sinkhorn
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.unit.test_dino_losses import ROWS

FIRST = {"2 + 2": 2, "1 + 3": 1, "4 + 0": 4, "0 + 4": 0}
"""How many of the four rows rank 0 has."""
CLASSES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
RESERVED = 5


def packed(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As masked tokens are: padded to a fixed number with what would win if it took part."""
    rows = torch.arange(RESERVED) < len(own)
    return torch.cat([own, torch.full((RESERVED - len(own), 3), 100.0)]), rows


def targets(world: World, classes: torch.Tensor, tokens: torch.Tensor) -> dict:
    scores, rows = packed(tokens)
    with CollectiveCounter() as seen:
        codes = sinkhorn([classes[None], scores[None]], 0.07, 3, world, [None, rows])
    sinkhorn_calls = [call.kind for call in seen.calls]
    centers = [torch.zeros(5), torch.tensor([0.1, 0.0, -0.05])]
    with CollectiveCounter() as seen:
        centred = softmax_center([classes, scores], centers, 0.04, 0.9, world, [None, rows])
    return {
        "codes": [codes[0][0].tolist(), codes[1][0, rows].tolist()],
        "centred": [centred[0].tolist(), centred[1][rows].tolist()],
        "centers": [c.tolist() for c in centers],
        "empty": sinkhorn([scores[None]], 0.07, 3, world, [rows & False])[0].abs().sum().item(),
        "calls": (sinkhorn_calls, [call.kind for call in seen.calls]),
    }


def on_rank(rank: int, size: int) -> dict:
    world, out = world_of(rank, size), {}
    for split, first in FIRST.items():
        out[split] = targets(world, CLASSES.chunk(size)[rank], ROWS.split([first, 4 - first])[rank])
    return out


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(2, on_rank)


@pytest.mark.parametrize("split", FIRST)
def test_targets_are_those_of_one_rank(ranks, split):
    whole, (one, other) = targets(World(), CLASSES, ROWS), (rank[split] for rank in ranks)
    for key in ("codes", "centred"):
        for ours, theirs in zip(zip(one[key], other[key], strict=True), whole[key], strict=True):
            assert sum(ours, []) == [pytest.approx(row, abs=1e-6) for row in theirs]
    for ours, same, theirs in zip(one["centers"], other["centers"], whole["centers"], strict=True):
        assert ours == same == pytest.approx(theirs, abs=1e-6)
    assert one["empty"] == other["empty"] == 0
    # for class tokens and patches together: the maxima, and one an iteration; one for both centres
    assert one["calls"] == other["calls"] == (["all_reduce"] * 4, ["all_reduce"])
