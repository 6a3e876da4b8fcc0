"""What is in a checkpoint: who wrote it, when, how large it is and whether it is whole; no tensor is read for that."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from seer_scale.checkpoint import store
from seer_scale.config import size_text
from seer_scale.distributed import World
from seer_scale.formatting import counted, memory_size


def describe(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """What `text` shows, as JSON can hold it. verify: read all files, and compare their checksums; else sizes must do.

    Raises CheckpointError if `path` is no checkpoint or its list of tensors cannot be read.
    """
    meta, tensors = store.read_meta(path), store.contents(path)
    parts: dict[str, dict[str, int]] = {}
    for name, (_, shape, nbytes) in tensors.items():
        part = parts.setdefault(name.partition("/")[0], {"tensors": 0, "elements": 0, "bytes": 0})
        part["tensors"] += 1
        part["elements"] += math.prod(shape)
        part["bytes"] += nbytes
    files = [f for f in path.iterdir() if f.is_file()]
    problem = store.validate(path, World(), contents=verify)
    return {
        "path": str(path),
        **{k: v for k, v in meta.items() if k not in ("config", "data")},
        "config": meta.get("config", {}),
        "data": meta.get("data", {}),
        "files": len(files),
        "bytes": sum(f.stat().st_size for f in files),
        "parts": parts,
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape), "bytes": nbytes}
            for name, (dtype, shape, nbytes) in tensors.items()
        },
        "verified": "contents" if verify else "sizes",
        "problem": problem and problem.rule,
    }


def text(found: dict[str, Any], *, tensors: int = 0) -> str:
    """`found` for people, with so many of the largest tensors."""
    config = found["config"]
    how = {
        "contents": "all contents agree with their checksums",
        "sizes": "all sizes are right; contents were not read (--verify reads them)",
    }[found["verified"]]
    written = time.strftime("%F %T", time.localtime(found["time"])) if "time" in found else "at an unknown time"
    train, seen = config.get("train", {}), found["samples_seen"]
    asked, batch = train.get("total_samples", 0), train.get("global_batch", 1)
    end = max(seen, -(-asked // batch) * batch)  # whole updates, as the run tells it
    rows = [
        ("samples seen", f"{seen:,} of {end:,}, in {counted(found.get('step', 0), 'update')}"),
        ("model", config.get("model", {}).get("name", "unknown")),
        ("method", _method(found)),
        ("images", _preprocessing(found.get("preprocessing"))),
        ("written", (
            f"{written} by {found.get('engine', 'unknown')} on {counted(found.get('world_size', 1), 'rank')}, "
            f"seer_scale {found.get('seer_scale')}, torch {found.get('torch')}"
        )),
        ("size", f"{memory_size(found['bytes'])} in {counted(found['files'], 'file')}"),
        ("whole", f"no: it {found['problem']}" if found["problem"] else f"yes: {how}"),
    ]  # fmt: skip
    lines = [
        found["path"],
        *(f"  {name:14}{value}" for name, value in rows),
        "",
        f"  {'part':14}{'tensors':>8}{'elements':>16}{'size':>12}",
    ]
    lines += [
        f"  {name:14}{p['tensors']:>8,}{p['elements']:>16,}{memory_size(p['bytes']):>12}"
        for name, p in found["parts"].items()
    ]
    if tensors:
        largest = sorted(found["tensors"].items(), key=lambda item: -item[1]["bytes"])[:tensors]
        lines += [
            "",
            *(f"  {t['dtype']:9}{str(t['shape']):22}{memory_size(t['bytes']):>12}  {name}" for name, t in largest),
        ]
    sections = {section: values for section, values in config.items() if isinstance(values, dict)}
    lines += [""] * bool(sections) + [
        f"  {section:14}" + " ".join(f"{k}={_short(v)}" for k, v in values.items())
        for section, values in sections.items()
    ]
    return "\n".join(lines)


def _method(found: dict[str, Any]) -> str:
    name, prefix = found.get("method", {}).get("name", "unknown"), found.get("export", {}).get("prefix")
    return f"{name}, its backbone's tensors model/{prefix}*" if prefix else name


def _preprocessing(how: dict[str, Any] | None) -> str:
    """Of an evaluation's images, in the order of the steps."""
    if not how:
        return "unknown"
    filtered = f"{how['interpolation']}{', antialiased' * how['antialias']}"
    sizes = ", ".join(map(size_text, how["training_sizes"]))
    mean, std = (" ".join(f"{v:g}" for v in how[key]) for key in ("mean", "std"))
    return (
        f"short side {how['resize_short_side']} ({filtered}), {how['crop']} {how['size']}, mean {mean}, std {std}; "
        f"trained on crops of {sizes}"
    )


def _short(value: Any) -> str:
    words = str(value)
    return words if len(words) <= 40 else f"{words[:37]}..."
