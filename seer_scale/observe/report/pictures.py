"""What the report shows of the run's gallery, as plain data for the template."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from seer_scale.observe.gallery import read_gallery
from seer_scale.observe.report.plots import BLUE, Curve, Plot, svg


@dataclass(frozen=True)
class Picture:
    """width, height: pixels on the page. uri: of its content; "" where the file is gone. tiny: to be magnified by
    pixels."""

    width: int
    height: int
    uri: str
    label: str = ""
    tiny: bool = False


@dataclass(frozen=True)
class Strip:
    """Pictures in a row, with a caption and a small line below that."""

    pictures: list[Picture]
    caption: str
    small: str = ""


@dataclass(frozen=True)
class Neighbour:
    """verdict: right, wrong or unknown, as its label is that of the query."""

    picture: Picture
    label: str
    verdict: str
    similarity: float


@dataclass(frozen=True)
class Query:
    """stages: before and after training, what is nearest, nearest first."""

    picture: Picture
    label: str
    stages: dict[str, list[Neighbour]]


class Pictures:
    """Of a run; each list is empty where the run kept none."""

    def __init__(self, run_dir: Path):
        self._folder, self._gallery = run_dir / "gallery", read_gallery(run_dir)

    def _picture(self, name: str, side: int, label: str = "") -> Picture:
        """side: pixels of its longer side on the page."""
        path = self._folder / name
        if not path.exists():
            return Picture(side, side, "")
        kind, pixels = "png" if path.suffix == ".png" else "jpeg", Image.open(path).size
        width, height = (round(side * n / max(pixels)) for n in pixels)
        uri = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        return Picture(width, height, uri, label, tiny=kind == "png")

    def _pixels(self, name: str) -> int:
        path = self._folder / name
        return math.prod(Image.open(path).size) if path.exists() else 0

    def crops(self) -> list[Strip]:
        """Those cut from one image in a strip, the largest first."""
        strips = []
        for entry in self._gallery.get("crops", []):
            largest = max(map(self._pixels, entry["images"]), default=0)
            pictures = [self._picture(n, 136 if self._pixels(n) == largest else 84) for n in entry["images"]]
            strips.append(Strip(pictures, f"image {entry['index']}"))
        return strips

    def strips(self, section: str, side: int = 80) -> list[Strip]:
        """Of a section of the gallery: `patches`, or one that a method brings."""
        return [
            Strip([self._picture(name, side) for name in entry["images"]], entry["caption"], entry.get("small", ""))
            for entry in self._gallery.get(section, [])
        ]

    def prototypes(self) -> list[Strip]:
        """The images nearest to some, nearest first."""
        return [
            Strip(
                [self._picture(name, 80) for name in entry["images"]],
                f"prototype {entry['k']}",
                f"{100 * entry['share']:.2g} % of images",
            )
            for entry in self._gallery.get("prototypes", [])
        ]

    def queries(self) -> list[Query]:
        stages = {
            stage: {entry["query"]: entry for entry in self._gallery.get(stage, [])} for stage in ("before", "after")
        }
        queries = []
        for name in dict.fromkeys([*stages["after"], *stages["before"]]):
            entries = {stage: known[name] for stage, known in stages.items() if name in known}
            label = list(entries.values())[-1]["label"]
            near = {
                stage: [self._neighbour(n, entry["label"]) for n in entry["neighbours"]]
                for stage, entry in entries.items()
            }
            queries.append(Query(self._picture(name, 124), label or "", near))
        return queries

    def _neighbour(self, near: dict[str, Any], wanted: str | None) -> Neighbour:
        label, known = near["label"], near["label"] is not None and wanted is not None
        verdict = ("right" if label == wanted else "wrong") if known else "unknown"
        return Neighbour(self._picture(near["image"], 86, label or ""), label or "", verdict, near["similarity"])

    def use(self) -> dict[str, Any] | None:
        """How evenly the images are shared out among the prototypes; None where that is not known."""
        shares = sorted((100 * s for s in self._gallery.get("use", [])), reverse=True)
        if not shares:
            return None
        curve = Curve("share of images", BLUE, range(1, len(shares) + 1), shares, ".2g", "%")
        plot = Plot(
            [curve],
            "% of images",
            "prototypes, most used first",
            (0, None),
            (100 / len(shares), "if all had the same"),
            bars=True,
        )
        return {"svg": svg(plot), "num": len(shares), "without": sum(s == 0 for s in shares)}


def hits(queries: list[Query]) -> dict[str, tuple[int, int]]:
    """Stage -> how many of the neighbours shown have the class of their query, of how many; where they have labels."""
    counts = {}
    for stage in ("before", "after"):
        verdicts = [n.verdict for q in queries for n in q.stages.get(stage, []) if n.label and q.label]
        if verdicts:
            counts[stage] = (verdicts.count("right"), len(verdicts))
    return counts
