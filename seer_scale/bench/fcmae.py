"""A backbone that computes what is visible of an image alone, against the same with all of it computed and masked
(which gives the same values) and against the same unmasked, forward and backward, without decoder.

In one process, in turn; medians, and medians of the ratios within a round. On one CPU thread seconds are of CPU time.
Memory is what autograd keeps for the backward pass of an image more, so no weight and no cast copy of one. Dense ones
run with images channels first and channels last; the faster counts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from seer_scale.bench.calibrate import clock_of
from seer_scale.bench.plan import time_kinds
from seer_scale.bench.ranks import wait, where
from seer_scale.config import multiples_near
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json
from seer_scale.formatting import memory_size
from seer_scale.methods.masking import RandomMasking
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.models.layers.stateful import StatefulLayer
from seer_scale.models.layers.tiles import on_canvas
from seer_scale.models.registry import build_backbone, initialise

CONTENDERS = {"packed": "packed", "masked": "dense, masked", "unmasked": "dense, unmasked"}
NOISE, MAY_DIFFER_BY = 0.05, 1e-9
"""What weights are moved by, and values may differ by, where packed and masked ones are compared in fp64."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="convnextv2_tiny", help="a backbone that can be masked")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--mask-ratio", type=float, default=0.6, help="share of the patches that is not seen")
    parser.add_argument("--precision", choices=COMPUTE_DTYPES, default="fp32", help="of autocast")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, with one forward and backward of each in turn")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--kinds", action="store_true", help="also the time of each kind of operation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


Work = Callable[[], Tensor]


class Contenders:
    """What is compared: each forward gives the last stage's maps, channels last."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.backbone, patch = build_backbone(args.model), 0
        if (patches := self.backbone.patch_map) and self.backbone.hides_tiles:
            patch = patches.stride
        if not patch:
            raise UserError(Problem("--model", args.model, "cannot be masked", ("convnextv2_tiny", "regnety_8gf")))
        self.masking = _masking(args, patch)
        of_batches = any(isinstance(layer, StatefulLayer) for layer in self.backbone.modules())
        if of_batches and self.masking.keep < 2:  # memory is that of one image
            rule = "leaves a BatchNorm one visible place of an image to normalise over"
            raise UserError(Problem("--mask-ratio", args.mask_ratio, rule, "see more, or larger images (--size)"))
        initialise(self.backbone, 0)
        self.backbone.to(self.device).train()
        self.precision, size = COMPUTE_DTYPES[args.precision], (args.batch + 1, 3, args.size, args.size)
        self.images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(self.device)
        noise = torch.rand(args.batch + 1, self.masking.num_patches, generator=torch.Generator().manual_seed(1))
        self.mask, self.places = self.masking.masks(noise, self.device)

    def forwards(self, num: int) -> dict[str, Work]:
        """Of the first `num` images. By "packed", "masked" and "unmasked", the dense ones also with images channels
        last."""
        images, mask, places = self.images[:num], self.mask[:num], self.places[:num]
        last, net = images.contiguous(memory_format=torch.channels_last), self.backbone
        return {
            "packed": lambda: net.visible_stages([images], [mask], [places])[-1][0],
            "masked": lambda: net.visible_stages([images], [mask], [])[-1][0],
            "masked, channels last": lambda: net.visible_stages([last], [mask], [])[-1][0],
            "unmasked": lambda: net.forward_stages([images])[-1][0],
            "unmasked, channels last": lambda: net.forward_stages([last])[-1][0],
        }

    def both(self, forward: Work) -> float:
        """Forward and backward; seconds of the forward."""
        clock = clock_of(self.device)
        self.backbone.zero_grad()
        wait(self.device)
        begin = clock()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            out = forward()
        wait(self.device)
        taken = clock() - begin
        out.float().mean().backward()
        wait(self.device)
        return taken

    def kept(self, way: str) -> int:
        """Bytes that autograd keeps of an image."""
        return self._kept(self.forwards(2)[way]) - self._kept(self.forwards(1)[way])

    def _kept(self, forward: Work) -> int:
        found: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32),
        ):
            out = forward()  # alive until all is counted: no memory is given twice
        del out
        return sum(found.values())

    @torch.no_grad()
    def apart(self) -> float:
        """The largest difference of packed values from masked ones of two images, as a share of the largest value; in
        fp64, and of weights with which every branch does something."""
        images, mask, places = self.images[:2].double(), self.mask[:2], self.places[:2]
        net = copy.deepcopy(self.backbone).double()
        for i, p in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(i)
            p.add_(NOISE * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
        packed, masked = (net.visible_stages([images], [mask], given)[-1][0] for given in ([places], []))
        difference = on_canvas(packed, mask.shape[1:], places) - masked * ~mask[..., None]
        return (difference.abs().max() / packed.abs().max()).item()


def _masking(args: argparse.Namespace, patch: int) -> RandomMasking:
    if args.size < patch or args.size % patch:
        near = multiples_near(max(args.size, patch), patch)
        raise UserError(Problem("--size", args.size, f"must be a multiple of the {patch} pixels of a patch", near))
    grid = (args.size // patch,) * 2
    masking = RandomMasking(seed=0, grid=grid, ratio=args.mask_ratio)
    if not (0 <= args.mask_ratio < 1 and masking.keep):
        raise UserError(Problem("--mask-ratio", args.mask_ratio, "must leave a patch to see", (0.6,)))
    return masking


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What is printed, as data."""
    low = {"--batch": args.batch, "--rounds": args.rounds, "--threads": args.threads}
    if wrong := [Problem(key, value, "must be at least 1", (1,)) for key, value in low.items() if value < 1]:
        raise UserError(*wrong)
    torch.set_num_threads(args.threads)
    contenders = Contenders(args)
    works = contenders.forwards(args.batch)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, forward in works.items():
            clock = clock_of(contenders.device)
            begin = clock()
            of_forward = contenders.both(forward)
            times[name] += [(of_forward, clock() - begin)] * bool(turn)
    chosen = {"packed": "packed"} | {name: _faster(times, name) for name in ("masked", "unmasked")}
    apart = contenders.apart()
    if not apart <= MAY_DIFFER_BY:
        raise AssertionError(f"packed and dense values differ by {apart:.1e} of the largest")
    rows = {}
    for name, way in chosen.items():
        with FlopCounterMode(display=False) as counter:
            works[way]()
        rows[name] = {
            "way": way,
            "forward_s": statistics.median(f for f, _ in times[way]),
            "both_s": statistics.median(b for _, b in times[way]),
            "kept_bytes": contenders.kept(way),
            "macs": counter.get_total_flops() / 2 / args.batch,
        }
    kinds = {}
    if args.kinds:
        kinds = {n: time_kinds(partial(contenders.both, works[w]), contenders.device, 3) for n, w in chosen.items()}
    return {
        "model": args.model, "batch": args.batch, "size": args.size, "precision": args.precision,
        "seen": contenders.masking.keep, "patches": contenders.masking.num_patches,
        "where": where(contenders.device), "rows": rows, "differ": apart, "kinds": kinds,
        "ratios": {against: _ratios(times, rows, chosen, against) for against in ("masked", "unmasked")},
    }  # fmt: skip


