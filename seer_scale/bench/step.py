"""The update against a plain loop of the same method: public networks called once a resolution, the textbook loss, an
optimiser of torch, torch.amp.GradScaler; the same weights, views and precision in one process.

Prints images/s of both, the median of the ratio over interleaved rounds, and both losses. With `--recipe` the method,
model, crops, heads, precision and recomputation are a recipe's, as far as nothing else is given. `--parts` times the
networks of our update one by one, beside their multiply-accumulates.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor

from seer_scale.bench import calibrate
from seer_scale.bench.ranks import wait
from seer_scale.bench.reference import Part, PlainLoop
from seer_scale.bench.reference_dinov2 import DINOv2Loop
from seer_scale.bench.reference_swav import SwAVLoop
from seer_scale.config import Config, Crop, merge, size_text
from seer_scale.config.schema import Method, Model
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.files import to_json
from seer_scale.methods.registry import build_method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine
from seer_scale.training.start import read_recipe, resolve_given

PLAIN_LOOPS: dict[str, type[PlainLoop[Any]]] = {"swav": SwAVLoop, "dinov2": DINOv2Loop}

UPDATE, REST = "update", "losses, optimiser and the rest"
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "V100": 125}
"""Dense half-precision peak of a device, from the makers' data sheets."""

SEER_V100 = ("regnety_256gf", "2x224,4x96", 2.78)
"""Model, crops, images/s of one of 512 V100s: 6.125 s an update of 8,704 images (arXiv 2103.01988)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="", help="a shipped recipe or a YAML file")
    parser.add_argument(
        "--method",
        default="",
        choices=["", *PLAIN_LOOPS],
        help="method of pretraining (default: the recipe's, or swav)",
    )
    parser.add_argument(
        "--model", default="", help="a backbone that timm has too (default: the recipe's, or a small one)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images an update")
    parser.add_argument(
        "--crops",
        default="",
        help="number x size, or number x height x width, of each kind of crop (default: the recipe's, or small ones)",
    )
    parser.add_argument("--prototypes", type=int, default=0, help="(default: the recipe's, or few)")
    parser.add_argument(
        "--precision", default="", choices=["", *COMPUTE_DTYPES], help="(default: the recipe's, or fp32)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of updates, alternating ours and the reference's")
    parser.add_argument("--updates", type=int, default=4, help="updates a round")
    parser.add_argument("--channels-last", action="store_true", help="channels-last feature maps, in both")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="only ours, with the recipe's optimiser, for models of which two do not fit",
    )
    parser.add_argument(
        "--parts", action="store_true", help="also the time of each network of our update, beside what it multiplies"
    )
    parser.add_argument(
        "--recompute",
        default="",
        help='parallel.activation_checkpoint of ours, as in "every 1", "units s1.b1" or "[[2], [7], [9, 17], []]"',
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="instead: measure what this device reaches, for seer-scale plan --device FILE",
    )
    parser.add_argument("--out", default="", metavar="FILE", help="with --calibrate: write it to this file (YAML)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


USED_BY_CALIBRATE = ("calibrate", "out", "json", "device", "threads", "rounds")


def check_calibrate(args: argparse.Namespace) -> None:
    """Raises UserError where an option has no effect."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [key for key, default in vars(parser.parse_args([])).items() if getattr(args, key) != default]
    unused = [key for key in given if key not in USED_BY_CALIBRATE] if args.calibrate else {"out"} & set(given)
    beside = "with --calibrate" if args.calibrate else "without --calibrate"
    problems = [
        Problem(f"--{key.replace('_', '-')}", NOTHING, f"has no effect {beside}", "leave it out") for key in unused
    ]
    if args.rounds < 1:
        problems.append(Problem("--rounds", args.rounds, "must be at least 1", (1,)))
    if problems:
        raise UserError(*problems)


def read_crops(text: str) -> list[dict[str, Any]]:
    """`2x96,4x48x64` as views.crops. Raises UserError."""
    kinds = [kind.split("x") for kind in text.split(",")]
    if not all(len(kind) in (2, 3) and all(map(str.isdecimal, kind)) for kind in kinds):
        rule = "must be number x size, or number x height x width, of each kind"
        raise UserError(Problem("--crops", text, rule, ("2x96,4x64",)))
    of_kinds = [list(map(int, kind)) for kind in kinds]
    return [{"num": num, "size": size if len(size) > 1 else size[0]} for num, *size in of_kinds]


