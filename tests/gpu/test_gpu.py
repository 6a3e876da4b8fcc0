"""What only a GPU shows: the update on CUDA against the CPU's, without a host synchronisation, in each precision, by
each engine (one NCCL rank, and two gloo ranks that share the GPU), and a checkpoint that leaves it and comes back.

`make test-gpu` runs these; without a GPU they are skipped.
"""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seer_scale.bench import calibrate
from seer_scale.bench import plan as bench_plan
from seer_scale.bench.step import of_ranks, with_batch
from seer_scale.checkpoint import store
from seer_scale.checkpoint.saver import Saver
from seer_scale.config import load_recipe, merge, resolve
from seer_scale.distributed import World
from seer_scale.methods.swav.method import SwAV
from seer_scale.parallel import ENGINES, load
from seer_scale.parallel.engine import Engine
from seer_scale.plan.devices import load_device
from seer_scale.plan.plan import make_plan
from seer_scale.training.probe import Probe
from tests.distributed.test_probe import Images, labelled
from tests.tiny import RECIPE, micro_batches, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CALM = {"swav.epsilon": 0.5, "swav.temperature": 0.2, "swav.batch_norm": False, "optim.name": "sgd"}
"""Codes that do not magnify the rounding of a tiny network's features as SEER's epsilon would."""
UPDATES = 6
OF_RANKS = 4
"""Updates of several ranks: by the sixth, one activation at its kink may have moved a loss by 1.5e-4."""


def gpu() -> World:
    return World(device=torch.device("cuda", 0))


def on_device(config, step: int, world: World) -> list:
    views = [[v.to(world.device) for v in make()] for make in micro_batches(config, step, world)]
    return [lambda v=v: v for v in views]


def losses(engine: Engine, config, world: World, updates: int = UPDATES, lr: float = 0.02) -> list[float]:
    out = []
    for step in range(updates):
        seen = step * config.train.global_batch
        loss = engine.gradients(on_device(config, step, world), samples_seen=seen).loss
        engine.update(lr, seen)
        out.append(loss.detach())
    return [(world.sum_(loss.clone()) / world.size).item() for loss in out]


@contextmanager
def no_host_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------ one process


def assert_follows(found: list[float], expected: list[float], precision: str) -> None:
    """fp32: every loss to 1e-4. Half precision moves single losses of a batch of 8 by up to 2 %, on CPUs too: their
    mean."""
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    else:
        np.testing.assert_allclose(found, expected, rtol=0.03)
        np.testing.assert_allclose(np.mean(found), np.mean(expected), rtol=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_update_is_the_cpus(precision):
    config, reference = tiny(World(), **CALM)
    expected = losses(reference, config, World())
    config, engine = tiny(gpu(), **CALM, **{"train.precision": precision})
    engine.scaler.scale.fill_(256.0 if precision == "fp16" else 1.0)
    assert_follows(losses(engine, config, gpu()), expected, precision)


VARIANTS = {
    "fp32": {},
    "fp16": {"train.precision": "fp16"},
    "bf16": {"train.precision": "bf16"},
    "queue": {"swav.queue": 16},
    "recomputed": {"parallel.activation_checkpoint": "every 1", "train.precision": "fp16"},
    "micro-batches": {"train.micro_batch": 4},
    "adamw": {"optim.name": "adamw", "optim.lr": 0.001},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_never_waits_for_the_host(variant):
    config, engine = tiny(gpu(), **VARIANTS[variant])
    losses(engine, config, gpu(), 3)
    batches = on_device(config, 3, gpu())
    with no_host_synchronisation():
        engine.gradients(batches, samples_seen=24, with_metrics=True)
        engine.update(0.02, 24)


def test_a_probe_never_waits_for_the_host_and_learns_what_it_does_on_the_cpu():
    source, batches = Images("train"), [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    weights = []
    for world in (World(), gpu()):
        probe, indices = Probe(0.01, source.classes, 6, labelled(source, 3), world), torch.arange(8)
        probe.update(batches[0].to(world.device), probe.labels(source, indices))
        given = [x.to(world.device) for x in batches[1:]]
        with no_host_synchronisation():
            for x in given:
                probe.update(x, probe.labels(source, indices))
        weights.append(probe.weight.cpu())
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)


def test_scores_and_sinkhorn_stay_fp32_in_half_precision_runs():
    """No TF32 in what is promised in fp32, whatever the rest computes in."""
    tiny(gpu(), **{"train.precision": "bf16"})
    a, b = (torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(i)) for i in (0, 1))
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).abs().max() < 2e-5 * exact.abs().max()


