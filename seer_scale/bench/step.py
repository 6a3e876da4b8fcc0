"""The update against a plain loop: timm's RegNetY called once a resolution, textbook SwAV (the reference's
distributed_sinkhorn), torch.optim.SGD, torch.amp.GradScaler; the same weights, views and precision in one process.

Prints images/s of both, the median of the ratio over interleaved rounds, and both losses.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale.config import Config, resolve
from seer_scale.errors import UserError
from seer_scale.methods.swav import SwAV
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import COMPUTE, Engine
from seer_scale.world import World

TIMM = {"200mf": "002", "400mf": "004", "600mf": "006", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "4gf": "040",
        "6_4gf": "064", "8gf": "080", "12gf": "120", "16gf": "160", "32gf": "320", "64gf": "640", "128gf": "1280", "256gf": "2560"}  # fmt: skip


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "V100": 125}
"""Dense half-precision peak of a device, from the makers' data sheets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="regnety_200mf", help="a backbone timm has too")
    parser.add_argument("--batch", type=int, default=8, help="images an update")
    parser.add_argument("--crops", default="2x96,4x64", help="number x size of each kind of crop")
    parser.add_argument("--prototypes", type=int, default=32)
    parser.add_argument("--precision", default="fp32", choices=list(COMPUTE))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of updates, ours and the reference's in turn")
    parser.add_argument("--updates", type=int, default=4, help="updates a round")
    parser.add_argument("--channels-last", action="store_true", help="both keep feature maps channels-last")
    parser.add_argument("--alone", action="store_true", help="ours only, for models of which two do not fit")
    parser.add_argument("--recompute", default="", help="stages whose blocks are recomputed, as in 1,2,3")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's default")


class Reference(nn.Module):
    """main_swav.py's multi-crop forward over timm's model, its head and prototypes."""

    def __init__(self, ours: SwAV, name: str):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise UserError("bench step compares with timm: pip install timm.") from error
        self.backbone = timm.create_model(f"regnety_{TIMM[name.removeprefix('regnety_')]}", num_classes=0)
        self.backbone.load_state_dict(ours.backbone.state_dict())
        layers: list[nn.Module] = []
        for layer in ours.head:
            if isinstance(layer, nn.Linear):
                layers.append(nn.Linear(layer.in_features, layer.out_features))
            elif isinstance(layer, nn.ReLU):
                layers.append(nn.ReLU(inplace=True))
            else:
                layers.append(nn.BatchNorm1d(layer.num_features))
        self.head = nn.Sequential(*layers)
        self.head.load_state_dict(ours.head.state_dict())
        self.prototypes = nn.Linear(ours.config.dim, ours.config.prototypes[0], bias=False)
        self.prototypes.weight.data.copy_(ours.prototypes[0].weight)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        z = self.head(torch.cat([self.backbone(v) for v in views]))
        z = F.normalize(z, dim=1, p=2)
        return z, self.prototypes(z)


@torch.no_grad()
def textbook_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """distributed_sinkhorn of main_swav.py on one process. scores [B, K] -> codes [B, K]."""
    Q = torch.exp(scores / epsilon).t()
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).t()


def textbook_loss(scores: Tensor, config: Config) -> Tensor:
    """main_swav.py's loss over all crops. scores [V * B, K], crop-major."""
    s, batch = config.swav, config.train.global_batch
    scores = scores.float()
    loss, assigned = 0.0, config.views.crops[0].num
    for crop in range(assigned):
        codes = textbook_sinkhorn(scores[batch * crop : batch * (crop + 1)].detach(), s.epsilon, s.iterations)
        others = [v for v in range(config.num_crops) if v != crop]
        terms = [(codes * F.log_softmax(scores[batch * v : batch * (v + 1)] / s.temperature, dim=1)).sum(1).mean() for v in others]
        loss = loss - sum(terms) / len(others)
    return loss / assigned


class ReferenceLoop:
    def __init__(self, engine: Engine, config: Config, device: torch.device):
        self.config, self.device, self.dtype = config, device, COMPUTE[config.train.precision]
        self.model = Reference(engine.method, config.model.name).to(device)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        o = config.optim
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.peak_lr, momentum=o.momentum, weight_decay=o.weight_decay)
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
    if args.model.removeprefix("regnety_") not in TIMM:
        raise UserError(f"timm has no {args.model}; choose from {', '.join('regnety_' + n for n in TIMM)}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    crops = [dict(zip(("num", "size"), map(int, kind.split("x")))) for kind in args.crops.split(",")]
    given = {
        "data": {"path": "-"}, "model": {"name": args.model}, "views": {"crops": crops},
        "swav": {"hidden": [512], "dim": 128, "prototypes": [args.prototypes], "iterations": 3},
        "optim": {"name": "sgd", "lr": 0.03, "lr_batch": 0}, "schedule": {"warmup_samples": 0},
        "train": {"samples": 10**6, "global_batch": args.batch, "precision": args.precision, "channels_last": args.channels_last},
        "parallel": {"engine": "single", "activation_checkpoint": [int(s) for s in args.recompute.split(",") if s]},
    }  # fmt: skip
    config = resolve(given, world_size=1)
    device = torch.device(args.device)
    world = World(device=device)
    with torch.device("meta"):
        method = SwAV(config, world)
    engine = build_engine(method, config, world)
    reference = None if args.alone else ReferenceLoop(engine, config, device)

    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    views = [
        torch.randn(c.num * args.batch, 3, c.size, c.size, generator=generator).to(device).contiguous(memory_format=layout)
        for c in config.views.crops
    ]

    def ours() -> Tensor:
        loss, _ = engine.forward(views, samples_seen=0)
        engine.backward(loss)
        engine.update(config.peak_lr)
        return loss.detach()

    loops = {"ours": ours} | ({"reference": lambda: reference.update(views)} if reference else {})
    times: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, float] = {}
    peaks = {}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, update in loops.items():
            _synchronise(device)
            begin = time.perf_counter()
            for _ in range(args.updates):
                loss = update()
            _synchronise(device)
            times[name] += [time.perf_counter() - begin] * bool(turn)
            losses[name] = loss.item()
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
    total = (args.rounds + 1) * args.updates
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"{args.model}, crops {args.crops}, batch {args.batch}, {args.precision}, {where}, torch {torch.__version__}"]
    for name, seconds in times.items():
        rate = args.batch * args.updates / statistics.median(seconds)
        line = f"{name:9}  {rate:9.2f} images/s   loss after {total} updates {losses[name]:.6f}"
        lines.append(line + (f"   peak {peaks[name]:.1f} GiB" if peaks else ""))
    if reference:
        ratio = statistics.median(r / o for o, r in zip(times["ours"], times["reference"]))
        lines.append(f"ours / reference: {ratio:.3f} times the images/s (median of {args.rounds} interleaved rounds{'; peaks hold both models' if peaks else ''})")
    macs = sum(c.num * method.backbone.num_macs(c.size) for c in config.views.crops)
    tflops = 6e-12 * macs * args.batch * args.updates / statistics.median(times["ours"])
    peak = next((p for n, p in PEAK_TFLOPS.items() if n in where), None)
    share = f", {tflops / peak:.1%} of {peak} (model FLOP utilisation)" if peak and args.precision != "fp32" else ""
    lines.append(f"ours: {macs / 1e9:.1f} GMAC an image forward, {tflops:.2f} TFLOP/s without recomputation{share}")
    return "\n".join(lines)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
