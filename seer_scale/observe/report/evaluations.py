"""What `seer-scale eval` has measured of a run: RUN/eval/*.json, as rows and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seer_scale.files import shown
from seer_scale.formatting import plus_minus, untrained_with
from seer_scale.observe.chart import Chart
from seer_scale.observe.report.figures import Figure
from seer_scale.observe.report.plots import chart_svg, is_number

FOLDER, UNTRAINED = "eval", "-random"
MAX_PLOTS = 4
"""Of one task."""


@dataclass(frozen=True)
class Row:
    """score, untrained: figures as they are shown; "" where there is none."""

    task: str
    figure: str
    score: str
    untrained: str
    of: str
    protocol: str


def read_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by the name of the file without its suffix; files that hold no result are passed over."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("task"), str) and isinstance(record.get("scores"), dict):
            found[path.stem] = record
    return found


def rows_of(results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a task, that of untrained weights in a column of its own."""
    rows = []
    for stem, record in results.items():
        trained = stem.removesuffix(UNTRAINED)
        if stem != trained and trained in results:
            continue
        is_untrained, before = stem != trained, results.get(trained + UNTRAINED)
        if before and any(before.get(key) != record.get(key) for key in ("data", "size", "settings")):
            before = None  # of other images, or in another way
        subject = record.get("subject") or {}
        images = ((before or {}).get("subject") or {}).get("statistics_images", 0)
        said = [str(record.get("protocol", "")), *map(str, record.get("warnings") or [])]
        if not is_untrained and isinstance(images, int):  # what was measured untrained says so itself
            said.append(untrained_with(images))
        rows.append(
            Row(
                task=shown(record["task"] if trained == record["task"] else f"{record['task']} ({trained})"),
                figure=shown(str(record.get("headline", ""))),
                score="" if is_untrained else figure_of(record),
                untrained=figure_of(before) if before else "",
                of="untrained" if is_untrained else shown(str(subject.get("checkpoint") or subject.get("path", ""))),
                protocol=shown(" ".join(filter(None, said))),
            )
        )
    return rows


def figure_of(record: Mapping[str, Any]) -> str:
    """Its headline, such as "71.20 ± 0.40"."""
    name, scores = record.get("headline"), record["scores"]
    value = scores.get(name)
    around = plus_minus(scores.get(f"{name}_stderr"), scores.get(f"{name}_std"))
    return f"{value:.2f}{around}" if is_number(value) else ""


def plots_of(results: Mapping[str, dict[str, Any]]) -> list[Figure]:
    """The plots of each task, of trained weights."""
    drawn = []
    for stem, record in results.items():
        if stem.endswith(UNTRAINED):
            continue
        for i, data in enumerate((record.get("plots") or [])[:MAX_PLOTS]):
            try:
                chart = Chart(**{f.name: data[f.name] for f in fields(Chart) if f.name in data})
                picture = chart_svg(chart, shown(f"{stem}-{i}"))
            except (TypeError, ValueError, KeyError, AttributeError):  # another version's, or damaged
                continue
            axes = f"{chart.y} by {chart.x}" if chart.x else chart.y
            drawn.append(Figure(shown(chart.title), f"eval {shown(record['task'])}: {axes}.", picture))
    return drawn
