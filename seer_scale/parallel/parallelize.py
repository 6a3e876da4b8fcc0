"""From a method on the meta device to what an engine calls in its place: every step, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.methods.base import Method
from seer_scale.models.layers.stateful import keep_eager, share_statistics
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing, find_segments
from seer_scale.parallel.buffers import Buffers
from seer_scale.parallel.recast_linear import compute_small_maps_in_fp32


class Wrapping(Protocol):
    """What engines do each in their own way. averages: names of the method's moving averages, and of their sources."""

    averages: dict[str, str]

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        """Shard the method, still on the meta device."""

    def materialise(self) -> None:
        """Make real what this rank holds, and fill it."""

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        """Wrap what `shard_on_meta` gave, once it is real."""

    def recomputing(self, units: list[nn.Module]) -> AbstractContextManager[None]:
        """Around the second run of units that are recomputed together."""


def parallelize(method: Method[Any, Any], config: Config, world: World, engine: Wrapping) -> tuple[nn.Module, Buffers]:
    """What is called in the method's place, and its buffers. Changes the method in place. Collective: groups are made.

    Units are compiled before they are recomputed, so that a compiled unit is recomputed as a whole, and recomputed
    before they are sharded, so that what is gathered stays for the second run. Sharding comes before materialising, so
    that no rank holds more than its part; DDP and its like take materialised tensors alone, so they wrap last.
    """
    parallel, is_half = config.parallel, config.train.precision != "fp32"
    keep_fp32_products()
    share_statistics(method, world.group("batch_norm", parallel.sync_bn_group or world.size))
    if config.train.compile:
        compile_units(method)
    for sequence in method.checkpointed_sequences():
        segments = find_segments(parallel.activation_checkpoint, sequence.stage_units())
        apply_activation_checkpointing(sequence, segments, engine.recomputing)
    module = engine.shard_on_meta(method)
    if is_half and world.device.type == "cpu":
        compute_small_maps_in_fp32(method)
    engine.materialise()
    buffers = Buffers(method, world.device, engine.averages)
    return engine.wrap_materialised(module), buffers


def keep_fp32_products() -> None:
    """fp32 means fp32, also beside half precision, where autocast chooses what is not: without this GPUs would round
    the inputs of scores, Sinkhorn, kNN and fp32 convolutions to TF32, and CPUs to bf16 where the process is told so."""
    backends = torch.backends
    # what libraries ask, which raises where the two disagree
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    settings = [(backends.cuda, "matmul"), (backends.cudnn, "conv"), (backends.cudnn, "rnn")]
    settings += [(backends.mkldnn, kind) for kind in ("matmul", "conv", "rnn")]
    for backend, kind in settings:  # by name: modules in whose place torch puts objects that have more
        getattr(backend, kind).fp32_precision = "ieee"


def compile_units(method: Method[Any, Any]) -> None:
    """torch.compile of each unit."""
    keep_eager(method)
    # units share their code: every width, stride and mode is one more version of it, and past a limit it would run
    # eager
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    for unit in method.shard_units().values():
        unit.forward = _compiled_in_training(unit)


def _compiled_in_training(unit: nn.Module) -> Callable:
    """Evaluation comes seldom and in other shapes: it would compile longer than it runs."""
    plain, compiled = unit.forward, torch.compile(unit.forward, dynamic=False)
    return lambda *given: (compiled if unit.training else plain)(*given)
