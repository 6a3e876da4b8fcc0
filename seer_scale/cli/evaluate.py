"""seer-scale eval"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from seer_scale.cli.parser import BOOLEANS, Parser, add_command
from seer_scale.errors import EXIT_DONE, EXIT_FAILED
from seer_scale.files import shown, to_json
from seer_scale.formatting import paragraph, plus_minus

NO_BREAK = "\0"
"""Stands for a space at which no line ends."""
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
    _add_suite(tasks, fill="suite" in asked)


def _tasks() -> dict[str, str]:
    from seer_scale.evaluate.registry import task_names

    return task_names()


def _add_suite(tasks: Any, fill: bool) -> None:
    what = "several tasks, in one table with SEER's published figures beside"
    parser = add_command(
        tasks, "suite", suite, what, description=f"Measures {what}.", epilog=EPILOG, takes_plugins=True
    )
    parser.hints = dict.fromkeys((".yaml", ".yml"), "give a file of tasks as --tasks FILE")
    _add_subject(parser)
    parser.add_argument(
        "--tasks", default="knn,linear,lowshot",
        help="names, or a YAML file: a list of names and of mappings with `task` and its options",
    )  # fmt: skip
    if fill:
        from seer_scale.evaluate.task import TaskSettings

        _add_options(parser, TaskSettings)


def _add_task(tasks: Any, name: str, what: str, fill: bool) -> None:
    parser = add_command(
        tasks, name, partial(evaluate, name), what, description=f"Measures {what}.", epilog=EPILOG, takes_plugins=True,
    )  # fmt: skip
    _add_subject(parser)
    if fill:
        from seer_scale.evaluate.registry import task_class

        task = task_class(name)
        _add_options(parser, task.settings, task.variants)


def _add_subject(parser: Parser) -> None:
    parser.set_defaults(instead_of_overrides="labelled images are given by --data and --test, options by --NAME")
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an exported file")
    parser.add_argument("--which", default="last", help="of a run: last, best, or samples seen")
    parser.add_argument(
        "--init", dest="weights", default="trained", choices=["trained", "random", "both"],
        help="random: the same network as it begins, to compare with",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results; a run's eval/ otherwise")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a sentence")


def _add_options(parser: Parser, settings: type, variants: Mapping[str, type] = MappingProxyType({})) -> None:
    """Those of `settings`, and of the settings that a flag chooses instead."""
    from seer_scale.config.fields import keys_of
    from seer_scale.evaluate.run import option_of

    chosen = {option_of(flag): {key: rest for key, *rest in keys_of(variant)} for flag, variant in variants.items()}
    done: set[str] = set()
    for flag, keys in {"": {key: rest for key, *rest in keys_of(settings)}, **chosen}.items():
        options = parser.add_argument_group(f"options with {flag}" if flag else "options of the task")
        for field, (kind, default, what) in keys.items():
            if field in done:
                continue
            done.add(field)
            usual = [f"default {_as_text(default)}"] * (default not in ("", ()))
            for name, of in chosen.items() if not flag else ():
                _, other, meaning = of.get(field, (kind, default, what))
                if option_of(field) != name and (other, meaning) != (default, what):
                    usual.append(f"with {name}{f': {meaning}, default' * (meaning != what)} {_as_text(other)}")
            said = f"{what} ({'; '.join(usual)})" if usual else what
            of_flag: dict[str, Any] = {"nargs": "?", "const": "true", "type": _boolean} if kind == "bool" else {}
            options.add_argument(
                option_of(field), dest=f"task.{field}", default=argparse.SUPPRESS, metavar=kind.replace("%", "%%"),
                help=said.replace("%", "%%"), **of_flag,
            )  # fmt: skip


def _boolean(word: str) -> str:
    """Of the word after a switch, which may be meant as another argument."""
    if word not in BOOLEANS:
        raise argparse.ArgumentTypeError(
            f"{shown(word)} is neither true nor false; write =true where it is not the value"
        )
    return word


def _as_text(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(map(_as_text, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def evaluate(name: str, args: argparse.Namespace) -> int:
    from seer_scale.evaluate.run import read_settings, results_folder, run_task
    from seer_scale.rank_info import detect

    settings = read_settings(name, _given(args))
    records = run_task(
        name, args.path, settings, which=args.which, initial=_weights(args), out=args.out, device=args.device
    )
    if detect().rank == 0:
        for record in records:
            print(to_json(record) if args.json else as_text(record, results_folder(args.path, args.out)))
    return EXIT_DONE


def suite(args: argparse.Namespace) -> int:
    from seer_scale.evaluate.run import results_folder
    from seer_scale.evaluate.suite import as_table, read_suite, run_suite
    from seer_scale.rank_info import detect

    items = read_suite(args.tasks, _given(args))
    summary = run_suite(args.path, items, which=args.which, initial=_weights(args), out=args.out, device=args.device)
    if detect().rank == 0:
        print(to_json(summary) if args.json else as_table(summary, results_folder(args.path, args.out)))
    return EXIT_DONE if not summary["problems"] else EXIT_FAILED


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a task that were given, as text."""
    return {key.partition(".")[2]: value for key, value in vars(args).items() if key.startswith("task.")}


def _weights(args: argparse.Namespace) -> list[str]:
    return ["random", "trained"] if args.weights == "both" else [args.weights]


def as_text(record: dict[str, Any], folder: Path, width: int = 0) -> str:
    """What a result says, for people: the figure that stands for it, the others, what was measured, and where it was
    written. folder: of the files. width: of the lines in columns, the terminal's otherwise."""
    scores, subject, headline = record["scores"], record["subject"], record["headline"]
    figures: list[str] = []
    for key, value in scores.items():
        if any(key.endswith(suffix) and key.removesuffix(suffix) in scores for suffix in ("_stderr", "_std")):
            continue
        around = plus_minus(scores.get(f"{key}_stderr"), scores.get(f"{key}_std"))
        figure = f"{value:,.0f}" if float(value).is_integer() and not around else f"{value:.2f}"
        name = key.removeprefix(f"{record['task']}/") if key != headline else key
        figures.insert(0 if key == headline else len(figures), f"{name} {figure}{around}".replace(" ", NO_BREAK))
    weights = "untrained weights" if subject["weights"] == "random" else subject["checkpoint"] or shown(subject["path"])
    told = [", ".join(figures[1:]), record["protocol"], *(f"Warning: {text}" for text in record["warnings"])]
    wrapped = [paragraph(text, width, "  ") for text in filter(None, told)]
    files = ", ".join(record["files"])
    lines = [f"{figures[0]} ({weights})", *wrapped, f"  Written: {shown(folder)}/{files}"]
    return "\n".join(lines).replace(NO_BREAK, " ")
