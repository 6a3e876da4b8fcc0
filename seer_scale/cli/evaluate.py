"""seer-scale eval"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import Parser, add_command
from seer_scale.errors import EXIT_DONE
from seer_scale.files import to_json

EPILOG = """On several processes: torchrun --nproc-per-node 8 -m seer_scale eval TASK ..., or srun, or accelerate
launch; the figure is the same. What is killed goes on where it was with the same command."""


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate the backbone of a run, a checkpoint or an exported file",
        description="Evaluates the backbone of a run, a checkpoint or an exported file. eval TASK --help has its "
        "options.",
    )
    asked = words[1:] if words[:1] == ["eval"] else []
    tasks = parser.add_subparsers(metavar="TASK", required=True)
    for name, what in _tasks().items() if words[:1] in (["eval"], ["help"]) else ():
        _add_task(tasks, name, what, fill=name in asked)


def _tasks() -> dict[str, str]:
    from seer_scale.evaluate.registry import task_names

    return task_names()


def _add_task(tasks: Any, name: str, what: str, fill: bool) -> None:
    parser = add_command(
        tasks, name, partial(evaluate, name), what, description=f"Measures {what}.", epilog=EPILOG, takes_plugins=True,
    )  # fmt: skip
    parser.set_defaults(instead_of_overrides="labelled images are given by --data and --test, options by --NAME")
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an exported file")
    parser.add_argument("--which", default="last", help="of a run: last, best, or samples seen")
    parser.add_argument(
        "--init", dest="weights", default="trained", choices=["trained", "random"],
        help="random: the same network as it begins, to compare with",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results; a run's eval/ otherwise")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a sentence")
    if fill:
        _add_options(parser, name)


def _add_options(parser: Parser, name: str) -> None:
    from seer_scale.config.fields import keys_of
    from seer_scale.evaluate.registry import task_class
    from seer_scale.evaluate.run import option_of

    options = parser.add_argument_group("options of the task")
    for field, kind, default, what in keys_of(task_class(name).settings):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        of_flag: dict[str, Any] = {"nargs": "?", "const": "true"} if kind == "bool" else {}
        options.add_argument(
            option_of(field), dest=f"task.{field}", default=argparse.SUPPRESS, metavar=kind.replace("%", "%%"),
            help=f"{what} (default {shown})".replace("%", "%%") if shown != "" else what.replace("%", "%%"), **of_flag,
        )  # fmt: skip


def evaluate(name: str, args: argparse.Namespace) -> int:
    from seer_scale.evaluate.run import read_settings, run_task
    from seer_scale.rank_info import detect

    given = {key.partition(".")[2]: value for key, value in vars(args).items() if key.startswith("task.")}
    settings = read_settings(name, given)
    record = run_task(
        name, args.path, settings, which=args.which, weights=args.weights, out=args.out, device=args.device
    )
    if detect().rank == 0:
        print(to_json(record) if args.json else as_text(record))
    return EXIT_DONE


def as_text(record: dict[str, Any]) -> str:
    """What a result says, for people."""
    scores, subject = record["scores"], record["subject"]
    shown = []
    for key, value in scores.items():
        if key.endswith("_stderr"):
            continue
        error = scores.get(f"{key}_stderr")
        figure = f"{value:,.0f}" if float(value).is_integer() and error is None else f"{value:.2f}"
        shown.append(f"{key} {figure}" + (f" ± {error:.2f}" if error is not None else ""))
    weights = "untrained weights" if subject["weights"] == "random" else subject["checkpoint"] or subject["path"]
    return f"{', '.join(shown)} ({weights}). {record['protocol']}"
