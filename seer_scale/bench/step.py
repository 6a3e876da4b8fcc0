"""The update against a plain loop: timm's RegNetY called once a resolution, textbook SwAV (the reference's
distributed_sinkhorn), torch.optim.SGD, torch.amp.GradScaler; the same weights, views and precision in one process.

Prints images/s of both, the median of the ratio over interleaved rounds, and both losses. With `--recipe` the model,
crops, head, prototypes, assignment, precision and recomputation are a recipe's, as far as nothing else is given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from seer_scale.bench import calibrate
from seer_scale.bench.ranks import wait
from seer_scale.config import Config, Crop, load_recipe, resolve
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.files import to_json
from seer_scale.interop.names import TIMM_MODELS
from seer_scale.methods.swav.method import SwAV
from seer_scale.methods.swav.settings import SwAVSettings
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.parallel import build_engine

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "V100": 125}
"""Dense half-precision peak of a device, from the makers' data sheets."""

SINGLE_RANK = World()


SEER_V100 = ("regnety_256gf", "2x224,4x96", 2.78)
"""Model, crops, images/s of one of 512 V100s: 6.125 s an update of 8,704 images (arXiv 2103.01988)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="", help="a shipped recipe or a YAML file")
    parser.add_argument(
        "--model", default="", help="a backbone that timm has too (default: the recipe's, or regnety_200mf)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images an update")
    parser.add_argument(
        "--crops", default="", help="number x size of each kind of crop (default: the recipe's, or 2x96,4x64)"
    )
    parser.add_argument("--prototypes", type=int, default=0, help="(default: the recipe's, or 32)")
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


def read_crops(text: str) -> list[dict[str, int]]:
    """`2x96,4x64` as views.crops. Raises UserError."""
    try:
        return [dict(zip(("num", "size"), map(int, kind.split("x")), strict=True)) for kind in text.split(",")]
    except ValueError:
        raise UserError(Problem("--crops", text, "must be number x size of each kind", ("2x96,4x64",))) from None


def small_recipe(model: str, crops: list[dict[str, int]], batch: int, prototypes: int, precision: str) -> dict:
    """A recipe for timing; the data are never read."""
    return {
        "data": {"path": "-"}, "model": {"name": model}, "views": {"crops": crops},
        "swav": {"hidden": [512], "embedding_dim": 128, "prototypes": [prototypes], "iterations": 3},
        "optim": {"name": "lars", "lr": 0.03, "lr_batch": 0}, "schedule": {"warmup_samples": 0},
        "train": {"total_samples": 10**6, "global_batch": batch, "precision": precision},
    }  # fmt: skip


def configure(args: argparse.Namespace) -> Config:
    """What to time on one rank: the recipe, or a small one, and over it what is given. Raises UserError."""
    crops, precision = args.crops or "2x96,4x64", args.precision or "fp32"
    given = small_recipe(args.model or "regnety_200mf", read_crops(crops), args.batch, args.prototypes or 32, precision)
    over: dict = {"parallel": {"engine": "single"}}
    if args.recipe:
        given = load_recipe(args.recipe)
        over = of_ranks(1)
        over["parallel"]["engine"] = "single"
        over |= {"model": {"name": args.model}} if args.model else {}
        over |= {"views": {"crops": read_crops(args.crops)}} if args.crops else {}
        over |= {"swav": {"prototypes": [args.prototypes]}} if args.prototypes else {}
        over |= {"train": {"precision": args.precision}} if args.precision else {}
    if args.recompute:
        over["parallel"]["activation_checkpoint"] = yaml.safe_load(args.recompute)
    if not args.alone:
        over["optim"] = {"name": "sgd", "lr": 0.03, "lr_batch": 0}
        given = given | {"optim": {}}
    return with_batch(resolve(given, over, world_size=1), args.batch)


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
    """Random images, for each resolution [num * batch, 3, S, S]."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sizes = [(c.num * batch, 3, c.size, c.size) for c in crops]
    return [torch.randn(s, generator=generator).to(device).contiguous(memory_format=layout) for s in sizes]


