"""Images with objects in COCO's format, read and checked before anything begins.

What is done as COCO's own tools do: crowds (`iscrowd`) are not trained on, and a detection on one counts neither as
right nor as wrong. What hangs over the edge of its image is cut off at it for training, and what has no area is left
out; measured is against the annotations as they are.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seer_scale.data.sources.base import NamesBuilder, StringArray
from seer_scale.errors import NOTHING, DataError, Problem, missing_path
from seer_scale.files import shown, to_json
from seer_scale.formatting import counted

MIN_SIDE = 0.01
"""Pixels; a box below it has no area."""
KNOWN = "see https://cocodataset.org/#format-data"


@dataclass(frozen=True, kw_only=True)
class CocoSet:
    """names: of image files below `folder`. ids: int64 [n], of images. sizes: int64 [n, 2], (height, width). objects:
    of each image, JSON of its annotations. usable: int64 [n], how many of them can be trained on. categories: id ->
    name, in order of ids, which need not be contiguous: class c, from 1, is the c-th of them. counts: what was found.
    """

    path: str
    folder: str
    names: StringArray
    ids: np.ndarray
    sizes: np.ndarray
    objects: StringArray
    usable: np.ndarray
    categories: dict[int, str]
    counts: Counter[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_masks(self) -> bool:
        """Of each object that counts. Raises DataError where some have one and others have not."""
        without, num = self.counts["without_mask"], int(self.usable.sum())
        if 0 < without < num:
            rule = f"{counted(without, 'object')} of {num:,} {'has' if without == 1 else 'have'} no segmentation"
            raise DataError(Problem(self.path, NOTHING, f": {rule}", "give --masks false to measure boxes alone"))
        return without == 0

    def annotations(self, i: int) -> list[dict[str, Any]]:
        """Of image i, as the file has them."""
        return json.loads(self.objects[i])

    @property
    def mark(self) -> str:
        """Stands for the images and their objects, but for their folder."""
        crc = zlib.crc32(self.ids.tobytes(), zlib.crc32(to_json(self.categories).encode()))
        return f"{zlib.crc32(self.objects.blob.tobytes(), crc):08x}"


def find_pair(data: Path, part: str) -> tuple[Path, Path]:
    """(annotations, folder of images) of the part "train" or "val" of a folder laid out as COCO's. Raises DataError."""
    if not data.is_dir():
        raise DataError(missing_path(data))
    found = sorted((data / "annotations").glob(f"instances_{part}*.json"))
    if len(found) != 1:
        option = "--annotations" if part == "train" else "--test-annotations"
        rule = f"has {len(found)} files annotations/instances_{part}*.json, one is needed"
        raise DataError(Problem(shown(data), NOTHING, rule, f"name it by {option}"))
    word = found[0].stem.removeprefix("instances_")
    places = [data / word, data / "images" / word]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(missing_path(places[0]))
    return found[0], folder


def read_coco(path: Path, folder: Path) -> CocoSet:
    """Reads and checks the file `path` of images below `folder`. Raises DataError with one sentence, and how many there
    are of it, for each thing that is wrong."""
    found = _load(path)
    problems = _Problems(path)
    categories = _categories(found["categories"], problems)
    images, numbers = found["images"], dict[int, int]()
    for i, image in enumerate(images):
        if not _is_image(image):
            problems.add("image", "without an id, file_name, height or width", image)
        elif numbers.setdefault(image["id"], i) != i:
            problems.add("image", "whose id another has", image)
    problems.raise_if_any()
    if not images:
        raise DataError(Problem(shown(path), NOTHING, "has no images"))
    if missing := [name for name in (i["file_name"] for i in images) if not _is_below(folder, name)]:
        begin = f"lacks {len(missing):,} of {counted(len(images), 'image')}"
        rule = f"{begin} that {shown(path)} names, such as {shown(missing[0])}"
        raise DataError(Problem(shown(folder), NOTHING, rule, "give the folder of these images"))

    counts: Counter[str] = Counter()
    objects: list[list[dict[str, Any]]] = [[] for _ in images]
    usable = np.zeros(len(images), np.int64)
    for one in found["annotations"]:
        if not isinstance(one, dict) or not _is_int(one.get("image_id")) or one["image_id"] not in numbers:
            problems.add("annotation", "whose image_id is of no image", one)
        elif not _is_int(one.get("category_id")) or one["category_id"] not in categories:
            problems.add("annotation", "whose category_id is of no category", one)
        elif not _is_box(one.get("bbox")):
            problems.add("annotation", "without a bbox of four finite numbers", one)
        else:
            i = numbers[one["image_id"]]
            height, width = images[i]["height"], images[i]["width"]
            if wrong := _wrong_segmentation(one.get("segmentation"), height, width):
                problems.add("annotation", f"whose segmentation {wrong}", one)
            elif clipped(one["bbox"], height, width) is None and _has_area(one["bbox"]):
                problems.add("annotation", "whose bbox lies outside its image", one)
            else:
                usable[i] += _count(one, height, width, counts)
                objects[i].append({key: one[key] for key in ANNOTATION_KEYS if key in one})
    problems.raise_if_any()
    if not usable.any():
        raise DataError(Problem(shown(path), NOTHING, "has no object with an area that is no crowd"))
    return CocoSet(
        path=shown(path),
        folder=str(folder),
        names=_strings(image["file_name"] for image in images),
        ids=np.array([image["id"] for image in images], np.int64),
        sizes=np.array([(image["height"], image["width"]) for image in images], np.int64),
        objects=_strings(to_json(of_image) for of_image in objects),
        usable=usable,
        categories=categories,
        counts=counts,
    )


