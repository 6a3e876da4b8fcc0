"""Methods by name: the one place that knows them."""

from __future__ import annotations

from typing import Any

import torch

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.methods.base import Method
from seer_scale.methods.swav.method import SwAV

METHODS: dict[str, type[Method[Any, Any]]] = {SwAV.name: SwAV}


def build_method(config: Config, world: World) -> Method[Any, Any]:
    """The recipe's method, on the meta device; an engine materialises and fills it."""
    with torch.device("meta"):
        return SwAV(config, world)