def macs_an_image(method: SwAV, crops: Sequence[Crop]) -> int:
    """Multiply-accumulates of one forward of one image's crops: the trunk's convolutions, groups counted as such, the
    head's matrices and the prototypes."""
    linear = sum(m.in_features * m.out_features for m in method.modules() if isinstance(m, nn.Linear))
    return sum(c.num * (method.backbone.num_macs(c.size) + linear) for c in crops)


class Reference(nn.Module):
    """main_swav.py's multi-crop forward over timm's model, its head and prototypes."""

    def __init__(self, ours: SwAV, name: str):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            fix = f"install it ({how_to_install('timm')}), or give --alone"
            raise UserError(Problem("timm", NOTHING, "is what bench step compares with", fix)) from error
        self.backbone = timm.create_model(TIMM_MODELS[name], num_classes=0)
        self.backbone.load_state_dict(ours.backbone.state_dict())
        layers: list[nn.Module] = []
        for layer in ours.head:
            if isinstance(layer, nn.Linear):
                layers.append(nn.Linear(layer.in_features, layer.out_features))
            elif isinstance(layer, nn.ReLU):
                layers.append(nn.ReLU(inplace=True))
            elif isinstance(layer, BatchNorm):
                layers.append(nn.BatchNorm1d(layer.num_features))
            else:
                raise TypeError(f"a projection head has a {type(layer).__name__}")
        self.head = nn.Sequential(*layers)
        self.head.load_state_dict(ours.head.state_dict())
        self.prototypes = nn.Linear(ours.config.embedding_dim, ours.config.prototypes[0], bias=False)
        self.prototypes.load_state_dict(ours.prototypes[0].state_dict())

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        z = self.head(torch.cat([self.backbone(v) for v in views]))
        z = F.normalize(z, dim=1, p=2)
        return z, self.prototypes(z)


@torch.no_grad()
def textbook_sinkhorn(scores: Tensor, epsilon: float, iterations: int, world: World = SINGLE_RANK) -> Tensor:
    """distributed_sinkhorn of main_swav.py. scores [B, K] of this rank -> codes [B, K]."""
    Q = torch.exp(scores / epsilon).t()
    K, B = Q.shape[0], Q.shape[1] * world.size
    Q /= world.sum_(Q.sum())
    for _ in range(iterations):
        Q /= world.sum_(Q.sum(dim=1, keepdim=True))
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).t()


def textbook_loss(scores: Tensor, config: Config) -> Tensor:
    """main_swav.py's loss over all crops. scores [V * B, K], crop-major."""
    s, batch = config.settings_as(SwAVSettings), config.train.global_batch
    scores = scores.float()
    none = scores.new_zeros(())
    loss, assigned = none, config.views.crops[0].num
    for crop in range(assigned):
        codes = textbook_sinkhorn(scores[batch * crop : batch * (crop + 1)].detach(), s.epsilon, s.iterations)
        others = [v for v in range(config.num_crops) if v != crop]
        terms = [
            (codes * F.log_softmax(scores[batch * v : batch * (v + 1)] / s.temperature, dim=1)).sum(1).mean()
            for v in others
        ]
        loss = loss - sum(terms, start=none) / len(others)
    return loss / assigned


