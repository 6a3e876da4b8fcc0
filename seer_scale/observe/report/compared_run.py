"""Several runs side by side: what each has logged, which keys of their recipes differ, and where each stands."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seer_scale.config import Config, load_recipe, merge, read_config, settings_classes
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.files import shown
from seer_scale.formatting import compute, duration, plus_minus, rate, short_number
from seer_scale.observe.records import START_EVENTS, Record, history, read_records, scalars
from seer_scale.observe.report.evaluations import read_results, rows_of
from seer_scale.observe.report.figures import latest, newest_start
from seer_scale.observe.report.plots import MAX_POINTS, Rows, is_number
from seer_scale.observe.time_account import read_time_account

MAX_RUNS = 24
"""More lines than that cannot be told apart by eye."""
BEST_OF: dict[str, Callable[..., Any]] = {"loss": min, "knn/top1": max, "probe/top1": max}
"""Figures whose best value is told, and which that is."""
RUNNING_S, COMPUTE, LOSS_SHARE = "running_s", "compute", "loss_share"
"""What is added to a row: seconds for which the run had run, floating-point operations of its training, and the loss as
a share of that of a network which has learned nothing."""


@dataclass
class ComparedRun:
    """rows: of metrics, enough to draw, with what stands on other axes. keys: of its recipe, by dotted name. flops: of
    training on one image, None where that is not known. running_s: for which it ran, as far as it was logged; rank_s:
    times ranks. figures: key of BEST_OF -> first, last and best value, with the samples seen then. metrics: the last
    value of each."""

    name: str
    path: Path
    rows: Rows
    events: Rows
    keys: dict[str, Any]
    results: dict[str, dict[str, Any]]
    state: str
    flops: int | None
    running_s: float
    rank_s: float
    figures: dict[str, dict[str, Any]]
    metrics: dict[str, float]
    images_per_s: float | None

    @property
    def begun(self) -> dict[str, Any]:
        """What its newest start said."""
        return newest_start(self.events)

    @property
    def total_samples(self) -> int | None:
        return self.begun.get("end", self.keys.get("train.total_samples"))

    @property
    def baseline(self) -> tuple[str, float | None]:
        """What a network that has learned nothing has for a loss."""
        name, loss = latest(self.events, "baseline") or ("", None)
        return name, loss

    @property
    def samples_seen(self) -> int:
        return self.rows[-1]["samples_seen"] if self.rows else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": shown(self.path),
            "state": self.state,
            "samples_seen": self.samples_seen,
            "total_samples": self.total_samples,
            "parameters": self.begun.get("parameters"),
            "ranks": self.begun.get("ranks"),
            "running_s": self.running_s,
            "rank_s": self.rank_s,
            "images_per_s": self.images_per_s,
            "training_flops": None if self.flops is None else self.flops * self.samples_seen,
            "figures": self.figures,
            "metrics": self.metrics,
            "evaluations": [vars(row) for row in rows_of(self.results)],
        }


def read_runs(paths: Sequence[Path], flops: Callable[[Config], int]) -> list[ComparedRun]:
    """In the order given. flops: of training on one image, by the recipe; it may raise UserError. Raises UserError,
    with every problem."""
    places, problems = [Path(p).absolute().resolve() for p in paths], []
    for path, place in zip(paths, places):
        if not place.is_dir():
            near = f"did you mean {Path('runs') / path}?" if (Path("runs") / path).is_dir() else ""
            problems.append(Problem("RUN", path, "that is no folder" if place.exists() else "it does not exist", near))
        elif not any((place / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            rule = "that is no run's folder: it has neither config.yaml nor metrics.jsonl"
            problems.append(Problem("RUN", path, rule))
    for number, (path, place) in enumerate(zip(paths, places)):
        if place in places[:number]:
            other = paths[places.index(place)]
            problems.append(Problem("RUN", path, f"that is the run {other}, which is given already", "give it once"))
    if len(places) < 2:
        rule = "one run has nothing to be compared with"
        problems.append(Problem("RUN", paths[0] if paths else NOTHING, rule, "seer-scale report RUN describes one run"))
    if len(places) > MAX_RUNS:
        problems.append(Problem("RUN", len(places), "more lines than that cannot be told apart by eye", MAX_RUNS))
    recipes = {}
    for place in places:
        try:
            recipes[place] = load_recipe(str(place / "config.yaml")) if (place / "config.yaml").is_file() else {}
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return [_read(name, place, recipes[place], flops) for name, place in zip(names_of(places), places)]


def _read(name: str, place: Path, recipe: dict[str, Any], flops: Callable[[Config], int]) -> ComparedRun:
    records = read_records(place)
    rows, events = history(records)
    running_s, rank_s, each = 0.0, 0.0, None
    at_s: dict[int, float] = {}
    for record, spent_s, ranks in _spent(records):
        running_s, rank_s = running_s + spent_s, rank_s + ranks * spent_s
        at_s[record["samples_seen"]] = running_s
    if recipe:
        with suppress(UserError):  # a backbone of a plugin or a library that is not here
            each = flops(read_config(recipe, []))
    attempts = read_time_account(place, records).attempts
    last: Record = {}
    for row in rows:
        last.update(row)
    speed = [r["throughput/img_per_s"] for r in rows if is_number(r.get("throughput/img_per_s"))]
    run = ComparedRun(
        name=name,
        path=place,
        rows=_thinned(rows),
        events=events,
        keys=keys_of(recipe),
        results=read_results(place),
        state=attempts[-1].cause if attempts else "not started",
        flops=each,
        running_s=running_s,
        rank_s=rank_s,
        figures=_figures(rows),
        metrics=scalars(last),
        images_per_s=statistics.median(speed) if speed else None,
    )
    of_nothing = run.baseline[1]
    for row in run.rows:
        row[RUNNING_S] = at_s[row["samples_seen"]]
        if each is not None:
            row[COMPUTE] = float(each * row["samples_seen"])
        if of_nothing and is_number(row.get("loss")):
            row[LOSS_SHARE] = row["loss"] / of_nothing
    return run


def _figures(rows: Rows) -> dict[str, dict[str, Any]]:
    found = {}
    for key, best_of in BEST_OF.items():
        known = [(r[key], r["samples_seen"], r.get(f"{key}_stderr")) for r in rows if is_number(r.get(key))]
        if known:
            picked = {"first": known[0], "last": known[-1], "best": best_of(known, key=lambda v: v[0])}
            found[key] = {n: {"value": v, "samples_seen": at, "stderr": e} for n, (v, at, e) in picked.items()}
    return found


def _thinned(rows: Rows) -> Rows:
    """Some MAX_POINTS of what most rows have, the last among them, and all of what few have."""
    stride = -(-len(rows) // MAX_POINTS) or 1
    counts = Counter(key for row in rows for key in row)
    rare = {key for key, count in counts.items() if count <= MAX_POINTS}
    return [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1 or not rare.isdisjoint(row)]


def _spent(records: Iterable[Record]) -> Iterator[tuple[Record, float, int]]:
    """Each line with the seconds since the line before, as it tells them, and the ranks at that time."""
    ranks = 1
    for record in records:
        if record.get("event") in START_EVENTS:
            ranks = record.get("ranks") or 1
        yield record, sum(s for s in (record.get("spent") or {}).values() if is_number(s)), ranks


def names_of(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others; safe to print."""
    names = []
    for place in places:
        parts = place.parts
        others = [other.parts for other in places if other != place]
        num = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts))
        names.append(shown(Path(*parts[-num:])))
    return names


