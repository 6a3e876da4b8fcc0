"""The backbone of a run or a checkpoint as a plain module."""

from __future__ import annotations

from pathlib import Path

import torch

from seer_scale.checkpoint import store
from seer_scale.config import read_config
from seer_scale.data.transforms.image import Transform
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.models.backbone import Backbone
from seer_scale.models.registry import build_backbone, reset_buffers


def load_backbone(path: Path, which: str = "last") -> Backbone:
    """As `seer_scale.load`, whose plugins are loaded already."""
    place = find_checkpoint(path, which)
    meta = store.read_meta(place)
    problems: list[Problem] = []
    config = read_config(meta["config"], problems)
    if own := [p for p in problems if p.key.startswith("model")]:
        raise ConfigError(own, f"The recipe of {place}")
    with torch.device("meta"):
        backbone = build_backbone(config.model.name, **config.model.explicit_keys())
    backbone = backbone.to_empty(device="cpu").eval()
    reset_buffers(backbone)
    held, prefix = store.contents(place), f"model/{meta['export']['prefix']}"
    state = {prefix + name: p.detach() for name, p in backbone.named_parameters()}
    state |= {prefix + name: b for name, b in backbone.named_buffers() if prefix + name in held}  # others are constants
    store.load(place, state, World(), prefixes=prefix)
    backbone.transform = Transform(meta["preprocessing"]["size"])
    return backbone


def find_checkpoint(path: Path, which: str) -> Path:
    """The checkpoint that is meant. Raises UserError."""
    if (path / store.MANIFEST).is_file():
        return path
    folder = path / "checkpoints"
    if which == "last":
        found = store.latest(folder, World())
    else:
        named = folder / (store.BEST if which == "best" else f"samples-{which.zfill(12)}")
        found = named if (named / store.MANIFEST).is_file() else None
    if found is None:
        there = ", ".join(sorted(p.name for p in folder.glob("samples-*"))) if folder.is_dir() else ""
        fix = f"there are {there}" if there else "give a run's folder with checkpoints, or a checkpoint's"
        raise UserError(
            Problem(str(path), NOTHING, f"has no checkpoint {which}" if there else "has no valid checkpoint", fix)
        )
    return found
