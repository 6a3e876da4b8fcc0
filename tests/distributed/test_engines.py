"""One result, whatever holds the model: losses, parameters, trust ratios, skips and traffic are equal or as written in
docs/engines.md, over engines, optimisers and rank counts.

Each rank count is started once and runs every case; the unsharded run on one process is the measure.
"""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from seer_scale.bench.collectives import CollectiveCounter
from seer_scale.checkpoint import store
from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.evaluate import statistics
from seer_scale.methods.losses.sinkhorn import sinkhorn
from seer_scale.methods.swav.method import SwAV
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.optim.parameter_groups import normalized_parameters
from seer_scale.parallel import load
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.units import joined_units, sharded_units
from tests.pictures import encode, photo
from tests.ranks import run_ranks
from tests.tiny import losses_of, micro_batches, tiny, world_of

pytestmark = pytest.mark.timeout(1500)  # the ranks run everything before the first test

UPDATES = {"lars": 4, "frozen": 4, "queue": 4}
"""Of a case; 2 of any other: the second sees what the first left in weights and optimiser state, and the weights it
makes are compared."""
CASES = {
    "lars": {},
    "sgd": {"optim.name": "sgd", "optim.lr": 0.05},
    # BatchNorm after it makes the gradient of a bias pure rounding, which AdamW would blow up to a whole step
    "adamw": {"optim.name": "adamw", "optim.lr": 0.01, "swav.batch_norm": False},
    "queue": {"swav.queue": 16},
    "each block recomputed": {"parallel.activation_checkpoint": "every 1"},
    "runs recomputed": {"parallel.activation_checkpoint": [[1], [1], [2], []]},
    "frozen": {"swav.freeze_samples": 16, "train.freeze_backbone_samples": 24},
    "no BatchNorm in the head": {"swav.batch_norm": False},
    "no decay of vectors": {"optim.exclude_vectors": True, "optim.weight_decay": 0.1},
}
LR = {"adamw": 3e-4, "sgd": 3e-4, "no decay of vectors": 1e-3}
"""0.02 for LARS: a network this small on a batch of 8 is chaotic, and larger steps magnify the last bit a
thousandfold."""
ENGINES = {
    "ddp": {"parallel.engine": "ddp"},
    "fsdp": {"parallel.engine": "fsdp"},
    "fsdp kept": {"parallel.engine": "fsdp", "parallel.reshard_after_forward": False},
    "fsdp in parts": {"parallel.engine": "fsdp", "parallel.max_unit_gib": 4608 * 4 / 2**30},
    # stem to s3.b1 together, so that the run s3.b1, s3.b2 is recomputed across two gathers
    "fsdp joined": {"parallel.engine": "fsdp", "parallel.min_unit_mib": 16 / 1024},
    "fsdp joined kept": {
        "parallel.engine": "fsdp",
        "parallel.min_unit_mib": 16 / 1024,
        "parallel.reshard_after_forward": False,
    },
    "fsdp parts joined": {
        "parallel.engine": "fsdp",
        "parallel.max_unit_gib": 4608 * 4 / 2**30,
        "parallel.min_unit_mib": 16 / 1024,
    },
    "fsdp whole": {"parallel.engine": "fsdp", "parallel.min_unit_mib": 8.0},  # backbone, head, prototypes
    "hsdp": {"parallel.engine": "fsdp", "parallel.replicate_degree": 2},
    "hsdp joined": {"parallel.engine": "fsdp", "parallel.replicate_degree": 2, "parallel.min_unit_mib": 16 / 1024},
    "zero1": {"parallel.engine": "zero1"},
    "zero2": {"parallel.engine": "zero2"},
    "zero3": {"parallel.engine": "zero3"},
    "zero3 in parts": {"parallel.engine": "zero3", "parallel.max_unit_gib": 4608 * 4 / 2**30},
    "zero1 offloaded": {"parallel.engine": "zero1", "parallel.offload": True},
    "zero2 offloaded": {"parallel.engine": "zero2", "parallel.offload": True},
    "zero3 offloaded": {"parallel.engine": "zero3", "parallel.offload": True},
    "fairscale": {"parallel.engine": "fairscale"},
}
OPTIMISERS = ("lars", "sgd", "adamw")
RECOMPUTED = ("each block recomputed", "runs recomputed")
CASES_OF = {
    "ddp": (*OPTIMISERS, "runs recomputed"),
    "fsdp": tuple(CASES),
    "fsdp kept": ("lars",),
    "fsdp in parts": ("lars", "runs recomputed"),
    "fsdp joined": ("lars", *RECOMPUTED, "queue"),
    "fsdp joined kept": ("lars", "runs recomputed"),
    "fsdp parts joined": ("runs recomputed",),
    "fsdp whole": ("lars", "runs recomputed"),
    "zero1": OPTIMISERS,
    "zero2": OPTIMISERS,
    "zero3": (*OPTIMISERS, *RECOMPUTED, "frozen", "no decay of vectors"),
    "zero3 in parts": ("runs recomputed",),
    "fairscale": OPTIMISERS,
    "zero1 offloaded": ("lars", "sgd"),
    "zero2 offloaded": ("lars", "adamw"),
    "zero3 offloaded": ("lars", "adamw"),
}
WITH = {
    2: [(e, c) for e, cases in CASES_OF.items() for c in cases],
    4: [(e, "lars") for e in ENGINES if " " not in e]
    + [("hsdp", "adamw"), ("hsdp", "runs recomputed"), ("hsdp joined", "runs recomputed")],
}
SKIPPED = [(e, 0) for e in ENGINES if "hsdp" not in e and "fsdp " not in e and "parts" not in e] + [
    (e, 2) for e in ("ddp", "fsdp", "zero3")
]


