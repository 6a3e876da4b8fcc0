"""Features of images to files, for whatever comes after: `seer-scale embed`."""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seer_scale import __version__, distributed
from seer_scale.data.loading.listing import share
from seer_scale.data.sources import Source, open_source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, DataError, Problem, UserError
from seer_scale.evaluate.shards import SHARD_KINDS, Shards, encode_images, share_cores
from seer_scale.evaluate.splits import images_mark
from seer_scale.evaluate.subject import Subject, check_path, open_subject
from seer_scale.files import published, to_json, write_whole
from seer_scale.formatting import counted, dtype_name
from seer_scale.observe.progress import Progress

EMBEDDED = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """size: of images in pixels, 0 = as the backbone's preprocessing says. shard: images a file. workers: loader
    processes of each process, -1 = by its cores."""

    format: str = "safetensors"
    dtype: str = "float32"
    shard: int = 8192
    size: int = 0
    batch: int = 64
    workers: int = -1

    def check(self) -> None:
        """Raises UserError."""
        problems = [
            Problem(f"--{name}", value, f"must be at least {least}", least)
            for name, value, least in (
                ("shard-size", self.shard, 1),
                ("batch", self.batch, 1),
                ("workers", self.workers, -1),
                ("size", self.size, 8 if self.size else 0),
            )
            if value < least
        ]
        takes = [dtype_name(dtype) for dtype in SHARD_KINDS[self.format]().dtypes]
        if self.dtype not in takes:
            problems.append(Problem("--dtype", self.dtype, f"{self.format} has no such numbers", tuple(takes)))
        if problems:
            raise UserError(*problems)


def embed_images(
    path: Path, data: str, out: Path, options: EmbedOptions, *, which: str = "last", device: str = "auto"
) -> dict[str, Any]:
    """Write the features of all images of `data` that can be read to the folder `out`, which appears when it is whole;
    returns its manifest. What was killed goes on with the same call; of what is there already nothing is done again.
    Collective over the processes that torchrun, accelerate launch or srun has started. Raises UserError."""
    options.check()
    check_path(path)
    if os.path.lexists(out) and not (out / EMBEDDED).is_file() and not (out.is_dir() and not any(out.iterdir())):
        rule = "exists, and is no folder of features"
        raise UserError(Problem("--out", str(out), rule, "give a new one"))
    meeting = out.with_name(f".{out.name}.unfinished")
    world = distributed.init(meeting, device=device)
    try:
        made = embed(open_subject(path, which, "trained", world.device), data, out, options, world, meeting)
        if world.is_main:
            shutil.rmtree(meeting, ignore_errors=True)
        return made
    finally:
        distributed.shutdown(world)


def embed(subject: Subject, data: str, out: Path, options: EmbedOptions, world: World, folder: Path) -> dict[str, Any]:
    """As `embed_images`, in a world that stands. folder: where what is not finished lies."""
    workers = share_cores(world, options.workers)
    size = options.size or subject.size
    begin = time.perf_counter()
    with Progress(active=world.is_main, to_stderr=True) as progress:
        with progress.doing("listing images"):
            source = share(world, folder, lambda: open_images(data), lambda found: [found], name="listed-embed")
        mark = world.from_main(lambda: fingerprint_of(subject, source, size, options))
        if found := world.from_main(lambda: _there(out, mark)):
            return found
        place = folder / mark
        if world.is_main:
            place.mkdir(parents=True, exist_ok=True)
        world.barrier()

        def encode(pixels: Tensor, numbers: np.ndarray) -> Tensor:
            return subject.encode(to_float(pixels))

        dtype: torch.dtype = getattr(torch, options.dtype)
        shards = Shards(place, len(source), options.shard, SHARD_KINDS[options.format](), dtype)
        stream = partial(
            encode_images, encode, source, size=size, batch=options.batch, workers=workers, device=world.device,
            within=options.shard,
        )  # fmt: skip
        shards.write(stream, source, world=world, progress=progress, label="computing features")

    def publish() -> dict[str, Any]:
        about = manifest_of(subject, source, shards, size, options)
        if not about["images"]:
            fix = "check them: seer-scale data describe"
            raise DataError(Problem(data, NOTHING, f"none of {counted(len(source), 'image')} can be read", fix))
        about |= {"data": data, "mark": mark, "seconds": round(time.perf_counter() - begin, 1)}
        write_whole(place / EMBEDDED, to_json(about, indent=1) + "\n")
        with published(out) as aside:
            os.rename(place, aside)
        return about

    return world.from_main(publish)


def open_images(data: str) -> Source:
    """Raises DataError where they come as a stream, which has no numbers to go on by."""
    source = open_source(data)
    if source.is_stream:
        raise DataError(Problem(data, NOTHING, "is a stream", "give images that can be read by number"))
    return source


def fingerprint_of(subject: Subject, source: Source, size: int, options: EmbedOptions) -> str:
    """Stands for what the files will hold: those of another network or other images are not gone on with."""
    shape = (options.format, options.dtype, options.shard)
    words = [subject.fingerprint, size, *shape, images_mark(source), *source.classes]
    return f"{zlib.crc32(repr(words).encode(errors='backslashreplace')):08x}"


def _there(out: Path, mark: str) -> dict[str, Any] | None:
    """The manifest of what was written before; None where there is none. Raises UserError where it is another's."""
    try:
        found: dict[str, Any] = json.loads((out / EMBEDDED).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = {}
    if found.get("mark") != mark:
        rule = "holds features of other images, of another network, or in another form"
        raise UserError(Problem("--out", str(out), rule, "give a new folder"))
    return found


def manifest_of(subject: Subject, source: Source, shards: Shards, size: int, options: EmbedOptions) -> dict[str, Any]:
    counts = [shards.format.count(shards.path(i)) for i in range(len(shards))]
    return {
        "format": options.format,
        "dtype": options.dtype,
        "images": sum(counts),
        "unreadable": len(source) - sum(counts),
        "num_features": subject.model.num_features,
        "classes": list(source.classes),
        "model": {
            "path": str(subject.path),
            "checkpoint": subject.checkpoint,
            "samples_seen": subject.samples_seen,
            "fingerprint": subject.fingerprint,
        },
        "preprocessing": eval_preprocessing(size),
        "shard_size": options.shard,
        "shards": [
            {"file": shards.path(i).name, "first": i * shards.size, "images": num} for i, num in enumerate(counts)
        ],
        "seer_scale": __version__,
        "torch": torch.__version__,
    }
