"""torch.compile of units keeps parity, under any engine and with recomputation around it."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
import torch

from seer_scale.distributed import World
from seer_scale.methods.dinov2.method import DINOv2
from seer_scale.methods.swav.method import SwAV
from tests.ranks import run_ranks
from tests.tiny import DINOV2, RECIPE, losses_of, tiny, world_of

CASES = {
    "fsdp": {
        "parallel.max_unit_gib": 4608 * 4 / 2**30
    },  # cut in parts, whose gathers then come inside what is compiled
    "fsdp joined": {"parallel.min_unit_mib": 8.0},
    "zero3": {},
}
RECOMPUTED = {"parallel.activation_checkpoint": [[1], [1], [2], []]}


def of_few(cls: type, *names: str):
    """The method's shard_units, of which the others are no units: each that is compiled takes seconds."""
    return lambda self, units=cls.shard_units: {n: u for n, u in units(self).items() if n in names}


def both(world: World, over: dict, steps: int, recipe: dict = RECIPE) -> dict[bool, list[float]]:
    """Losses as they are, and compiled."""
    runs = {}
    for on in (False, True):
        config, engine = tiny(world, recipe, **over, **{"train.compile": on})
        runs[on] = losses_of(engine, config, world, range(steps), 0.02)
    return runs


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU wants a C++ compiler")
def test_compiled_units_give_the_same_losses(monkeypatch):
    """With the compiler that users get; of one unit, for all of them take minutes on a CPU."""
    monkeypatch.setattr(SwAV, "shard_units", of_few(SwAV, "backbone.s3.b1"))
    runs = both(World(), {"parallel.engine": "single", **RECOMPUTED}, 4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 4, "nothing was compiled"
    np.testing.assert_allclose(runs[True], runs[False], rtol=1e-4)


def traced(rank: int, size: int) -> dict:
    """With all of torch.compile but the making of kernels, which takes minutes."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    SwAV.shard_units = of_few(SwAV, "backbone.s3.b1", "backbone.s3.b2")
    DINOv2.shard_units = of_few(DINOv2, "student.blocks.0", "teacher.blocks.0", "student_head")
    out = {"fsdp dinov2": both(world_of(rank, size), {"parallel.engine": "fsdp"}, 2, DINOV2)}
    return out | {
        name: both(world_of(rank, size), {"parallel.engine": name.split()[0], **RECOMPUTED, **more}, 3)
        for name, more in CASES.items()
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, traced, timeout=300)


@pytest.mark.parametrize("case", [*CASES, "fsdp dinov2"])
def test_engines_wrap_what_is_compiled(ranks, case):
    runs = ranks[0][case]
    np.testing.assert_allclose(runs[True], runs[False], rtol=1e-4)
