"""Pictures that show what a run learned, kept in RUN/gallery for the report: crops, neighbours, prototypes.

gallery.json says what belongs together and is published by rename; images are files named by their content, so a kill
at any point leaves the gallery as it was. Images are uint8 arrays [3, h, w].
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from seer_scale.files import to_json, write_whole

MAX_SIDE = 224  # pixels; larger images are shrunk, as the report shows thumbnails
TINY = 64  # up to this side an image is kept without loss: JPEG would show


def read_gallery(run_dir: Path) -> dict[str, Any]:
    """The sections of a run's gallery, {} where there is none; images are paths relative to RUN/gallery.

    {"crops": [{"index", "images"}], "before" and "after": [{"query", "label", "neighbours": [{"image", "label",
    "similarity"}]}], "prototypes": [{"k", "share", "images"}], "use": share of the images of every prototype,
    "patches" and those of methods: [{"caption", "small", "images"}]}
    """
    path = Path(run_dir) / "gallery" / "gallery.json"
    return json.loads(path.read_text()) if path.exists() else {}


class Gallery:
    """Collects images for the report. What a run has is kept; a section added to anew is replaced as a whole."""

    def __init__(self, run_dir: Path):
        self.folder = Path(run_dir) / "gallery"
        self._sections = read_gallery(run_dir)
        self._files: dict[str, bytes] = {}
        self._renewed: set[str] = set()

    def add_crops(self, index: int, crops: list[np.ndarray]) -> None:
        """The crops the network sees of image number `index`; they may differ in size."""
        self._add("crops", {"index": int(index), "images": [self._keep(c) for c in crops]})

    def add_neighbours(
        self,
        stage: Literal["before", "after"],
        query: np.ndarray,
        query_label: str | None,
        neighbours: list[tuple[np.ndarray, str | None, float]],
    ) -> None:
        """The images nearest to `query` before or after training, nearest first: (image, label, cosine similarity)."""
        near = [{"image": self._keep(i), "label": label, "similarity": float(s)} for i, label, s in neighbours]
        self._add(stage, {"query": self._keep(query), "label": query_label, "neighbours": near})

    def add_prototype(self, k: int, share: float, images: list[np.ndarray]) -> None:
        """The images nearest to prototype `k`, nearest first; `share` (0 to 1) of the images go to it."""
        self._add("prototypes", {"k": int(k), "share": float(share), "images": [self._keep(i) for i in images]})

    def add_strip(self, section: str, caption: str, images: list[np.ndarray], small: str = "") -> None:
        """A row of pictures: of `patches`, or for a ReportSection of the method whose `pictures` is `section`."""
        entry = {"caption": caption, "small": small, "images": [self._keep(i) for i in images]}
        self._add(section, entry)

    def set_use(self, shares: list[float]) -> None:
        """The share (0 to 1) of the images that goes to each prototype, in their order."""
        self._sections["use"] = [float(share) for share in shares]

    def save(self) -> None:
        """Publish: images first, then gallery.json by rename, then images nothing refers to are removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            write_whole(self.folder / name, data)
        text = to_json(self._sections, indent=1)
        write_whole(self.folder / "gallery.json", text)
        for path in self.folder.iterdir():
            if path.name != "gallery.json" and path.name not in text:
                path.unlink()
        self._files.clear()

    def _add(self, section: str, entry: dict[str, Any]) -> None:
        if section not in self._renewed:
            self._sections[section] = []
            self._renewed.add(section)
        self._sections[section].append(entry)

    def _keep(self, image: np.ndarray) -> str:
        """The name under which save() stores `image`."""
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        tiny, data = max(picture.size) <= TINY, io.BytesIO()
        picture.save(data, "PNG" if tiny else "JPEG", quality=88)
        name = hashlib.sha1(data.getvalue()).hexdigest()[:16] + (".png" if tiny else ".jpg")
        self._files[name] = data.getvalue()
        return name
