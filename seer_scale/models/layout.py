"""Which memory format a backbone's grouped convolutions run faster in: measured, because no rule holds on all devices."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.world import World

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MARGIN = 0.05
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_memory_format(backbone: nn.Module, config: Config, world: World) -> torch.memory_format:
    """What train.memory_format names; for auto, what the ranks together run faster. Collective where it measures.

    Only a gain of more than MARGIN takes channels_last: a run started twice shall not differ by the noise of a clock.
    """
    chosen = config.train.memory_format
    if chosen != "auto":
        return FORMATS[chosen]
    seconds = world.sum_(torch.tensor(list(measure(backbone, config, world).values()), device=world.device))
    contiguous, channels_last = seconds.tolist()
    return FORMATS["channels_last" if channels_last < (1 - MARGIN) * contiguous else "contiguous"]


def measure(backbone: nn.Module, config: Config, world: World, rounds: int = 3) -> dict[str, float]:
    """Seconds of forward and backward over the backbone (on the meta device) for a rank's micro-batch, by format.

    Timed is the last block of each stage, alone and with random weights, times the blocks of its stage. Medians. A block
    that no rank may hold whole (parallel.max_unit_gib) is left out.
    """
    batch = config.train.global_batch // world.size // config.accumulation(world.size)
    totals = dict.fromkeys(FORMATS, 0.0)
    sizes = [(crop.num * batch, -(-crop.size // 2)) for crop in config.views.crops]
    for names in backbone.stage_units():
        sizes = [(n, -(-size // 2)) for n, size in sizes]  # what the stage makes
        block = backbone.get_submodule(names[-1])
        if 4 * sum(p.numel() for p in block.parameters()) > config.parallel.max_unit_gib * 2**30:
            continue
        block = copy.deepcopy(block).to_empty(device=world.device)
        for p in block.parameters():
            nn.init.normal_(p, std=0.01)
        block.apply(lambda m: m.reset_running_stats() if hasattr(m, "reset_running_stats") else None)
        stride = block.conv2.conv.stride[0]
        into = [(n, block.conv1.conv.in_channels, size * stride, size * stride) for n, size in sizes]
        for name, layout in FORMATS.items():
            times = [_time(block, into, layout, config, world.device) for _ in range(rounds + 1)]
            totals[name] += statistics.median(times[1:]) * len(names)
    return totals


def _time(block: nn.Module, shapes: list[tuple[int, ...]], layout: torch.memory_format, config: Config, device: torch.device) -> float:
    dtype = DTYPES[config.train.precision]
    xs = [torch.randn(s, device=device).to(dtype, memory_format=layout).requires_grad_() for s in shapes]
    _wait(device)
    begin = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss: Tensor = sum(y.float().sum() for y in block(xs))
    loss.backward()
    _wait(device)
    block.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
