"""seer-scale eval"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE
from seer_scale.files import to_json


def add_commands(commands: Any, words: Sequence[str]) -> None:
    what = "kNN accuracy of a checkpoint, or of a run's newest one"
    parser = commands.add_parser(
        "eval",
        help="evaluate a checkpoint, or a run's newest one",
        description="Evaluates a checkpoint, or a run's newest one.",
    )
    kinds = parser.add_subparsers(metavar="EVALUATION", required=True)
    parser = add_command(
        kinds, "knn", knn, what, takes_overrides=True,
        description=f"{what}. Keys of its recipe can be overridden, as in --knn.bank DIR --knn.queries DIR.",
    )  # fmt: skip
    parser.add_argument(
        "path", metavar="RUN", type=Path, help="a run's folder, such as runs/demo, or a checkpoint in it"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a sentence")


def knn(args: argparse.Namespace) -> int:
    from seer_scale import distributed
    from seer_scale.evaluate.run import evaluated_config, knn_of, run_dir_of

    config = evaluated_config(args.path, args.overrides)
    world = distributed.init(run_dir_of(args.path) / "logs", device=config.parallel.device)
    scores = knn_of(args.path, config, world)
    distributed.shutdown(world)
    if world.is_main:
        print(to_json(scores) if args.json else as_sentence(scores))
    return EXIT_DONE


def as_sentence(scores: dict[str, Any]) -> str:
    top1, top5 = (f"{scores[name]:.1f} % ± {scores[f'{name}_stderr']:.1f}" for name in ("knn/top1", "knn/top5"))
    return (
        f"kNN top-1 {top1}, top-5 {top5} after {scores['samples_seen']:,} samples ({scores['checkpoint']}); always "
        f"naming the commonest class: {scores['knn/majority']:.1f} %. {scores['protocol']}"
    )