def _faster(times: Mapping[str, list[tuple[float, float]]], name: str) -> str:
    ways = [way for way in times if way.split(",")[0] == name]
    return min(ways, key=lambda way: statistics.median(both for _, both in times[way]))


def _ratios(
    times: Mapping[str, list[tuple[float, float]]],
    rows: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, str],
    against: str,
) -> dict[str, float]:
    pairs = list(zip(times["packed"], times[chosen[against]]))
    return {
        "forward": statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
        "both": statistics.median(ours[1] / theirs[1] for ours, theirs in pairs),
        "kept": rows["packed"]["kept_bytes"] / rows[against]["kept_bytes"],
        "macs": rows["packed"]["macs"] / rows[against]["macs"],
    }


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    got = measure(args)
    if args.json:
        return to_json(got, indent=1)
    lines = [
        f"{got['model']}, {got['batch']} images of {got['size']} x {got['size']}, {got['seen']} of {got['patches']} "
        f"patches seen, {got['precision']}, {got['where']}",
        f"{'':28}{'forward':>10}{'and backward':>15}{'kept an image':>15}{'GMAC an image':>15}",
    ]
    for name, row in got["rows"].items():
        word = CONTENDERS[name] + (", channels last" if "," in row["way"] else "")
        lines.append(
            f"{word:28}{1e3 * row['forward_s']:7.0f} ms{1e3 * row['both_s']:12.0f} ms"
            f"{memory_size(row['kept_bytes']):>15}{row['macs'] / 1e9:15.3f}"
        )
    for against, ratio in got["ratios"].items():
        lines.append(
            f"{'packed / ' + CONTENDERS[against]:28}{ratio['forward']:10.3f}{ratio['both']:15.3f}{ratio['kept']:15.3f}"
            f"{ratio['macs']:15.3f}"
        )
    lines.append(f"medians of {args.rounds} rounds in turn; packed and masked values differ by "
                 f"{got['differ']:.1e} of the largest in fp64")  # fmt: skip
    for kind in sorted({kind for times in got["kinds"].values() for kind in times}):
        of_all = [times.get(kind, 0.0) for times in got["kinds"].values()]
        lines.append(
            f"{kind:28}" + "  ".join(f"{1e3 * s:7.0f} ms {CONTENDERS[n]}" for n, s in zip(got["kinds"], of_all))
        )
    return "\n".join(lines)