def run_case(world: World, case: str, engine: dict, updates: int = 0) -> dict:
    """Losses of some updates, the norms LARS saw in the first, and the parameters before and after them.

    Those before are the same with all engines, or those after would not be: sharded engines need not collect them.
    """
    config, built = tiny(world, **CASES[case], **engine)
    norms = []
    update = built.optimizer.update

    def watched(grads, lr, of_whole, *rest):
        norms.append(of_whole.clone())
        update(grads, lr, of_whole, *rest)

    built.optimizer.update = watched
    start = {n: built.whole(n).numpy().copy() for n in built.shapes} if world.size == 1 else {}
    losses = losses_of(built, config, world, range(updates or UPDATES.get(case, 2)), LR.get(case, 0.02))
    weights = {n: built.whole(n).numpy().copy() for n in built.shapes}
    rows = {
        n: np.abs(np.linalg.norm(forward_weight(built, n), axis=1) - 1).max()
        for n in normalized_parameters(built.groups)
    }
    return {"losses": losses, "norms": norms[0].numpy(), "start": start, "weights": weights, "rows": rows}


def assert_moved_alike(ours: dict, measure: dict, start: dict, within: float = 0.05) -> None:
    """Weights of each matrix, to a part of how far it moved at all: one may be right to 1e-4 when its gradient was
    lost.
    Vectors before BatchNorm have gradients of rounding alone."""
    for name, weight in measure.items():
        if weight.ndim > 1 and (length := np.linalg.norm(weight - start[name])):
            assert np.linalg.norm(ours[name] - weight) <= within * length, name


def forward_weight(engine: Engine, name: str) -> np.ndarray:
    """What the next forward reads, as opposed to the fp32 shards that updates write."""
    p = dict(engine.method.named_parameters())[name]
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().float().numpy().copy()
    return (p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()).float().numpy()


@functools.cache
def single(case: str, updates: int = 0) -> dict:
    torch.set_num_threads(1)
    return run_case(World(), case, {"parallel.engine": "single"}, updates)


