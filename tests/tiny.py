"""A small RegNetY + SwAV recipe and batches for tests that run the real step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from seer_scale.config import Config, resolve
from seer_scale.distributed import World
from seer_scale.methods.registry import build_method
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine

RECIPE = {
    "data": {"path": "unused"},
    "model": {"name": "regnety", "depth": 5, "w0": 8, "wa": 12.0, "wm": 2.0, "group_width": 8},
    "views": {"crops": [{"num": 2, "size": 24}, {"num": 2, "size": 16, "scale": [0.05, 0.14]}]},
    "swav": {"hidden": [32], "embedding_dim": 16, "prototypes": [12, 7], "iterations": 3},
    "optim": {"name": "lars", "lr": 0.6, "lr_batch": 0},
    "schedule": {"warmup_samples": 32, "warmup_from": 0.1},
    "train": {"total_samples": 160, "global_batch": 8},
}

DINOV2 = {
    "data": {"path": "unused"},
    "model": {
        "name": "vit", "width": 24, "depth": 3, "heads": 2, "patch": 4, "image_size": 24, "registers": 2,
        "drop_path": 0.3, "layer_scale": 0.5,
    },
    "views": {"crops": [{"num": 2, "size": 24}, {"num": 2, "size": 16, "scale": [0.05, 0.14]}]},
    "method": {"name": "dinov2"},
    "dinov2": {
        "hidden": [32], "bottleneck": 12, "prototypes": 20, "patch_bottleneck": 8, "patch_prototypes": 14,
        "koleo_group": 2, "teacher_temperature_samples": 32, "teacher_momentum": 0.8, "freeze_samples": 8,
    },
    "optim": {"name": "sgd", "lr": 0.1, "lr_batch": 0},
    "schedule": {"warmup_samples": 32, "warmup_from": 0.1},
    "train": {"total_samples": 160, "global_batch": 8},
}  # fmt: skip

FCMAE = {
    "data": {"path": "unused"},
    "model": {"name": "convnextv2", "width": 8, "depths": [1, 1, 2, 1], "patch": 1, "drop_path": 0.3},
    "views": {"crops": [{"num": 2, "size": 32}, {"num": 1, "size": 24}]},
    "method": {"name": "fcmae"},
    "fcmae": {"decoder_width": 16},
    "optim": {"name": "sgd", "lr": 0.1, "lr_batch": 0},
    "schedule": {"warmup_samples": 32, "warmup_from": 0.1},
    "train": {"total_samples": 160, "global_batch": 8},
}

FCMAE_REGNETY = FCMAE | {
    "model": RECIPE["model"], "views": {"crops": [{"num": 2, "size": 64}]},
    "fcmae": {"decoder_width": 16, "mask_ratio": 0.5},
}  # fmt: skip


def world_of(rank: int, size: int) -> World:
    return World(rank, size, control=dist.group.WORLD if size > 1 else None)


def tiny(world: World, recipe: dict[str, dict] = RECIPE, **overrides) -> tuple[Config, Engine]:
    """The engine of `recipe`; overrides are "section.key": value."""
    config = resolve(recipe, sections(overrides), world_size=world.size)
    return config, build_engine(build_method(config, world), config, world)


def sections(overrides: dict) -> dict[str, dict]:
    """{"section.key": value} as a recipe has it; with fsdp each unit is gathered alone, as large ones are, unless
    told."""
    if overrides.get("parallel.engine") == "fsdp":
        overrides = {"parallel.min_unit_mib": 0.0} | overrides
    nested: dict[str, dict] = {}
    for key, value in overrides.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def fake_views(config: Config, step: int, world: World) -> list[torch.Tensor]:
    """This rank's slice of a random global batch that depends on `step` alone; crop-major."""
    generator = torch.Generator().manual_seed(step)
    b = config.train.global_batch // world.size
    out = []
    for crop in config.views.crops:
        whole = torch.randn(crop.num, config.train.global_batch, 3, *crop.shape, generator=generator)
        out.append(whole[:, world.rank * b : (world.rank + 1) * b].flatten(0, 1))
    return out


def micro_batches(config: Config, step: int, world: World) -> list[Callable[[], list[torch.Tensor]]]:
    """What makes each micro-batch of this rank's slice."""
    num = config.num_micro_batches(world.size)
    views = [
        v.unflatten(0, (c.num, -1)).chunk(num, dim=1)
        for v, c in zip(fake_views(config, step, world), config.views.crops)
    ]
    return [lambda i=i: [v[i].flatten(0, 1) for v in views] for i in range(num)]


def losses_of(engine: Engine, config: Config, world: World, steps: range, lr: float = 0.3) -> list[float]:
    """Global mean loss of each of `steps` updates."""
    out = []
    for step in steps:
        seen = step * config.train.global_batch
        loss = engine.gradients(micro_batches(config, step, world), samples_seen=seen).loss
        engine.update(lr, seen)
        out.append((world.sum_(loss.clone()) / world.size).item())
    return out
