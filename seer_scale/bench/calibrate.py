"""What one device reaches, measured once: the file that a plan's `--device FILE` reads.

Products in each precision and convolutions, dense and grouped, over shapes of RegNetY's blocks, forward and backward;
operations an element, BatchNorm and reductions over its feature maps; what an operation costs the host, from an update
of a network so small that nothing else takes time; all-reduces, where there are several GPUs. A share's likely value is
that of all its shapes together, low and high are those of the slowest and the fastest quarter.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from seer_scale.bench.ranks import run_ranks, seconds, wait, where
from seer_scale.config import Config, resolve
from seer_scale.distributed import World
from seer_scale.files import to_json, write_whole
from seer_scale.methods.registry import build_method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel import build_engine
from seer_scale.plan.devices import Device, Interval, Link, Precision
from seer_scale.plan.operations import flops, moved_bytes
from seer_scale.plan.trace import call_of

aten = torch.ops.aten


class Shapes(NamedTuple):
    """Of what is measured. large: numbers that no cache holds. square: rows of a matrix. dense: channels and side of
    1x1 convolutions; grouped: channels a group, channels, side of 3x3 ones."""

    large: int
    images: int
    square: int
    dense: Sequence[tuple[int, int]]
    grouped: Sequence[tuple[int, int, int]]

    @property
    def few(self) -> Shapes:
        return Shapes(self.large, self.images, self.square // 2, self.dense[-2:], self.grouped[::4])


SHAPES = {
    "cpu": Shapes(
        2**24, 16, 384, [(24, 48), (64, 24), (152, 12), (368, 6), (368, 3)],
        [(8, 48, 32), (8, 152, 8), (8, 368, 4), (16, 64, 32), (16, 320, 8), (16, 320, 4), (56, 448, 6), (112, 448, 6)],
    ),
    "cuda": Shapes(
        2**28, 64, 8192, [(224, 56), (448, 28), (1232, 14), (3024, 7)],
        [(8, 224, 56), (8, 440, 14), (24, 576, 28), (56, 896, 14), (112, 448, 28), (112, 1232, 14), (264, 2904, 14),
         (373, 1492, 28), (373, 4103, 14)],
    ),
}  # fmt: skip
TINY_RECIPE = {
    "data": {"path": "-"}, "model": {"name": "regnety", "depth": 12, "w0": 8, "wa": 8, "wm": 2.5, "group_width": 8},
    "views": {"crops": [{"num": 2, "size": 16}, {"num": 2, "size": 8}]},
    "swav": {"hidden": [8], "embedding_dim": 8, "prototypes": [8], "iterations": 3},
    "optim": {"name": "sgd", "lr": 0.03, "lr_batch": 0},
    "train": {"total_samples": 10**6, "global_batch": 8}, "parallel": {"engine": "single"},
}  # fmt: skip
"""A recipe whose update takes what giving its operations takes. (From 16 images on, a CPU's convolutions are
oneDNN's.)"""


class Sample(NamedTuple):
    """What was done, FLOP or bytes, in how many seconds."""

    amount: float
    seconds: float


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds; on one CPU thread of CPU time: other processes do not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


class Clock:
    """Of work on a device. On one CPU thread it counts CPU time: other processes do not. On a GPU it counts the time of
    the device alone, which is kept busy while the host gives the work."""

    def __init__(self, device: torch.device, rounds: int):
        self.device, self.rounds = device, rounds
        self.now = clock_of(device)
        self.cold_bytes = COLD_BYTES
        if device.type == "cuda":
            self._busy = torch.ones(BUSY_ROWS, BUSY_ROWS, device=device)
            self.cold_bytes = max(COLD_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)

    def seconds(self, work: Callable[[], Any]) -> float:
        wait(self.device)
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._busy @ self._busy
            begin.record()
            work()
            end.record()
            wait(self.device)
            return begin.elapsed_time(end) / 1000
        start = self.now()
        work()
        return self.now() - start

    def median(self, work: Callable[[], Any], calls: int = 1) -> float:
        """Seconds of one call."""
        work()
        return (
            statistics.median(self.seconds(lambda: [work() for _ in range(calls)]) for _ in range(self.rounds)) / calls
        )

    def sample(self, op: Any, *args: Any, least_s: float, bandwidth: float = math.inf) -> Sample:
        """FLOP of a product, bytes of what is none, and the seconds beyond `least_s` and what moving its bytes takes.

        As in an update, what is read was not used just before, and what is made is kept.
        """
        name, out = str(op._overloadpacket), op(*args)
        nbytes = moved_bytes(out, args, {})
        once = self.seconds(lambda: op(*args))
        copies = max(1, min(MAX_COPIES, math.ceil(self.cold_bytes / nbytes), int(PASS_S / once)))
        given = [args, *(tree_map_only(Tensor, Tensor.clone, args) for _ in range(copies - 1))]
        whole = self.median(lambda: [op(*own) for own in given]) / copies
        own_s = max(0.2 * whole, whole - least_s - nbytes / bandwidth)
        return Sample(flops(name, out, args) or nbytes, own_s)


COLD_BYTES, MAX_COPIES, PASS_S = 2**25, 32, 0.015
"""Between two uses of a tensor at least so many other bytes are used, which pushes it out of caches, where that does
not take longer than this."""
BUSY_ROWS = 5120
"""Of a product in fp32 that takes a GPU longer than the host takes to give a pass: 5 ms at 50 TFLOP/s."""


def time_updates(update: Callable[[], Any], device: torch.device, num: int) -> list[float]:
    """Seconds of each of `num` in a row. On a GPU the host goes on, as in training."""
    if device.type == "cpu":
        return [Clock(device, 1).seconds(update) for _ in range(num)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num + 1)]
    marks[0].record()
    for mark in marks[1:]:
        update()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]


