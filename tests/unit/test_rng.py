"""Initial values are functions of (seed, name, index): whatever run of a parameter is drawn, and a rank draws its own
alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from seer_scale.config import load_recipe, resolve
from seer_scale.distributed import World
from seer_scale.methods.swav.method import SwAV
from seer_scale.models.init import Constant, Normal, Uniform, UnitRows, initial_values
from seer_scale.parallel import build_engine
from seer_scale.parallel import engine as frame
from tests.tiny import tiny

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(st.sampled_from([Normal(0.1), Uniform(0.5), Constant(1.0), UnitRows(0.5)]), shapes, st.data())
def test_any_run_is_cut_from_the_whole(init, shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = initial_values(init, shape, 3, "a.weight")
    assert whole.shape == (numel,) and torch.equal(
        initial_values(init, shape, 3, "a.weight", start, stop), whole[start:stop]
    )


def test_values_are_those_of_the_distribution_and_differ_by_seed_and_name():
    n, inits = 2**20, (Normal(0.5), Uniform(0.25))
    for init in inits:
        x, others = (
            initial_values(init, (n,), 0, "a"),
            [initial_values(init, (n,), 1, "a"), initial_values(init, (n,), 0, "b")],
        )
        assert all((torch.corrcoef(torch.stack([x, y]))[0, 1] * math.sqrt(n)).abs() < 5 for y in others)
        assert (x.mean() / x.std() * math.sqrt(n)).abs() < 5
    normal, uniform = (initial_values(init, (n,), 0, "a") for init in inits)
    z = (normal / 0.5).double()
    for k, moment, of_its_square in ((2, 1, 3), (4, 3, 105), (6, 15, 10395)):
        error = math.sqrt((of_its_square - moment**2) / n)
        assert abs(z.pow(k).mean().item() - moment) < 5 * error
    assert z.isfinite().all() and 4.5 < z.abs().max() < 5.5
    assert uniform.abs().max() <= 0.25 and uniform.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=5e-3)
    rows = initial_values(UnitRows(0.1), (50, 16), 0, "p").view(50, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many numbers engines have drawn, of each parameter."""
    numels = []

    def counted(init, *args):
        out = initial_values(init, *args)
        numels.append(0 if isinstance(init, Constant) else out.numel())
        return out

    monkeypatch.setattr(frame, "initial_values", counted)
    return numels


def test_a_rank_of_512_draws_its_own_run_alone(drawn):
    """SEER's 256GF as rank 0 of 512 holds it; it drew all 1.4 billion before."""
    config = resolve(
        load_recipe("seer_regnety_256gf"),
        [
            "--data.path",
            "unused",
            "--parallel.engine",
            "fsdp",
            "--parallel.sync_bn_group",
            "1",
            "--parallel.device",
            "cpu",
        ],
        world_size=512,
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    try:
        world = World(0, 512)
        with torch.device("meta"):
            method = SwAV(config, world)
        engine = build_engine(method, config, world)
        matrices = [n for n, shape in engine.shapes.items() if len(shape) > 1]
        held = sum(engine.shards[n].local.numel() for n in matrices)
        whole = sum(engine.shapes[n].numel() for n in matrices)
        head_biases = 2 * 8192 + 256  # vectors, which every rank holds
        assert sum(drawn) == held + head_biases and sum(drawn) < whole / 250
    finally:
        dist.destroy_process_group()


def test_what_a_checkpoint_brings_is_not_drawn(drawn):
    config, whole = tiny(World(), **{"parallel.engine": "single"})
    assert sum(drawn) > 0
    for loaded in (("",), ("backbone.",)):
        drawn.clear()
        with torch.device("meta"):
            method = SwAV(config, World())
        engine = build_engine(method, config, World(), loaded)
        for name, shard in engine.shards.items():
            brought = name.startswith(loaded)
            assert shard.local.isnan().all() if brought else torch.equal(shard.local, whole.shards[name].local), name
        assert len(drawn) == sum(not n.startswith(loaded) for n in engine.shapes)
