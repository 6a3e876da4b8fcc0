"""Labelled images to train a head on and to test it on."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from seer_scale.config import Config, Data, Knn, Run, Train
from seer_scale.data.sources import Source, subset
from seer_scale.errors import NOTHING, DataError, Problem
from seer_scale.evaluate.knn import TRAIN, Words, labelled_images, some_names, why_unlabelled
from seer_scale.files import shown
from seer_scale.formatting import counted
from seer_scale.rng import numpy_generator


@dataclass(frozen=True)
class Split:
    """Images with their targets: int64 [n], a class each, or int8 [n, classes] where an image may have several: 1 has
    it, 0 has it not, -1 is not to be counted. taken: stands for which images of a larger one these are."""

    source: Source
    targets: np.ndarray
    classes: list[str]
    name: str = ""
    taken: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def multi_label(self) -> bool:
        return self.targets.ndim == 2

    def take(self, indices: np.ndarray) -> Split:
        """The images `indices`, in that order."""
        indices = np.asarray(indices, np.int64)
        taken = zlib.crc32(indices.tobytes(), self.taken)
        return dataclasses.replace(
            self, source=subset(self.source, indices), targets=self.targets[indices], taken=taken
        )

    def told_of_unreadable(self, rows: np.ndarray) -> str:
        """What is said where only the images `rows` can be read: how many cannot, and which classes have none without
        them; nothing where all can."""
        lost = np.setdiff1d(np.arange(len(self)), rows).tolist()
        if not lost:
            return ""
        gone = without(self.classes, self.targets[rows])
        gone = [name for name in gone if name not in without(self.classes, self.targets)]
        first = f"{shown(self.source.name(lost[0]))}{' and others' * (len(lost) > 1)}"
        told = f"Of {len(self):,} images {'drawn ' * bool(self.taken)}of {self.name} {len(lost):,} cannot be read and "
        told += f"{'is' if len(lost) == 1 else 'are'} left out: {first}"
        return f"{told}{f'; that leaves none of {some_names(gone)}' if gone else ''}."

    @cached_property
    def mark(self) -> str:
        """Stands for which images and targets these are, but for their folder, which may be moved."""
        crc = zlib.crc32(repr([images_mark(self.source), self.taken, *self.classes]).encode(errors="backslashreplace"))
        return f"{zlib.crc32(np.ascontiguousarray(self.targets).tobytes(), crc):08x}"


IMAGES_LOOKED_AT = 64


def images_mark(source: Source) -> str:
    """Stands for which images these are, by their number and the names and bytes of some, but for their folders, which
    may be moved. Reads those images."""
    some = np.linspace(0, len(source) - 1, min(len(source), IMAGES_LOOKED_AT)).astype(np.int64).tolist()
    crc = zlib.crc32(repr([len(source), *(os.path.basename(source.name(i)) for i in some)]).encode(errors="replace"))
    for i in some:
        with suppress(DataError):
            crc = zlib.crc32(source.read(i), crc)
    return f"{crc:08x}"


@dataclass(frozen=True)
class DataSet:
    """protocol: what is trained and tested on, by what classes, a sentence. more: what a layout has beside them, such
    as a revisited set's lists of what is easy and hard."""

    name: str
    train: Split
    test: Split
    protocol: str
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> list[Source]:
        return [self.train.source, self.test.source]

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def without_images(self) -> str:
        """Which classes have no image to train on, or none to test on: a sentence each, or nothing."""
        told = ""
        for what, split in (("training", self.train), ("test", self.test)):
            if missing := without(self.classes, split.targets):
                told += f" Classes without {what} images: {some_names(missing)}."
        return told


def without(classes: Sequence[str], targets: np.ndarray) -> list[str]:
    """Those of the classes that no image has, of the targets of a `Split`."""
    there = (targets == 1).any(0) if targets.ndim == 2 else np.isin(np.arange(len(classes)), targets)
    return [name for name, is_there in zip(classes, there) if not is_there]


