"""A recipe: from YAML and the command line to one frozen Config.

Precedence: defaults < YAML < command line. Every problem of a recipe is found in one pass and reported together.
Nothing mutates a `Config` afterwards. Durations are counted in samples (images), so a recipe means the same on any
number of ranks; one key counts ranks, parallel.sync_bn_group, as the papers do, and what BatchNorm then normalises over
is that many ranks' share of the batch.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from seer_scale.config.checks import check_rules, is_about, unused_keys
from seer_scale.config.fields import as_mapping, read_section, unknown_key
from seer_scale.config.method_settings import all_keys, settings_classes
from seer_scale.config.schema import METHOD_SETTINGS, Config, Method, Model, keys_of_model, section_classes
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError, closest, nearest
from seer_scale.plugins import load_plugins

RECIPES = Path(__file__).parents[1] / "recipes"
ExtraChecks = Callable[[Config], Iterable[Problem]]
"""What rooms above this one know to be wrong with a Config."""


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML without its traps: of a key given twice it would take the last and say nothing, and 12:00:00 would be
    43,200."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k.value for k, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} begins a section that has {twice} twice")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        plain = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        return node.value if ":" in node.value else plain(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What reading YAML raises: its constructors pass on what a date or a number of digits alone is no such thing."""


def yaml_problem(error: Exception) -> str:
    """What PyYAML complains of, in a line, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        context = f"{error.context}, " * bool(error.context)
        return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"
    return " ".join(str(error).split())


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """The mapping in a YAML file. example: of what it should hold. Raises UserError."""
    try:
        given = yaml.load(path.read_text(), _Loader) or {}
    except NOT_YAML as error:
        raise UserError(Problem(str(path), NOTHING, f"is not YAML: {yaml_problem(error)}")) from error
    if not isinstance(given, dict):
        raise UserError(Problem(str(path), NOTHING, f"holds {type(given).__name__}, but must hold {example}"))
    return given


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """The mapping in a shipped recipe or a YAML file. Raises UserError."""
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        path = RECIPES / f"{name_or_path}.yaml"
    elif os.path.isdir(path) or os.path.isfile(path) and path.suffix.lower() not in (".yaml", ".yml", ".json", ""):
        raise UserError(
            Problem(
                name_or_path,
                NOTHING,
                "is no recipe",
                "to train on images there give a recipe's name and their path, such as "
                f"photos_laptop --data.path {name_or_path}",
            )
        )
    elif not os.path.isfile(path) and (path.suffix in (".yaml", ".yml") or "/" in name_or_path):
        beside = sorted(glob.glob(os.path.join(glob.escape(str(path.parent)), "*.y*ml")))
        near = nearest(name_or_path, beside) if beside else "nor is any recipe beside it"
        raise UserError(Problem(name_or_path, NOTHING, "is no file", near))
    elif not os.path.isfile(path):
        near = nearest(name_or_path, recipe_names())
        raise UserError(Problem(name_or_path, NOTHING, "is no recipe, neither a YAML file nor a shipped one", near))
    return read_yaml(path, "sections of keys, such as 'train:'")


def as_asked(name: str, given: dict[str, Any], over: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A recipe's mapping without its bound on the warm-up where the command line gives a length, a shipped one's also
    without what goes with its own images, network or method where the command line names others; and what to say of
    it."""
    notes: list[str] = []

    def asked_for(key: str) -> Any:
        """What the command line gives for a key."""
        section, of = key.split(".")
        asked = over.get(section)
        return asked.get(of) if isinstance(asked, dict) else None

    def leave_out(section: str, keys: Iterable[str], why: str) -> None:
        nonlocal given
        own, kept = given.get(section) or {}, over.get(section) or {}
        gone = [k for k in keys if own.get(k) and k not in kept]
        if gone:
            notes.append(f"{' and '.join(f'{section}.{k}' for k in gone)} of the recipe {name} {why}.")
            given = given | {section: {k: v for k, v in own.items() if k not in gone}}

    if asked_for("schedule.warmup_samples") is not None:
        why = "bounds its own warm-up, and is left out as schedule.warmup_samples is given"
        leave_out("schedule", ("warmup_share",), why)
    if name not in recipe_names():
        return given, " ".join(notes)
    if asked_for("data.path") is not None:
        why = "go with its own images, and are left out as data.path names others"
        leave_out("knn", ("bank", "queries"), why)
    own_network = (given.get("model") or {}).get("name", Model.name)
    if (asked := asked_for("model.name")) not in (None, own_network):
        others = [f.name for f in dataclasses.fields(Model) if f.name not in ("name", *keys_of_model(str(asked)))]
        leave_out("model", others, "shape its own network, and are left out as model.name names another")
    own_method = (given.get("method") or {}).get("name", Method.name)
    if asked_for("method.name") not in (None, own_method) and given.get(own_method):
        notes.append(f"The section {own_method} of the recipe {name} goes with its own method, and is left out.")
        given = {k: v for k, v in given.items() if k != own_method}
    return given, " ".join(notes)


