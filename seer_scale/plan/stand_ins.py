"""Engines for a trace: the house's own, and stand-ins where a library refuses tensors without values."""

from __future__ import annotations

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.parallel import ENGINES, load
from seer_scale.parallel.engine import Engine


def engine_class(config: Config, world: World) -> type[Engine]:
    name = "single" if world.size == 1 and not config.parallel.offload else config.parallel.engine
    module, cls = ENGINES[name]
    return getattr(load(module), cls)