def interval(samples: Sequence[Sample], peak: float) -> Interval:
    """Their rates as shares of `peak`."""
    rates = sorted(s.amount / s.seconds for s in samples)
    likely = sum(s.amount for s in samples) / sum(s.seconds for s in samples)
    quarter = len(rates) // 4
    low, high = min(rates[quarter], likely), max(rates[-1 - quarter], likely)
    return low / peak, likely / peak, high / peak


# ------------------------------------------------------------------------------------------------ what is measured


@dataclasses.dataclass(frozen=True)
class Memory:
    """What operations that only move bytes reach. Seconds: the least that any operation, and a convolution, takes."""

    bandwidth: float
    elementwise: Interval
    normalisation: Interval
    reduction: Interval
    launch_s: float
    convolution_s: float


def measure_memory(clock: Clock, shapes: Shapes) -> Memory:
    device = clock.device
    tiny = torch.zeros(8, device=device)
    launch_s = clock.median(lambda: tiny.add_(1), calls=200)
    squeezed, weight = torch.zeros(shapes.images, 152, 1, 1, device=device), torch.zeros(38, 152, 1, 1, device=device)
    plain = plain_convolution(1, 1)
    convolution_s = clock.sample(aten.convolution.default, squeezed, weight, None, *plain, least_s=0).seconds
    kinds: dict[str, list[Sample]] = {"elementwise": [], "normalisation": [], "reduction": []}
    for channels, side in shapes.dense:
        x, y = (torch.randn(shapes.images, channels, side, side, device=device) for _ in range(2))
        scale, mean, var = (torch.ones(channels, device=device) for _ in range(3))
        for kind, op, *args in (
            ("elementwise", aten.add.Tensor, x, y),
            ("elementwise", aten.relu_.default, x),
            ("elementwise", aten.threshold_backward.default, x, y, 0),
            ("elementwise", aten.mul.Tensor, x, y),
            ("normalisation", aten.native_batch_norm.default, x, scale, mean, mean, var, True, 0.1, 1e-5),
            ("normalisation", aten.native_batch_norm_backward.default,
             x, y, scale, mean, var, mean, 1 / var, True, 1e-5, [True] * 3),
            ("reduction", aten.mean.dim, x, [2, 3]),
            ("reduction", aten._foreach_norm.Scalar, [x, y]),
        ):  # fmt: skip
            kinds[kind].append(clock.sample(op, *args, least_s=launch_s))
    large, other = (torch.zeros(shapes.large, device=device) for _ in range(2))
    copied = clock.sample(aten.copy_.default, large, other, least_s=launch_s)
    bandwidth = copied.amount / copied.seconds
    shares = {kind: interval(samples, bandwidth) for kind, samples in kinds.items()}
    return Memory(bandwidth=bandwidth, launch_s=launch_s, convolution_s=convolution_s, **shares)


