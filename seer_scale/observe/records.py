"""What metrics.jsonl holds: one JSON object a line, in the order things happened.

A line with the key "event" tells of something (kinds "start" and "resume" say from which samples_seen a process went
on); every other line is a row of metrics. Each says when it was written ("wall_time"), what the time since the line
before went into ("spent", seconds by category, see `time_account`), and to what the time after it goes ("spending").
`read_metrics` turns that history into the one path the weights really took.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

START_EVENTS = ("start", "resume")
"""Kinds of events with which a process begins: what was logged beyond their samples_seen is abandoned."""


def scalars(row: Record) -> dict[str, float]:
    """What services plot of a row, by name."""
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("samples_seen", "wall_time")}


def parsed(lines: Iterable[bytes]) -> Iterator[Record]:
    """The JSON objects among `lines`; a torn line is passed over."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("samples_seen"), int):
            yield record


def read_records(run_dir: Path) -> list[Record]:
    """All lines of a run's log in the order they were written, also those that a restart abandoned."""
    path = Path(run_dir) / "metrics.jsonl"
    return list(parsed(path.read_bytes().splitlines())) if path.exists() else []


def read_metrics(run_dir: Path) -> tuple[list[Record], list[Record]]:
    """(rows, events) of a run, also while it runs. A run without metrics.jsonl has neither.

    Rows are sorted by samples_seen, one for each: lines of the same samples_seen are merged and the later value wins.
    Rows of a stretch that a restart abandoned are dropped. Events are all kept, in the order they happened.
    """
    return history(read_records(run_dir))


def history(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """As `read_metrics`, of lines in the order they were written."""
    rows: dict[int, Record] = {}
    events = []
    for record in records:
        samples = record["samples_seen"]
        if "event" in record:
            events.append(record)
            if record["event"] in START_EVENTS:
                rows = {s: row for s, row in rows.items() if s <= samples}
        else:
            rows[samples] = rows.get(samples, {}) | record
    return [rows[s] for s in sorted(rows)], events


def compare(row: Record, other: Record) -> bool:
    """Whether kNN figures of two rows are of one measurement, as far as they tell (logs of old do not)."""
    marks = [r["knn/measurement"] for r in (row, other) if r.get("knn/measurement")]
    return len(set(marks)) < 2
