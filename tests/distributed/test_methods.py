"""Engines hold any method: a ViT-like one, one of matrices alone, a classifier, a student with a moving-average
teacher, an autoencoder, SwAV on networks of timm and on our vision transformer make the updates of the unsharded run,
are gathered whole, and go through the neutral state."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from seer_scale.checkpoint import store
from seer_scale.distributed import World
from seer_scale.parallel import ENGINES, load
from tests.ranks import run_ranks
from tests.tiny import losses_of, tiny, world_of
from tests.toy import make, toy

CASES = {
    "ddp": {}, "fsdp": {}, "hsdp": {"parallel.replicate_degree": 2}, "zero1": {}, "zero2": {}, "zero3": {},
    "fairscale": {},
    "zero2 offloaded": {"parallel.offload": True}, "zero3 offloaded": {"parallel.offload": True},
    "zero3 recomputed": {"parallel.activation_checkpoint": "every 1"},
    "fsdp recomputed": {"parallel.activation_checkpoint": "every 1"}, "fsdp accumulated": {"train.micro_batch": 2},
    "fsdp kept": {"parallel.reshard_after_forward": False},
}  # fmt: skip
ENGINE_OF_EACH_KIND = ("ddp", "fsdp", "zero1", "zero3", "fairscale")
RUNS = [(kind, case) for kind in ("vit", "teacher", "autoencoder") for case in CASES]
RUNS += [("classifier", case) for case in CASES if "accumulated" not in case]  # BatchNorm sees a micro-batch
RUNS += [("matrices", case) for case in ENGINE_OF_EACH_KIND]
RUNS += [("timm/test_resnet", case) for case in (*ENGINE_OF_EACH_KIND, "fsdp recomputed", "zero3 recomputed")]
RUNS += [(kind, case) for kind in ("timm/test_vit", "timm/test_nfnet") for case in ("fsdp recomputed", "zero3")]
RUNS += [("our vit", case) for case in (*ENGINE_OF_EACH_KIND, "fsdp recomputed", "fsdp accumulated")]
RUNS += [("our rotary vit", "zero3 recomputed")]
RUNS += [("our convnext", case) for case in ("fsdp recomputed", "fsdp accumulated", "zero3", "zero1")]
HALF = [
    ("vit", "fsdp", "bf16"),
    ("our vit", "fsdp", "bf16"),
    ("vit", "zero3", "bf16"),
    ("teacher", "fsdp", "bf16"),
    ("teacher", "zero1", "bf16"),
    ("classifier", "zero3", "bf16"),
    ("autoencoder", "fsdp", "bf16"),
    ("teacher", "ddp", "fp16"),
    ("teacher", "zero2", "fp16"),
    ("classifier", "fsdp", "fp16"),
    ("classifier", "fairscale", "fp16"),
    ("autoencoder", "zero1", "fp16"),
    ("autoencoder", "zero3", "fp16"),
]
OPTIM = {"optim.name": "adamw", "optim.clip_norm": 0.05, "optim.weight_decay_end": 10.0}
"""Gradients are clipped in every update, and a few updates at the beginning of a run decay visibly."""
NO_REGNETY = {f"model.{key}": None for key in ("depth", "w0", "wa", "wm", "group_width")}
NO_REGNETY |= {"optim.name": "sgd"}  # AdamW makes a whole step of a gradient that is all rounding
OF_TIMM = NO_REGNETY | {"views.crops": [{"num": 2, "size": 64}, {"num": 2, "size": 32}]}
OUR_VIT = NO_REGNETY | {
    "model.name": "vit", "model.width": 24, "model.depth": 3, "model.heads": 2, "model.patch": 8,
    "model.image_size": 16, "model.registers": 2, "model.drop_path": 0.3, "model.layer_scale": 0.5,
    "swav.batch_norm": False,
}  # fmt: skip
"""Tokens of two resolutions, of which branches are dropped, the same ones on any rank and in any micro-batch."""
OUR_CONVNEXT = NO_REGNETY | {
    "model.name": "convnextv2", "model.width": 8, "model.depths": [1, 1, 2, 1], "model.patch": 2,
    "model.drop_path": 0.3,
    "swav.batch_norm": False,
}  # fmt: skip
NETWORKS = {
    "our convnext": OUR_CONVNEXT,
    "our vit": OUR_VIT,
    "our rotary vit": OUR_VIT | {"model.positions": "rope", "model.width": 32},
}
CHAIN = ("fsdp", "zero3", "fairscale", "zero1", "ddp")
"""Engines that go on from each other's checkpoints, an update each."""
UPDATES = 3


