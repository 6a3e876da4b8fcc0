"""What a rank holds at least, by the formula of docs/engines.md: known before anything is traced."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from seer_scale.config import Config
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.formatting import counted, memory_size
from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel.units import compute_type, matrix_numel, sharded_units, split_units
from seer_scale.plan.devices import Device, known_devices
from seer_scale.plan.memory import KERNEL_WORKSPACE

GATHERED = ("fsdp", "zero3", "auto")
GATHERS_AT_ONCE = 5
"""What gathers of a unit take of `fsdp` while others run, in its gathered bytes, at most: 3h + 4 bytes an element, of
h = 2."""


def with_parallel(config: Config, **keys: Any) -> Config:
    """The recipe with other keys of its section parallel."""
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **keys))


def memory_left(device: Device, gpus: int) -> int:
    """Bytes of a device that tensors of one of so many ranks may take."""
    if not device.asynchronous:
        return device.memory_bytes
    communicator = device.communicator_bytes if gpus > 1 else 0
    return device.memory_bytes - device.context_bytes - KERNEL_WORKSPACE - communicator


def least_held(method: Method[Any, Any], config: Config, engine: str, gpus: int) -> int:
    """Bytes of weights, gradients and optimiser state on one of so many ranks; of moving averages weights alone."""
    slots, offload = (2 if config.optim.name == "adamw" else 1), config.parallel.offload
    groups = method.parameter_groups()
    trained = [p for n, p in method.named_parameters() if not groups[n].average_of]
    fixed = 4 * sum(p.numel() for n, p in method.named_parameters() if groups[n].average_of)
    vectors, num = sum(p.numel() for p in trained if p.ndim < 2), sum(p.numel() for p in trained)
    each = (8 + 4 * slots) * num
    if engine in ("single", "ddp"):
        return each + fixed
    if engine == "fsdp":
        share = config.parallel.shard_degree or max(1, gpus // config.parallel.replicate_degree)
        return (each + fixed) // share + (8 + 4 * slots) * vectors * (share - 1) // share
    if engine == "zero3":
        return 4 * vectors + (0 if offload else each // gpus) + fixed // gpus
    whole, shared = {"zero1": (8, 4 + 4 * slots), "zero2": (4, 8 + 4 * slots)}.get(engine, (4, 4 + 4 * slots))
    return whole * num + fixed + (0 if offload else shared * num // gpus)


def least_gpus(method: Method[Any, Any], config: Config, device: Device, above: int) -> int:
    """The least number of more GPUs, each with as many images, on which `fsdp` holds these; 0: none up to a batch."""
    batch = config.train.global_batch
    fsdp = with_parallel(config, engine="fsdp", replicate_degree=1, shard_degree=0)
    numbers = (n for n in range(above + 1, batch + 1) if batch % n == 0)
    return next((n for n in numbers if least_held(method, fsdp, "fsdp", n) <= memory_left(device, n)), 0)


def check_largest_unit(method: Method[Any, Any], config: Config, gpus: int, device: Device) -> None:
    """Raises UserError where what is gathered at once, or held whole, is more than the device has for it."""
    engine, left = "single" if gpus == 1 else config.parallel.engine, memory_left(device, gpus)
    if engine in GATHERED:
        needed, name = _largest(sharded_units(method, config), method, config)
        rule = f"{name} alone takes {memory_size(needed)} when it is gathered"
    else:
        needed = 4 * sum(p.numel() for p in method.parameters())
        rule = f"its weights alone take {memory_size(needed)} with parallel.engine {engine}"
    if needed > left:
        fix = _smaller_unit if engine in GATHERED else _spread
        has = f"has {memory_size(device.memory_bytes)}, {memory_size(max(0, left))} of it for tensors"
        raise UserError(
            Problem(f"--device {device.given}", NOTHING, f"{has}, but {rule}", fix(method, config, gpus, device))
        )


def _smaller_unit(method: Method[Any, Any], config: Config, gpus: int, device: Device) -> str:
    """What holds the largest unit: its layers apart, or another device."""
    held = least_held(method, config, "fsdp", gpus)
    layer, _ = _largest(split_units(method.shard_units(), 0), method, config)
    if held + GATHERS_AT_ONCE * layer <= memory_left(device, gpus):
        return f"parallel.max_unit_gib {math.ceil(1000 * layer / 2**30) / 1000:g} cuts it into its layers"
    needed, _ = _largest(sharded_units(method, config), method, config)
    larger = [d.name for d in known_devices().values() if held + needed <= memory_left(d, gpus)]
    return f"{' or '.join(larger)} holds it" if larger else f"no device that is known holds it on {gpus:,} GPUs"


def _spread(method: Method[Any, Any], config: Config, gpus: int, device: Device) -> str:
    """On how many GPUs `fsdp` may hold what one does not."""
    least = least_gpus(method, config, device, above=max(1, gpus - 1))
    if not least:
        batch = counted(config.train.global_batch, "GPU")
        return f"nor do {batch}, the most that train.global_batch takes, hold weights, gradients and state by fsdp"
    held = memory_size(least_held(method, with_parallel(config, shard_degree=0, replicate_degree=1), "fsdp", least))
    return f"parallel.engine fsdp on {least:,} GPUs at least, where weights, gradients and state take {held} of each"


def _largest(units: dict[str, nn.Module], method: Method[Any, Any], config: Config) -> tuple[int, str]:
    """(bytes in the type it is gathered in, name) of the largest."""
    types = {name: COMPUTE_DTYPES[compute_type(name, method, config)] for name in units}
    return max((matrix_numel(unit) * types[name].itemsize, name) for name, unit in units.items())
