"""seer-scale import"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE
from seer_scale.files import shown, to_json

ABOUT_IMPORT = """Published weights become what --checkpoint.init_from takes: SEER's in VISSL's files (consolidated,
sharded or sliced), SwAV's ResNet-50, DINOv2's, ConvNeXt V2's, and those of timm, torchvision and transformers, as files
or folders. Nothing in a file is run: it is read as data."""
SOURCE_FORMATS = ("auto", "vissl", "timm", "torchvision", "transformers", "dinov2", "convnextv2", "convnextv2_sparse",
                  "safetensors")  # fmt: skip
"""As `interop.published.SOURCE_LAYOUTS`, without loading torch for --help; auto, and our own."""


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands, "import", run, "turn published weights into what a run can begin with", description=ABOUT_IMPORT,
        takes_plugins=True,
    )  # fmt: skip
    parser.add_argument("path", metavar="FILE", type=Path, help="the file, or the folder that a library reads")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--format", choices=SOURCE_FORMATS, default="auto", help="whose names it has (default: auto, by the names)"
    )
    parser.add_argument(
        "--model", metavar="NAME", default="",
        help="the backbone it must be, as in model.name; timm/NAME for timm's; a plugin's for one that --plugin brings",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, default=0, help="of images, in pixels; default: as files beside the weights tell, else 224"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier import at --out")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(args: argparse.Namespace) -> int:
    from seer_scale.interop.importing import import_weights

    made = import_weights(args.path, args.out, format=args.format, model=args.model, size=args.size, force=args.force)
    print(to_json(made.to_dict(), indent=1) if args.json else shown(str(made), keep="\n"))
    return EXIT_DONE
