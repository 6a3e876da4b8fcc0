"""What is planned of an update beside what it takes on the device at hand: the most that tensors and workspaces of
kernels hold, what the allocator reserves, what is taken beside it, and time.

A recipe's own update runs, of random images and weights, with the crops, precision, optimiser, recomputation and engine
that it and --section.key value name; `seer-scale plan` traces the same one. The time is the median of updates that the
host gives without waiting for them. --kinds says where the two differ: seconds of each kind of operation, timed one by
one in further updates. On a CPU only time is measured (of one thread: CPU time).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from seer_scale.bench.calibrate import Clock, time_updates
from seer_scale.bench.ranks import run_ranks, where
from seer_scale.bench.step import of_ranks, with_batch
from seer_scale.config import Config, merge
from seer_scale.data.transforms.on_device import micro_batches
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json
from seer_scale.formatting import counted, memory_size
from seer_scale.methods.registry import build_method
from seer_scale.models.execution import MEMORY_FORMATS
from seer_scale.models.init import initial_values
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine
from seer_scale.plan.devices import Device, known_devices, load_device
from seer_scale.plan.operations import flops, group_width
from seer_scale.plan.plan import Plan, make_plan
from seer_scale.plan.time import kind_of
from seer_scale.plan.trace import Op, call_of, example_batch
from seer_scale.training.start import read_recipe, resolve_given

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="seer_regnety_16gf", help="a shipped recipe or a YAML file")
    parser.add_argument("--batch", type=int, default=64, help="images an update of all ranks")
    parser.add_argument("--micro-batch", type=int, default=0, help="images of a rank at once; 0 = all")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, or processes on a CPU")
    parser.add_argument(
        "--device",
        default="",
        metavar="NAME|FILE",
        help="what to plan by, as of seer-scale plan (default: the known device that this one is called after)",
    )
    parser.add_argument("--warm-up", type=int, default=3, help="updates before those measured")
    parser.add_argument("--updates", type=int, default=5, help="updates measured")
    parser.add_argument("--kinds", action="store_true", help="also the time of each kind of operation")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


class Asked(NamedTuple):
    """What to update, how many updates to warm up with and to measure, and whether to time operations."""

    config: Config
    warm_up: int
    updates: int
    with_kinds: bool


@dataclass(frozen=True)
class Measured:
    """Of rank 0. seconds: of each update. losses: of these and of those that warmed up. kinds: seconds of an update, by
    kind of operation. On GPUs, in bytes: allocated, the peak of what the allocator gave out after the warm-up;
    reserved, of what it took from the device; beside, what else is taken of it."""

    seconds: list[float]
    losses: list[float]
    kinds: dict[str, float] = field(default_factory=dict)
    allocated: int = 0
    reserved: int = 0
    beside: int = 0


def measure(world: World, asked: Asked) -> Measured:
    """Collective."""
    config, is_gpu = asked.config, world.device.type == "cuda"
    with torch.device("meta"):
        method = build_method(config, world)
    engine = build_engine(method, config, world, loaded=("",))
    draw_weights(engine)
    update, losses = make_update(engine, config, world), []
    for _ in range(asked.warm_up):
        losses.append(update())
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = time_updates(lambda: losses.append(update()), world.device, asked.updates)
    told, memory = [loss.item() for loss in losses], {}
    if is_gpu:
        free, total = torch.cuda.mem_get_info()
        memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        memory["beside"] = total - free - torch.cuda.memory_reserved()
    kinds = time_kinds(update, world.device, asked.updates) if asked.with_kinds else {}
    engine.close()
    return Measured(seconds, told, kinds, **memory)


@torch.no_grad()
def draw_weights(engine: Engine) -> None:
    """Vectors as an initialisation has them, matrices about as wide, without its time."""
    initialisers, seed = engine.method.initialisers(), engine.config.run.seed
    for name, shard in engine.shards.items():
        if len(shard.shape) > 1:
            shard.local.normal_(std=math.prod(shard.shape[1:]) ** -0.5)
        else:
            source = engine.averages.get(name, name)
            values = initial_values(initialisers[source], shard.shape, seed, source, shard.start, shard.stop)
            shard.local.copy_(values.view_as(shard.local))
    engine.refresh()


def make_update(engine: Engine, config: Config, world: World) -> Callable[[], Tensor]:
    """An update as training makes it, of one batch of noise; returns its loss."""
    batch, generator = example_batch(config, world), torch.Generator().manual_seed(world.rank)
    noise = [v.random_(256, generator=generator) for v in batch.views]
    batch = replace(batch, views=[v.pin_memory() for v in noise] if world.device.type == "cuda" else noise)
    num, seen = config.num_micro_batches(world.size), config.train.total_samples - config.train.global_batch
    form = MEMORY_FORMATS.get(config.train.memory_format, torch.contiguous_format)

    def update() -> Tensor:
        makes = micro_batches(batch, config.views.crops, num, world.device, form)
        loss = engine.gradients(makes, samples_seen=seen).loss
        engine.update(config.peak_lr, seen)
        return loss

    return update


class _Timer(TorchDispatchMode):
    """When each operation began and ended, and its kind, as a plan has it; collectives left out."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._is_gpu, self._now = device.type == "cuda", Clock(device, 1).now
        self.spans: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if not self._is_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its local operations come here
        name, is_work = call_of(func)
        if not is_work or name.startswith(("prim.", "c10d.")):
            return func(*args, **kwargs or {})
        begin = self._mark()
        out = func(*args, **kwargs or {})
        end = self._mark()
        own = name.removeprefix("aten.")
        op = Op(own, "forward", "", 0, flops(name, out, args), 0, torch.float32, group_width=group_width(name, args))
        self.spans.append((kind_of(op), begin, end))
        return out

    def seconds(self) -> dict[str, float]:
        """By kind."""
        if self._is_gpu:
            torch.cuda.synchronize()
        found: Counter[str] = Counter()
        for kind, begin, end in self.spans:
            found[kind] += begin.elapsed_time(end) / 1000 if self._is_gpu else end - begin
        return dict(found)


