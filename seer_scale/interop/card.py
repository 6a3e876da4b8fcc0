"""The model card of an export: what was trained on what, how well it did, and the lines that load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seer_scale.files import plain, shown, to_json
from seer_scale.formatting import counted
from seer_scale.interop.artefact import OWN_FORMAT, About
from seer_scale.interop.formats import LIBRARIES, Target
from seer_scale.interop.weights import Weights, public_name
from seer_scale.observe.records import read_metrics

README = "README.md"
UNLICENSED = "unknown"
IN_TRAINING, OF_THE_RECIPE = "in training", "of the recipe"
MAX_CLASSES = 20
"""That are named."""


def results_of(run: Path | None, samples_seen: int | None) -> list[dict[str, Any]]:
    """What a run has measured at so many samples: its last kNN line up to there, and its eval/*.json of that state,
    each with its name, data and the options that are not defaults, without what tells of this machine."""
    if run is None or samples_seen is None:
        return []
    found: list[dict[str, Any]] = []
    rows = [row for row in read_metrics(run)[0] if "knn/top1" in row and row["samples_seen"] <= samples_seen]
    if rows:
        scores = {name: value for name, value in rows[-1].items() if name.startswith("knn/")}
        found.append({"task": "knn", "name": IN_TRAINING, "samples_seen": rows[-1]["samples_seen"], "scores": scores})
    for path in sorted((run / "eval").glob("*.json")):
        try:
            result = json.loads(path.read_bytes())
            subject = result["subject"]
            of_these = subject["weights"] == "trained" and subject["samples_seen"] == samples_seen
            if isinstance(result["scores"], dict) and of_these:
                about = {"task": str(result["task"]), "name": path.stem, "data": result.get("data_name", "")}
                options = {name: _public(value) for name, value in (result.get("given") or {}).items()}
                own = {"options": options, "samples_seen": samples_seen, "scores": result["scores"]}
                found.append(about | own)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another's file, or one that is being written
    return plain(found)


def card(name: str, weights: Weights, about: About, target: Target) -> str:
    """README.md of an artefact, with the title `name`, as the Hub shows it. `about` is of the artefact, and has what is
    known: origin's recipe, method, samples_seen and results may be missing. weights: of it, or of what it was made
    of."""
    origin, how = about.origin, about.preprocessing
    license, method = origin.get("license", ""), origin.get("method", "")
    recipe: Mapping[str, Any] = origin.get("recipe") or {}
    data = (recipe.get("data") or {}).get("path", "")
    began = (recipe.get("checkpoint") or {}).get("init_from", "")
    head, finetuned = weights.head if about.format == OWN_FORMAT else None, weights.finetuned
    num_parameters = sum(p.numel() for p in weights.backbone.parameters())
    if head:
        num_parameters += sum(info.shape.numel() for info in weights.others.values())
    before = "pretraining: " if finetuned else ""
    kind = "a backbone without a classifier"
    if head:
        kind = f"a classifier of {counted(len(head.classes), 'class')}: a backbone and a linear head on its features"
    if finetuned:
        kind += f", {f'pretrained by {_cell(method)}, then fine-tuned' if method else 'trained'} with labels"
    size = (
        f"{how['size']} x {how['size']} pixels: the short side is resized to {how['resize_short_side']} "
        f"({how['interpolation']}), the centre cropped"
    )
    mean, std = (", ".join(f"{v:g}" for v in how[key]) for key in ("mean", "std"))
    rows = {
        "network": f"{about.model['name']} ({_settings(about.model, ('name',))})" if len(about.model) > 1
        else about.model["name"],
        "there called": f"{target.network} ({about.format})",
        "classes": _classes(head.classes) if head else "",
        "an image may have several": "yes" if head and head.multi_label else "",
        "features": f"{weights.backbone.num_features}",
        "parameters": f"{num_parameters:,}",
        "weights": origin.get("dtype", ""),
        f"{before}method": method,
        f"{before}began with": f"the weights of {began}" if began else "",
        f"{before}samples seen": f"{origin['samples_seen']:,}" if origin.get("samples_seen") is not None else "",
        f"{before}data": data,
        "labels of": ", then ".join(f"{step.data} ({counted(step.classes, 'class')})" for step in finetuned),
        "images": f"{size}; mean {mean}, standard deviation {std} of values in 0 to 1",
        "licence": license or "not stated",
    }  # fmt: skip
    tags = ["fine-tuned" if method else "supervised"] if finetuned else ["self-supervised"] * bool(method and not began)
    lines = [
        "---",
        f"license: {to_json(license or UNLICENSED)}",
        f"library_name: {to_json(LIBRARIES[about.format])}",
        f"pipeline_tag: {'image-classification' if head else 'image-feature-extraction'}",
        f"tags: {to_json(tags + [method] * bool(method))}",
        "---",
        f"# {_cell(name)}",
        "",
        f"Of images: {kind}. Written by seer_scale. PATH stands for this folder, FILE for its file of weights.",
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
    for step in finetuned:
        stands, *others = (f"{k}: {_number(v)}" for k, v in step.scores.items() if isinstance(v, int | float))
        lines += [f"## Training with the labels of {_cell(step.data)}", ""]
        lines += [f"**{_cell(stands)} %**. {_cell(step.protocol)}", ""]
        lines += [f"{_cell(', '.join(others))}.", "", "Options of `seer-scale eval finetune`:", "", "```yaml"]
        lines += [f"{k}: {to_json(v)}" for k, v in step.options.items()] + ["```", ""]
    if results := origin.get("results"):
        lines += ["## Results", "", "| task | data | options | samples seen | scores |", "|---|---|---|---|---|"]
        for result in results:
            task, name, options = result["task"], result.get("name", ""), result.get("options")
            scores = ", ".join(f"{k}: {_number(v)}" for k, v in result["scores"].items() if isinstance(v, int | float))
            cells = f"{task} ({name})" if name not in ("", task) else task, result.get("data") or OF_THE_RECIPE
            given = OF_THE_RECIPE if name == IN_TRAINING else _settings(options) if isinstance(options, dict) else ""
            row = *cells, given, f"{result['samples_seen']:,}", scores
            lines.append(f"| {' | '.join(map(_cell, row))} |")
        lines.append("")
    if recipe:
        lines += [f"## Recipe{' of the pretraining' * bool(finetuned)}", ""]
        lines += [f"{counted(len(recipe), 'section')}, keys that were resolved:", "", "```yaml"]
        lines += [f"{k}: {to_json(v)}" for k, v in recipe.items()] + ["```", ""]
    return "\n".join(lines)


def _classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_CLASSES:,} more" if len(names) > MAX_CLASSES else ""
    return f"{len(names):,}: {', '.join(names[:MAX_CLASSES])}{more}"


def _public(value: Any) -> Any:
    """Of an option, which may be a path or several."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    return public_name(value) if isinstance(value, str) else value


def _settings(section: Mapping[str, Any], without: tuple[str, ...] = ()) -> str:
    return ", ".join(f"{k} {v}" for k, v in section.items() if k not in without)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(text: Any) -> str:
    """In a table of Markdown, whatever a file or a class is called."""
    return shown(str(text)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
