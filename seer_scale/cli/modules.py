"""Commands that are modules: each has `add_arguments(parser)`, `run(args) -> text`, and a docstring, its help; with
TAKES_OVERRIDES, it takes keys of a recipe, too."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from seer_scale.cli.parser import SETTINGS, add_command, sentence
from seer_scale.errors import EXIT_DONE


def add_module_commands(
    commands: Any, group: str, what: str, modules: Mapping[str, tuple[str, str]], words: Sequence[str]
) -> Any:
    """`seer-scale GROUP NAME` for each name of `modules`, which gives its module below seer_scale and what it does. A
    module takes seconds to import: only the one that `words` ask for is."""
    parser = commands.add_parser(group, help=what, description=sentence(what))
    kinds = parser.add_subparsers(metavar=group.upper(), required=True)
    for name, (path, does) in modules.items():
        if list(words[:2]) != [group, name]:
            add_command(kinds, name, _run_nothing, does)
            continue
        module = importlib.import_module(f"seer_scale.{path}")
        takes_overrides = getattr(module, "TAKES_OVERRIDES", False)
        parser = add_command(
            kinds, name, partial(_run, module), does, description=module.__doc__, takes_overrides=takes_overrides
        )
        module.add_arguments(parser)
    return kinds


def _run(module: Any, args: argparse.Namespace) -> int:
    own = {k: v for k, v in vars(args).items() if k not in SETTINGS}  # which pickles: benches send it to their ranks
    print(module.run(argparse.Namespace(**own)))
    return EXIT_DONE


def _run_nothing(args: argparse.Namespace) -> int:
    raise AssertionError("the command that was asked for is loaded")