ANNOTATION_KEYS = ("bbox", "category_id", "iscrowd", "area", "segmentation")


def clipped(bbox: list[float], height: int, width: int) -> tuple[float, float, float, float] | None:
    """[x, y, w, h] as (left, top, right, bottom) inside the image; None where no area is left."""
    x, y, w, h = bbox
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    return (left, top, right, bottom) if right - left >= MIN_SIDE and bottom - top >= MIN_SIDE else None


def is_usable(annotation: Mapping[str, Any], height: int, width: int) -> bool:
    """To train on."""
    return not annotation.get("iscrowd") and clipped(annotation["bbox"], height, width) is not None


def _count(one: Mapping[str, Any], height: int, width: int, counts: Counter[str]) -> bool:
    """Whether it can be trained on; what it is goes to `counts`."""
    if one.get("iscrowd"):
        counts["crowds"] += 1
    elif not is_usable(one, height, width):
        counts["without_area"] += 1
    else:
        x, y, w, h = one["bbox"]
        counts["clipped"] += x < 0 or y < 0 or x + w > width or y + h > height
        counts["without_mask"] += not one.get("segmentation")
        return True
    return False


class _Problems:
    """What is wrong with a file's entries: how many, and the id of the first, of each kind."""

    def __init__(self, path: Path):
        self.path, self._found = path, dict[tuple[str, str], tuple[int, Any]]()

    def add(self, noun: str, rule: str, entry: Any) -> None:
        num, first = self._found.get((noun, rule), (0, entry.get("id") if isinstance(entry, dict) else entry))
        self._found[noun, rule] = num + 1, first

    def raise_if_any(self) -> None:
        if self._found:
            raise DataError(
                *(
                    Problem(
                        shown(self.path), NOTHING, f"has {counted(num, noun)} {rule} (the first: id {first})", KNOWN
                    )
                    for (noun, rule), (num, first) in self._found.items()
                )
            )


def _load(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise DataError(missing_path(path))
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(Problem(shown(path), NOTHING, f"is no JSON ({shown(str(error))})", KNOWN)) from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(found, dict) or not isinstance(found.get(name), list):
            raise DataError(Problem(shown(path), NOTHING, f'is not in COCO\'s format: it has no list "{name}"', KNOWN))
    return found


def _categories(entries: list[Any], problems: _Problems) -> dict[int, str]:
    names: dict[int, str] = {}
    for one in entries:
        if not (isinstance(one, dict) and _is_int(one.get("id")) and isinstance(one.get("name"), str)):
            problems.add("class", "without an id or name", one)
        elif one["id"] in names:
            problems.add("class", "whose id another has", one)
        else:
            names[one["id"]] = one["name"]
    return dict(sorted(names.items()))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


def _is_image(image: Any) -> bool:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not _is_int(image.get("id")):
        return False
    return all(_is_int(image.get(side)) and 0 < image[side] < 1 << 20 for side in ("height", "width"))


def _is_below(folder: Path, name: str) -> bool:
    """A file, and not one that a hostile name leads to elsewhere."""
    return ".." not in Path(name).parts and not os.path.isabs(name) and "\0" not in name and (folder / name).is_file()


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _has_area(box: list[float]) -> bool:
    return box[2] >= MIN_SIDE and box[3] >= MIN_SIDE


def _wrong_segmentation(found: Any, height: int, width: int) -> str:
    """What is wrong with it, as a clause; none at all is right."""
    if not found:
        return ""
    if isinstance(found, list):
        fine = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p)) for p in found)
        return "" if fine else "is not of polygons with at least three points"
    if not isinstance(found, dict) or found.get("size") != [height, width]:
        return "is neither polygons nor run lengths of its image's size"
    counts = found.get("counts")
    runs = _decoded(counts) if isinstance(counts, str) else counts
    fine = isinstance(runs, list) and all(_is_int(n) and n >= 0 for n in runs) and sum(runs) == height * width
    return "" if fine else "has runs that do not add up to its image"


def _decoded(text: str) -> list[int]:
    """The run lengths of COCO's compressed form: groups of five bits, lowest first; from the third on differences to
    the last but one. pycocotools reads what is not set where they do not add up."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) * bool(bits & 16)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs


def _strings(texts: Iterable[str]) -> StringArray:
    builder = NamesBuilder()
    for text in texts:
        builder.add(text)
    return builder.build()
