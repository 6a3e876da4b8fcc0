"""From the words of `seer-scale eval` to a result on the disk."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from seer_scale import distributed
from seer_scale.checkpoint import store
from seer_scale.config import NOT_YAML, RECIPES, read_yaml
from seer_scale.config.fields import read_section
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError, nearest
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.layouts import word_of
from seer_scale.evaluate.plotting import draw
from seer_scale.evaluate.registry import task_class, task_names
from seer_scale.evaluate.subject import Subject, check_path, open_subject, run_dir_of
from seer_scale.evaluate.task import NOT_IN_FIGURES, Result, TaskSettings
from seer_scale.files import shown, to_json, write_whole
from seer_scale.formatting import untrained_with
from seer_scale.interop.weights import public_name
from seer_scale.interop.write import check_replaceable
from seer_scale.observe.progress import Progress

RESULTS = "eval"
"""The folder of results in a run's folder."""
HISTORY = "history.jsonl"
"""A line a result, there: all that was measured, but for tables and plots."""


def read_settings(name: str, given: Mapping[str, Any]) -> TaskSettings:
    """The options of the task `name`, by field: text is read as a YAML value, or as several, "1,2", where the field is
    no text; what is no text is taken as it is. Of a task with recipes, those of its `recipe` that are not given are
    that one's, but for what has no effect beside what is given. Raises ConfigError with every problem, among them
    options that have no effect beside the others."""
    problems: list[Problem] = []
    task, values = task_class(name), {}
    of_recipe = options_of_recipe(name, given["recipe"]) if task.takes_recipes and given.get("recipe") else {}
    chosen, given = given.keys(), {**of_recipe, **given}
    kinds = {f.name: f.type for cls in (task.settings, *task.variants.values()) for f in dataclasses.fields(cls)}
    for field, text in given.items():
        try:
            is_text = kinds.get(field) == "str" or not isinstance(text, str)
            is_text |= not str(text).strip()  # of nothing YAML makes none
            values[field] = text if is_text else yaml.safe_load(f"[{text}]" if "," in text and text[0] != "[" else text)
        except NOT_YAML:
            problems.append(Problem(field, text, "must be a YAML value", "such as 3, 0.1, true or [1, 2]"))
    flag = next((flag for flag in task.variants if values.get(flag) is True), "")
    cls = task.variants.get(flag, task.settings)
    idle = {
        field: f"with {option_of(flag)}" if flag else f"without {' or '.join(map(option_of, task.variants))}"
        for field in kinds.keys() - cls.__dataclass_fields__.keys()
    }
    own = {k: v for k, v in values.items() if k not in idle}
    settings = read_section(cls, own, "", problems)
    if not problems:  # a broken one keeps its default, which tells nothing
        idle |= settings.without_effect()
        displaced = idle.keys() & (of_recipe.keys() - chosen)
        settings = read_section(cls, {k: v for k, v in own.items() if k not in displaced}, "", problems)
    problems += [
        Problem(field, value, f"has no effect {idle[field]}", "leave it out")
        for field, value in values.items() if field in idle and field in chosen
    ]  # fmt: skip
    problems += _given_twice(settings, values)
    problems += settings.name_problems(task_names().keys() - {name}) + settings.problems()
    if problems:
        raise ConfigError([dataclasses.replace(p, key=option_of(p.key)) for p in problems], f"eval {name}")
    return settings


def recipes_of(name: str) -> dict[str, Path]:
    """The shipped recipes of a task, by name."""
    return {path.stem: path for path in sorted((RECIPES / name).glob("*.yaml"))}


