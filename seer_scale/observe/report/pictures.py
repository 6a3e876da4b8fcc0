"""The sections of a report made of the run's gallery; each says what is missing when it is."""

from __future__ import annotations

import base64
import math
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from seer_scale.observe.gallery import read_gallery
from seer_scale.observe.report.parts import section
from seer_scale.observe.report.plots import BLUE, Curve, Plot, svg


class Pictures:
    def __init__(self, run_dir: Path):
        self.folder, self.sections = run_dir / "gallery", read_gallery(run_dir)

    def _image(self, name: str, side: int, label: str = "") -> str:
        path = self.folder / name
        if not path.exists():
            return f'<span class=gone style="width:{side}px;height:{side}px"></span>'
        tiny = " class=tiny" if path.suffix == ".png" else ""
        kind = "png" if path.suffix == ".png" else "jpeg"
        data = base64.b64encode(path.read_bytes()).decode()
        box = f'style="width:{side}px;height:{side}px" alt="{escape(label)}"'
        return f'<img{tiny} {box} src="data:image/{kind};base64,{data}">'

    def _pixels(self, name: str) -> int:
        path = self.folder / name
        return math.prod(Image.open(path).size) if path.exists() else 0

    def crops(self) -> str:
        title = "What the network sees"
        entries = self.sections.get("crops")
        if not entries:
            return section(title, "This run kept no crops, so there is nothing to show here.")
        lines = []
        for entry in entries:
            largest = max(map(self._pixels, entry["images"]), default=0)
            shown = "".join(self._image(n, 136 if self._pixels(n) == largest else 84) for n in entry["images"])
            lines.append(f"<figure class=strip>{shown}<figcaption>image {entry['index']}</figcaption></figure>")
        text = (
            "Each row holds the crops cut from one image at the first step, the largest first. The network "
            "is asked to put the crops of a row in the same place, whatever their colours, scale and sharpness."
        )
        return section(title, text, "<div class=strips>", *lines, "</div>")

    def neighbours(self) -> str:
        title = "Nearest neighbours"
        before, after = ({e["query"]: e for e in self.sections.get(stage, [])} for stage in ("before", "after"))
        if not before and not after:
            return section(title, "This run kept no neighbours, so there is nothing to show here.")
        blocks = []
        for query in dict.fromkeys([*after, *before]):
            label = (after.get(query) or before[query])["label"]
            rows = [
                f"<div class=stage><span>{stage}</span>{self._row(entries[query])}</div>"
                for stage, entries in (("before", before), ("after", after))
                if query in entries
            ]
            caption = f"<figcaption>{escape(label)}</figcaption>" if label else ""
            blocks.append(
                f"<div class=query><figure>{self._image(query, 124)}{caption}</figure><div>{''.join(rows)}</div></div>"
            )
        text = (
            "Left, an image; right, the images most similar to it, nearest first, before training "
            "and after. The number is the cosine similarity."
        )
        counts = [c for c in (_hits("before", before), _hits("after", after)) if c]
        if counts:
            text += (
                " <span class=right>Green ✓</span> has the class of the query, <span class=wrong>red ✗</span> another."
                f" Of the neighbours shown, {' and '.join(counts)}."
            )
        return section(title, text, *blocks)

    def _row(self, entry: dict[str, Any]) -> str:
        cells = []
        for near in entry["neighbours"]:
            label, known = near["label"], near["label"] is not None and entry["label"] is not None
            verdict = ("right" if label == entry["label"] else "wrong") if known else "unknown"
            mark = {"right": "✓ ", "wrong": "✗ ", "unknown": ""}[verdict]
            cells.append(
                f"<figure class={verdict}>{self._image(near['image'], 86, label or '')}"
                f"<figcaption><span>{mark}{escape(label or '')}</span>"
                f"<small>{near['similarity']:.2f}</small></figcaption></figure>"
            )
        return "".join(cells)

    def prototypes(self) -> str:
        title = "What prototypes collect"
        entries = self.sections.get("prototypes")
        if not entries:
            return section(title, "This run kept no images of its prototypes, so there is nothing to show here.")
        lines = [
            f"<figure class=strip>{''.join(self._image(name, 80) for name in e['images'])}"
            f"<figcaption>prototype {e['k']}<small>{100 * e['share']:.2g} % of images</small></figcaption></figure>"
            for e in entries
        ]
        text = (
            "Prototypes are the groups the network made up by itself. Each row shows the images nearest to one of "
            "them, nearest first: a row that makes sense to you is something the network found without being told. "
            "Shown are some that hold their images close and are far from each other."
        )
        return section(title, text, "<div class=strips>", *lines, "</div>", self._use())

    def _use(self) -> str:
        """How evenly the images are shared out."""
        shares = sorted((100 * s for s in self.sections.get("use", [])), reverse=True)
        if not shares:
            return ""
        curve = Curve("share of images", BLUE, range(1, len(shares) + 1), shares, ".2g", "%")
        without = sum(s == 0 for s in shares)
        picture = svg(
            Plot(
                [curve],
                "% of images",
                "prototypes, most used first",
                (0, None),
                (100 / len(shares), "if all had the same"),
                bars=True,
            )
        )
        return (
            f'<figure class="plot wide use"><h3>How the images are shared out</h3>{picture}<figcaption>Of '
            f"{len(shares):,} prototypes, "
            f"{without:,} are the nearest of no image looked at.</figcaption></figure>"
        )


def _hits(stage: str, entries: dict[str, dict[str, Any]]) -> str:
    """`31 of 48 match after`, or "" where nothing is labelled."""
    pairs = [(n["label"], e["label"]) for e in entries.values() for n in e["neighbours"] if n["label"] and e["label"]]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)} match {stage}" if pairs else ""
