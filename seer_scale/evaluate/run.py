"""Evaluate a run's newest checkpoint, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from seer_scale.checkpoint import store
from seer_scale.config import load_recipe, resolve
from seer_scale.errors import DataError, UserError
from seer_scale.evaluate.knn import knn, labelled_images, why_unlabelled
from seer_scale.methods.swav import SwAV
from seer_scale.observe.progress import Progress
from seer_scale.parallel import build_engine
from seer_scale.world import World


def knn_of_run(run_dir: Path, overrides: list[str], world: World) -> dict[str, Any]:
    """kNN scores of the newest valid checkpoint in `run_dir`; collective. Raises UserError."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run's folder (it has no config.yaml): give one, such as runs/demo.")
    recipe = load_recipe(str(run_dir / "config.yaml"))
    recipe["parallel"] = {"device": (recipe.get("parallel") or {}).get("device", "auto")}  # how it was trained does not bind its evaluation
    recipe["train"] = (recipe.get("train") or {}) | {"micro_batch": 0, "compile": False}
    config = resolve(recipe, overrides, world_size=1)  # an evaluation need not divide the training's batch
    config = dataclasses.replace(config, knn=dataclasses.replace(config.knn, enabled=True))  # asking for it enables it
    images = labelled_images(config)
    if images is None:
        raise DataError(f"{why_unlabelled(config)}: give labelled images, as in --knn.bank DIR --knn.queries DIR.")
    path = store.newest(run_dir / "checkpoints", world)
    if path is None:
        raise UserError(f"{run_dir} has no valid checkpoint yet: train it first.")
    with torch.device("meta"):
        method = SwAV(config, world)
    engine = build_engine(method, config, world, loaded=("",))
    state = {k: v for k, v in engine.state().items() if k.startswith("model/")}
    store.load(path, state, world, only="model/")
    engine.refresh()
    total = len(images.query_indices) + len(images.bank_indices)
    with Progress(active=world.is_main, to_stderr=True) as progress, progress.doing("measuring kNN", total):

        def represent(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            progress.advance(len(batch) * world.size)
            return engine.represent(batch)

        scores, _ = knn(represent, images, config.knn, workers=config.data.workers, world=world)
    scores |= {"protocol": images.protocol}
    return scores | {"samples_seen": store.read_meta(path)["samples_seen"], "checkpoint": path.name, "run": str(run_dir)}