def plain_convolution(kernel: int, groups: int, stride: int = 1) -> tuple[Any, ...]:
    """What follows the bias."""
    return [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups


def measure_precision(clock: Clock, dtype: torch.dtype, shapes: Shapes, memory: Memory) -> Precision:
    """Products of one type."""
    images, bandwidth = shapes.images, memory.bandwidth * memory.elementwise[1]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=clock.device, dtype=dtype)

    def convolutions(channels: int, side: int, kernel: int, groups: int, stride: int = 1) -> Iterator[Sample]:
        x, weight = random(images, channels, side, side), random(channels, channels // groups, kernel, kernel)
        dy = random(images, channels, side // stride, side // stride)
        rest, least_s = plain_convolution(kernel, groups, stride), memory.convolution_s
        yield clock.sample(aten.convolution.default, x, weight, None, *rest, least_s=least_s, bandwidth=bandwidth)
        yield clock.sample(
            aten.convolution_backward.default, dy, x, weight, None, *rest, [True, True, False],
            least_s=2 * least_s, bandwidth=bandwidth,
        )  # fmt: skip

    square = random(shapes.square, shapes.square)
    lines = (square, random(4 * images, shapes.square))
    product = [clock.sample(aten.mm.default, a, square, least_s=memory.launch_s) for a in lines]
    dense = [s for channels, side in shapes.dense for s in convolutions(channels, side, 1, 1)]
    grouped: dict[int, list[Sample]] = {}
    for width, channels, side in shapes.grouped:
        for stride in (1, 2):
            grouped.setdefault(width, []).extend(convolutions(channels, side, 3, channels // width, stride))
    peak = max(s.amount / s.seconds for s in [*product, *dense, *sum(grouped.values(), [])])
    return Precision(
        peak=peak,
        product=interval(product, peak),
        convolution=interval(dense, peak),
        grouped=tuple((width, *interval(samples, peak)) for width, samples in grouped.items()),
    )


class _Count(TorchDispatchMode):
    """Operations, as a trace counts them, and the passes of convolutions."""

    num = passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, is_work = call_of(func)
        self.num += is_work and not name.startswith("prim.")
        self.passes += {"aten.convolution": 1, "aten.convolution_backward": 2}.get(name, 0)
        return func(*args, **kwargs or {})


def measure_host(clock: Clock, memory: Memory) -> Interval:
    """Seconds an operation costs beside itself, in updates of a tiny network."""
    config: Config = resolve(TINY_RECIPE, world_size=1)
    world = World(device=clock.device)
    with torch.device("meta"):
        method = build_method(config, world)
    engine = build_engine(method, config, world)
    views = [torch.randn(c.num * 8, 3, *c.shape, device=clock.device) for c in config.views.crops]

    def update() -> None:
        engine.gradients([lambda: views], samples_seen=0)
        engine.update(config.peak_lr, 0)

    update()
    with _Count() as count:
        update()
    own = 0.0
    if clock.device.type == "cpu":  # a GPU's host goes on
        own = count.num * memory.launch_s + count.passes * (memory.convolution_s - memory.launch_s)
    rounds = (statistics.median(time_updates(update, clock.device, clock.rounds)) for _ in range(3))
    each = sorted((seconds - own) / count.num for seconds in rounds)
    low, likely, high = (max(1e-6, s) for s in each)
    return min(low, 0.8 * likely), likely, max(high, 1.3 * likely)


def measure_link(world: World, rounds: int) -> dict[str, float]:
    """All-reduces over the ranks of this machine. Collective."""
    free = torch.cuda.mem_get_info()[0] if world.device.type == "cuda" else 0
    small, large = (torch.zeros(num, device=world.device) for num in (1, 2**26 if free else 2**20))

    def once(x: Tensor) -> float:
        dist.all_reduce(x)
        return statistics.median(seconds(lambda: [dist.all_reduce(x) for _ in range(10)], world) for _ in range(rounds))

    latency, whole = once(small) / 10, once(large) / 10
    taken = free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved() if free else 0
    part = 2 * (world.size - 1) / world.size
    return {
        "bandwidth": part * large.nbytes / max(1e-9, whole - latency),
        "latency_s": latency / (2 * (world.size - 1)),
        "communicator_bytes": max(0, taken),
    }


# ------------------------------------------------------------------------------------------------ the device


def measure(device: torch.device, rounds: int = 5, dtypes: Mapping[str, torch.dtype] = COMPUTE_DTYPES) -> Device:
    """All of one device, but products of these types only, in seconds."""
    clock, shapes = Clock(device, rounds), SHAPES[device.type]
    with torch.no_grad():
        memory = measure_memory(clock, shapes)
        precisions: dict[str, Any] = {
            name: measure_precision(clock, dtype, shapes if is_fast(device, dtype) else shapes.few, memory)
            for name, dtype in dtypes.items()
        }
    num = torch.cuda.device_count() if device.type == "cuda" else 1
    link = run_ranks(measure_link, rounds, ranks=num, device="cuda") if num > 1 else {}
    return Device(
        name=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **_memory_of(device),
        communicator_bytes=round(link.pop("communicator_bytes", 0)),
        **precisions,
        **{field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)},
        host_s=measure_host(clock, memory),
        asynchronous=device.type == "cuda",
        gpus_per_node=num,
        link=Link(**link),
    )


def is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """A CPU may emulate half precision, which is not worth many measurements."""
    return device.type != "cpu" or dtype == torch.float32


def _memory_of(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "block_bytes": 64}
    free, total = torch.cuda.mem_get_info()
    return {
        "memory_bytes": total,
        "context_bytes": max(0, total - free - torch.cuda.memory_reserved()),
        "block_bytes": 512,
    }


def as_plain(device: Device) -> dict[str, Any]:
    """For a file: figures of four digits; what was not measured is left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v for k, v in ((k, plain(v)) for k, v in value.items()) if v not in ({}, 0.0) or v is False}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return plain(dataclasses.asdict(device))


def to_yaml(device: Device, device_in_words: str) -> str:
    """The file."""
    body = yaml.safe_dump(as_plain(device), sort_keys=False, default_flow_style=None, width=120)
    head = f"# Measured by seer-scale bench step --calibrate: {device_in_words}\n"
    rest = ""
    if not device.link.bandwidth:
        rest += "# Not measured: link, between GPUs of a node. A plan of several ranks needs it.\n"
    rest += "# Not measured: network, between nodes, as in\n# network: {bandwidth: 40.0e+9, latency_s: 8.0e-6}\n"
    return head + body + rest


def run(args: Any) -> str:
    """Of `bench step --calibrate`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    found = measure(device, args.rounds)
    text = to_yaml(found, where(device))
    if args.out:
        write_whole(Path(args.out), text)
    if args.json:
        return to_json(as_plain(found), indent=1)
    return f"Wrote {args.out}: give it to seer-scale plan RECIPE --device {args.out}" if args.out else text.rstrip()