def test_an_overflow_skips_the_update_and_halves_the_scale():
    config, engine = tiny(gpu(), **CALM, **{"train.precision": "fp16", "swav.queue": 16})
    engine.scaler.scale.fill_(256.0)
    losses(engine, config, gpu(), 2)
    before = {n: s.local.clone() for n, s in engine.shards.items()} | {"statistics": engine.buffers.statistics.clone()}
    batches = on_device(config, 2, gpu())
    batches[0]()[0][0] = torch.inf
    with no_host_synchronisation():
        engine.gradients(batches, samples_seen=16)
        stats = engine.update(0.02, 16)
    assert stats["skipped"].item() == 1 and engine.scaler.scale.item() == 128.0
    after = {n: s.local for n, s in engine.shards.items()} | {"statistics": engine.buffers.statistics}
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    assert np.isfinite(losses(engine, config, gpu(), 2)).all()


def test_memory_layouts_agree():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        config, engine = tiny(gpu(), **CALM)
        views = [
            [v.to("cuda").contiguous(memory_format=layout) for v in make()] for make in micro_batches(config, 0, gpu())
        ]
        loss = engine.gradients([lambda v=v: v for v in views], samples_seen=0).loss
        results.append((loss.item(), engine.update(0.02, 0)["grad_norm"].item()))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_a_checkpoint_written_beside_training_is_the_state_it_was_begun_with(tmp_path):
    config, engine = tiny(gpu(), **{"swav.queue": 16, "train.precision": "fp16"})
    losses(engine, config, gpu(), 2)
    expected = {k: getattr(v, "local", v).clone() for k, v in engine.state().items()}
    saver = Saver(tmp_path, engine.state(), gpu(), keep_last=2, keep_every_samples=0)
    saver.begin(engine.state(), {"samples_seen": 16})
    losses(engine, config, gpu(), 2)  # moves on while it is written
    saved = saver.wait()
    assert saved and saved.path, saved
    _, other = tiny(gpu(), **{"swav.queue": 16, "train.precision": "fp16", "run.seed": 7})
    store.load(saved.path, other.state(), gpu())
    other.refresh()
    found = {k: getattr(v, "local", v) for k, v in other.state().items()}
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []


WIDE = {
    "model": {"name": "regnety", "depth": 5, "w0": 128, "wa": 192.0, "wm": 2.0, "group_width": 64},
    "swav": {"hidden": [1024, 1024], "embedding_dim": 64, "prototypes": [32], "iterations": 3, "batch_norm": False},
}


@pytest.mark.parametrize("optimizer,slots", [("lars", 1), ("adamw", 2)])
def test_bytes_held_follow_the_formula_of_the_docs(optimizer, slots):
    gc.collect()
    before = torch.cuda.memory_allocated()
    config = resolve({**RECIPE, **WIDE}, {"optim": {"name": optimizer, "lr": 1e-3}}, world_size=1)
    with torch.device("meta"):
        method = SwAV(config, gpu())
    engine = load("engine").Engine(method, config, gpu())
    batches = on_device(config, 0, gpu())
    images = sum(v.numel() * 4 for make in batches for v in make())
    engine.gradients(batches, samples_seen=0)
    gc.collect()
    held = torch.cuda.memory_allocated() - before - images
    total = sum(s.numel() for s in engine.shapes.values())
    assert abs(held - (8 + 4 * slots) * total) < 0.1 * (8 + 4 * slots) * total


@pytest.mark.long
def test_compiled_units_keep_parity():
    over = CALM | {"train.precision": "bf16"}
    config, engine = tiny(gpu(), **over)
    expected = losses(engine, config, gpu(), 3)
    config, engine = tiny(gpu(), **over, **{"train.compile": True})
    np.testing.assert_allclose(losses(engine, config, gpu(), 3), expected, rtol=1e-2)


