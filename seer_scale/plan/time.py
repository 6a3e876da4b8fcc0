"""How long an update takes on a device: the operations of a trace, each as long as a roofline says, begun when their
stream, what they wait for and the host allow.

An operation takes the longer of multiplying and of moving its bytes (Williams et al., Roofline, CACM 52(4), 2009), at
the shares of the device's peaks that its kind reaches; a convolution takes both, as its library brings what it
multiplies into another order first. A collective takes a latency a step and the bytes a rank sends
over the slowest link of its group (Thakur et al., Optimization of collective communication operations in MPICH, IJHPCA
19(1), 2005; latencies of rings and trees over nodes as NCCL's own model has them, src/graph/tuning.cc). How these
overlap is not assumed: a collective begins on the stream the engine gave it to, after what the engine made it wait for,
and holds its group's communicator until it ends.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from seer_scale.config import Config, load_recipe, resolve
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.formatting import counted, duration
from seer_scale.models.compute import training_flops
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.plan.devices import Device
from seer_scale.plan.trace import Collective, Op, Trace, Wait

LOW, LIKELY, HIGH = range(3)
SUMMING = {"sum", "mean", "amax", "var_mean", "linalg_vector_norm", "_foreach_norm"}
LAUNCH_BOUND = 0.1
"""Of an update: from such a share on it is worth saying that the device waits for the host."""
LOADER_RATE = {False: 179.0, True: 262.0}
"""Images a second that a core makes 2 x 224 + 4 x 96 views of, from photographs of 400 x 533; with photometrics left to
the device (docs/performance.md)."""


def kind_of(op: Op) -> str:
    """What its time is told under, and which share it reaches."""
    if op.collective:
        return op.collective.kind
    if op.flops:
        if op.group_width:
            return "grouped convolutions"
        return "convolutions" if op.name.startswith("convolution") else "matrix products"
    if "_norm" in op.name and op.name not in SUMMING:
        return "normalisation"
    return "reductions" if op.name in SUMMING else "elementwise"


# ------------------------------------------------------------------------------------------------ an operation


def op_seconds(op: Op, device: Device, shares: int = LIKELY) -> float:
    """Of one operation alone. shares: which of the intervals' ends; LOW are low shares, hence long times."""
    if op.collective:
        return device.launch_s + collective_seconds(op.collective, device)
    kind, precision = kind_of(op), device.precision(op.dtype)
    reached = {
        "matrix products": precision.product,
        "convolutions": precision.convolution,
        "normalisation": device.normalisation,
        "reductions": device.reduction,
    }.get(kind, device.elementwise)
    if op.group_width:
        reached = precision.grouped_share(op.group_width)
    if not op.flops:
        return device.launch_s + op.nbytes / (device.bandwidth * reached[shares])
    multiplying = op.flops / (precision.peak * reached[shares])
    moving = op.nbytes / (device.bandwidth * device.elementwise[shares])
    if kind == "matrix products":
        return device.launch_s + max(multiplying, moving)
    passes = 2 if op.name == "convolution_backward" else 1
    return passes * device.convolution_s + multiplying + moving  # its kernels reorder what they multiply