def keys_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a recipe by its dotted name, with the default where an older version did not write it; without the
    folder, which each run has for itself."""
    if not recipe:
        return {}
    config = read_config(dict(recipe), [])
    known = config.to_dict()
    if config.method.name not in settings_classes():  # of a plugin that is not loaded: as it was written
        del known[config.method.name]
    sections = merge(dict(recipe), known)
    keys = {f"{s}.{k}": v for s, section in sections.items() if isinstance(section, dict) for k, v in section.items()}
    return {key: value for key, value in keys.items() if key != "run.dir"}


def differing_keys(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all runs whose recipe is known, with the value of each run; NOTHING where a
    run has no such key."""
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.keys):
        first, *others = (run.keys.get(key, NOTHING) for run in runs if run.keys)
        if any(other != first for other in others):
            found[key] = [run.keys.get(key, NOTHING) for run in runs]
    return found


def value_text(value: Any) -> str:
    """As a recipe writes it; "" where there is none."""
    if value is NOTHING:
        return ""
    if isinstance(value, str):
        return shown(value) or "''"
    return shown(yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip())


# --- tables


STANDING_COLUMNS = (
    "run", "state", "images seen", "running", "rank-hours", "images/s", "parameters", "compute", "loss", "lowest loss",
    "kNN top-1", "best kNN", "linear probe",
)  # fmt: skip


def standing(runs: Iterable[ComparedRun], name: Callable[[ComparedRun], str] = lambda run: run.name) -> list[list[str]]:
    """STANDING_COLUMNS and a row a run; columns that no run has a value in are left out."""
    rows = [list(STANDING_COLUMNS)] + [_standing(run, name(run)) for run in runs]
    kept = [column for column in zip(*rows) if any(column[1:])]
    return [list(row) for row in zip(*kept)]


def _standing(run: ComparedRun, name: str) -> list[str]:
    found = run.figures
    total = run.total_samples
    of = f" of {total:,}" if total and total > run.samples_seen else ""
    parameters, speed = run.begun.get("parameters"), run.images_per_s

    def figure(key: str, which: str, digits: str, unit: str = "") -> str:
        if key not in found:
            return ""
        value = found[key][which]
        at = f" at {value['samples_seen']:,}" * (which == "best")
        return f"{value['value']:{digits}}{unit}{plus_minus(value['stderr'])}{at}"

    return [
        name,
        run.state,
        f"{run.samples_seen:,}{of}",
        duration(run.running_s) if run.running_s else "",
        f"{run.rank_s / 3600:.3g}" if run.rank_s else "",
        rate(speed) if speed else "",
        short_number(parameters) if parameters else "",
        compute(run.flops * run.samples_seen) if run.flops else "",
        figure("loss", "last", ".4f"),
        figure("loss", "best", ".4f"),
        figure("knn/top1", "last", ".1f", " %"),
        figure("knn/top1", "best", ".1f", " %"),
        figure("probe/top1", "last", ".1f", " %"),
    ]


def text(runs: Sequence[ComparedRun]) -> str:
    """Where each stands, and which keys differ, for a terminal."""
    rows = standing(runs)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip() for row in rows]
    differing = differing_keys(runs)
    if differing:
        lines += ["", "Keys that differ:"]
    for key, values in differing.items():
        said = [f"{run.name}: {value_text(value) or '(none)'}" for run, value in zip(runs, values)]
        lines.append(f"  {key}  {'; '.join(said)}")
    return "\n".join(lines)


def to_dict(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """What the page shows, as data."""
    differing = {
        key: {run.name: value for run, value in zip(runs, values) if value is not NOTHING}
        for key, values in differing_keys(runs).items()
    }
    return {"differing_keys": differing, "runs": [run.to_dict() for run in runs]}
