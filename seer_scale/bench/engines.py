"""Every engine against ddp, and every feature against the same engine without it: images/s and memory of a rank.

The ranks are processes of this machine: on the CPU all cases are built in the same ranks and take turns, in another
order each round; ratios are medians over rounds. On GPUs they are built and measured one after another.

An engine costs by the parameter, computing by the pixel: SEER's 256GF does 7,800 multiply-adds a parameter and update
on a rank (16 images of 2 x 224 + 4 x 96), the default here 630, so an engine looks worse here than there.

Memory is counted from before an engine is built. `peak` is the most of an update after two that warm up, images
included; `held` is what is there between backward and update, without the images: weights, gradients, optimiser state,
running statistics and what libraries keep, such as buckets. On GPUs both are the allocator's figures. On the CPU, where
nobody counts, they are the bytes of all storages that torch operations have made and that still live: exact for
tensors, blind to what a kernel uses inside. Host memory is all there is there, so offloading saves none of it.

`calls` are the collectives of an update. `alone` is the time they take by themselves, one after the other on tensors of
the same sizes, as a share of the update: what a backend that overlaps nothing, such as gloo, costs whatever we do.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from seer_scale.bench.collectives import CollectiveCounter
from seer_scale.bench.ranks import run_ranks, seconds, wait, where
from seer_scale.bench.step import fake_views, read_crops, small_recipe
from seer_scale.config import ZERO_ENGINES, Config, merge, resolve
from seer_scale.distributed import World
from seer_scale.errors import ConfigError, Problem, UserError, nearest
from seer_scale.files import to_json
from seer_scale.formatting import memory_size
from seer_scale.methods.registry import build_method
from seer_scale.parallel import ENGINES
from seer_scale.parallel.engine import Engine

FEATURES = (
    "activation_checkpoint", "reshard_after_forward", "min_unit_mib", "replicate", "precision", "sync_bn_group",
    "micro_batch", "offload",
)  # fmt: skip
SHARDED = [name for name in ENGINES if name not in ("single", "ddp")]
WARM_UP = 2
"""DDP makes its final buckets in the second update."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", default=",".join(SHARDED), help="engines to compare with ddp")
    parser.add_argument("--features", default="all", help=f"all, none, or some of {','.join(FEATURES)}")
    parser.add_argument("--compile", action="store_true", help="also train.compile, which takes minutes to start")
    parser.add_argument("--model", default="regnety_200mf", help="a backbone's name")
    parser.add_argument("--batch", type=int, default=32, help="global batch")
    parser.add_argument("--crops", default="2x96,4x48", help="number x size of each kind of crop")
    parser.add_argument("--prototypes", type=int, default=32)
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=["fp32", "fp16", "bf16"],
        help="precision of all cases, except those that measure precision",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ranks", type=int, default=0, help="0 = 2 on the CPU, every GPU on cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=1, help="updates a round")
    parser.add_argument("--channels-last", action="store_true", help="images and feature maps channels-last")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


@dataclass(frozen=True)
class Case:
    """A row: a recipe's difference, and the row it is compared with."""

    name: str
    over: dict
    against: str


Update = tuple[Callable[[], None], CollectiveCounter]


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    """Seconds of an update's collectives by themselves."""
    calls: int = 0
    moved: int = 0
    peak: int = 0
    held: int = 0


# ------------------------------------------------------------------------------------------------ what is compared


