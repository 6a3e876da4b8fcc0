"""DINOv2 on every engine: losses, student and teacher of the unsharded run on one, two and four ranks, in any
micro-batches; another engine and number of ranks at every update; skipped updates; what an update moves."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from seer_scale.bench.collectives import CollectiveCounter
from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.methods.registry import build_method
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine
from seer_scale.training.initial_weights import find_initial_weights
from tests import over_engines
from tests.over_engines import CASES, CHAIN, LR, OF_EACH_KIND, check_same, left_by, settings
from tests.ranks import run_ranks
from tests.tiny import DINOV2, losses_of, micro_batches, tiny, world_of
from tests.unit.test_dinov2 import ANCHORED, OF_REGNETY

KINDS = {
    "vit": {},
    "centred": {"dinov2.centering": "softmax", "dinov2.shared_head": True, "dinov2.patch_bottleneck": 256,
                "dinov2.patch_prototypes": 65536},
    "anchored": ANCHORED,
    "regnety": OF_REGNETY | {"dinov2.mask_exact": True},
}  # fmt: skip
RUNS = {
    2: [("vit", case) for case in CASES if case != "single"]
    + [("centred", case) for case in ("zero1", "fsdp", "fsdp accumulated")]
    + [("regnety", case) for case in OF_EACH_KIND]
    + [("anchored", case) for case in ("zero1", "fsdp", "zero3", "fairscale", "ddp accumulated")],
    4: [("vit", case) for case in ("ddp", "hsdp", "zero2", "zero3")],
}
HALF = [("fsdp", "bf16"), ("fsdp", "fp16"), ("zero3", "fp16"), ("ddp", "bf16")]
OPTIM = {"optim.name": "adamw", "optim.clip_norm": 0.5, "optim.clip_by": "part", "optim.layer_decay": 0.8,
         "optim.patch_lr": 0.2, "optim.weight_decay_end": 10.0, "optim.exclude_vectors": True}  # fmt: skip


def engine_of(kind: str, case: str, world: World, **more: object) -> tuple[Config, Engine]:
    return tiny(world, DINOV2, **OPTIM | settings(case) | KINDS[kind] | more)


def trained(kind: str, case: str, world: World, **more: object) -> dict:
    config, engine = engine_of(kind, case, world, **more)
    out = over_engines.trained(config, engine, world)
    engine.close()
    return out


@functools.cache
def single(kind: str, **more: object) -> dict:
    torch.set_num_threads(1)
    return trained(kind, "single", World(), **more)


def chained(world: World, folder: Path, *given: object) -> list[float]:
    own = {"export": {"prefix": "teacher."}}
    return over_engines.chained(lambda case: engine_of("vit", case, world), world, folder, *given, **own)


def skipped(world: World, case: str) -> list[str]:
    """What of the weights (the teacher's too) moved in an update in which one rank saw an inf."""
    config, engine = engine_of("vit", case, world, **{"train.precision": "bf16"})
    losses_of(engine, config, world, range(1), LR)
    before = {n: s.local.clone() for n, s in engine.shards.items()}
    views = micro_batches(config, 1, world)[0]()
    if world.rank == 1:
        views[0][0] = torch.inf
    engine.gradients([lambda: views], samples_seen=8)
    engine.update(LR, 8)
    moved = [n for n, s in engine.shards.items() if not torch.equal(s.local, before[n])]
    engine.close()
    return moved


LARGER = {"model.image_size": 48, "views.crops": [{"num": 2, "size": 48}, {"num": 2, "size": 24}]}


def begun_larger(world: World, case: str, path: Path) -> dict[str, np.ndarray]:
    """Tables of positions of a run of larger images that begins with the checkpoint `path`."""
    config, _ = engine_of("vit", case, world, **LARGER, **{"checkpoint.init_from": str(path)})
    weights = find_initial_weights(config, build_method(config, world), world)
    engine = build_engine(build_method(config, world), config, world, weights.loaded)
    weights.load(engine.state(), world)
    engine.refresh()
    out = {n: engine.whole(n).numpy().copy() for n in engine.shapes if n.endswith("pos_embed")}
    assert np.isfinite(losses_of(engine, config, world, range(1), LR)).all()
    engine.close()
    return out


def counted(world: World, case: str, **more: object) -> dict:
    config, engine = engine_of("vit", case, world, **more)
    losses_of(engine, config, world, range(2), LR)  # DeepSpeed and DDP look around first
    with CollectiveCounter() as seen:
        engine.gradients(micro_batches(config, 2, world), samples_seen=16)
        engine.update(LR, 16)
    matrices = {n.rpartition(".")[0] for n, shape in engine.shapes.items() if len(shape) > 1}
    units = [u for u in engine.method.shard_units() if any(f"{n}.".startswith(f"{u}.") for n in matrices)]
    trained_numel = sum(s.numel() for n, s in engine.shapes.items() if n not in engine.averages)
    out = {"calls": seen.calls, "units": len(units) // 2, "P": trained_numel}
    engine.close()
    return out


def shown(world: World, case: str) -> dict[str, np.ndarray]:
    """What a report has of an update: figures of a metric line, patches of images, and what attends to them."""
    config, engine = engine_of("vit", case, world)
    losses_of(engine, config, world, range(1), LR)
    out = engine.gradients(micro_batches(config, 1, world), samples_seen=8, with_metrics=True)
    engine.update(LR, 8)
    means = {name: world.sum_(mean.double()) / world.size for name, mean in out.metrics.items()}
    images = torch.linspace(-1, 1, 3 * 24 * 24).view(1, 3, 24, 24).expand(1 + world.rank, -1, -1, -1)
    features = engine.encode_patches(images)
    engine.close()
    figures = np.array(list(engine.method.metrics(means, 1.0).values()))
    return {"figures": figures, "patches": features.patches[0].numpy(), "attention": features.attention[0].numpy()}


def everything(rank: int, size: int, folder: Path) -> dict:
    world = world_of(rank, size)
    out: dict = {(kind, case): trained(kind, case, world) for kind, case in RUNS[size]}
    out["chain"] = chained(world, folder / str(size))
    if size == 2:
        out |= {pair: trained("vit", pair[0], world, **{"train.precision": pair[1]}) for pair in HALF}
        out |= {("skipped", case): skipped(world, case) for case in ("fsdp", "zero1")}
        out |= {("shown", case): shown(world, case) for case in (*OF_EACH_KIND, "ddp accumulated")}
        out |= {("counted", case): counted(world, case) for case in ("ddp", "fsdp")}
        left = left_by(folder / str(size))
        out |= {("larger", case): begun_larger(world, case, left) for case in ("fsdp", "zero3", "zero1")}
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder):
    return {size: run_ranks(size, functools.partial(everything, folder=folder)) for size in RUNS}


@pytest.mark.parametrize("size,kind,case", [(size, *run) for size in RUNS for run in RUNS[size]])
def test_losses_student_and_teacher_are_the_unsharded_runs(ranks, size, kind, case):
    for rank in ranks[size]:
        check_same(rank[kind, case], single(kind))


def test_accumulation_keeps_the_algorithm():
    """One, two and four micro-batches."""
    for micro_batch in (4, 2):
        ours = single("vit", **{"train.micro_batch": micro_batch})
        np.testing.assert_allclose(ours["losses"], single("vit")["losses"], rtol=1e-5)


@pytest.mark.parametrize("engine,precision", HALF)
def test_half_precision_is_that_of_the_unsharded_run(ranks, engine, precision):
    measure = single("vit", **{"train.precision": precision})["losses"]
    np.testing.assert_allclose(ranks[2][0][engine, precision]["losses"], measure, rtol=0.03)


@pytest.mark.parametrize("size", RUNS)
def test_any_engine_on_any_number_of_ranks_goes_on(ranks, folder, size):
    """Another engine for each update; and one rank from what they left before the last two."""
    expected = chained(World(), folder / "one")
    np.testing.assert_allclose(ranks[size][0]["chain"], expected, rtol=1e-4)
    left = left_by(folder / str(size), 2)
    ended = chained(World(), folder / f"after {size}", len(CHAIN) - 2, left)
    np.testing.assert_allclose(ended, expected[-2:], rtol=1e-4)


@pytest.mark.parametrize("case", ["fsdp", "zero3", "zero1"])
def test_sharded_tables_of_positions_are_resized_as_whole_ones(ranks, folder, case):
    expected = begun_larger(World(), "single", left_by(folder / "2"))
    assert {n for n in expected} == {"student.embed.pos_embed", "teacher.embed.pos_embed"}
    for rank in ranks[2]:
        for name, table in rank["larger", case].items():
            np.testing.assert_array_equal(table, expected[name])


@pytest.mark.parametrize("case", [*OF_EACH_KIND, "ddp accumulated"])
def test_what_a_report_shows_is_that_of_the_unsharded_run(ranks, case):
    measure = shown(World(), "single")
    assert measure["patches"].shape == (36, 24) and measure["attention"].shape == (3, 36) == (1 + 2, 36)
    assert measure["patches"].std(0).min() > 0 and measure["attention"].std(1).min() > 0
    for rank in ranks[2]:
        for name, values in measure.items():
            np.testing.assert_allclose(rank["shown", case][name], values, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["fsdp", "zero1"])
def test_where_an_update_is_skipped_the_teacher_stays(ranks, case):
    assert [rank["skipped", case] for rank in ranks[2]] == [[], []]


def test_statistics_of_the_teacher_move_once_an_update_in_any_micro_batches():
    def after(micro_batch: int) -> dict[str, torch.Tensor]:
        config, engine = engine_of("regnety", "single", World(), **{"train.micro_batch": micro_batch})
        own = {n: b for n, b in engine.method.named_buffers() if n.endswith("running_mean")}
        before = {n: b.clone() for n, b in own.items()}
        losses_of(engine, config, World(), range(1), LR)
        return {n: b - before[n] for n, b in own.items()}

    whole, parts = after(0), after(4)
    assert {n.partition(".")[0] for n in whole} == {"student", "teacher"}
    for name, moved in whole.items():  # means of halves are those of the whole but where a BatchNorm came before
        assert moved.abs().max() > 0
        torch.testing.assert_close(parts[name], moved, rtol=0.5, atol=0.3 * moved.abs().max().item())
    assert any(isinstance(m, BatchNorm) for m in engine_of("regnety", "single", World())[1].method.modules())


def test_what_an_update_moves_is_what_the_docs_say(ranks):
    """docs/engines.md: the teacher's units are gathered once, the student's twice; nothing of it is reduced."""
    sinkhorn = 3 + 1
    own = ranks[2][0]["counted", "fsdp"]
    kinds = [call.kind for call in own["calls"]]
    assert kinds.count("all_gather") == 3 * own["units"] and kinds.count("reduce_scatter") == own["units"]
    assert kinds.count("all_reduce") == sinkhorn + 2  # vectors' gradients, norms
    own = ranks[2][0]["counted", "ddp"]
    kinds = [call.kind for call in own["calls"]]
    assert set(kinds) == {"all_reduce"} and kinds.count("all_reduce") == sinkhorn + 1
    assert sum(call.numel for call in own["calls"][sinkhorn:]) == own["P"]