def collective_seconds(collective: Collective, device: Device) -> float:
    """Of one collective over idle links: bytes a rank sends over what its slowest link carries, and the latencies of a
    ring; for all-reduces those of a tree where that is faster."""
    size = len(collective.ranks)
    per_node = Counter(rank // device.gpus_per_node for rank in collective.ranks)
    nodes = len(per_node)
    if size == 1:
        return 0.0
    # each GPU of a node sends its part of what leaves the node by an adapter of its own
    outside = device.network.bandwidth * min(per_node.values())
    bandwidth = min(device.link.bandwidth, outside) if nodes > 1 else device.link.bandwidth
    around = (size - nodes) * device.link.latency_s + (nodes - 1) * device.network.latency_s
    sent = collective.nbytes / bandwidth
    part = (size - 1) / size
    if collective.kind in ("all-gather", "reduce-scatter", "all-to-all"):
        return around + part * sent
    tree = (max(per_node.values()) - 1) * device.link.latency_s + math.ceil(math.log2(nodes)) * device.network.latency_s
    if collective.kind == "all-reduce":
        return min(2 * around + 2 * part * sent, 2 * tree + 2 * sent)
    return tree + sent  # broadcast, reduce


# ------------------------------------------------------------------------------------------------ an update


@dataclass(frozen=True)
class StepTime:
    """Of one update, in seconds. low, high: with the device's shares at their high and low ends.

    busy: by kind of operation, of all streams. exposed: in which only collectives run. idle: in which nothing runs, as
    the host has not given it yet. units: busy by unit. images: of all ranks. flops: the model's, a rank (its backbone
    forward and backward, without recomputation). peak: FLOP/s of the device in the recipe's precision.
    """

    seconds: float
    low: float
    high: float
    busy: dict[str, float]
    exposed: float
    idle: float
    units: dict[str, float]
    device: Device
    world_size: int
    images: int
    flops: float
    peak: float
    loader_rate: float
    assumptions: list[str] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        """Of all ranks."""
        return self.images / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation, from 0 to 1."""
        return self.flops / self.seconds / self.peak

    @property
    def is_launch_bound(self) -> bool:
        return self.device.asynchronous and self.idle >= LAUNCH_BOUND * self.seconds

    @property
    def loader_cores(self) -> int:
        """CPU cores a rank that loading its images takes."""
        return math.ceil(self.images_per_s / self.world_size / self.loader_rate)

    def days(self, samples: int) -> float:
        """Of updates alone, until so many images are seen."""
        return samples / self.images_per_s / 86400

    def gpu_hours(self, samples: int) -> float:
        return self.days(samples) * 24 * self.world_size

    def price(self, samples: int, per_gpu_hour: float) -> float:
        """In the currency of the rate."""
        return self.gpu_hours(samples) * per_gpu_hour


def simulate(trace: Trace, device: Device) -> StepTime:
    """The update of a trace on a device, as one of many in a row: the host may be ahead by an update."""
    config = trace.config
    check_links(trace, device)
    runs = {shares: schedule(trace.steps, device, shares) for shares in (LOW, LIKELY, HIGH)}
    likely = runs[LIKELY]
    found = StepTime(
        seconds=likely.seconds,
        low=runs[HIGH].seconds,
        high=runs[LOW].seconds,
        busy=likely.busy,
        exposed=likely.exposed,
        idle=likely.idle,
        units=likely.units,
        device=device,
        world_size=trace.world_size,
        images=config.train.global_batch,
        flops=training_flops(config) * config.train.global_batch / trace.world_size,
        peak=device.precision(COMPUTE_DTYPES[config.train.precision]).peak,
        loader_rate=LOADER_RATE[config.data.on_device(device.torch_type)],
    )
    found.assumptions.extend(_assumptions(found, trace))
    return found


def check_links(trace: Trace, device: Device) -> None:
    """Raises UserError where the ranks of a trace are joined by what nothing is known of."""
    nodes = trace.world_size > device.gpus_per_node
    needed = {"link": trace.world_size > 1 and device.gpus_per_node > 1, "network": nodes}
    problems = [
        Problem(
            f"{name} of {device.name}", NOTHING, f"is not known, which {counted(trace.world_size, 'rank')} need",
            f"write it into the device's file, as in '{name}: {{bandwidth: 40e9, latency_s: 8e-6}}'",
        )
        for name, is_needed in needed.items()
        if is_needed and not getattr(device, name).bandwidth
    ]  # fmt: skip
    if problems:
        raise UserError(*problems)


@dataclass(frozen=True)
class Schedule:
    """As StepTime has them. begins: of each operation, from the end of the update before."""

    seconds: float
    busy: dict[str, float]
    exposed: float
    idle: float
    units: dict[str, float]
    begins: list[float]


def schedule(steps: Sequence[Op | Wait], device: Device, shares: int = LIKELY) -> Schedule:
    """When each operation begins and ends, in the second of two updates in a row."""
    host = 0.0
    free: defaultdict[object, float] = defaultdict(float)  # by stream, and by communicator
    ends: defaultdict[int, list[float]] = defaultdict(list)
    before = 0.0
    busy: defaultdict[str, float] = defaultdict(float)
    units: defaultdict[str, float] = defaultdict(float)
    begins: list[float] = []
    computing: list[tuple[float, float]] = []
    communicating: list[tuple[float, float]] = []
    for update in range(2):
        computing.clear()
        communicating.clear()
        before = max(free.values(), default=0.0)
        ends.clear()
        for step in steps:
            if isinstance(step, Wait):
                free[step.stream] = max(free[step.stream], ends[step.on][step.mark - 1])
                continue
            host += device.host_s[HIGH - shares]
            begin = max(host, free[step.stream])
            if step.collective:
                begin = max(begin, free[step.collective.ranks, step.collective.group])
            seconds = op_seconds(step, device, shares)
            end = begin + seconds
            free[step.stream] = end
            ends[step.stream].append(end)
            (communicating if step.collective else computing).append((begin, end))
            if step.collective:
                free[step.collective.ranks, step.collective.group] = end
            if not device.asynchronous:
                host = end
            if update:
                begins.append(begin - before)
                busy[kind_of(step)] += seconds
                units[step.unit] += seconds
    seconds = max(free.values(), default=0.0) - before
    computed, active = _covered(computing), _covered(computing + communicating)
    return Schedule(seconds, dict(busy), active - computed, max(0.0, seconds - active), dict(units), begins)


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one of them."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _assumptions(found: StepTime, trace: Trace) -> list[str]:
    """What the figures rest on, a sentence each."""
    device, config = found.device, trace.config
    nodes = -(-trace.world_size // device.gpus_per_node)
    told = [
        f"Operations take what {device.name}'s peaks and the shares of them in its table say; low and high are its "
        "intervals.",
        "All ranks are as fast as this one, the loader is never waited for, and no checkpoint is written.",
    ]
    if trace.world_size > 1:
        told.append(
            f"{counted(trace.world_size, 'GPU')} on {counted(nodes, 'node')} of up to {device.gpus_per_node}, the "
            "links carrying nothing else; computing is not slowed by what is sent beside it."
        )
    if config.train.compile:
        told.append(
            "Compiled units are counted operation by operation: an update may be faster, and hold less memory or more."
        )
    if config.parallel.device not in ("auto", device.torch_type):
        told.append(
            f"The recipe's parallel.device is {config.parallel.device}: {device.name} takes --parallel.device auto."
        )
    if found.is_launch_bound:
        told.append(
            "The host gives operations more slowly than the device does them, which idles "
            f"{found.idle / found.seconds:.0%} of an update. Larger batches would cost little."
        )
    if trace.syncs:
        told.append(f"{counted(len(trace.syncs), 'wait')} of the host for the device cost nothing here.")
    return told


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 10 else duration(seconds)


# ------------------------------------------------------------------------------------------------ a published run

SEER_UPDATE_S, SEER_IMAGES, SEER_GPUS, SEER_DEVICE = 6.125, 8704, 512, "v100-32gb"
"""SEER's update on V100s of 32 GB, fp16, SyncBN over 64 (arXiv 2103.01988). Which of its RegNetYs it was is not said
clearly: SEER_READINGS has both."""
SEER_READINGS = {"seer_regnety_128gf": "regnety_128gf", "seer_regnety_256gf": "regnety_256gf"}


def seer_config(recipe: str) -> Config:
    """SEER's row under a reading: 17 images a GPU, every block recomputed, as 32 GB need it."""
    over = {
        "data": {"path": "-"},
        "train": {"global_batch": SEER_IMAGES, "micro_batch": 0, "precision": "fp16"},
        "parallel": {"engine": "fsdp", "ranks": SEER_GPUS, "sync_bn_group": 64, "activation_checkpoint": "every 1"},
    }
    return resolve(load_recipe(recipe), over, world_size=SEER_GPUS)


def seer_row(predicted: Mapping[str, StepTime]) -> list[str]:
    """What was published beside what is predicted for each reading, a line each. predicted: by recipe."""
    return [
        f"SEER's {1000 * SEER_UPDATE_S:,.0f} ms an update of {SEER_IMAGES:,} images on {SEER_GPUS} V100, read as "
        f"{SEER_READINGS[recipe]}: predicted {milliseconds(step.seconds)} "
        f"({milliseconds(step.low)} to {milliseconds(step.high)}), "
        f"{step.seconds / SEER_UPDATE_S:.2f} of what was measured; {step.flops / SEER_UPDATE_S / step.peak:.1%} MFU as "
        f"measured, {step.mfu:.1%} as predicted"
        for recipe, step in predicted.items()
    ]
