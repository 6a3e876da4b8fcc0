"""From a recipe's name to a run: what every rank does, however it was started."""

from __future__ import annotations

from pathlib import Path

import torch

from seer_scale import world as worlds
from seer_scale.config import Config, load_recipe, resolve
from seer_scale.errors import UserError
from seer_scale.models.registry import build_backbone
from seer_scale.train.loop import train


def resolve_recipe(recipe: str, overrides: list[str], world_size: int) -> Config:
    """The checked Config of a recipe for `world_size` ranks; before any device is taken. Raises UserError."""
    return resolve(load_recipe(recipe), overrides, world_size=world_size, also=_beyond_config)


def _beyond_config(config: Config) -> list[str]:
    """Problems that only the rooms of models and data can see."""
    problems = []
    try:
        with torch.device("meta"):
            build_backbone(config.model.name, **config.model.free())
    except UserError as problem:
        problems.append(str(problem))
    return problems


def run_training(recipe: str, overrides: list[str], attempt: str = "") -> int:
    """Resolve the recipe for the ranks the environment tells of, join them, train; returns the exit status.

    attempt: a word all ranks of this start share (see world.start). Raises UserError.
    """
    config = resolve_recipe(recipe, overrides, worlds.detect().size)
    run_dir = run_dir_of(config, recipe)
    world = worlds.start(run_dir / "logs", attempt)
    try:
        return train(config, world, run_dir)
    finally:
        worlds.stop(world)


def run_dir_of(config: Config, recipe: str) -> Path:
    return Path(config.run.dir or Path("runs") / Path(recipe).stem)