def small_recipe(method: str, batch: int) -> dict[str, Any]:
    """A recipe for timing; the data are never read."""
    return {
        "data": {"path": "-"}, "method": {"name": method}, "schedule": {"warmup_samples": 0},
        "train": {"total_samples": 10**6, "global_batch": batch},
    } | dict(PLAIN_LOOPS[method].small)  # fmt: skip


def configure(args: argparse.Namespace) -> Config:
    """What to time on one rank: the recipe, or a small one, and over it what is given. Raises UserError."""
    method = args.method
    named = {"method": {"name": method}} if method else {}
    named |= {"model": {"name": args.model}} if args.model else {}
    if args.recipe:
        given = merge(read_recipe(args.recipe, named)[0], named)
        method = (given.get("method") or {}).get("name", Method.name)
        if method not in PLAIN_LOOPS:
            raise UserError(Problem("method.name", method, "there is no plain loop of it", tuple(PLAIN_LOOPS)))
    else:
        method = method or Method.name
        given = small_recipe(method, args.batch) | named
    loop, over = PLAIN_LOOPS[method], of_ranks(1)
    over["parallel"]["engine"] = "single"
    if args.recompute:
        over["parallel"]["activation_checkpoint"] = yaml.safe_load(args.recompute)
    over |= {"views": {"crops": read_crops(args.crops)}} if args.crops else {}
    over |= {method: loop.prototypes(args.prototypes)} if args.prototypes else {}
    over |= {"train": {"precision": args.precision}} if args.precision else {}
    if not args.alone:
        model = (given.get("model") or {}).get("name", Model.name)
        given, over = given | {"optim": {}}, merge(over, loop.sides(model))
    config = with_batch(resolve_given(given, over, 1, with_data=False), args.batch)
    if problems := list(loop.refusals(config)):
        raise UserError(*problems)
    return config


def of_ranks(num: int) -> dict[str, Any]:
    """Keys with which any recipe is one of so many ranks, for a timing."""
    alike = {"ranks": num, "replicate_degree": 1, "shard_degree": 0, "sync_bn_group": 0}
    return {"data": {"path": "-"}, "parallel": alike}


def with_batch(config: Config, batch: int, micro_batch: int = 0) -> Config:
    """Of so many images an update: what a recipe must keep to make sense, such as images for its prototypes, a timing
    need not."""
    return replace(config, train=replace(config.train, global_batch=batch, micro_batch=micro_batch))


def fake_views(
    crops: Sequence[Crop], batch: int, device: torch.device, channels_last: bool, seed: int = 0
) -> list[Tensor]:
    """Random images, for each resolution [num * batch, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sizes = [(c.num * batch, 3, *c.shape) for c in crops]
    return [torch.randn(s, generator=generator).to(device).contiguous(memory_format=layout) for s in sizes]


def time_loops(
    loops: Mapping[str, Callable[[], Tensor]], rounds: int, updates: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Seconds of each of so many rounds of `updates`, in turn, after one that warms up; the last loss; on a GPU the
    peak of memory, in GiB."""
    now = calibrate.clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, update in loops.items():
            wait(device)
            begin = now()
            for _ in range(updates):
                loss = update()
            wait(device)
            times[name] += [now() - begin] * bool(turn)
            losses[name] = loss.item()
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
    return times, losses, peaks