def list_cases(args: argparse.Namespace, ranks: int) -> tuple[list[Case], list[str]]:
    """The rows, each after the one it is compared with, and a sentence for each that cannot be. Raises UserError."""
    engines = [e for e in args.engines.split(",") if e and e != "ddp"]
    for engine in engines:
        if engine not in SHARDED:
            raise UserError(Problem("--engines", engine, "there is no such engine", nearest(engine, SHARDED)))
    chosen = {"all": list(FEATURES), "none": []}.get(args.features, args.features.split(","))
    for name in chosen:
        if name not in FEATURES:
            raise UserError(Problem("--features", name, "there is no such feature", nearest(name, FEATURES)))
    cases = [Case(e, {"parallel": {"engine": e}}, "ddp") for e in ["ddp", *engines]]
    out: list[str] = []

    def feature(name: str, what: str, over: dict, on: str = "fsdp") -> None:
        if name not in chosen:
            return
        if on not in [c.name for c in cases]:
            cases.append(Case(on, {"parallel": {"engine": on}}, "ddp"))
        parallel = {"engine": on} | over.get("parallel", {})
        cases.append(Case(f"{on}, {what}", over | {"parallel": parallel}, on))

    half = args.batch // ranks // 2
    feature(
        "activation_checkpoint", "activation_checkpoint every 1", {"parallel": {"activation_checkpoint": "every 1"}}
    )
    feature("reshard_after_forward", "reshard_after_forward false", {"parallel": {"reshard_after_forward": False}})
    feature("min_unit_mib", "min_unit_mib 0 (each unit alone)", {"parallel": {"min_unit_mib": 0.0}})
    if ranks >= 4:
        feature("replicate", "replicate 2", {"parallel": {"replicate_degree": 2}})
    elif "replicate" in chosen:
        out.append(f"replicate is left out: two copies, each spread over ranks, need 4 ranks, not {ranks}.")
    for precision in ("fp32", "bf16", "fp16"):
        if precision != args.precision:
            feature("precision", f"precision {precision}", {"train": {"precision": precision}})
    if ranks > 1:
        for engine in ("ddp", "fsdp"):
            feature("sync_bn_group", "sync_bn_group 1", {"parallel": {"sync_bn_group": 1}}, on=engine)
    elif "sync_bn_group" in chosen:
        out.append("sync_bn_group is left out: one rank has nobody to share statistics with.")
    feature("micro_batch", f"micro_batch {half} (2 micro-batches)", {"train": {"micro_batch": max(1, half)}})
    for engine in engines:
        if engine in ZERO_ENGINES:
            feature("offload", "offload", {"parallel": {"offload": True}}, on=engine)
    if args.compile:
        chosen.append("compile")
        feature("compile", "compile", {"train": {"compile": True}})
    return cases, out


def class_of(engine: str) -> type[Engine]:
    """The class itself: `build_engine` takes `single` on one rank, where the engines are still worth measuring."""
    module, name = ENGINES[engine]
    return getattr(importlib.import_module(f"seer_scale.parallel.{module}"), name)


# ------------------------------------------------------------------------------------------------ bytes


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations under it make: `now` sums those alive, `peak` the most since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self.now = self.peak = 0

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_  # FSDP frees and fills gathered weights in place

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            out = resize(storage, size)
            if storage._cdata in self._alive:
                self._count(storage)
            return out

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", counted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it takes itself apart first, and its local operations come here
        out = func(*args, **kwargs or {})
        self._see(out)
        return out

    def _see(self, out: object) -> None:
        if isinstance(out, list | tuple):
            for part in out:
                self._see(part)
        # others are fakes, with which DTensor plans an operation
        elif isinstance(out, Tensor) and type(out) in (Tensor, nn.Parameter) and out.device.type != "meta":
            self._count(out.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        ref, before = self._alive.get(key) or (weakref.ref(storage, lambda _: self._forget(key)), 0)
        self._alive[key] = ref, storage.nbytes()
        self.now += storage.nbytes() - before
        if self.now > self.peak:
            time.sleep(0.0005)  # what gloo's threads are about to let go of is no peak
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]

    def settled(self) -> int:
        """`now`, once a backend's threads have let go of the last collectives' tensors: gloo's do a moment later."""
        time.sleep(0.05)
        return self.now

    def reset(self) -> None:
        self.peak = self.now


class CudaBytes:
    """The same face over the allocator's own count."""

    def __enter__(self) -> CudaBytes:
        gc.collect()
        torch.cuda.empty_cache()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated() - self._before

    def settled(self) -> int:
        return self.now

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------------------------------------------------------ on a rank


def measure(world: World, given: dict) -> tuple[dict[str, Measured], list[str]]:
    cases, args = given["cases"], given["args"]
    rows: dict[str, Measured] = {}
    updates: dict[str, Update] = {}
    left_out = []
    for case, config in cases:
        if case.against not in rows and case.against != case.name:
            left_out.append(f"{case.name} is left out, since {case.against} is.")
            continue
        try:
            engine_class = class_of(config.parallel.engine)
        except ImportError as error:
            left_out.append(f"{case.name} is left out: {error.name or error} is missing here.")
            continue
        rows[case.name] = Measured()
        updates[case.name] = prepare(engine_class, config, world, args, rows[case.name])
        if world.device.type == "cuda":  # only one of them is there at a time
            time_rounds(updates, rows, world, args)
            updates.clear()
    time_rounds(updates, rows, world, args)
    return rows, left_out


def time_rounds(updates: dict[str, Update], rows: dict[str, Measured], world: World, args: argparse.Namespace) -> None:
    order = random.Random(0)
    for _ in range(args.rounds):
        for name in order.sample(list(updates), len(updates)):
            update, collectives = updates[name]
            rows[name].seconds.append(seconds(partial(_repeated, update, args.updates), world) / args.updates)
            rows[name].alone.append(seconds(collectives.repeat, world))


