"""What loading a backbone reads of a checkpoint that many ranks wrote, against reading the whole of it.

The checkpoint is a stand-in: its manifest and the place of every element are those of a run of that many ranks (weights
and one momentum, each rank an equal run of every tensor), its files have that length and are empty (sparse), so that
512 ranks of RegNetY-256GF take a few megabytes of disk. What is counted are the bytes this process asked the system
for; reading the whole reads each file once. The seconds say nothing of a disk: they are what Python and copying cost.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seer_scale.checkpoint import store
from seer_scale.checkpoint.layout import Layout, Part, Stored
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json
from seer_scale.formatting import memory_size
from seer_scale.interop.load import materialise
from seer_scale.interop.weights import open_weights
from seer_scale.models.registry import build_backbone

PREFIX = "backbone."
IO = Path("/proc/self/io")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="regnety_16gf", help="a backbone's name (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=512, help="ranks that wrote (default: %(default)s)")
    parser.add_argument("--head", type=int, default=160, help="millions of parameters beside it (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def state_of(model: str, head: int) -> dict[str, Tensor]:
    """What a run of a backbone and `head` more parameters saves, by name, on the meta device."""
    with torch.device("meta"):
        backbone = build_backbone(model)
    state = {f"model/{PREFIX}{n}": t for n, t in backbone.state_dict().items()}
    state["model/head.weight"] = torch.empty(head, device="meta")
    return state | {f"optim/{n}/momentum": t for n, t in state.items() if t.is_floating_point()}


def stand_in(folder: Path, model: str, ranks: int, head: int) -> Path:
    """A checkpoint of `ranks` ranks whose tensors are all zero, in files without content."""
    layout = even_layout(state_of(model, head), ranks)
    aside = folder / ".tmp-stand-in"
    aside.mkdir(parents=True)
    meta = {
        "samples_seen": 0, "config": {"model": {"name": model}}, "method": {"name": "swav", "state": {}},
        "export": {"prefix": PREFIX}, "preprocessing": eval_preprocessing(224),
    }  # fmt: skip
    files = {}
    for rank in range(ranks):
        header = layout.header(rank)
        path = aside / f"state-{rank:05d}.safetensors"
        with path.open("wb") as file:
            file.write(header)
            ends = (
                p.offset + (p.stop - p.start) * layout.tensors[n].dtype.itemsize
                for n, p in layout.written_by(rank).items()
            )
            file.truncate(len(header) + max(ends, default=0))
        files[path.name] = {"size": path.stat().st_size, "crc32": 0}
    return store.publish_files(aside, meta, files, layout)


def even_layout(state: Mapping[str, Tensor], ranks: int) -> Layout:
    """As if each of `ranks` ranks had held an equal run of every tensor."""
    ends = [0] * ranks
    tensors = {}
    for name, tensor in state.items():
        step = max(1, -(-tensor.numel() // ranks))
        stored = Stored(tensor.dtype, tensor.shape, [])
        for rank, start in enumerate(range(0, tensor.numel(), step)):
            stop = min(start + step, tensor.numel())
            stored.parts.append(Part(start, stop, rank, ends[rank]))
            ends[rank] += (stop - start) * tensor.itemsize
        tensors[name] = stored
    return Layout(tensors)


def bytes_asked() -> int:
    """Bytes this process has asked the system to read so far."""
    return int(next(line for line in IO.read_text().splitlines() if line.startswith("rchar:")).split()[1])


def measure(place: Path) -> dict[str, Any]:
    """Load the backbone, then read every file; bytes and seconds of each, and the most memory of the former."""
    before, begin = bytes_asked(), time.perf_counter()
    weights = open_weights(place)
    backbone, own = materialise(weights)
    weights.close()
    asked, seconds = bytes_asked() - before, time.perf_counter() - begin
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del backbone
    before, begin = bytes_asked(), time.perf_counter()
    for path in sorted(place.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return {
        "backbone_bytes": own, "asked_bytes": asked, "seconds": seconds, "peak_rss_bytes": peak,
        "whole_bytes": bytes_asked() - before, "whole_seconds": time.perf_counter() - begin,
    }  # fmt: skip


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    for option, number in (("--ranks", args.ranks), ("--head", args.head)):
        if number < 1:
            raise UserError(Problem(option, number, "must be at least 1", (1,)))
    if not IO.is_file():
        raise UserError(Problem(str(IO), "", "is not there, so bytes cannot be counted", "use Linux"))
    with tempfile.TemporaryDirectory() as folder:
        place = stand_in(Path(folder), args.model, args.ranks, args.head * 1_000_000)
        found = measure(place)
    found |= {"model": args.model, "ranks": args.ranks, "asked_of_own": found["asked_bytes"] / found["backbone_bytes"]}
    if args.json:
        return to_json(found, indent=1)
    times = found["whole_bytes"] / found["asked_bytes"]
    return "\n".join([
        f"{args.model}, {args.head} million parameters beside it, momentum; a stand-in for {args.ranks} ranks",
        f"backbone            {memory_size(found['backbone_bytes']):>10}",
        f"loading it asks for {memory_size(found['asked_bytes']):>10} = {found['asked_of_own']:.4f} of its own bytes, "
        f"in {found['seconds']:.1f} s; most memory of the process {memory_size(found['peak_rss_bytes'])}",
        f"the whole           {memory_size(found['whole_bytes']):>10} = {times:.2f} times as much, "
        f"in {found['whole_seconds']:.1f} s",
    ])  # fmt: skip
