"""How many threads, and which memory format, a backbone's blocks run faster with: measured, because no rule holds on
all devices, and none on a machine that others use."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.cores import Contention, told_threads
from seer_scale.distributed import World
from seer_scale.models.backbone import Backbone
from seer_scale.models.registry import reset_buffers

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MARGIN = 0.05
COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Execution:
    """threads: CPU threads of each rank. contended: what else was busy on the cores while they were measured, if much
    was."""

    threads: int
    memory_format: torch.memory_format
    contended: str = ""


def choose_execution(
    backbone: nn.Module, config: Config, world: World, cores: int, between: Callable[[], object] = lambda: None
) -> Execution:
    """What train.threads or OMP_NUM_THREADS, and train.memory_format, name; else what the ranks together run faster.
    Sets the threads. Collective where it measures.

    cores: of each rank. Only a gain of more than MARGIN takes fewer threads, or channels_last: a run started twice
    shall not differ by the noise of a clock. On an accelerator, threads are not measured. between: called before each
    timing, as often on every rank; what it raises ends the choice.
    """
    watch = Contention(cores * world.local_size, world.local_size)
    threads = config.train.threads or told_threads()
    if not threads:
        threads = cores if world.device.type == "cuda" else _fastest_threads(backbone, config, world, cores, between)
    torch.set_num_threads(threads)
    if config.train.memory_format == "auto":
        seconds = {
            name: measure(backbone, config, world, form, between=between) for name, form in MEMORY_FORMATS.items()
        }
        gains = seconds["channels_last"] < (1 - MARGIN) * seconds["contiguous"]
        memory_format = MEMORY_FORMATS["channels_last" if gains else "contiguous"]
    else:
        memory_format = MEMORY_FORMATS[config.train.memory_format]
    return Execution(threads, memory_format, watch.found())


def _fastest_threads(
    backbone: nn.Module, config: Config, world: World, cores: int, between: Callable[[], object]
) -> int:
    """Of `cores` and its halves, as long as fewer are faster."""
    best, least_s = cores, float("inf")
    for threads in _halves(cores) if cores > 1 else ():
        torch.set_num_threads(threads)
        # on contended cores a round may take long
        seconds = measure(backbone, config, world, rounds=1, between=between)
        if seconds > (1 - MARGIN) * least_s:
            break
        best, least_s = threads, seconds
    return best


def _halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


def measure(
    backbone: nn.Module,
    config: Config,
    world: World,
    memory_format: torch.memory_format = torch.contiguous_format,
    rounds: int = 3,
    between: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of forward and backward over the backbone (on the meta device) for a micro-batch, of all ranks together.

    Timed is the last block of each stage, alone and with random weights, times the blocks of its stage. Medians. A
    block that no rank may hold whole (parallel.max_unit_gib) is left out. Collective.
    """
    batch = config.train.global_batch // world.size // config.num_micro_batches(world.size)
    total = 0.0
    images = [torch.empty(crop.num * batch, 3, *crop.shape, device="meta") for crop in config.views.crops]
    stages = cast(Backbone, backbone).stage_units()
    takes = _shapes(backbone, [names[-1] for names in stages], images)
    for names in stages:
        block = backbone.get_submodule(names[-1])
        if 4 * sum(p.numel() for p in block.parameters()) > config.parallel.max_unit_gib * 2**30:
            continue
        twin = copy.deepcopy(backbone)
        block = twin.get_submodule(names[-1]).to_empty(device=world.device)
        for p in block.parameters():
            nn.init.normal_(p, std=0.01)
        reset_buffers(twin)  # by the whole, which knows the tables of its parts
        times = []
        for _ in range(rounds + 1):
            between()
            times.append(_time(block, takes[names[-1]], memory_format, config, world.device))
        total += statistics.median(times[1:]) * len(names)
    return world.sum_(torch.tensor(total, device=world.device)).item()


@torch.no_grad()
def _shapes(backbone: nn.Module, names: Sequence[str], images: list[Tensor]) -> dict[str, list[tuple[int, ...]]]:
    """What these units take of images on the meta device, as shapes."""
    takes: dict[str, list[tuple[int, ...]]] = {}

    def note(name: str, xs: list[Tensor]) -> None:
        takes[name] = [tuple(x.shape) for x in xs]

    hooks = [
        backbone.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in names
    ]
    training = backbone.training
    backbone.eval()(images)
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    return takes


def _time(
    block: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    memory_format: torch.memory_format,
    config: Config,
    device: torch.device,
) -> float:
    dtype = COMPUTE_DTYPES[config.train.precision]
    xs = [torch.randn(s, device=device).to(dtype) for s in shapes]
    xs = [(x.to(memory_format=memory_format) if x.dim() == 4 else x).requires_grad_() for x in xs]
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