def everything(rank: int, size: int, folder: str) -> dict:
    world = world_of(rank, size)
    load("deepspeed.engine")
    gc.freeze()  # a million objects of libraries, through which zero3 would have gc look at each start
    out = {key: run_case(world, key[1], ENGINES[key[0]]) for key in WITH[size]}
    if rank:  # the parent compares rank 0's, and that the others' losses are the same
        out = {k: {"losses": v["losses"]} for k, v in out.items()}
    out["sinkhorn"] = sinkhorn_of_ranks(world)
    out["handed on"] = handed_on(world, Path(folder) / "checkpoints")
    if size == 2:
        out["skip"] = {(name, m): skipped_on_all(world, ENGINES[name], m) for name, m in SKIPPED}
        out["precision"] = {(e, p): precision_run(world, e, p) for e, p in PRECISIONS}
        out["group_stats"] = averaged_statistics(world)
        out["evaluated"] = {e: evaluated(world, ENGINES[e], case) for e, case in EVALUATED.items()}
        out["traffic"] = {(e, v): traffic_of(world, ENGINES[e], VARIANTS[v]) for e, vs in TRAFFIC.items() for v in vs}
        out["accumulated"] = {(e, c): accumulated(world, e, c) for e, c in ACCUMULATED}
    if size == 4:
        out["accumulated"] = {("ddp", c): accumulated(world, "ddp", c) for c in ("", "queue")}
        out["traffic"] = {("hsdp", "two"): traffic_of(world, ENGINES["hsdp"], {})}
    return out


# ------------------------------------------------------------------------------------------------ what the ranks run


def sinkhorn_of_ranks(world: World) -> dict:
    """Codes of this rank's rows and the number of all-reduces; rows are dealt out unevenly."""
    scores = torch.randn(2, 24, 9, generator=torch.Generator().manual_seed(3))
    bounds = [0, 3, 24] if world.size == 2 else [0, 3, 3, 10, 24]
    mine = scores[:, bounds[world.rank] : bounds[world.rank + 1]]
    with CollectiveCounter() as seen:
        codes = sinkhorn([mine, mine[:, :, :4]], 0.05, 6, world)
    return {"codes": [c.numpy() for c in codes], "all_reduces": seen.count("all_reduce"), "all": len(seen.calls)}


