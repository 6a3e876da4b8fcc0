"""seer-scale export"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE
from seer_scale.files import shown, to_json

EXPORT_FORMATS = ("timm", "torchvision", "transformers", "dinov2", "convnextv2", "safetensors", "onnx")
"""As `interop.formats.FORMATS`, without loading torch for --help."""


def add_commands(commands: Any, words: Sequence[str]) -> None:
    what = "write a trained backbone for timm, torchvision, transformers, ONNX or seer_scale.load"
    parser = add_command(
        commands, "export", export, what, takes_plugins=True,
        description="Writes the backbone of a run, a checkpoint or an earlier export for another library, which loads "
        "it without this package and gives the same features; with a model card. docs/export.md says more.",
    )  # fmt: skip
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an earlier export")
    parser.add_argument(
        "--out", metavar="DIR|FILE", type=Path, required=True,
        help="a folder to make, or a lone file whose name ends with .safetensors or .onnx",
    )  # fmt: skip
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help=", ".join(EXPORT_FORMATS))
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="fp32 (default), fp16, bf16")
    parser.add_argument("--which", default="last", metavar="last|best|SAMPLES", help="of a run: which checkpoint")
    parser.add_argument("--license", default="", metavar="NAME", help="for the model card, as in cc-by-4.0")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file, where the library reads several (5GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def export(args: argparse.Namespace) -> int:
    from seer_scale.interop.write import export_backbone

    loading = export_backbone(
        args.path, args.out, args.format, dtype=args.dtype, which=args.which, license=args.license,
        max_shard_size=args.max_shard_size, force=args.force,
    )  # fmt: skip
    if args.json:
        print(to_json({"path": str(args.out), "format": args.format, "dtype": args.dtype, "loading": loading}))
        return EXIT_DONE
    print(f"Written: {shown(args.out)}. Load it with\n\n{loading}")
    return EXIT_DONE
