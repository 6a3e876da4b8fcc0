"""seer-scale train, recipes"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from typing import Any

import yaml

from seer_scale import __version__
from seer_scale.cli.parser import OTHERS_WORDS, add_command
from seer_scale.config import RECIPES, Crop, all_keys, keys_of, load_recipe, plugins_of, recipe_names
from seer_scale.errors import EXIT_DONE, ConfigError, nothing_begun, print_error
from seer_scale.files import shown, to_json
from seer_scale.plugins import load_plugins
from seer_scale.rank_info import detect


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands,
        "train",
        train,
        "train a recipe, or resume its run (RECIPE --help shows every key)",
        takes_overrides=True,
        is_run=True,
    )
    parser.hints = OTHERS_WORDS
    parser.add_argument("recipe", metavar="RECIPE", help=f"a YAML file or one of {', '.join(recipe_names())}")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe as YAML, and train nothing"
    )
    if words[:1] == ["train"]:
        recipe = next((w for w in words[1:] if not w.startswith("-")), "")
        vars(parser)["format_help"] = lambda: help_of_train(recipe)  # before that of its class
    parser = add_command(commands, "recipes", recipes, "list the shipped recipes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def train(args: argparse.Namespace) -> int:
    with nothing_begun():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if not args.print_config:
            _print_start(args.recipe)
        from seer_scale.training import start  # takes seconds to load

    if args.print_config:
        config, problems = start.check_recipe(args.recipe, args.overrides, detect().size)
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="", flush=True)
        return print_error(ConfigError(problems)) if problems else EXIT_DONE
    return start.run_training(args.recipe, args.overrides)


def _print_start(recipe: str) -> None:
    """The first line, at once, on rank 0. Raises UserError where there is no such recipe."""
    load_recipe(recipe)
    if detect().rank == 0:
        print(f"seer-scale {__version__}: starting {shown(recipe)} ...", flush=True)


def help_of_train(recipe: str = "") -> str:
    """Every key with its type, meaning and default, and with the value a recipe gives it. Raises UserError."""
    given = load_recipe(recipe) if recipe else {}
    load_plugins(plugins_of(given))
    lines = ["usage: seer-scale train RECIPE [--print-config] [--plugin MODULE] [--section.key value ...]", ""]
    lines += [
        "Trains a recipe, or resumes its run where it stopped.",
        "",
        f"RECIPE: a YAML file or one of {', '.join(recipe_names())}.",
    ]
    lines += [
        (
            "--print-config: print the resolved recipe as YAML, and on stderr what prevents it from running here; "
            "train nothing."
        ),
        "",
    ]
    lines += ["--plugin MODULE: a Python module that brings methods or backbones, by name or path (run.plugins).", ""]
    lines += [
        "Precedence: defaults < recipe < command line. Lists are written [1, 2]; a bool alone is true, "
        "--section alone sets its key enabled. Keys, types, defaults:",
        "",
    ]
    for key, kind, default, meaning in all_keys():
        section, name = key.split(".")
        values = given.get(section)
        own = f"; {recipe}: {_as_json(values[name])}" if isinstance(values, dict) and name in values else ""
        lines += [f"  --{key} {kind}", f"      {meaning} (default {_as_json(default)}{own})"]
        if key == "views.crops":
            lines += [f"        {name} {kind}: {meaning}" for name, kind, _, meaning in keys_of(Crop)]
    return "\n".join(lines) + "\n"


def _as_json(value: Any) -> str:
    def given(section: Any) -> dict[str, Any]:
        return {k: v for k, v in vars(section).items() if v is not None}

    return json.dumps(value, default=given, allow_nan=False) if value is not None else "none"


def recipes(args: argparse.Namespace) -> int:
    heads = {}
    for name in recipe_names():
        lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        heads[name] = [line[1:].strip() for line in lines if line.startswith("#")]
    if args.json:
        print(to_json({name: " ".join(lines) for name, lines in heads.items()}, indent=1))
    else:
        print("\n\n".join("\n  ".join([name, *lines]) for name, lines in heads.items()))
    return EXIT_DONE
