"""Data sets by one word, each in its usual layout: `--data imagenet:/datasets/imagenet`.

Classes are in the order that published heads have: ImageNet's by wnid, VOC's by name, the others' by the number that
their own files give.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from seer_scale.data.sources import open_source
from seer_scale.data.sources.base import NamesBuilder, is_image
from seer_scale.data.sources.files import Files, folders_in
from seer_scale.errors import NOTHING, DataError, Problem, missing_path
from seer_scale.evaluate.knn import TRAIN, named_classes
from seer_scale.evaluate.splits import DataSet, Split
from seer_scale.extras import how_to_install
from seer_scale.files import shown
from seer_scale.formatting import counted

DATASETS = "SEER_SCALE_DATASETS"
"""The environment's folder of all data sets, each below its word."""


def named_folder(data: str, words: Collection[str]) -> tuple[str, Path | None]:
    """WORD:FOLDER, or WORD alone, as the word and its folder; none where it is none of `words`. Of a word alone the
    folder is that in $SEER_SCALE_DATASETS, or here. Raises DataError where it is not there."""
    word, has_folder, folder = data.partition(":")
    if word not in words:
        return word, None
    if has_folder:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise DataError(missing_path(root))
        return word, root
    root = Path(os.environ.get(DATASETS, ""), word.partition("-")[0]).expanduser()
    if not root.is_dir():
        looked = f"looked for {shown(root)}" if DATASETS in os.environ else f"{DATASETS} is not set"
        fix = f"write {word}:FOLDER, or set {DATASETS} to the folder of all data sets"
        raise DataError(Problem("--data", word, f"there is no such folder: {looked}", fix))
    return word, root


def word_of(data: str) -> str:
    """The word of LAYOUTS that --data names; "" where it is none."""
    word = data.partition(":")[0]
    return word if word in LAYOUTS else ""


def named_data_set(data: str, roles: str = TRAIN) -> DataSet | None:
    """What WORD:FOLDER, or WORD alone, names; None where it is no word of LAYOUTS. roles: as of `open_data_set`. Raises
    DataError."""
    word, root = named_folder(data, LAYOUTS)
    if root is None:
        return None
    train, test = LAYOUTS[word](root)
    for split in (train, test):
        if not len(split):
            raise DataError(Problem(str(root), NOTHING, f"has no image of {split.name} as {word} has it"))
    bank, queries = f"{len(train):,} images of {word}'s {train.name}", f"{len(test):,} of its {test.name}"
    kind = "several labels an image, " if train.multi_label else ""
    return DataSet(
        data, train, test, f"{roles.format(bank=bank, queries=queries)}; {kind}{named_classes(train.classes)}."
    )


# ------------------------------------------------------------------------------------------------ the layouts