def trained(kind: str, case: str, world: World, precision: str = "fp32", updates: int = UPDATES) -> dict:
    name = {"hsdp": "fsdp"}.get(case, case.split()[0])
    module, cls = ENGINES[name]
    over = OPTIM | {"parallel.engine": name, "train.precision": precision} | CASES.get(case, {})
    if kind.startswith("timm/"):
        config, engine = tiny(world, **over | OF_TIMM | {"model.name": kind})
    elif kind in NETWORKS:
        config, engine = tiny(world, **over | NETWORKS[kind])
    else:
        config, engine = toy(lambda: make(kind, world), getattr(load(module), cls), world, **over)
    rate = 1e-2 if kind.startswith("timm/") else 1e-1 if kind in NETWORKS else 1e-3
    losses = losses_of(engine, config, world, range(updates), rate)
    engine.average_buffers()
    assert engine.is_finite()
    out = {"losses": losses, "weights": {n: engine.whole(n).numpy().copy() for n in engine.shapes}}
    engine.close()
    return out


@functools.cache
def single(kind: str, precision: str = "fp32", updates: int = UPDATES) -> dict:
    torch.set_num_threads(1)
    return trained(kind, "single", World(), precision, updates)


def resumed(kind: str, world: World, folder: Path) -> list[float]:
    """Losses of a run whose every update is made by another engine, from the checkpoint of the one before."""
    losses, path = [], None
    for step, name in enumerate(CHAIN):
        module, cls = ENGINES[name]
        over = OPTIM | {"parallel.engine": name, "run.seed": step}  # a seed leaves no trace
        config, engine = toy(lambda: make(kind, world), getattr(load(module), cls), world, **over)
        if path:
            store.load(path, engine.state(), world)
            engine.refresh()
        losses += losses_of(engine, config, world, range(step, step + 1), 1e-3)
        engine.average_buffers()
        path = store.save(folder / kind, engine.state(), {"samples_seen": 8 * (step + 1)}, world)
        engine.close()
    return losses


def ended(kind: str, path: Path) -> list[float]:
    """Losses of the last two updates of a run that goes on from the checkpoint `path`, on one rank."""
    over = OPTIM | {"parallel.engine": "single"}
    config, engine = toy(lambda: make(kind, World()), load("engine").Engine, World(), **over)
    store.load(path, engine.state(), World())
    engine.refresh()
    return losses_of(engine, config, World(), range(len(CHAIN) - 2, len(CHAIN)), 1e-3)


def everything(rank: int, size: int, folder: Path) -> dict:
    world = world_of(rank, size)
    out = {(kind, case, "fp32"): trained(kind, case, world) for kind, case in RUNS}
    out |= {(kind, case, precision): trained(kind, case, world, precision) for kind, case, precision in HALF}
    return out | {(kind, "resumed"): resumed(kind, world, folder) for kind in ("teacher", "classifier", "autoencoder")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(2, functools.partial(everything, folder=folder))


@pytest.mark.parametrize("kind,case", RUNS)
def test_any_method_trains_as_unsharded(ranks, kind, case):
    measure = single(kind)
    falls = not (kind.startswith("timm/") or kind in NETWORKS)  # in three updates of other images
    assert measure["losses"][-1] < measure["losses"][0] or not falls
    for rank in ranks:
        ours = rank[kind, case, "fp32"]
        np.testing.assert_allclose(ours["losses"], measure["losses"], rtol=1e-5)
        for name, weight in measure["weights"].items():
            assert ours["weights"][name].shape == weight.shape
            np.testing.assert_allclose(ours["weights"][name], weight, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind,case,precision", HALF)
def test_any_method_trains_in_half_precision(ranks, kind, case, precision):
    measure = single(kind, precision)["losses"]
    np.testing.assert_allclose(ranks[0][kind, case, precision]["losses"], measure, rtol=0.02)


@pytest.mark.parametrize("kind", ["teacher", "classifier", "autoencoder"])
def test_any_method_goes_on_with_any_engine_on_any_number_of_ranks(ranks, folder, kind):
    """Two ranks, another engine for each update; and one rank from what they left before the last two."""
    expected = single(kind, updates=len(CHAIN))["losses"]
    np.testing.assert_allclose(ranks[0][kind, "resumed"], expected, rtol=1e-5)
    left = folder / kind / f"samples-{8 * (len(CHAIN) - 2):012d}"
    np.testing.assert_allclose(ended(kind, left), expected[-2:], rtol=1e-5)
