"""What `eval linear` pays for a sweep: an update of many heads against one of a single head, with the forward of the
frozen backbone that feeds either.

Both see the same images, already decoded, in turn; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seer_scale.bench.ranks import seconds, where
from seer_scale.cores import available_cores
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.evaluate.context import accelerator_of
from seer_scale.evaluate.heads import Head, Heads, HeadsSGD, update
from seer_scale.evaluate.layers import fit_inputs, layers_of
from seer_scale.evaluate.subject import Subject, begin
from seer_scale.files import to_json
from seer_scale.models.registry import build_backbone

if TYPE_CHECKING:
    from accelerate import Accelerator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="regnety_400mf", help="a registered name, or timm/NAME")
    parser.add_argument("--size", type=int, default=224, help="of images, in pixels")
    parser.add_argument("--batch", type=int, default=64, help="images an update")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def updates(args: argparse.Namespace, accelerator: Accelerator) -> dict[int, Callable[[], Tensor]]:
    """By the number of heads, the sweep's and one: an update of theirs, with the forward that feeds it."""
    device = torch.device(args.device)
    model = build_backbone(args.backbone).to_empty(device="cpu").eval()
    begin(model, 0)
    subject = Subject(path=Path(), model=model.to(device), fingerprint="", weights="random", size=args.size)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=draw).to(device)
    targets = torch.randint(args.classes, (args.batch,), generator=draw).to(device)
    layers = layers_of(subject, ("last",))
    inputs = fit_inputs(layers, layers.encode(images).cpu(), "standardize")

    def update_of(num: int) -> Callable[[], Tensor]:
        heads = Heads(
            [Head("last", 0.01 + 0.001 * i, 0.0) for i in range(num)], {"last": model.num_features}, args.classes
        ).to(device)
        wrapped, optimizer = accelerator.prepare(heads, HeadsSGD(heads.groups(), 0.9))
        return lambda: update(wrapped, optimizer, accelerator, inputs(layers.encode(images)), targets)

    return {args.heads: update_of(args.heads), 1: update_of(1)}


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    for option in ("size", "batch", "classes", "heads", "rounds"):
        if getattr(args, option) < 1:
            raise UserError(Problem(f"--{option}", getattr(args, option), "must be at least 1", (1,)))
    device = torch.device(args.device)
    torch.set_num_threads(available_cores())
    world = World(device=device)
    accelerator = accelerator_of(world)
    both = updates(args, accelerator)
    taken: dict[int, list[float]] = {num: [] for num in both}
    for turn in range(args.rounds + 1):  # the first warms up
        for num, work in both.items():
            taken[num] += [seconds(work, world)] * bool(turn)
    accelerator.free_memory()
    ratio = statistics.median(many / one for many, one in zip(taken[args.heads], taken[1]))
    medians = {num: statistics.median(times) for num, times in taken.items()}
    what = f"{args.backbone}, {args.batch} images of {args.size} px, {args.classes} classes, {where(device)}"
    if args.json:
        return to_json({"what": what, "seconds": medians, "heads": args.heads, "ratio": ratio}, indent=1)
    lines = [what]
    for num, median in medians.items():
        lines.append(f"{f'{num} heads' if num > 1 else 'one head':10} {1e3 * median:9.1f} ms an update")
    return "\n".join([*lines, f"a sweep costs {ratio:.2f} times one head (median of {args.rounds} rounds)"])