def _repeated(update: Callable[[], object], times: int) -> None:
    for _ in range(times):
        update()


def prepare(
    engine_class: type[Engine], config: Config, world: World, args: argparse.Namespace, row: Measured
) -> Update:
    """Build the engine, warm it up, find what it holds and moves; returns what makes an update, and its collectives."""
    with CudaBytes() if world.device.type == "cuda" else LiveBytes() as count:
        method = build_method(config, world)
        engine = engine_class(method, config, world)
        share, num = config.train.global_batch // world.size, config.num_micro_batches(world.size)
        batches = [
            fake_views(config.views.crops, share // num, world.device, args.channels_last, seed=world.rank * num + i)
            for i in range(num)
        ]
        images = sum(v.numel() * v.itemsize for views in batches for v in views)
        makers = [lambda views=views: views for views in batches]

        def update() -> None:
            engine.gradients(makers, samples_seen=0)
            engine.update(config.peak_lr, 0)

        for _ in range(WARM_UP):
            update()
        with CollectiveCounter() as collectives:
            update()
        row.calls, row.moved = len(collectives.calls), collectives.nbytes
        gc.collect()
        wait(world.device)
        count.settled()
        count.reset()
        engine.gradients(makers, samples_seen=0)
        row.held = count.settled() - images
        engine.update(config.peak_lr, 0)
        wait(world.device)
        row.peak = count.peak
    return update, collectives


# ------------------------------------------------------------------------------------------------ what is printed


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    crops = read_crops(args.crops)
    cases, left_out = list_cases(args, ranks)
    given_here = {
        "model": {"name": args.model}, "views": {"crops": crops}, "swav": {"prototypes": [args.prototypes]},
        "train": {"precision": args.precision},
    }  # fmt: skip
    base = merge(small_recipe("swav", args.batch), given_here)
    given = []
    for case in cases:
        try:
            given.append((case, resolve(base, case.over, world_size=ranks)))
        except ConfigError as error:
            if case.against == case.name:
                raise
            left_out.append(f"{case.name} is left out: {error}")
    rows, missing = run_ranks(measure, {"cases": given, "args": args}, ranks=ranks, device=args.device)
    left_out += missing
    table = [table_row(case, rows, args) for case in cases if case.name in rows]
    device = (
        where(torch.device(args.device))
        if args.device == "cuda"
        else f"CPU, 1 thread a rank, torch {torch.__version__}"
    )
    title = f"{args.model}, crops {args.crops}, global batch {args.batch}, {args.precision}, {ranks} ranks, {device}"
    if args.json:
        return to_json({"what": title, "rows": table, "left_out": left_out}, indent=1)
    turns = (
        f"{args.rounds} interleaved rounds"
        if args.device == "cpu"
        else f"{args.rounds} rounds of each, one after another"
    )
    return "\n".join(
        [
            title,
            (
                f"each ratio is to the row named under 'to'; speed: median of {turns}; collectives, bytes and "
                "memory are a rank's"
            ),
            *aligned(table),
            *left_out,
        ]
    )


def table_row(case: Case, rows: dict[str, Measured], args: argparse.Namespace) -> dict:
    mine, other = rows[case.name], rows[case.against]
    return {
        "case": case.name, "against": case.against,
        "images_per_s": args.batch / statistics.median(mine.seconds),
        "speed": statistics.median(o / m for m, o in zip(mine.seconds, other.seconds)),
        "calls": mine.calls, "moved_bytes": mine.moved,
        "alone": statistics.median(a / s for a, s in zip(mine.alone, mine.seconds)),
        "peak_bytes": mine.peak, "peak": mine.peak / other.peak,
        "held_bytes": mine.held, "held": mine.held / other.held,
    }  # fmt: skip


def aligned(table: list[dict]) -> list[str]:
    lines = [("", "images/s", "ratio", "calls", "moved", "alone", "peak", "ratio", "held", "ratio", "to")]
    for r in table:
        ratios = [f"{r[k]:.3f}" if r["case"] != r["against"] else "" for k in ("speed", "peak", "held")]
        to = r["against"] if r["case"] != r["against"] else ""
        moved = str(r["calls"]), memory_size(r["moved_bytes"]), f"{100 * r['alone']:.1f} %"
        memory = memory_size(r["peak_bytes"]), ratios[1], memory_size(r["held_bytes"]), ratios[2]
        lines.append((r["case"], f"{r['images_per_s']:.2f}", ratios[0], *moved, *memory, to))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    sides = "<" + ">" * 9 + "<"
    return ["  ".join(f"{w:{side}{n}}" for w, side, n in zip(line, sides, widths)).rstrip() for line in lines]