def time_parts(
    engine: Engine, parts: Mapping[str, Part], update: Callable[[], Tensor], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each part, and of what else an update takes; whole updates run in turn with them."""

    def run(part: Part) -> None:
        with torch.autocast(device.type, engine.dtype, enabled=engine.dtype != torch.float32):
            part.run()
        engine.method.zero_grad(set_to_none=True)

    works: dict[str, Callable[[], object]] = {name: partial(run, part) for name, part in parts.items()}
    times: dict[str, list[float]] = {name: [] for name in (UPDATE, *works)}
    now = calibrate.clock_of(device)
    for turn in range(rounds + 1):
        for name, work in {UPDATE: update, **works}.items():
            wait(device)
            begin = now()
            work()
            wait(device)
            times[name] += [now() - begin] * bool(turn)
    seconds = {name: statistics.median(own) for name, own in times.items()}
    return {name: seconds[name] for name in parts} | {REST: seconds[UPDATE] - sum(seconds[name] for name in parts)}


def table_of_parts(parts: Mapping[str, Part], seconds: Mapping[str, float]) -> list[str]:
    """Shares are of all parts together."""
    width = max(map(len, seconds))
    time_s, macs = sum(seconds[name] for name in parts), sum(part.update_macs for part in parts.values())
    lines = [f"{'part of our update':{width}}  {'ms':>8}  {'time':>7}  {'GMAC':>8}  {'share':>7}"]
    for name, part in parts.items():
        shares = f"{seconds[name] / time_s:7.1%}  {part.update_macs / 1e9:8.2f}  {part.update_macs / macs:7.1%}"
        lines.append(f"{name:{width}}  {1e3 * seconds[name]:8.1f}  {shares}")
    return [*lines, f"{REST:{width}}  {1e3 * seconds[REST]:8.1f}"]


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    check_calibrate(args)
    if args.calibrate:
        return calibrate.run(args)
    config = configure(args)
    loop, name, batch, kinds = PLAIN_LOOPS[config.method.name], config.model.name, args.batch, config.views.crops
    if not args.alone and (problems := list(loop.problems(config))):
        raise UserError(*problems)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    world = World(device=device)
    method = build_method(config, world)
    views = fake_views(kinds, batch, device, args.channels_last)
    parts = loop.parts(method, config, views)  # before the engine, after which some networks cannot be copied
    engine = build_engine(method, config, world)
    reference = None if args.alone else loop(method, config, device)
    if reference and args.channels_last:
        reference.model.to(memory_format=torch.channels_last)

    def ours(seen: int) -> Tensor:
        loss = engine.gradients([lambda: views], samples_seen=seen).loss
        engine.update(config.peak_lr, seen)
        return loss

    def in_turn(update: Callable[[int], Tensor]) -> Callable[[], Tensor]:
        seen = itertools.count(0, batch)
        return lambda: update(next(seen))

    loops = {"ours": in_turn(ours)}
    if reference:
        loops["reference"] = in_turn(partial(reference.update, views))
    times, losses, peaks = time_loops(loops, args.rounds, args.updates, device)
    seconds = time_parts(engine, parts, loops["ours"], args.rounds, device) if args.parts else {}
    total = (args.rounds + 1) * args.updates
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} threads" if threads > 1 else "CPU time of 1 thread"
    place = torch.cuda.get_device_name() if device.type == "cuda" else on_cpu
    crops, precision = ",".join(f"{c.num}x{size_text(c.size)}" for c in kinds), config.train.precision
    lines = [f"{name}, crops {crops}, batch {batch}, {precision}, {place}, torch {torch.__version__}"]
    rates = {loop: batch * args.updates / statistics.median(seconds) for loop, seconds in times.items()}
    ratio = statistics.median(r / o for o, r in zip(times["ours"], times["reference"])) if reference else None
    macs, update_macs = (sum(of) // batch for of in zip(*((p.macs, p.update_macs) for p in parts.values())))
    if args.json:
        return to_json({
            "what": lines[0], "method": config.method.name, "images_per_s": rates, "loss": losses, "peak_gib": peaks,
            "speed": ratio, "macs_per_image": macs,
        } | ({"parts": {
            part: {"seconds": s, "macs": parts[part].update_macs if part in parts else 0} for part, s in seconds.items()
        }} if seconds else {}), indent=1)  # fmt: skip
    recomputed = config.parallel.activation_checkpoint
    if args.recipe or config.method.name != Method.name or recomputed != "none":
        spans = recomputed if isinstance(recomputed, str) else [list(stage) for stage in recomputed]
        lines.append(f"{loop.heads(config)}, {config.optim.name}, recomputed: {spans}")
    for side, rate in rates.items():
        line = f"{side:9}  {rate:9.2f} images/s   loss after {total} updates {losses[side]:.6f}"
        lines.append(line + (f"   peak {peaks[side]:.1f} GiB" if peaks else ""))
    if reference:
        lines.append(
            f"ours / reference: {ratio:.3f} times the images/s (median of {args.rounds} interleaved "
            f"rounds{'; peaks hold both models' if peaks else ''})"
        )
    rate, flops = rates["ours"], 2e-12 * update_macs
    peak = next((p for n, p in PEAK_TFLOPS.items() if n in place), None)
    share = f", {flops * rate / peak:.1%} of {peak} (model FLOP utilisation)" if peak and precision != "fp32" else ""
    lines.append(
        f"ours: {macs / 1e9:.1f} GMAC an image forward, {flops * rate:.2f} TFLOP/s without recomputation{share}"
    )
    if (name, crops) == SEER_V100[:2]:
        lines.append(
            f"the paper: {SEER_V100[2]} images/s on each of 512 V100 in fp16, "
            f"{flops * SEER_V100[2]:.1f} TFLOP/s by the same count; ours here: "
            f"{rate / SEER_V100[2]:.2f} times that"
        )
    return "\n".join(lines + (table_of_parts(parts, seconds) if seconds else []))
