"""seer-scale embed"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE
from seer_scale.files import shown, to_json
from seer_scale.formatting import counted

ABOUT_EMBED = """Features of every image that can be read, with names and labels, in files of so many images each, and
manifest.json, which says what they are of. The folder appears when it is whole; what was killed goes on with the same
command, on any number of processes (torchrun --nproc-per-node 8 -m seer_scale embed ...)."""
SHARD_FORMATS = ("safetensors", "npy", "parquet")


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands, "embed", run, "write the features of images to files", description=ABOUT_EMBED, takes_plugins=True
    )
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an exported file")
    parser.add_argument("data", metavar="DATA", help="images, as data.path takes them; labels are kept")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument("--which", default="last", help="of a run: last, best, or samples seen")
    parser.add_argument("--format", default="safetensors", choices=SHARD_FORMATS, help="default: safetensors")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="as stored; default: float32"
    )
    parser.add_argument("--shard-size", type=int, default=8192, metavar="IMAGES", help="images a file; default: 8192")
    parser.add_argument("--size", type=int, default=0, help="of images, in pixels; default: as the backbone's says")
    parser.add_argument("--batch", type=int, default=64, help="images a forward pass of one process; default: 64")
    parser.add_argument(
        "--workers", type=int, default=-1, help="loader processes of one process; default: by its cores"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="the manifest instead of a sentence")


def run(args: argparse.Namespace) -> int:
    from seer_scale.evaluate.embed import EmbedOptions, embed_images
    from seer_scale.rank_info import detect

    options = EmbedOptions(
        format=args.format, dtype=args.dtype, shard=args.shard_size, size=args.size, batch=args.batch,
        workers=args.workers,
    )  # fmt: skip
    made = embed_images(args.path, args.data, args.out, options, which=args.which, device=args.device)
    if detect().rank == 0:
        print(to_json(made) if args.json else as_text(made, args.out))
    return EXIT_DONE


def as_text(made: dict[str, Any], out: Path) -> str:
    """A manifest in a sentence, for people."""
    lost = f"; {made['unreadable']:,} could not be read" if made["unreadable"] else ""
    files = counted(len(made["shards"]), f"{made['format']} file")
    return f"{shown(out)}: {made['images']:,} x {made['num_features']:,} features in {files}{lost}."
