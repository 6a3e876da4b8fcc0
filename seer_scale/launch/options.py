"""What a launch was asked for, in the user's own words, and how those are read."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from seer_scale.errors import UserError
from seer_scale.launch.profile import Profile, minutes

CLUSTERS = ("local", "slurm")
NEEDS_QUEUE = ("profile", "nodes", "time", "dry_run")
"""Options that mean nothing on this machine."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Texts as they were given, empty where they were not. overrides: `--section.key value` words of the recipe."""

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
    overrides: Sequence[str] = ()

    def words(self, recipe: str, name: str, overrides: Sequence[str]) -> list[str]:
        """The words after `seer-scale launch` that start one run of this, alone."""
        given = {k: getattr(self, k) for k in ("cluster", "profile", "nodes", "ranks", "time", "restarts")} | {
            "name": name
        }
        return [recipe, *(word for key, value in given.items() if value for word in (f"--{key}", value)), *overrides]


def read(text: str, reader: Callable[[str], T], otherwise: T, problems: list[str]) -> T:
    """What `reader` makes of an option; `otherwise` where it was not given, or (then a problem) where it cannot be
    read."""
    try:
        return reader(text) if text else otherwise
    except UserError as problem:
        problems.append(str(problem))
        return otherwise


def whole_number(option: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{option} is {value!r}, but must be a whole number of at least {least}, such as 2.")
    return int(value)


def node_range(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", value)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--nodes is {value!r}, but must be a number of nodes or a range such as 32-64.")
    return low, high


def with_time(profile: Profile, time: str) -> Profile:
    """The profile with another time limit. Raises UserError."""
    if minutes(time) * 60 <= profile.grace_s:
        raise UserError(
            f"--time is {time}, but the profile's grace_s is {profile.grace_s} s, in which the run saves before the "
            "limit: give more time, or lower grace_s."
        )
    return dataclasses.replace(profile, time=time)


def grid(recipe: str, name: str, array: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(recipe, name, overrides) of each run: one for each element of the grid that `--array` options span."""
    axes: list[list[tuple[str, str]]] = []
    for one in array:
        key, is_given, values = one.partition("=")
        listed = split_list(values) if is_given else []
        if len(listed) < 2 or not all(listed):
            raise UserError(
                f"--array is {one!r}, but must name a key and at least two values, such as optim.lr=0.1,0.2."
            )
        axes.append([(key, value) for value in listed])
    if not axes:
        return [(recipe, name, [])]
    runs, base = [], name or Path(recipe).stem
    for point in itertools.product(*axes):
        overrides = [word for key, value in point if key != "recipe" for word in (f"--{key}", value)]
        marks = [Path(value).stem if key == "recipe" else _mark(key, value) for key, value in point]
        runs.append((next((v for k, v in point if k == "recipe"), recipe), "-".join([base, *marks]), overrides))
    names = [name for _, name, _ in runs]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(
            f"--array gives two runs of one name, {twice}: leave out values that are alike, or alike but for signs "
            "that a name does not hold."
        )
    return runs


def _mark(key: str, value: str) -> str:
    """What a value is called in a run's name."""
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]', '_', value)}"


def split_list(values: str) -> list[str]:
    """At the commas outside of all brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in values:
        if c == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += c
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        else:
            depth += (c in "[{(") - (c in ")}]")
    return parts
