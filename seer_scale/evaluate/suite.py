"""Several tasks of one backbone, one table, with SEER's published figures beside."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from seer_scale import distributed
from seer_scale.config import NOT_YAML
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.evaluate.context import UNFINISHED_WORK
from seer_scale.evaluate.layouts import word_of
from seer_scale.evaluate.places import remove, remove_stale
from seer_scale.evaluate.published import difference, published
from seer_scale.evaluate.registry import task_class, task_names
from seer_scale.evaluate.run import check_path, check_results, measure, read_settings, record_in, report, results_folder
from seer_scale.evaluate.subject import open_subject
from seer_scale.evaluate.task import TaskSettings
from seer_scale.files import plain, shown, to_json, write_whole
from seer_scale.formatting import paragraph, plus_minus

DEFAULT = ("knn", "linear", "lowshot")
"""What a minute or two on a laptop measures."""
SUITE_FILE = "suite.json"
Item = tuple[str, TaskSettings]


def read_suite(given: str, common: Mapping[str, Any]) -> list[Item]:
    """given: task names, as in "knn,linear", or a YAML file: a list of names and of mappings with `task` and its
    options. common: options of every task that has them, as text. Raises UserError, with every problem."""
    is_file = given.endswith((".yaml", ".yml"))
    entries: list[Any] = [{"task": name.strip()} for name in given.split(",") if name.strip()]
    if is_file:
        try:
            entries = yaml.safe_load(Path(given).read_text())
        except (OSError, *NOT_YAML) as error:
            raise UserError(Problem("--tasks", given, f"cannot be read ({type(error).__name__})")) from error
    if not isinstance(entries, list) or not entries:
        raise UserError(Problem("--tasks", given, "must be a list of tasks", f"such as {','.join(DEFAULT)}"))
    return items_of(entries, common, given if is_file else "")


def items_of(entries: Sequence[Any], common: Mapping[str, Any], file: str = "") -> list[Item]:
    """As `read_suite`, of what is in `file`."""
    problems: list[Problem] = []
    items = []
    for number, entry in enumerate(entries, 1):
        where = f"entry {number} of {file}" if file else ""
        options = {"task": entry} if isinstance(entry, str) else entry
        if not isinstance(options, dict) or not isinstance(options.get("task"), str):
            rule = "must be a task's name, or a mapping with `task` and its options"
            problems.append(Problem(where, NOTHING, rule, "such as {task: knn, k: [20]}"))
            continue
        name = options["task"]
        try:
            known = task_class(name).settings.__dataclass_fields__
            own = {k.replace("-", "_"): v for k, v in options.items() if k != "task"}
            items.append((name, read_settings(name, {k: v for k, v in common.items() if k in known} | own)))
        except UserError as error:
            problems += [replace(p, key=f"{where}: {p.key}") if where else p for p in error.problems]
    problems = problems or _same_names(items)
    if problems:
        raise ConfigError(problems, "The suite")
    return _named(items)


def to_entries(items: Sequence[Item]) -> list[dict[str, Any]]:
    """What a file of a suite holds, from which `items_of` makes the same items."""
    found = []
    for task, settings in items:
        chosen = {flag for flag, variant in task_class(task).variants.items() if type(settings) is variant}
        own = {f.name: getattr(settings, f.name) for f in fields(settings)}
        kept = {f.name for f in fields(settings) if own[f.name] != f.default} | chosen
        found.append({"task": task, **{key: plain(own[key]) for key in own if key in kept}})
    return found


def _same_names(items: Sequence[Item]) -> list[Problem]:
    """What was named, and as another result is called."""
    names = Counter(settings.name or task for task, settings in items)
    given = dict.fromkeys(settings.name for _, settings in items if settings.name)
    rule, fix = "more than one of the suite's results is called so", "give each a name of its own, in a file"
    return [Problem("--name", name, rule, fix) for name in given if names[name] > 1]


def _named(items: Sequence[Item]) -> list[Item]:
    """With distinct names: of several of one task without names all but the first are TASK-2, TASK-3 ..."""
    taken = {settings.name for _, settings in items} | task_names().keys()
    named: list[Item] = []
    for task, settings in items:
        if not settings.name and any(task == other and not known.name for other, known in named):
            settings = replace(settings, name=next(n for i in count(2) if (n := f"{task}-{i}") not in taken))
            taken.add(settings.name)
        named.append((task, settings))
    return named


def run_suite(
    path: Path, items: Sequence[Item], *, which: str, initial: Sequence[str], out: Path | None, device: str
) -> dict[str, Any]:
    """Measure each, one after the other; writes each task's file, and eval/suite.json. initial: "trained", "random".
    Collective. Raises UserError where nothing could be measured."""
    check_path(path)
    folder = results_folder(path, out)
    if os.path.lexists(folder / SUITE_FILE) and not record_in(folder / SUITE_FILE, "suite", "rows"):
        rule = f"its {SUITE_FILE} is no table of a suite"
        raise UserError(Problem("--out", shown(folder), rule, "choose another"))
    check_results(folder, items, initial)
    world = distributed.init(folder / "logs", device=device)
    rows: list[dict[str, Any]] = []
    features: set[Path] = set()
    failed: list[UserError] = []
    problems: list[dict[str, str]] = []
    for weights in initial:
        opened, seed = None, None
        for name, settings in items:
            try:
                if opened is None or weights == "random" and seed != settings.seed:
                    opened, seed = open_subject(path, which, weights, world.device, settings.seed), settings.seed
                given, opened = opened, None if task_class(name).trains_backbone else opened
                record = measure(name, given, settings, world, folder, keep=features)
            except UserError as error:
                failed.append(error.prefixed(f"eval {name}"))
                problems.append({"task": settings.name or name, "weights": weights, "problem": str(error)})
                continue
            rows += rows_of(record)
    of_trained = [row for row in rows if row["weights"] == "trained"]
    subject: dict[str, Any] = next((row["subject"] for row in of_trained + rows), {})
    summary = {"suite": [name for name, _ in items], "subject": subject, "rows": rows, "problems": problems,
               "wall_time": time.time()}  # fmt: skip
    if world.is_main:
        write_whole(folder / SUITE_FILE, to_json(summary, indent=1) + "\n")
        if not problems:
            remove(features)
            remove_stale(folder / UNFINISHED_WORK)
    report(path, folder, world)
    distributed.shutdown(world)
    if failed and not rows:
        raise UserError.joined(failed)
    return summary


def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the figure that stands for the task, and of others beside which a published one stands."""
    subject, task, scores = record["subject"], record["task"], record["scores"]
    data, backbone = word_of(record["settings"]["data"]), subject["backbone"]
    beside = {name: published(task, name.removeprefix(f"{task}/"), data, backbone) for name in scores}
    return [
        {
            "task": task, "name": record["settings"]["name"] or task, "figure": name, "data": record["data"],
            "weights": subject["weights"], "score": scores[name], "warnings": record["warnings"],
            "stderr": scores.get(f"{name}_stderr"), "std": scores.get(f"{name}_std"),
            "published": theirs.score if theirs else None, "seconds": record["seconds"], "subject": subject,
            "difference": theirs and difference(
                theirs, backbone, subject["parameters"], subject["samples_seen"], record["data"], record["size"]
            ) or "",
        }
        for name, theirs in beside.items() if theirs or name == record["headline"]
    ]  # fmt: skip


