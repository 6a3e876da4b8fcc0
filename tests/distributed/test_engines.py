"""One result, whatever holds the model: losses, state, collectives and skips are equal over engines and rank counts.

Each rank count is started once and runs every case; the unsharded run on one process is the measure.
"""

from __future__ import annotations

import collections
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from seer_scale.methods.sinkhorn import sinkhorn
from seer_scale.world import World
from tests.ranks import run_ranks
from tests.tiny import fake_views, losses_of, tiny, world_of

UPDATES = {"plain": 20}
"""Updates of a case; 8 where nothing is said."""
CASES = {
    "plain": {},
    "queue": {"swav.queue": 16},
    "adamw": {"optim.name": "adamw", "optim.lr": 0.01},
    "sgd": {"optim.name": "sgd", "optim.lr": 0.05},
    "recompute": {"parallel.activation_checkpoint": [1, 2, 3, 4]},
    "frozen": {"swav.freeze_samples": 40},
    "no_bn_head": {"swav.batch_norm": False},
}
LR = {"adamw": 3e-4, "sgd": 3e-4}
"""0.02 for LARS: a network this small on a batch of 8 is chaotic, and larger steps magnify the last bit a thousandfold."""
ENGINES = {
    2: {"ddp": {"parallel.engine": "ddp"}, "fsdp": {"parallel.engine": "fsdp"}},
    4: {
        "ddp": {"parallel.engine": "ddp"},
        "fsdp": {"parallel.engine": "fsdp"},
        "fsdp_kept": {"parallel.engine": "fsdp", "parallel.reshard_after_forward": False},
        "hsdp": {"parallel.engine": "fsdp", "parallel.replicate": 2},
    },
}


def losses_of_case(world: World, case: str, engine: dict) -> list[float]:
    config, built = tiny(world, **CASES[case], **engine)
    return losses_of(built, config, world, range(UPDATES.get(case, 8)), LR.get(case, 0.02))


@functools.cache
def single(case: str) -> list[float]:
    torch.set_num_threads(1)
    return losses_of_case(World(), case, {"parallel.engine": "single"})


def everything(rank: int, size: int) -> dict:
    world = world_of(rank, size)
    out = {}
    for name, engine in ENGINES[size].items():
        for case in CASES if size == 2 else ("plain", "recompute"):
            out[name, case] = losses_of_case(world, case, engine)
    out["sinkhorn"] = sinkhorn_of_ranks(world)
    if size == 2:
        out["skip"] = skipped_on_all(world)
        out["precision"] = {p: precision_run(world, p) for p in ("fp32", "fp16", "bf16")}
        out["group_stats"] = averaged_statistics(world)
        out["collectives"] = collectives_of_an_update(world)
    return out


def sinkhorn_of_ranks(world: World) -> dict:
    """Codes of this rank's rows and the number of all-reduces; rows are dealt out unevenly."""
    scores = torch.randn(2, 24, 9, generator=torch.Generator().manual_seed(3))
    bounds = [0, 3, 24] if world.size == 2 else [0, 3, 3, 10, 24]
    mine = scores[:, bounds[world.rank] : bounds[world.rank + 1]]
    counted, original = [], dist.all_reduce

    def counting(*args, **kwargs):
        counted.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = counting
    try:
        codes = sinkhorn([mine, mine[:, :, :4]], 0.05, 6, world)
    finally:
        dist.all_reduce = original
    return {"codes": [c.numpy() for c in codes], "all_reduces": len(counted)}


def skipped_on_all(world: World) -> dict:
    """An inf in one rank's images: weights, statistics, momentum and queue stay as they were on all; then it goes on."""
    out = {}
    for name in ("ddp", "fsdp"):
        config, engine = tiny(world, **{"parallel.engine": name, "train.precision": "fp16", "swav.queue": 16})
        engine.scaler.scale.fill_(256.0)  # where nothing overflows by itself
        losses_of(engine, config, world, range(1))
        counters = ("num_batches_tracked", "scaler/")
        before = {k: _local(v).clone() for k, v in engine.state().items() if not any(c in k for c in counters)}
        scale, skipped = engine.scaler.scale.item(), engine.scaler.skipped.item()
        views = fake_views(config, 1, world)
        if world.rank == 1:
            views[0][0] = torch.inf
        loss, _ = engine.forward(views, samples_seen=8)
        engine.backward(loss)
        engine.update(0.3)
        moved = [k for k, v in engine.state().items() if k in before and not torch.equal(_local(v), before[k])]
        halved = engine.scaler.scale.item() == scale / 2
        counted = engine.scaler.skipped.item() - skipped == 1 and engine.scaler.skipped_in_a_row.item() >= 1
        losses_of(engine, config, world, range(2, 3))
        out[name] = (moved, halved, counted, engine.scaler.skipped_in_a_row.item())
    return out


