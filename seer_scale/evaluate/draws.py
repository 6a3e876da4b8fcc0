"""Few labels: which images are drawn, or listed, to train on."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seer_scale.config.fields import opt
from seer_scale.errors import DataError, Problem, missing_path
from seer_scale.evaluate.splits import Split, stratified
from seer_scale.evaluate.task import TaskSettings
from seer_scale.files import shown
from seer_scale.formatting import counted


@dataclass(frozen=True, kw_only=True)
class DrawSettings(TaskSettings):
    shots: tuple[str, ...] = opt(
        (),
        "labels: a share of each class's training images, as in 1%, or images of each class, as in 5; none = 1%,10% "
        "where that leaves an image of each, else 5 for 1%",
    )
    draws: int = opt(5, "draws of each, by seed", ge=1)
    split_file: tuple[str, ...] = opt(
        (), "instead of shots: lists of file names, one a line, each a draw, such as SimCLR's 1percent.txt"
    )

    def problems(self) -> list[Problem]:
        rule = "must be a share of the images, such as 1%, or a number of images a class"
        found = [Problem("shots", shot, rule, ("1%", "5")) for shot in self.shots if amount_of(shot) is None]
        missing = [missing_path(path) for path in self.split_file if not os.path.exists(path)]
        return super().problems() + found + [Problem("split_file", p.key, f"it {p.rule}", p.nearest) for p in missing]

    def without_effect(self) -> dict[str, str]:
        listed = dict.fromkeys(("shots", "draws"), "with --split-file") if self.split_file else {}
        return super().without_effect() | listed


def usual_shots(train: Split) -> tuple[str, ...]:
    """1 % and 10 %, as published, where they leave an image of each class; else 5 of each class, or what there is."""
    least = int(np.bincount(train.targets, minlength=len(train.classes)).min())
    shares = tuple(f"{percent}%" for percent in (1, 10) if least * percent >= 100)
    return shares if "1%" in shares else (str(max(1, min(5, least))), *shares)


def amount_of(shot: str) -> float | int | None:
    """A share of a class's images, or a number of them; None of what is neither."""
    try:
        amount = float(shot[:-1]) / 100 if shot.endswith("%") else int(shot)
    except ValueError:
        return None
    return amount if 0 < amount and (isinstance(amount, int) or amount <= 1) else None


@dataclass(frozen=True)
class Draw:
    """indices: of the training split, ascending. least: images each class is to have. path: of its list, if it is of
    one."""

    shot: str
    number: int
    indices: np.ndarray
    least: int = 1
    path: str = ""

    @property
    def stem(self) -> str:
        """Of files of what is made of these images: a list may name others by the time a command goes on."""
        return f"{self.shot}-{self.number}-{zlib.crc32(self.indices.tobytes()):08x}"


def draws_of(options: DrawSettings, train: Split) -> list[Draw]:
    """Raises DataError where one has no image of a class, or fewer than asked for."""
    if options.split_file:
        names = [re.sub(r"^(\d+)percent$", r"\1%", Path(p).stem) for p in options.split_file]  # SimCLR's
        found = [
            Draw(name, n, listed(Path(path), train), path=path)
            for n, (name, path) in enumerate(zip(names, options.split_file))
        ]
    else:
        found = []
        for shot in options.shots or usual_shots(train):
            amount = amount_of(shot)
            assert amount is not None, "the settings have been checked"
            for number in range(options.draws):
                rows = stratified(train.targets, len(train.classes), amount, number, seed=options.seed)
                found.append(Draw(shot, number, rows, least=amount if isinstance(amount, int) else 1))
    for draw in found:
        _check(draw, train)
    return found


def readable(draws: Sequence[Draw], rows: np.ndarray, train: Split) -> list[Draw]:
    """Draws without the images that cannot be read. rows: those that can, of the training split. Raises DataError where
    too few are left of a class."""
    found = [replace(draw, indices=draw.indices[np.isin(draw.indices, rows)]) for draw in draws]
    for draw in found:
        _check(draw, train, "that can be read ", "check the images: seer-scale data describe")
    return found


def _check(draw: Draw, train: Split, which: str = "", fix: str = "") -> None:
    """Raises DataError where a class has no image, or fewer than asked for."""
    num = np.bincount(train.targets[draw.indices], minlength=len(train.classes))
    if num.min() >= draw.least:
        return
    name, is_one = train.classes[int(num.argmin())], num.min() == 1
    rule = f"of the class {name} there {'is' if is_one else 'are'} {counted(num.min(), 'image')} {which}in a draw"
    if draw.path:
        raise DataError(Problem("--split-file", draw.path, rule, fix or "list images of each class"))
    raise DataError(Problem("--shots", draw.shot, rule, fix or _possible(draw, train)))


def _possible(draw: Draw, train: Split) -> tuple[str, ...] | str:
    """The shots nearest to those of a draw that each class has images for."""
    if not (fewest := int(np.bincount(train.targets, minlength=len(train.classes)).min())):
        return "give images of each class"
    if not draw.shot.endswith("%"):
        return (str(fewest),)
    return f"{next(p for p in range(1, 101) if round(p / 100 * fewest))}%", "1"


def listed(path: Path, train: Split) -> np.ndarray:
    """The training images that a list names by their file names, with as many folders as tell them apart: of images of
    one file name it is that whose path ends most alike. Raises DataError where none is there, or several are alike."""
    try:
        lines = {shown(line.strip()) for line in path.read_text().splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem("--split-file", str(path), f"it cannot be read ({error})")) from error
    named = {line: parts_of(line) for line in sorted(lines)}
    images: dict[str, list[tuple[int, list[str]]]] = {parts[-1]: [] for parts in named.values()}
    for i in range(len(train)):
        own = parts_of(train.source.name(i))
        if own[-1] in images:
            images[own[-1]].append((i, own))
    if missing := [line for line, parts in named.items() if not images[parts[-1]]]:
        rule = f"{counted(len(missing), 'image')} of its {len(named):,} are not among the training images"
        raise DataError(Problem("--split-file", str(path), rule, f"the first is {missing[0]}"))
    found: dict[int, str] = {}
    for line, parts in named.items():
        alike = images[parts[-1]]
        for depth in range(2, len(parts) + 1):
            alike = [(i, own) for i, own in alike if own[-depth:] == parts[-depth:]] or alike
        image, name = alike[0][0], train.source.name(alike[0][0])
        if len(alike) > 1:
            rule = f"its {line} may be any of {counted(len(alike), 'image')}, such as {name}"
            raise DataError(Problem("--split-file", str(path), rule, "name their folders, too"))
        if image in found:
            rule = f"its {found[image]} and {line} are both {name}"
            raise DataError(Problem("--split-file", str(path), rule, "name each image once, by its folders"))
        found[image] = line
    return np.array(sorted(found), np.int64)


def parts_of(name: str) -> list[str]:
    """Folders and file of a path, or of a tar and its member; one part at least."""
    return [part for part in name.replace("::", "/").split("/") if part not in ("", ".")] or [name]