def as_table(summary: Mapping[str, Any], folder: Path, width: int = 0) -> str:
    """For people. What tells our figures from SEER's is said of the trained weights, where a task measured both.
    folder: of the files. width: of paragraphs in columns, the terminal's otherwise."""
    lines = [("task", "figure", "data", "weights", "score", "SEER's", "seconds")]
    for row in summary["rows"]:
        theirs = f"{row['published']:.2f}" if row["published"] is not None else ""
        score = f"{row['score']:.2f}{plus_minus(row['stderr'], row['std'])}"
        about = row["name"], row["figure"].removeprefix(f"{row['task']}/"), shown(row["data"]), row["weights"]
        lines.append((*about, score, theirs, f"{row['seconds']:.0f}"))
    data = {line[2] for line in lines[1:]}
    columns = [i for i in range(len(lines[0])) if i != 2 or len(data) > 1]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    told = ["  ".join(f"{line[i]:<{widths[i]}}" for i in columns).rstrip() for line in lines]
    differing = [row for row in summary["rows"] if row["difference"]]
    of_trained = {row["task"] for row in differing if row["weights"] == "trained"}
    notes = [f"Data: {data.pop()}"] if len(data) == 1 else []
    notes += dict.fromkeys(
        shown(row["difference"]) for row in differing if row["weights"] == "trained" or row["task"] not in of_trained
    )
    notes += dict.fromkeys(  # a task may have several rows
        f"Warning, {row['name']}, {row['weights']} weights: {text}"
        for row in summary["rows"]
        for text in row["warnings"]
    )
    notes += [f"Not measured: {p['task']}, {p['weights']} weights: {p['problem']}" for p in summary["problems"]]
    return "\n".join([*told, *(paragraph(note, width) for note in notes), f"Written: {shown(folder / SUITE_FILE)}"])