def open_data_set(data: str, test: str, config: Config | None, roles: str = TRAIN) -> DataSet:
    """data: whatever `data.path` takes, WORD or WORD:FOLDER of layouts.LAYOUTS; empty: what `config`, the run's
    recipe, has. test: images to test on. roles: what they are for, as the protocol says it (knn.TRAIN, knn.VOTE).
    Raises DataError."""
    if not data and config is None:
        raise DataError(Problem("--data", NOTHING, "is missing, and no recipe says where labelled images are",
                                "give a folder of train and test parts, or of classes"))  # fmt: skip
    from seer_scale.evaluate import layouts  # which stands on this module

    if named := layouts.named_data_set(data, roles):
        if test:
            fix = "leave it out, or give a folder as --data"
            raise DataError(Problem("--test", test, f"{data} has its own images to test on", fix))
        return named
    section = Config(
        run=Run(dir="-"),
        train=Train(total_samples=1),
        data=Data(path=data) if data else config.data if config else Data(),
        knn=Knn(queries=test, limit=0, limit_queries=0),
    )
    if not data and config:
        known = config.knn
        section = dataclasses.replace(
            section, knn=dataclasses.replace(section.knn, bank=known.bank, queries=test or known.queries)
        )
    images = labelled_images(section, words=Words("--data", "--test", "", "", not data, "eval", roles))
    if images is None:
        problem = why_unlabelled(section)
        assert problem is not None, "else there are labelled images"
        raise DataError(dataclasses.replace(problem, nearest="give labelled images: --data DIR, or --data and --test"))
    assert images.bank.labels is not None and images.queries.labels is not None, "they are labelled"
    bank, asked = images.bank_indices, images.query_indices
    train = Split(subset(images.bank, bank), images.bank.labels[bank].astype(np.int64), images.classes, "train")
    of_test = images.query_to_bank[images.queries.labels[asked]].astype(np.int64)
    return DataSet(
        name=data or (section.knn.bank or section.data.path),
        train=train,
        test=Split(subset(images.queries, asked), of_test, images.classes, "test"),
        protocol=images.protocol,
    )


def check_targets(split: Split) -> None:
    """Raises DataError where a target is missing or beyond the classes."""
    low, high = (-1, 1) if split.multi_label else (0, len(split.classes) - 1)
    bad = np.flatnonzero(((split.targets < low) | (split.targets > high)).reshape(len(split), -1).any(1))
    if split.multi_label and split.targets.shape[1] != len(split.classes):
        rule = f"has {split.targets.shape[1]} labels an image, but {counted(len(split.classes), 'class')}"
        raise DataError(Problem(split.name, NOTHING, rule))
    if len(bad):
        name, value = split.source.name(int(bad[0])), split.targets[bad[0]].tolist()
        rule = f"it has {counted(len(split.classes), 'class')}, and of {counted(len(bad), 'image')} the label is none"
        raise DataError(Problem(f"{split.name}, label of {name}", value, rule, f"give {low} to {high}"))


def stratified(targets: np.ndarray, classes: int, amount: float | int, *key: object, seed: int) -> np.ndarray:
    """Row numbers, ascending, drawn by (seed, key) without replacement from int64 [n]: of each class `amount` rows (an
    int), or this share of them, rounded."""
    drawn = []
    generator = numpy_generator(seed, "stratified", *key)
    for c in range(classes):
        rows = generator.permutation(np.flatnonzero(targets == c))
        drawn.append(rows[: amount if isinstance(amount, int) else round(amount * len(rows))])
    return np.sort(np.concatenate(drawn))


def hold_out(split_targets: np.ndarray, classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out), ascending; of each class at least one is trained on, and one held out where it
    has two. Of several labels an image, a plain draw."""
    n = len(split_targets)
    if split_targets.ndim == 2:
        held = numpy_generator(seed, "held out").permutation(n)[: max(1, round(share * n))]
    else:
        drawn = []
        for c in range(classes):
            rows = numpy_generator(seed, "held out", c).permutation(np.flatnonzero(split_targets == c))
            drawn.append(rows[: min(len(rows) - 1, max(1, round(share * len(rows))))] if len(rows) else rows)
        held = np.concatenate(drawn)
    is_held = np.zeros(n, bool)
    is_held[held] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