def parse_overrides(words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """`--a.b value` and `--a.b=value` as a nested mapping, with the problems found; values are read as YAML."""
    nested: dict[str, Any] = {}
    problems: list[Problem] = []
    rest = list(words)
    kinds = {key: kind for key, kind, *_ in all_keys()}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            quote = "a pattern goes in quotes, as in --data.path 'DIR/*.tar'" if os.path.exists(word) else ""
            problems.append(Problem(word, NOTHING, "stands alone: overrides are written --section.key value", quote))
            continue
        key, given, value = word[2:].partition("=")
        if not given:
            if not rest or rest[0].startswith("--"):
                problems.append(Problem(f"--{key}", NOTHING, "has no value", f"write --{key} VALUE"))
                continue
            value = rest.pop(0)
        try:
            is_text = kinds.get(key) == "str" or kinds.get(key) == "[str, ...]" and not value.startswith("[")
            parsed = value if is_text or not value.strip() else yaml.safe_load(value)  # of nothing YAML makes none
        except NOT_YAML:
            problems.append(Problem(f"--{key}", value, "must be a YAML value", "such as 3, 0.1, true or [1, 2]"))
            continue
        *sections, name = key.split(".")
        place = nested
        for s in sections:
            place = place.setdefault(s, {})
            if not isinstance(place, dict):
                problems.append(Problem(f"--{key}", NOTHING, f"goes below {s}, which was given a value"))
                place = {}
        twice = Problem(f"--{key}", NOTHING, "is given twice", "give it once")
        if name in place and twice not in problems:
            problems.append(twice)
        place[name] = parsed
    return nested, problems


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; where both have a key, `over` says what it is."""
    both = dict(base)
    for k, v in over.items():
        both[k] = merge(both[k], v) if isinstance(v, dict) and isinstance(both.get(k), dict) else v
    return both


def read_config(given: Any, problems: list[Problem]) -> Config:
    """A recipe's mapping; problems are collected, and a broken field keeps its default. The method's section is found
    by method.name."""
    given = as_mapping(given, "the recipe", problems)
    classes = {name: cls for name, cls in section_classes().items() if name != METHOD_SETTINGS}
    settings, elsewhere = settings_classes(), {key.rpartition(".")[2]: key for key, *_ in all_keys()}
    values: dict[str, Any] = {
        n: read_section(c, given[n], n, problems, elsewhere) for n, c in classes.items() if n in given
    }
    if "train" in values and not values["train"].total_samples:  # missing or wrong: no other rule is broken by that
        values["train"] = dataclasses.replace(values["train"], total_samples=sys.maxsize)
    name = values.get("method", Method()).name
    if name not in settings:
        near = closest(name, settings)
        fix = f"did you mean {near}?" if near else "--plugin brings others"
        problems.append(Problem("method.name", name, f"must be one of {', '.join(settings)}", fix))
    for section in given:
        if section in settings and section != name and name in settings:
            problems.append(Problem(section, NOTHING, f"has no effect with method.name {name}", "remove the section"))
        elif section not in (*classes, *settings, name):
            problems.append(_unknown_section(str(section), [*classes, *settings]))
    if name in settings:
        values[METHOD_SETTINGS] = read_section(settings[name], given.get(name), name, problems, elsewhere)
    return Config(**values)


def _unknown_section(section: str, known: Sequence[str]) -> Problem:
    near = closest(section, known)
    if not near:
        return unknown_key(section, known)
    keys = [key.partition(".")[2] for key, *_ in all_keys() if key.startswith(f"{near}.")]
    return Problem(
        section, NOTHING, "is not a key", f"did you mean the section {near}, with its keys {', '.join(keys)}?"
    )


# ------------------------------------------------------------------------------------------------ resolve


def resolve(
    given: dict[str, Any],
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    world_size: int | None = None,
    extra_checks: ExtraChecks = lambda config: [],
) -> Config:
    """The frozen Config of a recipe, checked for `world_size` ranks (default: parallel.ranks).

    extra_checks: those of rooms above this one (does the data exist, can the model be built). Raises ConfigError with
    every problem.
    """
    config, problems = checked(given, overrides, world_size=world_size, extra_checks=extra_checks)
    if problems:
        raise ConfigError(problems)
    return config


def checked(
    given: dict[str, Any],
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    world_size: int | None = None,
    extra_checks: ExtraChecks = lambda config: [],
) -> tuple[Config, list[Problem]]:
    """As `resolve`, with the problems beside the Config. Raises ConfigError, with all of them, where a value cannot be
    read; UserError where a plugin cannot be loaded."""
    load_plugins(plugins_of(given, overrides))
    over, problems = (overrides, []) if isinstance(overrides, dict) else parse_overrides(overrides)
    merged = merge(given, over)
    config = read_config(merged, problems)
    if not isinstance(merged.get("train"), dict) or "total_samples" not in merged["train"]:
        fix = "give the number of images the run sees, such as 1000000"
        problems.append(Problem("train.total_samples", NOTHING, "is missing", fix))
    is_read = not problems
    if not config.data.path:
        fix = "give a folder of images, a list file or tars, as in --data.path ~/Pictures"
        problems.append(Problem("data.path", NOTHING, "is empty", fix))
    broken = {p.key for p in problems}  # their defaults stand in: what is said of those is not true
    problems += check_rules(config, world_size or config.parallel.ranks, broken)
    problems += unused_keys(config, broken)
    if "method.name" not in broken:
        problems += [p for p in extra_checks(config) if not is_about(p.key, broken)]
    if not is_read:
        raise ConfigError(problems)
    return config, problems


def plugins_of(given: dict[str, Any], overrides: Sequence[str] | dict[str, Any] = ()) -> list[str]:
    """run.plugins of a recipe before it is read, as what they bring has to be known for that; what is wrong with the
    value is told by reading it."""
    key = "--run.plugins"
    if isinstance(overrides, dict):
        over = overrides
    else:
        words = list(overrides)
        own = [i for i, word in enumerate(words) if word == key or word.startswith(f"{key}=")]
        over = parse_overrides([w for i in own for w in words[i : i + 1 + (words[i] == key)]])[0] if own else {}
    run = merge(given, over).get("run")
    plugins = run.get("plugins") if isinstance(run, dict) else None
    return [plugins] if isinstance(plugins, str) else [p for p in plugins or () if isinstance(p, str)]