def options_of_recipe(name: str, recipe: str) -> dict[str, Any]:
    """The options in a shipped recipe of the task `name`, or in a YAML file, by field. Raises UserError, with every
    problem."""
    shipped = recipes_of(name)
    path = shipped.get(recipe, Path(recipe))
    if not path.is_file():
        rule = "is neither a file nor a shipped recipe"
        raise UserError(Problem("--recipe", recipe, rule, nearest(recipe, shipped)))
    options = {k.replace("-", "_"): v for k, v in read_yaml(path, "options, such as 'lr: 1e-3'").items()}
    if "recipe" in options:
        raise UserError(Problem(shown(path), NOTHING, "names another recipe", "give its options"))
    try:
        read_settings(name, options)
    except ConfigError as error:
        raise ConfigError(error.problems, f"The recipe {shown(recipe)}") from error
    return options


def _given_twice(settings: TaskSettings, given: Mapping[str, Any]) -> list[Problem]:
    """Entries of options that are lists of any length: what is measured twice has one row too many."""
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in given and str(field.type).endswith("...]") and len(set(value)) < len(value):
            found.append(Problem(field.name, value, "has an entry twice", list(dict.fromkeys(value))))
    return found


def option_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def results_folder(path: Path, out: Path | None) -> Path:
    """Where results go: the run's eval/, else beside what was exported."""
    if out:
        return out
    if path.is_file():
        return path.with_name(f"{path.stem}-{RESULTS}")
    if (path / store.MANIFEST).is_file() or (path / "config.yaml").is_file():
        return run_dir_of(path) / RESULTS
    return path.with_name(f"{path.name}-{RESULTS}")


def check_results(folder: Path, items: Sequence[tuple[str, TaskSettings]], initial: Sequence[str]) -> None:
    """That what the results of these tasks replace in `folder` are results of the same. Raises UserError."""
    problems: list[Problem] = []
    for (name, settings), weights in product(items, initial):
        path = folder / f"{settings.stem(name, weights)}.json"
        if os.path.lexists(path) and (there := str(record_in(path, "task", "scores").get("task", ""))) != name:
            rule = f"{path.name} in {shown(folder)} is {f'of the task {shown(there)}' if there else 'no result'}"
            key, value = ("--name", settings.name) if settings.name else ("--out", shown(folder))
            problems.append(Problem(key, value, rule, "choose another"))
        if task_class(name).keeps_network:
            try:
                check_replaceable(path.with_suffix(""), True, "the network kept there replaces such a one only")
            except UserError as error:
                fix = "give --name another" if settings.name else "choose another, or give --name NAME"
                problems += [dataclasses.replace(p, nearest=fix) for p in error.problems]
    if problems:
        raise UserError(*problems)


def record_in(path: Path, *keys: str) -> dict[str, Any]:
    """A result, or a summary, by what it must have; {} where it is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.keys() >= set(keys) else {}


def run_task(
    name: str, path: Path, settings: TaskSettings, *, which: str = "last", initial: Sequence[str] = ("trained",),
    out: Path | None = None, device: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure with each of the weights `initial` ("trained", "random"), and write eval/NAME.json (NAME-random.json of
    untrained ones) and its plots; returns what was written. Collective over the processes that torchrun, accelerate
    launch or srun has started. Raises UserError."""
    check_path(path)
    folder = results_folder(path, out)
    check_results(folder, [(name, settings)], initial)
    world = distributed.init(folder / "logs", device=device)
    records = []
    for weights in initial:
        subject = open_subject(path, which, weights, world.device, settings.seed)
        records.append(measure(name, subject, settings, world, folder))
    report(path, folder, world)
    distributed.shutdown(world)
    return records


def measure(
    name: str, subject: Subject, settings: TaskSettings, world: World, folder: Path, *, keep: set[Path] | None = None
) -> dict[str, Any]:
    """As `run_task`, of one subject, in a world that stands. keep: as of `Evaluation.clean`."""
    begin = time.perf_counter()
    task = task_class(name)(settings)
    with Progress(active=world.is_main, to_stderr=True) as progress:
        evaluation = Evaluation(
            task=name, subject=subject, options=settings, world=world, progress=progress, folder=folder
        )
        result = task.measure(evaluation)
    record = as_record(name, settings, evaluation, result, time.perf_counter() - begin)
    if world.is_main:
        if told := told_of_replaced(record, folder):
            print(told, file=sys.stderr)
        publish(record, result, folder)
    evaluation.clean(keep)
    return record