# ------------------------------------------------------------------------------------------------ the plan

PLANNED = {
    "half precision": ("seer_regnety_16gf", "bf16", "none", 0),
    "single precision": ("seer_regnety_16gf", "fp32", "none", 0),
    "recomputed": ("seer_regnety_64gf", "fp16", "every 1", 0),
    "micro-batches": ("seer_regnety_32gf", "bf16", "none", 8),
}


@pytest.mark.parametrize("case", PLANNED)
def test_the_planned_peak_is_what_the_allocator_counts(case):
    recipe, precision, recomputed, micro_batch = PLANNED[case]
    over = {"train": {"precision": precision}, "parallel": {"activation_checkpoint": recomputed}}
    config = with_batch(resolve(load_recipe(recipe), merge(of_ranks(1), over), world_size=1), 16, micro_batch)
    gc.collect()
    before = torch.cuda.memory_allocated()
    real = bench_plan.measure(gpu(), bench_plan.Asked(config, 2, 1, False)).allocated - before
    planned = make_plan(config, 1, load_device("h200")).memory.allocated
    assert abs(planned / real - 1) < 0.05, (planned, real)


def test_a_calibration_times_the_device_and_not_the_host():
    clock, x = calibrate.Clock(gpu().device, 3), torch.zeros(8, device="cuda")
    assert clock.median(lambda: (time.sleep(0.001), x.add_(1))) < 0.0005


def test_a_calibrated_gpu_is_a_device(monkeypatch, tmp_path):
    few = calibrate.Shapes(2**24, 8, 1024, [(64, 16), (128, 8)], [(8, 64, 16), (64, 128, 8)])
    monkeypatch.setitem(calibrate.SHAPES, "cuda", few)
    found = calibrate.measure(gpu().device, rounds=2)
    (tmp_path / "gpu.yaml").write_text(calibrate.to_yaml(found, "a GPU"))
    device = load_device(str(tmp_path / "gpu.yaml"))
    assert device.asynchronous and 1e-7 < device.launch_s < 2e-5 and device.host_s[1] > device.launch_s


# ------------------------------------------------------------------------------------------------ engines


def _rank(rank: int, size: int, backend: str, folder: str) -> None:
    """Losses of every engine in each precision, written by rank 0. Two ranks share the one GPU, which NCCL refuses."""
    import os
    import traceback

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.cuda.set_device(0)
    store_ = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(backend, store=store_, rank=rank, world_size=size)
    control = dist.new_group(backend="gloo")
    world = World(rank, size, 0, size, torch.device("cuda", 0), control)
    out: dict = {}
    for name in [n for n in ENGINES if n != "single"]:
        for precision in ("fp32", "fp16"):
            try:
                module, cls = ENGINES[name]
                over = {"parallel": {"engine": name}, "train": {"precision": precision}}
                for key, value in CALM.items():
                    section, field = key.split(".")
                    over.setdefault(section, {})[field] = value
                config = resolve(RECIPE, over, world_size=size)
                with torch.device("meta"):
                    method = SwAV(config, world)
                engine = getattr(load(module), cls)(method, config, world)
                engine.scaler.scale.fill_(256.0 if precision == "fp16" else 1.0)
                out[name, precision] = losses(engine, config, world, OF_RANKS)
                engine.close()
                del engine
            except Exception:
                out[name, precision] = traceback.format_exc()
    if rank == 0:
        torch.save(out, f"{folder}/out.pt")
    dist.barrier(group=control)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[(1, "cpu:gloo,cuda:nccl"), (2, "gloo")], ids=["1 NCCL rank", "2 gloo ranks"])
def ranks(request):
    size, backend = request.param
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, backend, folder), nprocs=size)
        return torch.load(f"{folder}/out.pt", weights_only=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("engine", [n for n in ENGINES if n != "single"])
def test_every_engine_makes_the_update_of_the_unsharded_run(ranks, engine, precision):
    found = ranks[engine, precision]
    assert not isinstance(found, str), found
    config, single = tiny(gpu(), **CALM)
    assert_follows(found, losses(single, config, gpu(), OF_RANKS), precision)