def _held(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's state apart from counters, with what forward reads."""
    state = {k: getattr(v, "local", v).clone() for k, v in engine.state().items()}
    state |= {f"forward/{n}": torch.from_numpy(forward_weight(engine, n)) for n in normalized_parameters(engine.groups)}
    return {k: v for k, v in state.items() if not any(c in k for c in ("num_batches_tracked", "scaler/", "memory/"))}


def skipped_on_all(world: World, over: dict, micro_batch: int) -> dict:
    """An inf in one rank's images: weights, statistics and momentum stay as they were on all; then it goes on, and the
    queue has filled by the samples seen."""
    config, engine = tiny(
        world, **over, **{"train.precision": "fp16", "swav.queue": 16, "train.micro_batch": micro_batch}
    )
    engine.scaler.scale.fill_(256.0)  # where nothing overflows by itself
    losses_of(engine, config, world, range(1), 0.01)
    before, scale, skipped = _held(engine), engine.scaler.scale.item(), engine.scaler.skipped.item()
    views = [make() for make in micro_batches(config, 1, world)]
    if world.rank == 1:
        views[0][0][0] = torch.inf
    engine.gradients([lambda v=v: v for v in views], samples_seen=8)
    engine.update(0.3, 8)
    moved = [k for k, v in _held(engine).items() if not torch.equal(v, before[k])]
    halved = engine.scaler.scale.item() == scale / 2
    counted = engine.scaler.skipped.item() - skipped == 1 and engine.scaler.skipped_in_a_row.item() >= 1
    losses = losses_of(engine, config, world, range(2, 4), 0.01)
    finite = engine.is_finite() and engine.method.queue[:, :16].norm(dim=2).gt(0.5).all().item()
    went_on = any(
        not torch.equal(v, before[k]) for k, v in _held(engine).items() if k.startswith("model/") and v.numel()
    )
    return {"moved": moved, "halved": halved, "counted": counted, "in_a_row": engine.scaler.skipped_in_a_row.item(),
            "went_on": went_on and np.isfinite(losses).all() and finite}  # fmt: skip


PRECISIONS = [
    ("fsdp", "fp16"),
    ("fsdp", "bf16"),
    ("ddp", "fp16"),
    ("zero1", "fp16"),
    ("zero3", "fp16"),
    ("zero3", "bf16"),
    ("fairscale", "fp16"),
]
LONG, SHORT = 20, 5
"""Updates of fsdp in bf16, and of the others."""

CALM = {"swav.epsilon": 0.5, "swav.temperature": 0.2, "swav.batch_norm": False, "optim.name": "sgd"}
"""Codes that do not magnify the rounding of a tiny network's features as SEER's epsilon would."""


def precision_run(world: World, engine: str, precision: str) -> list[float]:
    """Losses over four batches again and again, which it learns."""
    config, built = tiny(world, **CALM, **{"parallel.engine": engine, "train.precision": precision})
    built.scaler.scale.fill_(256.0 if precision == "fp16" else 1.0)  # no skips while the scale settles
    losses = []
    for step in range(LONG if engine == "single" or (engine, precision) == ("fsdp", "bf16") else SHORT):
        loss = built.gradients(
            micro_batches(config, step % 4, world), samples_seen=config.train.global_batch * step
        ).loss
        built.update(0.03, config.train.global_batch * step)
        losses.append((world.sum_(loss.clone()) / world.size).item())
    return losses


CHAIN = ("zero3", "fairscale", "fsdp in parts", "fsdp joined", "zero1 offloaded", "ddp")


def handed_on(world: World, folder: Path) -> list[float]:
    """An update by each engine of CHAIN, which goes on from what the one before has saved."""
    losses, path = [], store.latest(folder, world)
    first = store.read_meta(path)["samples_seen"] // 8 if path else 0
    for i, name in enumerate(CHAIN):
        config, engine = tiny(world, **ENGINES[name], **CASES["queue"])
        if path:
            store.load(path, engine.state(), world)
            engine.refresh()
        begin = first + i
        losses += losses_of(engine, config, world, range(begin, begin + 1), 0.02)
        engine.average_buffers()
        path = store.save(folder, engine.state(), {"samples_seen": 8 * (begin + 1)}, world)
    return losses


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


EVALUATED = {
    "ddp": "runs recomputed", "fsdp": "runs recomputed", "fsdp joined": "runs recomputed", "zero1": "lars",
    "zero2": "lars", "zero3": "runs recomputed", "fairscale": "lars",
}  # fmt: skip
"""The case of each."""


class Photos(Source):
    """Some of them cannot be read."""

    def __len__(self) -> int:
        return 23

    def read(self, i: int) -> bytes:
        return encode(Image.fromarray(photo(30, 40, seed=i)), "PNG") if i % 7 else b""

    def name(self, i: int) -> str:
        return str(i)


def untrained(world: World, engine: Engine) -> tuple[int, np.ndarray]:
    """Of how many images the statistics of an evaluation before training are, and what is encoded with them."""
    engine.buffers.keep()
    how = dict(size=16, workers=0, world=world)
    with engine.buffers.unmoved(), mock.patch.object(statistics, "BATCH", 4):
        num = statistics.statistics_of_images(engine.method, engine.encode, Photos(), np.arange(23), **how)
        return num, engine.encode(torch.ones(2, 3, 16, 16)).features.numpy()


def evaluated(world: World, over: dict, case: str) -> dict:
    """Losses of updates with an evaluation, which runs no prototypes, before each."""
    config, engine = tiny(world, **over, **CASES[case])
    num, features = untrained(world, engine)
    losses = []
    for step in range(2):
        engine.encode(micro_batches(config, 9, world)[0]()[1])
        losses += losses_of(engine, config, world, range(step, step + 1), 0.02)
    return {"losses": losses, "images": num, "features": features}


ACCUMULATED = [(e, "") for e in ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero2 offloaded", "fairscale")] + [
    ("fsdp", "queue"),
    ("fsdp joined", "queue"),
]


def accumulated(world: World, engine: str, case: str) -> dict:
    """Losses and statistics with BatchNorm over micro-batches of 2 images; 2 ranks take two of them, 4 ranks one."""
    over = {"parallel.sync_bn_group": 1, "train.micro_batch": 2, **CASES.get(case, {})}
    config, built = tiny(world, **ENGINES[engine], **over)
    losses = losses_of(built, config, world, range(3), 0.02)
    built.average_buffers()
    state = built.state()
    begin = {n: p.data_ptr() for n, p in built.method.named_parameters() if p.numel() % 4 == 0}
    return {"losses": losses, "off": [n for n, at in begin.items() if at % 16],
            "stats": state["model/backbone.s2.b1.conv1.bn.running_var"].numpy(),
            "queue": state["memory/queue"].numpy() if "memory/queue" in state else None,
            "weights": {n: built.whole(n).numpy().copy() for n in built.shapes}}  # fmt: skip


VARIANTS = {
    "two": {},
    "one": {"views.crops": [{"num": 2, "size": 24}]},
    "fp16": {"train.precision": "fp16"},
    "recomputed": {"parallel.activation_checkpoint": [[1], [1], [2], []]},
    "in parts": {"parallel.activation_checkpoint": "every 1", "parallel.max_unit_gib": 4608 * 4 / 2**30},
    "accumulated": {"train.micro_batch": 2},
    "synchronised": {"parallel.sync_bn_group": 2, "swav.batch_norm": False},
}
TRAFFIC = {
    "ddp": ["two", "accumulated"],
    "fsdp": list(VARIANTS),
    "fsdp kept": ["two"],
    "fsdp in parts": ["two", "recomputed"],
    "fsdp joined": ["two", "recomputed", "accumulated", "fp16"],
    "zero1": ["two", "fp16"],
    "zero2": ["two"],
    "zero3": ["two", "one", "fp16", "recomputed", "in parts"],
    "fairscale": ["two"],
}


def traffic_of(world: World, over: dict, more: dict) -> dict:
    """Of one update; without SyncBN, so that what is left is the engine's, save in one variant."""
    config, engine = tiny(world, **{**over, "parallel.sync_bn_group": 1, "swav.iterations": 3, **more})
    if config.parallel.engine != "fsdp":
        losses_of(engine, config, world, range(2), 0.01)  # DeepSpeed and DDP look around first
    with CollectiveCounter() as seen:
        engine.gradients(micro_batches(config, 2, world), samples_seen=16)
        engine.update(0.01, 16)
    shapes, vectors = engine.shapes, engine.vectors
    with torch.device("meta"):
        units = (joined_units if config.parallel.engine == "fsdp" else sharded_units)(SwAV(config, world), config)
    return {"calls": seen.calls, "tensors": len(shapes), "K": 12 + 7, "P": sum(s.numel() for s in shapes.values()),
            "V": sum(shapes[n].numel() for n in vectors), "units": len(units),
            "prototypes": sum(shapes[n].numel() for n in normalized_parameters(engine.groups)),
            "layers": sum(isinstance(m, BatchNorm) for m in engine.method.modules())}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    return {size: run_ranks(size, everything, folder, timeout=1200) for size in (2, 4)}


# ------------------------------------------------------------------------------------------------ 1. parity


@pytest.mark.parametrize("size,engine,case", [(s, e, c) for s in WITH for e, c in WITH[s]])
def test_losses_and_parameters_equal_the_unsharded_run(ranks, size, engine, case):
    ours, measure = ranks[size][0][engine, case], single(case)
    np.testing.assert_allclose(ours["losses"], measure["losses"], rtol=1e-4)
    for name, weight in measure["weights"].items():
        assert np.abs(ours["weights"][name] - weight).max() <= 1e-4 * max(np.abs(weight).max(), 1e-2), name
    assert_moved_alike(ours["weights"], measure["weights"], measure["start"])
    assert all(r[engine, case]["losses"] == ours["losses"] for r in ranks[size])


@pytest.mark.parametrize("size,engine", [(s, e) for s in WITH for e, c in WITH[s] if c == "lars"])
def test_norms_behind_the_trust_ratios_are_those_of_whole_tensors(ranks, size, engine):
    ours, measure = ranks[size][0][engine, "lars"]["norms"], single("lars")["norms"]
    np.testing.assert_allclose(ours[0], measure[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], measure[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size,engine", [(s, e) for s in WITH for e, c in WITH[s] if c == "lars"])
def test_prototypes_have_unit_length_in_the_master_copy_and_in_what_forward_reads(ranks, size, engine):
    run = ranks[size][0][engine, "lars"]
    for name, off in run["rows"].items():
        assert off < 1e-6 and np.abs(np.linalg.norm(run["weights"][name], axis=1) - 1).max() < 1e-6, name


SAME_ORDER = [("fsdp", e) for e in ENGINES if e.startswith("fsdp ")]
SAME_ORDER += [("zero1", "zero2"), ("zero1", "zero1 offloaded"), ("zero3", "zero3 offloaded")]


@pytest.mark.parametrize("one,other,case", [(a, b, c) for a, b in SAME_ORDER for c in CASES_OF[b] if c in CASES_OF[a]])
def test_engines_that_reduce_in_the_same_order_agree_to_the_bit(ranks, one, other, case):
    a, b = (ranks[2][0][e, case] for e in (one, other))
    assert a["losses"] == b["losses"] and all(np.array_equal(w, b["weights"][n]) for n, w in a["weights"].items())


def test_recomputing_changes_no_bit():
    for case in RECOMPUTED:
        ours, measure = single(case), single("lars", 2)
        assert ours["losses"] == measure["losses"] and all(
            np.array_equal(w, measure["weights"][n]) for n, w in ours["weights"].items()
        )


def test_a_run_may_go_on_with_any_other_engine_and_number_of_ranks(ranks):
    """Through the checkpoints of six engines on 2 ranks, then of six on 4: what one uninterrupted process does."""
    config, built = tiny(World(), **CASES["queue"])
    measure = losses_of(built, config, World(), range(2 * len(CHAIN)), 0.02)
    np.testing.assert_allclose(ranks[2][0]["handed on"] + ranks[4][0]["handed on"], measure, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ 2. precision, skips


@pytest.mark.parametrize("engine,micro_batch", SKIPPED)
def test_an_inf_on_one_rank_skips_the_update_on_all(ranks, engine, micro_batch):
    for rank in ranks[2]:
        seen = rank["skip"][engine, micro_batch]
        assert (
            seen["moved"] == [] and seen["halved"] and seen["counted"] and seen["in_a_row"] == 0 and seen["went_on"]
        ), seen


@functools.cache
def fp32() -> np.ndarray:
    torch.set_num_threads(1)
    return np.array(precision_run(World(), "single", "fp32"))


@pytest.mark.parametrize("engine,precision", PRECISIONS)
def test_half_precision_follows_fp32(ranks, engine, precision):
    ours, measure = np.array(ranks[2][0]["precision"][engine, precision]), fp32()
    assert measure[-5:].mean() < 0.9 * measure[:5].mean()  # it learns
    np.testing.assert_allclose(ours.reshape(-1, 5).mean(1), measure[: len(ours)].reshape(-1, 5).mean(1), rtol=0.01)


# ------------------------------------------------------------------------------------------------ 4. statistics


def test_what_is_saved_of_batch_norm_is_the_mean_over_groups(ranks):
    for apart, error in (r["group_stats"] for r in ranks[2]):
        assert apart > 1e-4 and error < 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_codes_do_not_depend_on_the_ranks(ranks, size):
    scores = torch.randn(2, 24, 9, generator=torch.Generator().manual_seed(3))
    for which, whole in enumerate(sinkhorn([scores, scores[:, :, :4]], 0.05, 6, World())):
        parts = np.concatenate([r["sinkhorn"]["codes"][which] for r in ranks[size]], axis=1)
        np.testing.assert_allclose(parts, whole.numpy(), atol=1e-6)
    assert all(r["sinkhorn"]["all_reduces"] == r["sinkhorn"]["all"] == 7 for r in ranks[size])  # iterations + 1


@pytest.mark.parametrize("engine", EVALUATED)
def test_an_evaluation_between_updates_leaves_no_trace(ranks, engine):
    losses = ranks[2][0]["evaluated"][engine]["losses"]
    assert losses == ranks[2][0][engine, EVALUATED[engine]]["losses"][: len(losses)]


@functools.cache
def untrained_alone() -> tuple[int, np.ndarray]:
    torch.set_num_threads(1)
    return untrained(World(), tiny(World())[1])


@pytest.mark.parametrize("engine", EVALUATED)
def test_statistics_of_images_do_not_depend_on_engine_and_ranks(ranks, engine):
    num, features = untrained_alone()
    for rank in ranks[2]:
        assert rank["evaluated"][engine]["images"] == num
        np.testing.assert_allclose(rank["evaluated"][engine]["features"], features, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ 8. accumulation


@pytest.mark.parametrize("engine,case", ACCUMULATED)
def test_accumulating_on_fewer_ranks_is_the_same_algorithm(ranks, engine, case):
    """2 ranks with two micro-batches each, against 4 ranks with one: codes, BatchNorm, queue and weights are the same.

    BatchNorm over two images makes 1e-4 of a gradient from a forward's last bit, so forwards have to agree to the bit:
    no engine may let weights begin where kernels sum in another order.
    """
    ours, measure = ranks[2][0]["accumulated"][engine, case], ranks[4][0]["accumulated"]["ddp", case]
    assert ours["off"] == measure["off"] == []
    np.testing.assert_allclose(ours["losses"], measure["losses"], rtol=1e-4)
    np.testing.assert_allclose(ours["stats"], measure["stats"], rtol=1e-4)
    if case:
        np.testing.assert_allclose(ours["queue"], measure["queue"], atol=1e-3)
    for name, weight in measure["weights"].items():
        assert np.abs(ours["weights"][name] - weight).max() <= 1e-4 * max(np.abs(weight).max(), 1e-2), name
    assert_moved_alike(ours["weights"], measure["weights"], single("lars")["start"])


# ------------------------------------------------------------------------------------------------ 5. traffic


@pytest.mark.parametrize("engine,variant", [(e, v) for e, vs in TRAFFIC.items() for v in vs])
def test_an_update_moves_what_the_formula_says(ranks, engine, variant):
    """docs/engines.md, "What an update moves", by kind: calls and bytes; nothing else is issued."""
    t = ranks[2][0]["traffic"][engine, variant]
    P, V, U, h = t["P"], t["V"], t["units"], 2 if variant == "fp16" else 4
    M, A = P - V, 2 if variant == "accumulated" else 1
    layers = t["layers"] if variant == "synchronised" else 0
    # what is not the engine's: Sinkhorn's iterations + 1 for two crops, norms and finiteness, BatchNorm's statistics
    codes, norms = (4, 4 * 4 * 2 * t["K"]), (1, 4 * (2 * t["tensors"] + 1))
    gathered = h * (M - t["prototypes"]) + 4 * t["prototypes"]
    passes = (1 if engine == "fsdp kept" else 2) * A + (A if A > 1 else 0)  # forward, backward, and a look first
    want = {
        "ddp": {"all_reduce": (1, 4 * P)},
        "fsdp": {
            "all_gather": (passes * U, passes * gathered),
            "reduce_scatter": (A * U, 4 * A * M),
            "all_reduce": (1, 4 * V),
        },
        "zero1": {"reduce": (None, 4 * P), "all_reduce": (1, 4 * t["K"]), "all_gather": (1, 4 * P)},
        "zero2": {"reduce": (None, 4 * P), "all_reduce": (1, 4 * t["K"]), "all_gather": (1, 4 * P)},
        "zero3": {
            "all_gather": (2 * U + 1, 2 * gathered + 4 * V),
            "reduce_scatter": (None, 4 * P),
            "all_reduce": (1, 4 * t["K"]),
        },
        "fairscale": {"reduce": (2, 4 * P), "broadcast": (2, 4 * P), "all_reduce": (0, 0)},
    }[engine.split()[0]]
    if engine != "ddp":  # which has the norms of everything on every rank
        codes = (codes[0] + norms[0], codes[1] + norms[1])
    want["all_reduce"] = tuple(a + b for a, b in zip(want["all_reduce"], codes))
    got = _table(t["calls"])
    if layers:  # a gather of counts, means and deviations forward, an all-reduce of sums backward, for both resolutions
        assert got["all_gather"][0] - want["all_gather"][0] == got["all_reduce"][0] - want["all_reduce"][0] == layers
        return
    for kind in ("reduce", "reduce_scatter", "all_gather"):  # rows and flat vectors are padded to the number of ranks
        calls, size = want.get(kind, (0, 0))
        seen = got.get(kind, (0, 0))
        assert calls in (None, seen[0]) and size <= seen[1] <= 1.005 * size, (
            engine,
            variant,
            kind,
            seen,
            (calls, size),
        )
        want[kind] = seen
    want = {k: v for k, v in want.items() if v != (0, 0)}
    assert got == want, (engine, variant)


def test_replicas_exchange_what_is_left_of_each_unit(ranks):
    """HSDP on 2 x 2 ranks: what FSDP on 2 moves, and an all-reduce of each unit's part between the copies."""
    fsdp, hsdp = (
        _table(ranks[2][0]["traffic"]["fsdp", "two"]["calls"]),
        _table(ranks[4][0]["traffic"]["hsdp", "two"]["calls"]),
    )
    t = ranks[4][0]["traffic"]["hsdp", "two"]
    for kind in ("all_gather", "reduce_scatter"):
        assert hsdp.pop(kind) == fsdp.pop(kind), kind
    (calls, size), (calls_fsdp, size_fsdp) = hsdp.pop("all_reduce"), fsdp.pop("all_reduce")
    parts = 4 * (t["P"] - t["V"]) / 2
    assert calls - calls_fsdp == t["units"] and parts <= size - size_fsdp <= 1.005 * parts
    assert hsdp == fsdp == {}


def test_gathers_are_as_wide_as_the_compute_type_and_no_vector_is_gathered_alone(ranks):
    for engine in ("fsdp", "zero3"):
        t = ranks[2][0]["traffic"][engine, "fp16"]
        kinds = [(dtype, n) for kind, dtype, n, _ in t["calls"] if kind == "all_gather"]
        assert sum(n for dtype, n in kinds if dtype == torch.float16) >= 2 * (t["P"] - t["V"] - t["prototypes"])
        assert len(kinds) <= 2 * t["units"] + 1
        assert {dtype for kind, dtype, *_ in t["calls"] if kind != "all_gather"} == {torch.float32}


def _table(calls: list) -> dict[str, tuple[int, int]]:
    """kind -> (calls, bytes)."""
    out: dict[str, tuple[int, int]] = {}
    for kind, dtype, n, _ in calls:
        count, size = out.get(kind, (0, 0))
        out[kind] = count + 1, size + n * dtype.itemsize
    return out