def time_kinds(update: Callable[[], Any], device: torch.device, num: int) -> dict[str, float]:
    """Seconds of an update by kind of operation: medians of `num` updates. They hold what the host takes to give each
    operation, where it does not run ahead."""
    found = []
    for _ in range(num):
        with _Timer(device) as timer:
            update()
        found.append(timer.seconds())
    return {kind: statistics.median(one[kind] for one in found) for kind in found[0]}


# ------------------------------------------------------------------------------------------------ beside the plan


def configure(args: argparse.Namespace) -> Config:
    """The recipe for so many ranks. Raises UserError."""
    wrong = [
        Problem(f"--{name.replace('_', '-')}", value, f"must be at least {least}", (least,))
        for name, least in (("ranks", 1), ("batch", 1), ("micro_batch", 0), ("warm_up", 1), ("updates", 1))
        if (value := getattr(args, name)) < least
    ]
    if not wrong and args.batch % args.ranks:
        wrong.append(Problem("--batch", args.batch, f"does not divide among {args.ranks} ranks", (args.ranks,)))
    elif not wrong and args.micro_batch and args.batch // args.ranks % args.micro_batch:
        rule = f"does not divide {args.batch // args.ranks} images of a rank"
        wrong.append(Problem("--micro-batch", args.micro_batch, rule, (args.batch // args.ranks,)))
    if wrong:
        raise UserError(*wrong)
    given, _ = read_recipe(args.recipe, args.overrides)
    config = resolve_given(merge(given, of_ranks(args.ranks)), args.overrides, args.ranks, with_data=False)
    return with_batch(config, args.batch, args.micro_batch)


def find_device(named: str) -> Device:
    """What to plan by. Raises UserError."""
    gpu = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    if named:
        device = load_device(named)
        if device.asynchronous and not gpu:
            raise UserError(Problem("--device", named, "is a GPU, and there is none here", ("cpu",)))
        return device
    for device in known_devices().values():
        if all(part in gpu for part in device.name.split("-")) if gpu else not device.asynchronous:
            return device
    rule, fix = f"has no default: no plan knows {gpu}", "measure it by seer-scale bench step --calibrate --out FILE"
    raise UserError(Problem("--device", named, rule, fix))


def compare(plan: Plan, found: Measured) -> dict[str, tuple[float, float]]:
    """Planned and measured, by what it is: bytes and seconds."""
    rows = {}
    if found.allocated:
        rows = {
            kind: (getattr(plan.memory, kind), getattr(found, kind)) for kind in ("allocated", "reserved", "beside")
        }
    rows["update_s"] = plan.time.seconds, statistics.median(found.seconds)
    kinds = sorted(found.kinds, key=lambda kind: -found.kinds[kind])
    return rows | {kind: (plan.time.busy.get(kind, 0.0), found.kinds[kind]) for kind in kinds}


def run(args: argparse.Namespace) -> str:
    """Plan and measure; returns what to print. Raises UserError."""
    device, config = find_device(args.device), configure(args)
    plan = make_plan(config, args.ranks, device)
    name = "cuda" if device.asynchronous else "cpu"
    asked = Asked(plan.config, args.warm_up, args.updates, args.kinds)
    if args.ranks > 1:
        found = run_ranks(measure, asked, ranks=args.ranks, device=name)
    else:
        found = measure(World(device=torch.device(name)), asked)
    rows, taken, low, high = compare(plan, found), plan.config, plan.time.low, plan.time.high
    what = (
        f"{taken.model.name}, {plan.trace.engine} on {args.ranks}, {taken.train.precision}, {taken.optim.name}, batch "
        f"{args.batch} in {counted(taken.num_micro_batches(args.ranks), 'micro-batch')}, recomputed: "
        f"{taken.parallel.activation_checkpoint}; {where(torch.device(name))}, planned by {device.name}"
    )
    if args.json:
        facts: dict[str, Any] = {key: {"planned": p, "measured": m, "ratio": p / m} for key, (p, m) in rows.items()}
        facts["update_s"] |= {"low": low, "high": high}
        return to_json({"what": what, **facts, "rank_0": asdict(found)}, indent=1)
    lines = [what, f"{'':26}{'planned':>10}{'measured':>10}{'ratio':>8}"]
    for key, (planned, real) in rows.items():
        told = [memory_size(x) if key in IN_BYTES else f"{1000 * x:,.1f} ms" for x in (planned, real)]
        title = {**IN_BYTES, "update_s": "time of an update"}.get(key, f"  {key}")
        rest = f"  planned {1000 * low:,.1f} to {1000 * high:,.1f} ms" * (key == "update_s")
        lines.append(f"{title:26}{told[0]:>10}{told[1]:>10}{planned / real:>8.2f}{rest}")
    return "\n".join(lines)


IN_BYTES = {"allocated": "tensors and workspaces", "reserved": "reserved", "beside": "beside the allocator"}