class ReferenceLoop:
    def __init__(self, ours: SwAV, config: Config, device: torch.device):
        self.config, self.device, self.dtype = config, device, COMPUTE_DTYPES[config.train.precision]
        self.model = Reference(ours, config.model.name).to(device)
        o = config.optim
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.peak_lr, momentum=o.momentum, weight_decay=o.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def update(self, views: list[Tensor]) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            _, scores = self.model(views)
        loss = textbook_loss(scores, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.model.prototypes.weight.copy_(F.normalize(self.model.prototypes.weight, dim=1))
        return loss.detach()


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    check_calibrate(args)
    if args.calibrate:
        return calibrate.run(args)
    config = configure(args)
    name, batch, kinds = config.model.name, args.batch, config.views.crops
    if not args.alone and name not in TIMM_MODELS:
        known = ", ".join(TIMM_MODELS)
        raise UserError(Problem("--model", name, "timm has none of that name", f"give --alone, or one of {known}"))
    prototypes = config.settings_as(SwAVSettings).prototypes
    if not args.alone and len(prototypes) > 1:
        fix = "give --alone, or --prototypes"
        raise UserError(Problem("swav.prototypes", prototypes, "the reference has one set of them", fix))
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    world = World(device=device)
    with torch.device("meta"):
        method = SwAV(config, world)
    engine = build_engine(method, config, world)
    reference = None if args.alone else ReferenceLoop(method, config, device)
    if reference and args.channels_last:
        reference.model.to(memory_format=torch.channels_last)
    views = fake_views(kinds, batch, device, args.channels_last)

    def ours() -> Tensor:
        loss = engine.gradients([lambda: views], samples_seen=0).loss
        engine.update(config.peak_lr, 0)
        return loss

    loops = {"ours": ours} | ({"reference": lambda: reference.update(views)} if reference else {})
    times: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, float] = {}
    peaks = {}
    for turn in range(args.rounds + 1):  # the first warms up
        for loop, update in loops.items():
            wait(device)
            begin = time.perf_counter()
            for _ in range(args.updates):
                loss = update()
            wait(device)
            times[loop] += [time.perf_counter() - begin] * bool(turn)
            losses[loop] = loss.item()
            if device.type == "cuda":
                peaks[loop] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
    total = (args.rounds + 1) * args.updates
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    crops, precision = ",".join(f"{c.num}x{c.size}" for c in kinds), config.train.precision
    lines = [f"{name}, crops {crops}, batch {batch}, {precision}, {place}, torch {torch.__version__}"]
    rates = {loop: batch * args.updates / statistics.median(seconds) for loop, seconds in times.items()}
    ratio = statistics.median(r / o for o, r in zip(times["ours"], times["reference"])) if reference else None
    macs = macs_an_image(method, kinds)
    if args.json:
        return to_json({
            "what": lines[0], "images_per_s": rates, "loss": losses, "peak_gib": peaks, "speed": ratio,
            "macs_per_image": macs,
        }, indent=1)  # fmt: skip
    recomputed = config.parallel.activation_checkpoint
    if args.recipe or recomputed != "none":
        s = config.settings_as(SwAVSettings)
        widths = " x ".join(map(str, [*s.hidden, s.embedding_dim]))
        norm = " with BatchNorm" if s.batch_norm else ""
        spans = recomputed if isinstance(recomputed, str) else [list(stage) for stage in recomputed]
        lines.append(f"head {widths}{norm}, prototypes {list(s.prototypes)}, {config.optim.name}, recomputed: {spans}")
    for loop, rate in rates.items():
        line = f"{loop:9}  {rate:9.2f} images/s   loss after {total} updates {losses[loop]:.6f}"
        lines.append(line + (f"   peak {peaks[loop]:.1f} GiB" if peaks else ""))
    if reference:
        lines.append(
            f"ours / reference: {ratio:.3f} times the images/s (median of {args.rounds} interleaved "
            f"rounds{'; peaks hold both models' if peaks else ''})"
        )
    rate = rates["ours"]
    peak = next((p for n, p in PEAK_TFLOPS.items() if n in place), None)
    share = (
        f", {6e-12 * macs * rate / peak:.1%} of {peak} (model FLOP utilisation)" if peak and precision != "fp32" else ""
    )
    lines.append(
        f"ours: {macs / 1e9:.1f} GMAC an image forward, {6e-12 * macs * rate:.2f} TFLOP/s without recomputation{share}"
    )
    if (name, crops) == SEER_V100[:2]:
        lines.append(
            f"the paper: {SEER_V100[2]} images/s on each of 512 V100 in fp16, "
            f"{6e-12 * macs * SEER_V100[2]:.1f} TFLOP/s by the same count; ours here: "
            f"{rate / SEER_V100[2]:.2f} times that"
        )
    return "\n".join(lines)
