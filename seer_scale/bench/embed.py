"""Images a second that `seer-scale embed` makes of files, against the bare forward of the same images, decoded before.

In turn, round by round: the forward alone, from memory; the loader alone; all of embed, which reads, decodes, encodes
and writes shards. Ratios are medians over rounds. On a GPU decoding costs the forward nothing where the loader is the
faster of both; on a CPU both share the cores, and what they could make at best is less than the forward alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from seer_scale.bench.ranks import wait, where
from seer_scale.cores import available_cores
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import open_source, subset
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, DataError, Problem
from seer_scale.evaluate.context import SHARD
from seer_scale.evaluate.shards import SafetensorsShards, Shards, encode_images
from seer_scale.evaluate.subject import check_path, open_subject
from seer_scale.files import to_json
from seer_scale.observe.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an exported file")
    parser.add_argument("data", metavar="DATA", help="images, as data.path takes them")
    parser.add_argument("--images", type=int, default=1024, help="how many of them to use, spread over all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=0, help="of images, in pixels (default: as the backbone's says)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=-1, help="loader processes; -1 = one less than cores, 8 at most")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    check_path(args.path)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device, cores = torch.device(name), available_cores()
    torch.set_num_threads(cores)
    subject = open_subject(args.path, "last", "trained", device)
    whole = open_source(args.data)
    source = subset(whole, np.linspace(0, len(whole) - 1, min(args.images, len(whole))).astype(np.int64))
    size, workers = args.size or subject.size, args.workers if args.workers >= 0 else min(8, max(0, cores - 1))

    def loader() -> list[torch.Tensor]:
        stream = eval_batches(source, np.arange(len(source)), size, batch=args.batch, workers=workers)
        return [pixels for pixels, *_ in stream]

    decoded = loader()
    num = sum(map(len, decoded))
    if not num:
        raise DataError(Problem(args.data, NOTHING, f"gives no image that can be read, of {len(source)}"))

    @torch.no_grad()
    def forward() -> None:
        for pixels in decoded:
            subject.encode(to_float(pixels.to(device)))
        wait(device)

    stream = partial(
        encode_images, lambda pixels, _: subject.encode(to_float(pixels)), source, size=size, batch=args.batch,
        workers=workers, device=device, within=SHARD,
    )  # fmt: skip

    def embed() -> None:
        with tempfile.TemporaryDirectory() as folder:
            shards = Shards(Path(folder), len(source), SHARD, SafetensorsShards(with_names=True))
            shards.write(stream, source, world=World(device=device), progress=Progress(active=False), label="")

    forward()
    seconds: dict[str, list[float]] = {"forward": [], "loader": [], "embed": []}
    things: dict[str, Callable[[], object]] = {"forward": forward, "loader": loader, "embed": embed}
    for _ in range(args.rounds):
        for kind, thing in things.items():
            begin = time.perf_counter()
            thing()
            seconds[kind].append(time.perf_counter() - begin)
    rates = {kind: num / statistics.median(s) for kind, s in seconds.items()}
    at_best = [f + d if device.type == "cpu" else max(f, d) for f, d in zip(seconds["forward"], seconds["loader"])]
    ratio = statistics.median(f / e for f, e in zip(seconds["forward"], seconds["embed"]))
    of_best = statistics.median(b / e for b, e in zip(at_best, seconds["embed"]))
    title = f"{num} images of {args.data}, {size} pixels, {workers} loader processes; {where(device)}"
    if args.json:
        found = {"what": title, "images_per_s": rates, "to_forward": ratio, "to_best": of_best}
        return to_json(found, indent=1)
    return "\n".join([
        title,
        f"bare forward  {rates['forward']:8.1f} images/s",
        f"loader alone  {rates['loader']:8.1f} images/s",
        f"embed         {rates['embed']:8.1f} images/s: {ratio:.2f} of the bare forward, {of_best:.2f} of what forward "
        f"and loader could make at best",
    ])  # fmt: skip
