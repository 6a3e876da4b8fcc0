"""The model card of an export: what was trained on what, how well it did, and the lines that load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_scale.files import plain, shown, to_json
from seer_scale.formatting import counted
from seer_scale.interop.artefact import About
from seer_scale.interop.formats import LIBRARIES, Target
from seer_scale.observe.records import read_metrics

UNLICENSED = "unknown"


def results_of(run: Path | None, samples_seen: int | None) -> list[dict[str, Any]]:
    """What a run has measured at so many samples: its last kNN line up to there, and its eval/*.json of that state."""
    if run is None or samples_seen is None:
        return []
    found: list[dict[str, Any]] = []
    rows = [row for row in read_metrics(run)[0] if "knn/top1" in row and row["samples_seen"] <= samples_seen]
    if rows:
        scores = {name: value for name, value in rows[-1].items() if name.startswith("knn/")}
        found.append({"task": "knn", "samples_seen": rows[-1]["samples_seen"], "scores": scores})
    for path in sorted((run / "eval").glob("*.json")):
        try:
            result = json.loads(path.read_bytes())
            subject = result["subject"]
            of_these = subject["weights"] == "trained" and subject["samples_seen"] == samples_seen
            if isinstance(result["scores"], dict) and of_these:
                found.append({"task": str(result["task"]), "samples_seen": samples_seen, "scores": result["scores"]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another's file, or one that is being written
    return plain(found)


def card(name: str, about: About, target: Target, num_features: int, num_parameters: int) -> str:
    """README.md of an export called `name`, as the Hub shows it. `about` has what is known: origin's recipe, method,
    samples_seen and results may be missing."""
    origin, how = about.origin, about.preprocessing
    license = origin.get("license", "")
    recipe: Mapping[str, Any] = origin.get("recipe") or {}
    data = (recipe.get("data") or {}).get("path", "")
    size = (
        f"{how['size']} x {how['size']} pixels: the short side is resized to {how['resize_short_side']} "
        f"({how['interpolation']}), the centre cropped"
    )
    mean, std = (", ".join(f"{v:g}" for v in how[key]) for key in ("mean", "std"))
    rows = {
        "network": f"{about.model['name']} ({_settings(about.model, ('name',))})" if len(about.model) > 1
        else about.model["name"],
        "there called": f"{target.network} ({about.format})",
        "features": f"{num_features}",
        "parameters": f"{num_parameters:,}",
        "weights": origin.get("dtype", ""),
        "method": origin.get("method", ""),
        "samples seen": f"{origin['samples_seen']:,}" if origin.get("samples_seen") is not None else "",
        "data": data,
        "images": f"{size}; mean {mean}, standard deviation {std} of values in 0 to 1",
        "licence": license or "not stated",
    }  # fmt: skip
    lines = [
        "---",
        f"license: {to_json(license or UNLICENSED)}",
        f"library_name: {to_json(LIBRARIES[about.format])}",
        "pipeline_tag: image-feature-extraction",
        f"tags: [self-supervised, {to_json(origin.get('method') or 'unknown')}]",
        "---",
        f"# {_cell(name)}",
        "",
        "An image backbone without a classifier, exported by seer_scale. PATH stands for this folder, FILE for its "
        "file of weights.",
        "",
        "```python",
        target.loading,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value),
        "",
    ]
    if results := origin.get("results"):
        lines += ["## Results", "", "| task | samples seen | scores |", "|---|---|---|"]
        for result in results:
            scores = ", ".join(f"{k}: {_number(v)}" for k, v in result["scores"].items() if isinstance(v, int | float))
            lines.append(f"| {_cell(result['task'])} | {result['samples_seen']:,} | {_cell(scores)} |")
        lines.append("")
    if recipe:
        lines += ["## Recipe", "", f"{counted(len(recipe), 'section')}, keys that were resolved:", "", "```yaml"]
        lines += [f"{k}: {to_json(v)}" for k, v in recipe.items()] + ["```", ""]
    return "\n".join(lines)


def _settings(section: Mapping[str, Any], without: tuple[str, ...] = ()) -> str:
    return ", ".join(f"{k} {v}" for k, v in section.items() if k not in without)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(text: Any) -> str:
    """In a table of Markdown, whatever a file or a class is called."""
    return shown(str(text)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
