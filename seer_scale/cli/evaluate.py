"""seer-scale eval"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE
from seer_scale.observe.sinks import plain


def add_commands(commands: Any, words: Sequence[str]) -> None:
    kinds = commands.add_parser("eval", help="kNN accuracy of a run's newest checkpoint").add_subparsers(metavar="EVALUATION", required=True)
    parser = add_command(kinds, "knn", knn, "kNN accuracy of a run's newest checkpoint", takes_overrides=True)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run's folder, such as runs/demo")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a sentence")


def knn(args: argparse.Namespace) -> int:
    from seer_scale import world as worlds
    from seer_scale.evaluate.run import knn_of_run

    world = worlds.start(args.run_dir / "logs")
    scores = knn_of_run(args.run_dir, args.overrides, world)
    worlds.stop(world)
    if world.is_main:
        text = f"kNN top-1 {scores['knn/top1']:.1f} %, top-5 {scores['knn/top5']:.1f} % after {scores['samples_seen']:,} samples ({scores['checkpoint']})"
        print(json.dumps(plain(scores)) if args.json else text)
    return EXIT_DONE