def report(path: Path, folder: Path, world: World) -> None:
    """Write the report of the run at `path`, or of the checkpoint there, anew, where results went into its folder."""
    run_dir = run_dir_of(path)
    if world.is_main and (run_dir / "config.yaml").is_file() and folder.resolve() == (run_dir / RESULTS).resolve():
        from seer_scale.observe.report import write_report  # loads matplotlib

        write_report(run_dir)


def as_record(
    name: str, settings: TaskSettings, evaluation: Evaluation[Any], result: Result, seconds: float
) -> dict[str, Any]:
    """A result as eval/NAME.json holds it."""
    subject = evaluation.subject
    stem, num = settings.stem(name, subject.weights), len(result.plots)
    data = settings.data or (subject.config.data.path if subject.config else "")
    statistics_images = 0 if settings.trains_network else subject.statistics_images
    said = [result.protocol, *evaluation.unreadable, untrained_with(statistics_images)]
    plots = [f"{stem}{f'~{i + 1}' * bool(i)}.svg" for i in range(num)]  # no name of a result has a tilde
    return {
        "task": name,
        "files": [f"{stem}.json", *plots, *result.files],
        "headline": result.headline,
        "score": result.scores[result.headline],
        "scores": dict(result.scores),
        "protocol": " ".join(filter(None, said)),
        "warnings": [*filter(None, [subject.remark]), *result.warnings],
        "subject": {
            "path": str(subject.path),
            "run": str(subject.run_dir or ""),
            "checkpoint": subject.checkpoint,
            "samples_seen": subject.samples_seen,
            "weights": subject.weights,
            "statistics_images": statistics_images,
            "fingerprint": subject.fingerprint,
            "backbone": subject.backbone,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
        },
        "data": data,
        "data_name": word_of(data) or public_name(data),
        "size": evaluation.size,
        "settings": dataclasses.asdict(settings),
        "given": settings.given,
        "table": [dict(row) for row in result.table],
        "plots": [dataclasses.asdict(plot) for plot in result.plots],
        **result.more,
        "seconds": round(seconds, 1),
        "processes": evaluation.world.size,
        "device": str(evaluation.device.type),
        "torch": torch.__version__,
        "wall_time": time.time(),
    }


def told_of_replaced(record: Mapping[str, Any], folder: Path) -> str:
    """A sentence where the result that lies there is of other images, size or options; "" otherwise."""
    path = folder / record["files"][0]
    try:
        before, now = (_measured(json.loads(text)) for text in (path.read_bytes(), to_json(record)))
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    differing = [f"{option_of(key)} {shown(str(value))}" for key, value in before.items() if now.get(key) != value]
    if not differing:
        return ""
    return f"{shown(path)} replaces a result of {', '.join(differing)}. --name NAME keeps both."


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record is of: its options and their defaults, but those on which no figure depends."""
    given = {k: v for k, v in record["settings"].items() if k in ("data", "test") or k not in NOT_IN_FIGURES}
    return given | {"data": given["data"] or record["data"], "size": record["size"]}


def publish(record: Mapping[str, Any], result: Result, folder: Path) -> Path:
    """Write a record and its plots; the path of the record."""
    path, *plots = (folder / name for name in record["files"])
    for plot, place in zip(result.plots, plots):
        draw(plot, place)
    write_whole(path, to_json(record, indent=1) + "\n")
    line = {key: value for key, value in record.items() if key not in ("table", "plots")}
    with (folder / HISTORY).open("a") as file:  # a file of this name that is written anew loses nothing
        file.write(to_json(line) + "\n")
    return path
