"""FCMAE on every engine: losses, weights and reconstructions of the unsharded run on one, two and four ranks, in any
micro-batches; another engine and number of ranks at every update."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.parallel.engine import Engine
from tests import over_engines
from tests.over_engines import CHAIN, OF_EACH_KIND, check_same, left_by, settings
from tests.ranks import run_ranks
from tests.tiny import FCMAE, FCMAE_REGNETY, tiny, world_of

KINDS = {
    "convnext": (FCMAE, {}), "unet": (FCMAE, {"fcmae.decoder": "unet"}), "regnety": (FCMAE_REGNETY, {}),
}  # fmt: skip
"""The last two have BatchNorm, whose statistics are those of a micro-batch."""
RUNS = {
    1: [("convnext", case) for case in ("ddp", "fsdp", "zero2", "zero3", "fairscale")],
    2: [
        ("convnext", case)
        for case in (
            *OF_EACH_KIND,
            "hsdp",
            "fsdp recomputed",
            "zero3 recomputed",
            "fsdp accumulated",
            "zero3 accumulated",
        )
    ]
    + [("unet", case) for case in ("ddp", "fsdp", "zero1", "zero3")]
    + [("regnety", case) for case in (*OF_EACH_KIND, "fsdp recomputed", "zero3 recomputed")],
    4: [("convnext", case) for case in ("hsdp", "zero1", "zero3")] + [("regnety", case) for case in ("fsdp", "zero2")],
}
HALF = [("convnext", "fsdp", "bf16"), ("convnext", "zero1", "fp16"), ("regnety", "fsdp", "bf16"),
        ("regnety", "zero1", "fp16")]  # fmt: skip
OPTIM = {"optim.name": "adamw", "optim.clip_norm": 0.05, "optim.weight_decay_end": 10.0}


def engine_of(kind: str, case: str, world: World, **more: object) -> tuple[Config, Engine]:
    recipe, of_kind = KINDS[kind]
    return tiny(world, recipe, **OPTIM | settings(case) | of_kind | more)


def trained(kind: str, case: str, world: World, **more: object) -> dict:
    config, engine = engine_of(kind, case, world, **more)
    out, side = over_engines.trained(config, engine, world), engine.method.reconstruction_size
    images = torch.linspace(-9, 9, 6 * side**2).sin().view(2, 3, side, side)
    out["weights"]["filled in"] = engine.reconstruct(images, [4, 7]).filled.numpy()
    engine.close()
    return out


@functools.cache
def single(kind: str, **more: object) -> dict:
    torch.set_num_threads(1)
    return trained(kind, "single", World(), **more)


def chained(kind: str, world: World, folder: Path, *given: object) -> list[float]:
    return over_engines.chained(lambda case: engine_of(kind, case, world), world, folder / kind, *given)


def everything(rank: int, size: int, folder: Path) -> dict:
    world = world_of(rank, size)
    out: dict = {(kind, case): trained(kind, case, world) for kind, case in RUNS[size]}
    if size == 2:
        out |= {run: trained(*run[:2], world, **{"train.precision": run[2]}) for run in HALF}
    if size > 1:
        out |= {("chain", kind): chained(kind, world, folder / str(size)) for kind in ("convnext", "regnety")}
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder):
    return {size: run_ranks(size, functools.partial(everything, folder=folder)) for size in RUNS}


@pytest.mark.parametrize("size,kind,case", [(size, *run) for size in RUNS for run in RUNS[size]])
def test_losses_and_weights_are_the_unsharded_runs(ranks, size, kind, case):
    for rank in ranks[size]:
        check_same(rank[kind, case], single(kind))


@pytest.mark.parametrize("kind,engine,precision", HALF)
def test_half_precision_is_that_of_the_unsharded_run(ranks, kind, engine, precision):
    measure = single(kind, **{"train.precision": precision})["losses"]
    np.testing.assert_allclose(ranks[2][0][kind, engine, precision]["losses"], measure, rtol=0.03)


@pytest.mark.parametrize("kind", ["convnext", "regnety"])
@pytest.mark.parametrize("size", [2, 4])
def test_any_engine_on_any_number_of_ranks_goes_on(ranks, folder, size, kind):
    """Another engine for each update; and one rank from what they left before the last two."""
    expected = chained(kind, World(), folder / "one")
    np.testing.assert_allclose(ranks[size][0]["chain", kind], expected, rtol=1e-4)
    left = left_by(folder / str(size) / kind, 2)
    ended = chained(kind, World(), folder / f"after {size}", len(CHAIN) - 2, left)
    np.testing.assert_allclose(ended, expected[-2:], rtol=1e-4)
