"""Engines hold any method: a ViT-like one and one of matrices alone, without BatchNorm, float buffers and unit rows, make
the updates of the unsharded run, are gathered whole, and go through the neutral state."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from seer_scale.parallel import ENGINES, load
from seer_scale.world import World
from tests.ranks import run_ranks
from tests.tiny import losses_of, world_of
from tests.toy import Toy, toy

CASES = {
    "ddp": {}, "fsdp": {}, "hsdp": {"parallel.replicate": 2}, "zero1": {}, "zero2": {}, "zero3": {}, "fairscale": {},
    "zero2 offloaded": {"parallel.offload": True}, "zero3 offloaded": {"parallel.offload": True},
    "zero3 recomputed": {"parallel.activation_checkpoint": "every 1"}, "fsdp accumulated": {"train.micro_batch": 2},
}  # fmt: skip
RUNS = [("vit", case) for case in CASES] + [("matrices", case) for case in ("ddp", "fsdp", "zero1", "zero3", "fairscale")]
UPDATES = 3


def trained(kind: str, case: str, world: World, precision: str = "fp32") -> dict:
    name = {"hsdp": "fsdp"}.get(case, case.split()[0])
    module, cls = ENGINES[name]
    over = {"parallel.engine": name, "optim.name": "adamw", "train.precision": precision} | CASES.get(case, {})
    config, engine = toy(lambda: Toy(kind), getattr(load(module), cls), world, **over)
    losses = losses_of(engine, config, world, range(UPDATES), 1e-3)
    engine.average_buffers()
    assert engine.is_finite()
    out = {"losses": losses, "weights": {n: engine.whole(n).numpy().copy() for n in engine.shapes}}
    engine.close()
    return out


@functools.cache
def single(kind: str, precision: str = "fp32") -> dict:
    torch.set_num_threads(1)
    return trained(kind, "single", World(), precision)


def everything(rank: int, size: int) -> dict:
    world = world_of(rank, size)
    out = {(kind, case, "fp32"): trained(kind, case, world) for kind, case in RUNS}
    return out | {("vit", case, "bf16"): trained("vit", case, world, "bf16") for case in ("fsdp", "zero3")}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, everything)


@pytest.mark.parametrize("kind,case", RUNS)
def test_any_method_trains_as_unsharded(ranks, kind, case):
    measure = single(kind)
    assert measure["losses"][-1] < measure["losses"][0]
    for rank in ranks:
        ours = rank[kind, case, "fp32"]
        np.testing.assert_allclose(ours["losses"], measure["losses"], rtol=1e-5)
        for name, weight in measure["weights"].items():
            assert ours["weights"][name].shape == weight.shape
            np.testing.assert_allclose(ours["weights"][name], weight, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("case", ["fsdp", "zero3"])
def test_layers_over_tokens_in_half_precision(ranks, case):
    np.testing.assert_allclose(ranks[0]["vit", case, "bf16"]["losses"], single("vit", "bf16")["losses"], rtol=0.02)
