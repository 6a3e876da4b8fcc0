"""argparse with this house's manners: options in full and once, a mistake as one sentence, keys of a recipe set
apart."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from seer_scale.config import all_keys
from seer_scale.errors import UserError, nearest

Command = Callable[[argparse.Namespace], int]
"""What a command does; returns the exit status. Raises UserError."""


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would end the process."""

    def __init__(self, **how: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.given: set[str] = set()
        self.hints: dict[str, str] = {}
        """Options that are none, with what to say of them."""

    def error(self, message: str) -> NoReturn:
        required = "the following arguments are required: "
        if message.startswith(required):
            kinds = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
            needs = f"one of {', '.join(kinds)}" if kinds else message.removeprefix(required)
            message = f"{self.prog.removeprefix('seer-scale ')} needs {needs}"
        raise UserError(f"{message}; {self.prog} --help explains each.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own names all choices; ours names the nearest."""
        if action.choices is not None and value not in action.choices:
            what = "no command of" if isinstance(action, argparse._SubParsersAction) else "no value for"
            of = (
                self.prog
                if isinstance(action, argparse._SubParsersAction)
                else "/".join(action.option_strings) or action.metavar
            )
            raise UserError(f"{value!r} is {what} {of}; {nearest(str(value), map(str, action.choices))}")

    def unexpected(self, words: Sequence[str], takes_overrides: bool) -> NoReturn:
        """Raises UserError about words that nothing takes."""
        word = words[0]
        name = word.partition("=")[0]
        if not word.startswith("-"):
            quote = " A pattern goes in quotes, as in --data.path 'DIR/*.tar'." if Path(word).exists() else ""
            how = (
                f"overrides are written --section.key value.{quote}"
                if takes_overrides
                else f"{self.prog} --help says what is."
            )
            raise UserError(f"{word!r} is not expected here: {how}")
        options = [o for o in self._option_string_actions if o.startswith("--")]
        if not takes_overrides or name in self.hints:
            raise UserError(f"{name} is no option of {self.prog}; {self.hints.get(name) or nearest(name, options)}")
        keys = [f"--{key}" for key, *_ in all_keys()]
        if of_section := [key for key in keys if key.startswith(f"{name}.")]:
            raise UserError(f"{name} is a section of the recipe, not a key; its keys are {', '.join(of_section)}.")
        same = [key for key in keys if key.rpartition(".")[2] == name.lstrip("-").replace("-", "_")]
        hint = f"did you mean {same[0]}?" if same else nearest(name, (*options, *keys))
        raise UserError(
            f"{name} is no option of {self.prog}, and keys of a recipe have a dot, as in --train.total_samples; {hint}"
        )


class _Once(argparse.Action):
    """Stores a value; of an option given twice it would be a guess which is meant."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if option_string and self.dest in parser.given:
            raise UserError(f"{option_string} is given twice; give it once.")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Print(argparse.Action):
    """Prints a text and ends, as --version does."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, text: Callable[[], str], help: str):  # noqa: A002
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)
        self._text = text

    def __call__(self, parser: Any, *_: Any) -> None:
        print(self._text())
        parser.exit()


SETTINGS = ("run", "parser", "takes_overrides", "is_run")
"""What a command's parser sets beside the arguments that were given."""


def add_command(
    commands: Any,
    name: str,
    run: Command,
    help: str,
    *,
    takes_overrides: bool = False,
    is_run: bool = False,
    **how: Any,  # noqa: A002
) -> Parser:
    """A command of the tree. takes_overrides: of `--section.key value`. is_run: what it prints is not its product."""
    parser = commands.add_parser(name, help=help, description=how.pop("description", sentence(help)), **how)
    parser.set_defaults(run=run, parser=parser, takes_overrides=takes_overrides, is_run=is_run)
    return parser


def sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other words, `--section.key value` and `--section.key=value` words): what has a dot is a key of a recipe."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, is_whole, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(word)
            continue
        overrides.append(word)
        if not is_whole and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides
