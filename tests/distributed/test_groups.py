"""What shall overlap runs in process groups of its own: a communicator runs one collective at a time, in order of
issue."""

from __future__ import annotations

from collections import Counter

import pytest
import torch.distributed as dist

from seer_scale.bench.collectives import CollectiveCounter
from seer_scale.parallel import fsdp
from tests.ranks import run_ranks
from tests.tiny import losses_of, micro_batches, tiny, world_of

ENGINES = {
    "ddp": {"parallel.engine": "ddp"},
    "fsdp": {"parallel.engine": "fsdp"},
    "hsdp": {"parallel.engine": "fsdp", "parallel.replicate_degree": 2},
    "replicas alone": {"parallel.engine": "fsdp", "parallel.replicate_degree": 4},
    "grouped": {"parallel.engine": "fsdp", "parallel.sync_bn_group": 2},
}


def groups_of_collectives(rank: int, size: int) -> dict:
    """For each engine, as on GPUs: how often an update asks which group for what, with that group's ranks."""
    fsdp.overlaps = lambda world: True
    world, out = world_of(rank, size), {}
    for name, over in ENGINES.items():
        config, engine = tiny(world, **over)
        losses_of(engine, config, world, range(2))  # DDP makes its buckets
        with CollectiveCounter() as seen:
            engine.gradients(micro_batches(config, 2, world), samples_seen=0)
            engine.update(0.01, 0)
        out[name] = Counter((call.kind, call.group) for call in seen.calls)
    near, apart = world.group("near", 2), world.group("apart", 2, stride=2)
    out["ranks"] = [dist.get_process_group_ranks(group) for group in (near, apart)]
    out["kept"] = (
        world.group("near", 2) is near and world.group("far", 2) is not near and world.group("none", 1) is None
    )
    return out


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(4, groups_of_collectives)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_norm_gathers_and_reduce_scatters_have_a_communicator_each(ranks, engine):
    for seen in (rank[engine] for rank in ranks):
        group_of = {}
        for kind, group in seen:
            group_of.setdefault(kind, set()).add(group)
        layers = seen["all_reduce", "batch_norm"]
        assert layers > 1 and seen["all_gather", "batch_norm"] == layers
        assert group_of.get("reduce_scatter", set()) <= {"reduce_scatter"}
        gathers = {"ddp": set(), "hsdp": {"shard"}, "replicas alone": set()}.get(engine, {"default_pg"})
        assert group_of["all_gather"] == {"batch_norm"} | gathers
        assert ("reduce_scatter" in group_of) == bool(gathers)
        assert ("replicate" in group_of["all_reduce"]) == (engine in ("hsdp", "replicas alone"))


def test_groups_are_of_neighbours_or_of_those_a_stride_apart(ranks):
    for rank, seen in enumerate(ranks):
        assert seen["ranks"] == [[rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]] and seen["kept"]
