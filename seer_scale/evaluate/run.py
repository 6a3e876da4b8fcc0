"""Evaluate a checkpoint, or a run's newest one, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from seer_scale.checkpoint import store
from seer_scale.config import Config, load_recipe, resolve
from seer_scale.cores import rank_cores, told_threads
from seer_scale.data.loading.listing import share
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, CheckpointError, ConfigError, DataError, Problem, UserError
from seer_scale.evaluate.knn import LabelledImages, knn, labelled_images, why_unlabelled
from seer_scale.methods.registry import build_method
from seer_scale.observe.progress import Progress
from seer_scale.parallel import build_engine, check_device


def run_dir_of(path: Path) -> Path:
    """The folder of the run at `path` or of the checkpoint at `path`; of one that lies elsewhere, where it lies."""
    if (path / "config.yaml").is_file():
        return path
    above = path.resolve().parents
    return above[1] if (above[1] / "config.yaml").is_file() else above[0]


def _list_images(config: Config, run_dir: Path, world: World) -> LabelledImages:
    """The images kNN is to use, listed by rank 0; collective. Raises UserError."""

    def listed() -> LabelledImages:
        if images := labelled_images(config):
            return images
        problem = why_unlabelled(config)
        assert problem is not None, "else there are labelled images"
        raise DataError(
            dataclasses.replace(problem, nearest="give labelled images, as in --knn.bank DIR --knn.queries DIR")
        )

    return share(world, run_dir / "logs", listed, lambda images: [images.bank, images.queries], name="evaluated")


def evaluated_config(path: Path, overrides: list[str]) -> Config:
    """The recipe of the run or checkpoint `path` as an evaluation takes it. Raises UserError, also for what this
    machine's devices cannot do."""
    is_run = (path / "config.yaml").is_file()
    if not is_run and not (path / store.MANIFEST).is_file():
        raise UserError(
            Problem(
                str(path),
                NOTHING,
                "is not a run's folder (it has no config.yaml), nor a checkpoint",
                "give one, such as runs/demo",
            )
        )
    recipe = load_recipe(str(path / "config.yaml")) if is_run else store.read_meta(path)["config"]
    recipe["parallel"] = {
        "device": (recipe.get("parallel") or {}).get("device", "auto")
    }  # how it was trained does not bind its evaluation
    recipe["run"] = {
        k: v for k, v in (recipe.get("run") or {}).items() if k != "plugins"
    }  # loaded where --plugin is given
    recipe["train"] = (recipe.get("train") or {}) | {"micro_batch": 0, "compile": False}
    config = resolve(recipe, overrides, world_size=1)  # an evaluation need not divide the training's batch
    if problems := check_device(config):
        raise ConfigError(problems)
    return dataclasses.replace(config, knn=dataclasses.replace(config.knn, enabled=True))  # asking for it enables it


def knn_of(path: Path, config: Config, world: World) -> dict[str, Any]:
    """kNN scores of the checkpoint `path`, or of the newest valid one of the run `path`; collective. Raises
    UserError."""
    is_run = (path / "config.yaml").is_file()
    images = _list_images(config, run_dir_of(path), world)
    found = store.latest(path / "checkpoints", world) if is_run else path
    if found is None:
        raise UserError(Problem(str(path), NOTHING, "has no valid checkpoint yet", "train it first"))
    if not is_run and (problem := store.validate(path, world)):
        rule = f"cannot be used as a checkpoint: it {problem.rule}"
        raise CheckpointError(Problem(str(path), NOTHING, rule, problem.nearest))
    engine = build_engine(build_method(config, world), config, world, loaded=("",))
    state = {k: v for k, v in engine.state().items() if k.startswith("model/")}
    store.load(found, state, world, prefixes="model/")
    engine.refresh()
    total, cores = len(images.query_indices) + len(images.bank_indices), rank_cores(world)
    torch.set_num_threads(told_threads() or cores)
    with Progress(active=world.is_main, to_stderr=True) as progress, progress.doing("measuring kNN", total):

        def encode(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            progress.advance(len(batch) * world.size)
            return engine.encode(batch)

        scores, _ = knn(encode, images, config.knn, workers=config.data.num_workers(cores), world=world)
    seen = store.read_meta(found, world)["samples_seen"]
    about = {"protocol": images.protocol, "samples_seen": seen, "checkpoint": found.resolve().name}
    return {**scores, **about, "run": str(run_dir_of(path))}