def imagenet(root: Path) -> tuple[Split, Split]:
    """train/WNID/*.JPEG; val/WNID/*.JPEG, or val/ILSVRC2012_val_*.JPEG beside the devkit. Classes: wnids, sorted."""
    train = _folder(find(root, "train", "ILSVRC2012_img_train"), "train")
    place = find(root, "val", "ILSVRC2012_img_val")
    if folders_in(str(place)):
        val = _folder(place, "val")
        if unknown := sorted(set(val.classes) - set(train.classes)):
            raise DataError(Problem(str(place), NOTHING, f"has the class {unknown[0]}, which {root}/train has not"))
        number = {name: n for n, name in enumerate(train.classes)}
        table = np.array([number[name] for name in val.classes])
        return train, replace(val, targets=table[val.targets], classes=train.classes)
    devkit = find(root, "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
    truth = find(devkit, "ILSVRC2012_validation_ground_truth.txt")
    wnid_of = _devkit_wnids(find(devkit, "meta.mat"))
    names = sorted(p.name for p in os.scandir(place) if is_image(p.name))
    ids = [line for line in truth.read_text().split("\n") if line.strip()]
    if len(names) != len(ids):
        rule = f"has {counted(len(names), 'image')}, but {truth} tells of {len(ids):,}"
        raise DataError(Problem(str(place), NOTHING, rule, "unpack all of them"))
    number = {name: n for n, name in enumerate(train.classes)}
    try:
        targets = [number[wnid_of[int(i)]] for i in ids]
    except (ValueError, KeyError) as error:
        rule = f"has a label that is no class of {root}/train ({error})"
        raise DataError(Problem(str(truth), NOTHING, rule)) from None
    return train, _split(place, names, targets, train.classes, "val")


def _devkit_wnids(meta: Path) -> dict[int, str]:
    """The devkit's numbers of synsets, which are in another order than wnids."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        rule = "is not installed, and reads the devkit's meta.mat"
        raise DataError(Problem("scipy", NOTHING, rule, how_to_install("scipy"))) from error
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not int(s["num_children"])}
    except Exception as error:  # a damaged file fails anywhere in scipy's reader
        raise DataError(Problem(str(meta), NOTHING, f"is not the devkit's ({error})")) from None


def places205(root: Path) -> tuple[Split, Split]:
    """train_places205.csv and val_places205.csv, lines of a path and a number, below images256."""
    images = find(root, "images256", "data/vision/torralba/deeplearning/images256", "images")
    lists = {}
    for part in ("train", "val"):
        name = f"{part}_places205.csv"
        path = find(root, f"trainvalsplit_places205/{name}", name)
        lists[part] = [_path_and_number(path, line) for line in path.read_text().split("\n") if line.strip()]
    classes: dict[int, str] = {}
    for name, number in (row for rows in lists.values() for row in rows):
        folder = os.path.dirname(name)
        if classes.setdefault(number, folder) != folder:
            rule = f"has images of {shown(folder)} and of {shown(classes[number])} under one number"
            raise DataError(Problem(f"Label {number}", NOTHING, rule, "fetch the lists again"))
    if sorted(classes) != list(range(len(classes))):
        missing = next(n for n in range(len(classes)) if n not in classes)
        raise DataError(Problem(str(root), NOTHING, f"has no image of class {missing} of {max(classes) + 1}"))
    named = [classes[n] for n in range(len(classes))]
    train, val = (
        _split(images, [name for name, _ in rows], [n for _, n in rows], named, part) for part, rows in lists.items()
    )
    return train, val


def _path_and_number(path: Path, line: str) -> tuple[str, int]:
    name, _, number = line.strip().rpartition(" ")
    if not name or not number.isdecimal():
        raise DataError(Problem(str(path), line, "a line is a path, a space and the number of its class"))
    return name.lstrip("/"), int(number)


def inat18(root: Path) -> tuple[Split, Split]:
    """train2018.json and val2018.json, whose file names begin with train_val2018/."""
    train, val = (_annotated(root, find(root, f"{part}2018.json"), "", part) for part in ("train", "val"))
    if train[1] != val[1]:
        raise DataError(Problem(str(root), NOTHING, "has other categories in val2018.json than in train2018.json"))
    parts = []
    for (names, classes, pairs), part in zip((train, val), ("train", "val")):
        targets = np.full(len(names), -1, np.int64)
        targets[[image for image, _ in pairs]] = [label for _, label in pairs]
        if (without := np.flatnonzero(targets < 0)).size:
            rule = f"has no label for {counted(len(without), 'image')}, such as {shown(names[without[0]])}"
            raise DataError(Problem(str(root / f"{part}2018.json"), NOTHING, rule))
        parts.append(_split(root, names, targets, classes, part))
    return parts[0], parts[1]


def coco(root: Path) -> tuple[Split, Split]:
    """annotations/instances_*2017.json: an image has each class of which it has an instance."""
    parts = []
    for part in ("train", "val"):
        path = find(root, f"annotations/instances_{part}2017.json")
        names, classes, pairs = _annotated(root, path, f"{part}2017", part)
        targets = np.zeros((len(names), len(classes)), np.int8)
        if pairs:
            targets[tuple(np.array(pairs).T)] = 1
        parts.append(_split(find(root, f"{part}2017"), names, targets, classes, part))
    if parts[0].classes != parts[1].classes:
        raise DataError(Problem(str(root), NOTHING, "has other categories in val than in train"))
    return parts[0], parts[1]


def _annotated(root: Path, path: Path, folder: str, part: str) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """File names, classes by their number, and (image, class) of each annotation of a file in COCO's format."""
    try:
        found = json.loads(path.read_bytes())
        categories = sorted(found["categories"], key=lambda c: c["id"])
        number = {c["id"]: n for n, c in enumerate(categories)}
        place = {image["id"]: n for n, image in enumerate(found["images"])}
        pairs = [(place[a["image_id"]], number[a["category_id"]]) for a in found["annotations"]]
        return [i["file_name"] for i in found["images"]], [str(c["name"]) for c in categories], pairs
    except OSError as error:
        raise DataError(Problem(str(path), NOTHING, f"cannot be read ({error.strerror})")) from error
    except KeyError as error:
        rule = f"has no {error}, or refers to one that it has not"
        raise DataError(Problem(str(path), NOTHING, rule, "fetch it again")) from None
    except (ValueError, TypeError) as error:
        raise DataError(Problem(str(path), NOTHING, f"is no annotation file ({error})", "fetch it again")) from None


def voc07(root: Path) -> tuple[Split, Split]:
    """VOCdevkit/VOC2007: trainval and test of ImageSets/Main, where 0 is difficult, which is not counted."""
    voc = find(root, "VOCdevkit/VOC2007", "VOC2007", ".", containing="ImageSets/Main")
    lists, images = voc / "ImageSets" / "Main", find(voc, "JPEGImages")
    parts = []
    classes = sorted(p.name.removesuffix("_trainval.txt") for p in lists.glob("*_trainval.txt"))
    if not classes:
        raise DataError(Problem(str(lists), NOTHING, "has no list of a class, such as aeroplane_trainval.txt"))
    for part in ("trainval", "test"):
        names, columns = None, []
        for name in classes:
            path = find(lists, f"{name}_{part}.txt")
            rows = [line.split() for line in path.read_text().split("\n") if line.strip()]
            if bad := [row for row in rows if len(row) != 2 or row[1] not in ("-1", "0", "1")]:
                raise DataError(Problem(str(path), " ".join(bad[0]), "a line is an image and -1, 0 or 1"))
            if names is not None and names != [row[0] for row in rows]:
                raise DataError(Problem(str(path), NOTHING, "lists other images than the other classes do"))
            names = [row[0] for row in rows]
            columns.append([{"1": 1, "0": -1, "-1": 0}[row[1]] for row in rows])
        assert names is not None, "there are classes"
        targets = np.array(columns, np.int8).T
        parts.append(_split(images, [f"{name}.jpg" for name in names], targets, classes, part))
    return parts[0], parts[1]


def openimages(root: Path, with_machine: bool = False) -> tuple[Split, Split]:
    """Image-level labels that people have verified: 1 it has, 0 it has not, all others are not counted. with_machine:
    to train on, also what a machine is at least half sure of. Of the images that lie in train/ and in test/ or
    validation/."""
    test = "test" if (root / "test").is_dir() else "validation"
    described = _csv(
        find(root, "class-descriptions-boxable.csv", "oidv6-class-descriptions.csv", "class-descriptions.csv"),
        ("LabelName", "DisplayName"),
    )
    names = dict(described)
    labels = sorted(names)
    number = {label: n for n, label in enumerate(labels)}
    parts = []
    for part in ("train", test):
        folder = find(root, part)
        images = sorted(p.name for p in os.scandir(folder) if is_image(p.name))
        place = {name.rpartition(".")[0]: n for n, name in enumerate(images)}
        targets = np.full((len(images), len(labels)), -1, np.int8)
        kinds = ["machine", "human"] if with_machine and part == "train" else ["human"]
        for kind in kinds:  # people have the last word
            stem = f"{part}-annotations-{kind}-imagelabels"
            path = find(root, f"{stem}-boxable.csv", f"oidv6-{stem}.csv", f"{stem}.csv")
            for image, label, confidence in _csv(path, ("ImageID", "LabelName", "Confidence")):
                if image in place and label in number:
                    targets[place[image], number[label]] = _number(path, confidence) >= 0.5
        parts.append(_split(folder, images, targets, [names[label] for label in labels], part))
    return parts[0], parts[1]


def _number(path: Path, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(Problem(str(path), text, "a confidence is a number from 0 to 1")) from None


def openimages_machine(root: Path) -> tuple[Split, Split]:
    return openimages(root, with_machine=True)


LAYOUTS: dict[str, Callable[[Path], tuple[Split, Split]]] = {
    "imagenet": imagenet, "places205": places205, "inat18": inat18, "voc07": voc07, "openimages": openimages,
    "openimages-machine": openimages_machine, "coco": coco,
}  # fmt: skip
"""What to train on and to test on, of the folder where a data set lies."""


# ------------------------------------------------------------------------------------------------ parts of them


def find(root: Path, *names: str, containing: str = "") -> Path:
    """The first of `names` that lies below `root`. Raises DataError, which tells what was looked for."""
    for name in names:
        if (root / name / containing).exists():
            return root / name
    looked = " or ".join(f"{name}/{containing}" if containing else name for name in names)
    raise DataError(Problem(shown(root), NOTHING, f"has no {looked}", "see docs/evaluation.md for its usual layout"))


def _folder(path: Path, name: str) -> Split:
    """Images of a folder for each class, which are sorted by name."""
    source = open_source(str(path), "folder")
    if source.labels is None or not source.has_labels:
        raise DataError(Problem(str(path), NOTHING, "has not a folder for each class, with all images in them"))
    return Split(source, source.labels.astype(np.int64), list(source.classes), name)


def _split(
    root: Path, names: Iterable[str], targets: np.ndarray | Sequence[int], classes: Sequence[str], part: str
) -> Split:
    builder = NamesBuilder()
    for name in names:
        builder.add(name)
    targets = np.asarray(targets, np.int8 if np.ndim(targets) == 2 else np.int64)
    labels = targets.astype(np.int32) if targets.ndim == 1 else None
    named = [shown(c) for c in classes]
    source = Files(str(root), builder.build(), labels, named if labels is not None else (), {})
    if len(source):
        source.arrive()
    return Split(source, targets, named, part)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """These columns of a table, by their names in its first line; of one without, the first."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        first = next(rows, None)
        if first is None:
            raise DataError(Problem(str(path), NOTHING, "is empty", "fetch it again"))
        has_header = columns[0] in first
        if has_header and (missing := [c for c in columns if c not in first]):
            raise DataError(Problem(str(path), NOTHING, f"has no column {missing[0]}", "fetch it again"))
        places = [first.index(c) for c in columns] if has_header else list(range(len(columns)))
        for row in [] if has_header else [first]:
            yield tuple(row[i] for i in places)
        for row in rows:
            if row and len(row) <= max(places):
                raise DataError(Problem(f"{path}, line {rows.line_num},", NOTHING, "is cut off", "fetch it again"))
            if row:
                yield tuple(row[i] for i in places)
