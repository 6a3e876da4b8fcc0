"""seer-scale data"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.modules import add_module_commands
from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE, Problem, UserError

MODULES = {
    "inspect": ("corpus.describe", "count images, sizes and formats; what cannot be read; a contact sheet"),
    "pack": ("corpus.pack", "write balanced tars with an index, from any images"),
}
REFRESH = """Gives a run other images: those of the manifest FILE (docs/data.md explains it), which is copied into the
run's folder. A run in progress reads it at its next metric line, any other at its next start. The epoch continues with
what is left of the parts that stay and with the new ones, in proportion; no image comes twice in it."""
DEMO = """Writes the demo's corpus into the folder DIR: 5,000 small JPEGs of ten textures, a folder for each texture.
The files are the same wherever they are written."""


def add_commands(commands: Any, words: Sequence[str]) -> None:
    kinds = add_module_commands(commands, "data", "inspect images, pack them, give a run other ones", MODULES, words)
    parser = add_command(
        kinds, "refresh", refresh, "give a run other images, from its next metric line on", description=REFRESH
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run's folder, such as runs/demo")
    parser.add_argument("--manifest", metavar="FILE", required=True, help="the new images")
    parser = add_command(kinds, "demo", demo, "write the demo's corpus of textures", description=DEMO)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write them")


def refresh(args: argparse.Namespace) -> int:
    from seer_scale import distributed
    from seer_scale.checkpoint import store
    from seer_scale.training.data_history import ask_refresh

    if not (args.run_dir / "config.yaml").is_file():
        raise UserError(Problem("RUN", args.run_dir, "that is no run's folder: it has no config.yaml", ("runs/demo",)))
    found = store.latest(
        args.run_dir / "checkpoints", distributed.World(), warn=lambda text: print(text, file=sys.stderr)
    )
    print(ask_refresh(args.run_dir, args.manifest, store.read_meta(found)["data"] if found else None))
    return EXIT_DONE


def demo(args: argparse.Namespace) -> int:
    from seer_scale.corpus.demo import write_demo_corpus

    write_demo_corpus(args.folder)
    print(f"The demo corpus is in {args.folder}.")
    return EXIT_DONE
