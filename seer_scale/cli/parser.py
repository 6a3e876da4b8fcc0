"""argparse with our rules: options are written in full and once, a mistake raises a Problem, and keys of a recipe are
set apart."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from seer_scale.config import all_keys
from seer_scale.errors import NOTHING, Problem, UserError, closest, nearest

OTHERS_WORDS = {"--images": "did you mean --train.total_samples?"}
"""What a key of a recipe is called elsewhere, as `Parser.hints`."""
Command = Callable[[argparse.Namespace], int]
"""What a command does; returns the exit status. Raises UserError."""


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would end the process."""

    def __init__(self, **settings: Any):
        super().__init__(
            allow_abbrev=False, exit_on_error=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings
        )
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.given: set[str] = set()
        self.hints: dict[str, str] = {}
        """Options that do not exist, with a clause on what does."""

    def parse_known_args(  # type: ignore[override]  # typeshed returns the type of `namespace`; nobody gives one
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            if error.argument_name is None:
                self.error(error.message)
            rule = f"cannot be taken: {error.message}"
            raise UserError(Problem(error.argument_name, NOTHING, rule, self._see_help())) from None

    def error(self, message: str) -> NoReturn:
        missing = [action for action in self._actions if action.required and action.dest not in self.given]
        if not missing:
            raise UserError(Problem(self.prog, NOTHING, f"cannot be run: {message}", self._see_help()))
        commands = next((a.choices for a in missing if isinstance(a, argparse._SubParsersAction)), None)
        names = (a.metavar if not a.option_strings else a.option_strings[0] for a in missing)
        needs = f"one of {', '.join(commands)}" if commands else ", ".join(map(str, names))
        raise UserError(Problem(self.prog, NOTHING, f"needs {needs}", self._see_help()))

    def _see_help(self) -> str:
        return f"see {self.prog} --help"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own names all choices; ours names the nearest."""
        if action.choices is not None and value not in action.choices:
            near = nearest(str(value), map(str, action.choices))
            if isinstance(action, argparse._SubParsersAction):
                raise UserError(Problem(str(value), NOTHING, f"is no command of {self.prog}", near))
            name = "/".join(action.option_strings) or str(action.metavar)
            raise UserError(Problem(name, value, "that is none of its values", near))

    def unexpected(self, words: Sequence[str], takes_overrides: bool) -> NoReturn:
        """Raises UserError about words that nothing takes."""
        word = words[0]
        name = word.partition("=")[0]
        if not word.startswith("-"):
            fix = self.hints.get(Path(word).suffix) or f"{self.prog} --help says what is"
            if takes_overrides:
                quote = ", and a pattern in quotes, as in --data.path 'DIR/*.tar'" if Path(word).exists() else ""
                fix = f"write overrides as --section.key value{quote}"
            raise UserError(Problem(word, NOTHING, "is not expected here", fix))
        options = [o for o in self._option_string_actions if o.startswith("--")]
        if not takes_overrides or name in self.hints:
            near = self.hints.get(name) or nearest(name, options)
            raise UserError(Problem(name, NOTHING, f"is no option of {self.prog}", near))
        keys = [f"--{key}" for key, *_ in all_keys()]
        if of_section := [key for key in keys if key.startswith(f"{name}.")]:
            rule, fix = "is a section of the recipe, not a key", f"its keys are {', '.join(of_section)}"
            raise UserError(Problem(name, NOTHING, rule, fix))
        same = [key for key in keys if key.rpartition(".")[2] == name.lstrip("-").replace("-", "_")]
        found = same[0] if same else closest(name, (*options, *keys))
        rule = f"is no option of {self.prog}, and keys of a recipe have a dot, as in --train.total_samples"
        raise UserError(Problem(name, NOTHING, rule, f"did you mean {found}?" if found else self._see_help()))


class _Once(argparse.Action):
    """Stores a value; of an option given twice it would be a guess which is meant."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if option_string and self.dest in parser.given:
            raise UserError(Problem(option_string, NOTHING, "is given twice", "give it once"))
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Print(argparse.Action):
    """Prints a text and ends, as --version does."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, text: Callable[[], str], help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)
        self._text = text

    def __call__(self, parser: Any, *_: Any) -> None:
        print(self._text())
        parser.exit()


SETTINGS = ("run", "parser", "takes_overrides", "takes_plugins", "is_run")
"""What a command's parser sets beside the arguments that were given."""


def add_command(
    commands: Any,
    name: str,
    run: Command,
    help: str,
    *,
    takes_overrides: bool = False,
    takes_plugins: bool = False,
    is_run: bool = False,
    **settings: Any,
) -> Parser:
    """A command of the tree. takes_overrides: of `--section.key value`. takes_plugins: of --plugin alone. is_run: what
    it prints is not its product."""
    parser = commands.add_parser(name, help=help, description=settings.pop("description", sentence(help)), **settings)
    parser.set_defaults(
        run=run, parser=parser, takes_overrides=takes_overrides, takes_plugins=takes_plugins, is_run=is_run
    )
    return parser


BOOLEANS = [spelt(w) for w in ("true", "false", "yes", "no", "on", "off") for spelt in (str, str.title, str.upper)]
"""YAML's."""


def switched_sections() -> set[str]:
    """Those of a recipe that have a key `enabled` of true or false."""
    return {key.removesuffix(".enabled") for key, kind, *_ in all_keys() if key.endswith(".enabled") and kind == "bool"}


def split_switches(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides, the words left) of words that no option took: `--SECTION` is its key `enabled`, where it has one."""
    overrides: list[str] = []
    left: list[str] = []
    sections = switched_sections()
    for word in words:
        name, is_whole, value = word.partition("=")
        if name.startswith("--") and name[2:] in sections:
            overrides += [f"{name}.enabled", value if is_whole else "true"]
        else:
            left.append(word)
    return overrides, left


def sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other words, `--section.key value` and `--section.key=value` words): what has a dot is a key of a recipe;
    `--plugin MODULE`, which may come more than once, is run.plugins. A key of true or false alone is true. Raises
    UserError where the word after such a key may be meant as its value or as another argument."""
    own: list[str] = []
    overrides: list[str] = []
    plugins: list[str] = []
    rest, switches = list(words), {key for key, kind, *_ in all_keys() if kind == "bool"}
    sections = {f"--{section}" for section in switched_sections()}
    while rest:
        word = rest.pop(0)
        name, is_whole, value = word.partition("=")
        if name == "--plugin":
            if not is_whole and (not rest or rest[0].startswith("--")):
                raise UserError(Problem("--plugin", NOTHING, "has no value", "write --plugin MODULE"))
            plugins.append(value if is_whole else rest.pop(0))
            continue
        if not (name.startswith("--") and "." in name):
            with_value = word in sections and rest and rest[0] in BOOLEANS  # which a parser takes for another argument
            own.append(f"{word}={rest.pop(0)}" if with_value else word)
            continue
        overrides.append(word)
        has_value = is_whole or bool(rest) and not rest[0].startswith("--")
        if name[2:] in switches and not is_whole:
            if has_value and rest[0] not in BOOLEANS:
                fix = f"write {name}=true where {rest[0]} is no value of it"
                raise UserError(Problem(name, rest[0], "must be true or false", fix))
            overrides += [] if has_value else ["true"]
        if has_value and not is_whole:
            overrides.append(rest.pop(0))
    if plugins:
        overrides += ["--run.plugins", json.dumps(plugins, allow_nan=False)]
    return own, overrides
