"""What a launch was asked for, as the user wrote it, and how each option is parsed."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from seer_scale.errors import Problem, UserError
from seer_scale.launch.profile import Profile, minutes

CLUSTERS = ("local", "slurm")
NEEDS_QUEUE = ("profile", "nodes", "time", "dry_run", "no_plan")
"""Options that mean nothing on this machine."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Texts as they were given, empty where they were not. overrides: the words `--section.key value`."""

    recipe: str
    cluster: str
    profile: str = ""
    nodes: str = ""
    ranks: str = ""
    time: str = ""
    name: str = ""
    restarts: str = ""
    array: Sequence[str] = ()
    dry_run: bool = False
    no_plan: bool = False
    overrides: Sequence[str] = ()

    def to_words(self, recipe: str, name: str, overrides: Sequence[str]) -> list[str]:
        """The words after `seer-scale launch` that start one run of these alone."""
        given = {
            option: getattr(self, option) for option in ("cluster", "profile", "nodes", "ranks", "time", "restarts")
        } | {"name": name}
        words = [word for key, value in given.items() if value for word in (f"--{key}", value)]
        return [recipe, *words, *["--no-plan"] * self.no_plan, *overrides]


def parse(text: str, parser: Callable[[str], T], default: T, errors: list[UserError]) -> T:
    """What `parser` makes of an option; `default` where it was not given, or (then an error) where it cannot be
    parsed."""
    try:
        return parser(text) if text else default
    except UserError as error:
        errors.append(error)
        return default


def parse_whole_number(option: str, value: str, least: int) -> int:
    """Raises UserError."""
    if not value.isdecimal() or int(value) < least:
        raise UserError(Problem(option, value, f"must be a whole number of at least {least}", (least,)))
    return int(value)


def parse_node_range(value: str) -> tuple[int, int]:
    """(fewest, most). Raises UserError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", value)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(Problem("--nodes", value, "must be a number of nodes, or a range such as 32-64"))
    return low, high


def with_time(profile: Profile, time: str) -> Profile:
    """The profile with another time limit. Raises UserError."""
    if minutes(time) * 60 <= profile.grace_s:
        rule = f"the run saves in the last {profile.grace_s} s (grace_s of the profile)"
        raise UserError(Problem("--time", time, rule, "give more time, or lower grace_s"))
    return dataclasses.replace(profile, time=time)


def expand_grid(recipe: str, name: str, array: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(recipe, name, overrides) of each run: one for each point of the grid that the `--array` options span. Raises
    UserError."""
    axes: list[list[tuple[str, str]]] = []
    for axis in array:
        key, is_given, values = axis.partition("=")
        listed = split_list(values) if is_given else []
        if len(listed) < 2 or not all(listed):
            rule = "must name a key and at least two values"
            raise UserError(Problem("--array", axis, rule, ("optim.lr=0.1,0.2",)))
        axes.append([(key, value) for value in listed])
    if not axes:
        return [(recipe, name, [])]
    runs, base = [], name or Path(recipe).stem
    for point in itertools.product(*axes):
        overrides = [word for key, value in point if key != "recipe" for word in (f"--{key}", value)]
        labels = [Path(value).stem if key == "recipe" else _label(key, value) for key, value in point]
        runs.append((next((v for k, v in point if k == "recipe"), recipe), "-".join([base, *labels]), overrides))
    names = [name for _, name, _ in runs]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        fix = "leave out values that are equal, or differ only in characters that a name cannot hold"
        raise UserError(Problem("--array", " ".join(array), f"it gives two runs the name {twice}", fix))
    return runs


def _label(key: str, value: str) -> str:
    """A value, as part of a run's name."""
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]', '_', value)}"


def split_list(values: str) -> list[str]:
    """At the commas outside of all brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in values:
        if char == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += char
        if quote or char in "'\"":
            quote = "" if char == quote else quote or char
        else:
            depth += (char in "[{(") - (char in ")}]")
    return parts
