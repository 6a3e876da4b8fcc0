"""Engines by name: all make the same update, and differ in what each rank holds and what is moved (docs/engines.md)."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel.engine import Engine

ENGINES = {
    "single": ("engine", "Engine"),
    "ddp": ("ddp", "DDP"),
    "fsdp": ("fsdp", "FSDP"),
    "zero1": ("deepspeed.engine", "Zero1"),
    "zero2": ("deepspeed.engine", "Zero2"),
    "zero3": ("deepspeed.engine", "Zero3"),
    "fairscale": ("fairscale", "Fairscale"),
}
"""Module and class of each, imported where used: DeepSpeed and fairscale take seconds."""

MAX_STATE_SHARE = 0.4
"""Of a rank's memory, what weights, gradients and optimiser state may take before they are sharded; activations,
which no engine shards, need the rest."""


def build_engine(method: Method[Any, Any], config: Config, world: World, loaded: tuple[str, ...] = ()) -> Engine:
    """Collective over all ranks: builds groups, materialises and initialises the parameters. Raises UserError.

    loaded: beginnings of the names of parameters that a checkpoint will bring, so that they need not be drawn; ("",):
    all.

    On one rank there is nothing to share out, and every engine is `single`, but for ZeRO with offload.
    """
    module, name = ENGINES[choose_engine(method, config, world)]
    return getattr(load(module), name)(method, config, world, loaded)


def load(module: str) -> ModuleType:
    """A module of this package. Raises UserError where it needs a package that is not installed."""
    try:
        return importlib.import_module(f"seer_scale.parallel.{module}")
    except ModuleNotFoundError as missing:
        package = str(missing.name)  # an import that fails names what it lacks
        rule, fix = f"needs {package}, which is not installed", f"{how_to_install(package)}, or use engine fsdp"
        raise UserError(Problem("parallel.engine", NOTHING, rule, fix)) from missing


def leave_groups() -> None:
    """Destroy all process groups, those that libraries remember among them."""
    if private := sys.modules.get("seer_scale.parallel.deepspeed.private"):
        private.leave()
    elif dist.is_initialized():
        dist.destroy_process_group()


def choose_engine(method: Method[Any, Any], config: Config, world: World) -> str:
    """The engine's name: `single` on one rank; what the recipe names; for auto the cheapest that fits, by size.

    `ddp` moves least where all ranks can hold everything; else `fsdp`, whose gathers are half as wide as its weights.
    Collective where it is auto.
    """
    parallel = config.parallel
    if world.size == 1 and not parallel.offload:
        return "single"
    if parallel.engine != "auto":
        return parallel.engine
    if parallel.replicate_degree > 1 or parallel.shard_degree:
        return "fsdp"
    slots = 2 if config.optim.name == "adamw" else 1
    groups = method.parameter_groups()
    held = sum((4 if groups[n].average_of else 4 * (2 + slots)) * p.numel() for n, p in method.named_parameters())
    return "ddp" if held <= MAX_STATE_SHARE * min(world.gather_objects(_memory(world))) else "fsdp"


def _memory(world: World) -> int:
    """Bytes this rank can have."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size


def check_device(config: Config) -> list[Problem]:
    """What this machine's devices cannot do of the recipe; before any is taken."""
    device, precision, has_gpu = config.parallel.device, config.train.precision, torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        return [Problem("parallel.device", device, "there is no GPU here", ("cpu", "auto"))]
    if device == "cpu" or not has_gpu:
        if precision != "fp32" and (why := _refusal_of_cpu(COMPUTE_DTYPES[precision])):
            rule = f"this CPU does not compute in it ({why})"
            return [Problem("train.precision", precision, rule, ("fp32",))]
        return []
    for name, needed, instead in (("fp16", (5, 3), "fp32"), ("bf16", (8, 0), "fp16")):
        have = torch.cuda.get_device_capability()
        if precision == name and have < needed:
            gpu = f"{torch.cuda.get_device_name()} (compute capability {have[0]}.{have[1]})"
            return [Problem("train.precision", precision, f"{gpu} has no {name}", (instead,))]
    return []


def _refusal_of_cpu(dtype: torch.dtype) -> str | None:
    x, weight = (
        torch.ones(1, 2, 3, 3, dtype=dtype, requires_grad=True),
        torch.ones(2, 1, 3, 3, dtype=dtype, requires_grad=True),
    )
    try:
        torch.nn.functional.conv2d(x, weight, groups=2).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
