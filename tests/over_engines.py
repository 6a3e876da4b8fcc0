"""What a method's test over engines consists of: a few updates by each, and a run of which each goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seer_scale.checkpoint import store
from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.parallel.engine import Engine
from tests.tiny import losses_of

CASES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {}, "fsdp": {}, "hsdp": {"parallel.replicate_degree": 2}, "zero1": {}, "zero2": {}, "zero3": {},
    "fairscale": {},
    "fsdp recomputed": {"parallel.activation_checkpoint": "every 1"},
    "zero3 recomputed": {"parallel.activation_checkpoint": "every 1"},
    "ddp accumulated": {"train.micro_batch": 2}, "fsdp accumulated": {"train.micro_batch": 2},
    "zero1 accumulated": {"train.micro_batch": 2}, "zero3 accumulated": {"train.micro_batch": 2},
    "zero2 offloaded": {"parallel.offload": True},
    "fsdp kept": {"parallel.reshard_after_forward": False},
}  # fmt: skip
OF_EACH_KIND = ("ddp", "fsdp", "zero1", "zero3", "fairscale")
CHAIN = ("fsdp", "zero3", "fairscale", "zero1", "ddp")
"""Engines that go on from each other's checkpoints, an update each."""
UPDATES, LR = 3, 1e-3


def settings(case: str) -> dict[str, Any]:
    """Keys of a recipe."""
    return {"parallel.engine": {"hsdp": "fsdp"}.get(case, case.split()[0])} | CASES[case]


def trained(config: Config, engine: Engine, world: World) -> dict[str, Any]:
    losses = losses_of(engine, config, world, range(UPDATES), LR)
    engine.average_buffers()
    assert engine.is_finite()
    weights = {n: engine.whole(n).numpy().copy() for n in engine.shapes}
    statistics = {n: b.numpy().copy() for n, b in engine.method.named_buffers() if b.is_floating_point()}
    return {"losses": losses, "weights": weights | statistics}


def check_same(ours: Mapping[str, Any], measure: Mapping[str, Any]) -> None:
    """Losses to 1e-5, every weight and statistic to 1e-4."""
    np.testing.assert_allclose(ours["losses"], measure["losses"], rtol=1e-5)
    for name, weight in measure["weights"].items():
        np.testing.assert_allclose(ours["weights"][name], weight, rtol=1e-4, atol=2e-5, err_msg=name)


def chained(
    engine_of: Callable[[str], tuple[Config, Engine]],
    world: World,
    folder: Path,
    first: int = 0,
    path: Path | None = None,
    **meta: Any,
) -> list[float]:
    """Losses of a run whose every update is made by another engine, from the checkpoint of the one before; `path` for
    the first. On one rank by the unsharded."""
    losses = []
    for step, name in list(enumerate(CHAIN))[first:]:
        config, engine = engine_of(name if world.size > 1 else "single")
        if path:
            store.load(path, engine.state(), world)
            engine.refresh()
        losses += losses_of(engine, config, world, range(step, step + 1), LR)
        engine.average_buffers()
        path = store.save(folder, engine.state(), {"samples_seen": 8 * (step + 1)} | meta, world)
        engine.close()
    return losses


def left_by(folder: Path, updates: int = 0) -> Path:
    """What `chained` left in `folder` so many updates before its end."""
    return folder / f"samples-{8 * (len(CHAIN) - updates):012d}"
