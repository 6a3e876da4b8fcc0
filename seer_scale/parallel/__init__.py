"""Engines by name: all make the same update, and differ in what each rank holds and what is moved."""

from __future__ import annotations

from torch import nn

from seer_scale.config import Config
from seer_scale.parallel.ddp import DDP
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.fsdp import FSDP
from seer_scale.world import World

ENGINES = {"single": Engine, "ddp": DDP, "fsdp": FSDP}


def build_engine(method: nn.Module, config: Config, world: World) -> Engine:
    """Collective over all ranks: builds groups, materialises and initialises the parameters.

    On one rank there is nothing to share out, and every engine is `single`.
    """
    return (ENGINES[config.parallel.engine] if world.size > 1 else Engine)(method, config, world)