def _local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def precision_run(world: World, precision: str) -> list[float]:
    config, engine = tiny(world, **{"parallel.engine": "fsdp", "train.precision": precision, "optim.name": "sgd"})
    engine.scaler.scale.fill_(256.0 if precision == "fp16" else 1.0)  # no skips while the scale settles
    return losses_of(engine, config, world, range(12), 3e-4)


def averaged_statistics(world: World) -> tuple[float, float]:
    """With BatchNorm groups of one rank, what is saved is the mean over the ranks; and it is the same on all."""
    config, engine = tiny(world, **{"parallel.engine": "fsdp", "parallel.sync_bn_group": 1})
    losses_of(engine, config, world, range(2))
    mine = engine.state()["model/backbone.stem.bn.running_mean"].clone()
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everyone, mine)
    engine.average_buffers()
    saved = engine.state()["model/backbone.stem.bn.running_mean"]
    return (everyone[0] - everyone[1]).abs().max().item(), (saved - sum(everyone) / world.size).abs().max().item()


class _Collectives(TorchDispatchMode):
    """Counts the collectives issued under it, by name."""

    def __init__(self):
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_an_update(world: World) -> dict:
    """Of one fsdp update, for two and for one resolution; without SyncBN, so that what is left is the engine's."""
    over = {"parallel.engine": "fsdp", "parallel.sync_bn_group": 1, "swav.iterations": 3}
    out = {}
    for name, crops in (("two", {}), ("one", {"views.crops": [{"num": 2, "size": 32}]})):
        config, engine = tiny(world, **over, **crops)
        losses_of(engine, config, world, range(1))
        with _Collectives() as seen:
            loss, _ = engine.forward(fake_views(config, 1, world), samples_seen=8)
            engine.backward(loss)
            engine.update(0.3)
        out[name] = dict(seen.counts)
    out["units"] = len(engine.method.units())
    return out


@pytest.fixture(scope="module")
def ranks():
    return {size: run_ranks(size, everything) for size in (2, 4)}


@pytest.mark.parametrize("size,engine,case", [(s, e, c) for s in ENGINES for e in ENGINES[s] for c in (CASES if s == 2 else ("plain", "recompute"))])
def test_losses_equal_the_unsharded_run(ranks, size, engine, case):
    np.testing.assert_allclose(ranks[size][0][engine, case], single(case), rtol=1e-4)


def test_recomputing_changes_no_bit():
    assert single("recompute") == single("plain")[:8]


@pytest.mark.parametrize("size", [2, 4])
def test_codes_do_not_depend_on_the_ranks(ranks, size):
    scores = torch.randn(2, 24, 9, generator=torch.Generator().manual_seed(3))
    for which, whole in enumerate(sinkhorn([scores, scores[:, :, :4]], 0.05, 6, World())):
        parts = np.concatenate([r["sinkhorn"]["codes"][which] for r in ranks[size]], axis=1)
        np.testing.assert_allclose(parts, whole.numpy(), atol=1e-6)
    assert all(r["sinkhorn"]["all_reduces"] == 7 for r in ranks[size])  # iterations + 1, for two crops and two sets


def test_an_inf_on_one_rank_skips_the_update_on_all(ranks):
    for rank in ranks[2]:
        for name, (moved, halved, counted, after) in rank["skip"].items():
            assert moved == [] and halved and counted and after == 0.0, name


def test_half_precision_follows_fp32(ranks):
    runs = ranks[2][0]["precision"]
    for precision in ("fp16", "bf16"):
        np.testing.assert_allclose(np.mean(runs[precision]), np.mean(runs["fp32"]), rtol=0.01)


def test_what_is_saved_of_batch_norm_is_the_mean_over_groups(ranks):
    for apart, error in (r["group_stats"] for r in ranks[2]):
        assert apart > 1e-4 and error < 1e-6


def test_collective_budget_of_an_fsdp_update(ranks):
    """However many resolutions: a gather a unit and pass, a reduce-scatter a unit; all-reduces are Sinkhorn's
    iterations + 1, one of the vectors' gradients, one of norms and finiteness."""
    counts = ranks[2][0]["collectives"]
    assert counts["two"] == counts["one"], counts
    gathers = sum(n for op, n in counts["two"].items() if "allgather" in op or "all_gather" in op)
    scatters = sum(n for op, n in counts["two"].items() if "reduce_scatter" in op)
    assert counts["units"] <= gathers <= 2 * counts["units"] and scatters == counts["units"], counts
    assert sum(n for op, n in counts["two"].items() if "allreduce" in op or "all_reduce" in op) == 4 + 1 + 1, counts
