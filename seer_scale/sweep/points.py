"""The points of a sweep, sizes x images x seeds, each a recipe of its own, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from seer_scale.config import Config, Model, Views, merge, parse_overrides, read_config
from seer_scale.data.sources.base import shorten
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.models.registry import build_backbone
from seer_scale.training import resume
from seer_scale.training.start import read_recipe, resolve_given

LADDER = (1.0, 1.5, 2.25, 3.5, 5.5)
"""Multiples of a recipe's width. Parameters grow with their square: of cifar_laptop's 0.33M, to 9.8M."""
WIDTH_KEYS = ("w0", "wa", "group_width")
FLOP_PER_MAC = 6
"""Of one sample in training: two for each multiply-accumulate, forward once and backward twice."""
OF_RESULT = (
    "data.path", "data.kind", "data.exclude", "data.split", "data.image_key", "data.length", "data.buffer",
    "data.block", "data.max_images", "views.", "model.", "method.", "optim.", "schedule.", "train.total_samples",
    "train.global_batch", "train.freeze_backbone_samples", "train.precision", "parallel.sync_bn_group", "run.seed",
)  # fmt: skip
"""What keys begin with on which what a run learns depends, beside those of its method."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a sweep was asked for. recipes: names or files. widths: multiples of the one recipe's width. images: numbers
    of unique images; empty: all there are. equal: what all sizes are given as much of, "samples" or "compute".
    overrides: words `--section.key value` of every point. is_local: whether recipes are checked for this machine."""

    recipes: Sequence[str]
    out: Path
    widths: Sequence[float] = ()
    images: Sequence[int] = ()
    seeds: int = 1
    equal: str = "samples"
    overrides: Sequence[str] = ()
    is_local: bool = True


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run. size: its network, by recipe and width. given: its recipe. parameters: of the backbone. macs:
    multiply-accumulates of a forward over all crops of an image. images: unique ones, 0 = all of data.path."""

    name: str
    size: str
    given: dict[str, Any]
    config: Config
    parameters: int
    macs: int
    images: int
    seed: int

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def samples(self) -> int:
        """Seen at its end, in whole batches."""
        return self.config.end()

    @property
    def compute(self) -> float:
        """Floating-point operations of its training in the backbone: 3 x 2 x MACs x samples."""
        return float(FLOP_PER_MAC * self.macs * self.samples)


def points_of(asked: Asked) -> list[Point]:
    """All of them, smallest first, in the order in which they are run. Raises UserError, with every problem."""
    sizes = _sizes(asked)
    seeds = {name: read_config(given, []).run.seed for name, given in sizes.items()}
    runs = [
        (size, images, seeds[size] + i)
        for size in sizes
        for images in (asked.images or (0,))
        for i in range(asked.seeds)
    ]
    problems: list[tuple[Problem, list[str]]] = []
    points = []
    for size, images, seed in runs:
        name = f"{size}{f'-n{images}' * bool(images)}-s{seed}"
        own: dict[str, Any] = {"run": {"dir": str(asked.out / name), "seed": seed}}
        if images:
            own["data"] = {"max_images": images}
        given = merge(sizes[size], own)
        try:
            points.append(_point(name, size, given, images, seed, asked.is_local))
        except UserError as error:
            for problem in error.problems:
                names = next((names for known, names in problems if known == problem), None)
                if names is None:
                    problems.append((problem, names := []))
                names.append(name)
    if problems:
        several = [
            p if len(names) == len(runs) else replace(p, key=f"{shorten(names)}: {p.key}") for p, names in problems
        ]
        raise ConfigError(several, "The sweep")
    if asked.equal == "compute":
        points = _of_equal_compute(points)
    elif unequal := _unequal(points):
        raise UserError(unequal)
    return sorted(points, key=lambda p: (p.parameters, p.images, p.seed))


def _sizes(asked: Asked) -> dict[str, dict[str, Any]]:
    """The recipe of each size, by its name. Raises UserError."""
    over, problems = parse_overrides(asked.overrides)
    if problems:
        raise ConfigError(problems)
    if "dir" in (over.get("run") or {}):
        raise UserError(
            Problem("run.dir", over["run"]["dir"], "each run has a folder of its own in --out", "leave it out")
        )
    sizes: dict[str, dict[str, Any]] = {}
    for recipe in asked.recipes:
        given = merge(read_recipe(recipe, list(asked.overrides))[0], over)
        for width in asked.widths or (None,):
            name = Path(recipe).stem if width is None else f"{Path(recipe).stem}-x{width:g}"
            if name in sizes:
                raise UserError(
                    Problem("RECIPE", recipe, f"two sizes would be called {name}", "give each file a name of its own")
                )
            sizes[name] = given if width is None else merge(given, {"model": widened(given, recipe, width)})
    return sizes


def widened(given: dict[str, Any], recipe: str, width: float) -> dict[str, Any]:
    """Keys of the recipe's RegNetY at `width` times its width: w0 (in multiples of 8), wa and group_width times that,
    its depth and wm as they are. So every stage is wider by it, and parameters and MACs grow with its square.

    Raises UserError where the recipe has no free RegNetY.
    """
    model = read_config(given, []).model
    w0, wa, group_width = (getattr(model, key) for key in WIDTH_KEYS)
    if w0 is None or wa is None or group_width is None:
        rule = f"the network of {recipe} is {model.name}, whose widths are fixed"
        raise UserError(Problem("--widths", width, rule, "give recipes, one a size, or one with model.name regnety"))
    return {
        "w0": 8 * max(1, round(w0 * width / 8)),
        "wa": wa * width,
        "group_width": max(1, round(group_width * width)),
    }


def _point(name: str, size: str, given: dict[str, Any], images: int, seed: int, is_local: bool) -> Point:
    problems: list[Problem] = []
    config = read_config(given, problems)
    if is_local or problems:
        config = resolve_given(given, {}, config.parallel.ranks)
    parameters, macs = cost_of(config.model, config.views)
    return Point(
        name=name, size=size, given=given, config=config, parameters=parameters, macs=macs, images=images, seed=seed
    )


@cache
def cost_of(model: Model, views: Views) -> tuple[int, int]:
    """(parameters of the backbone, MACs of its forward over all crops of an image). Raises UserError."""
    with torch.device("meta"):
        backbone = build_backbone(model.name, **model.explicit_keys())
    macs = sum(crop.num * backbone.num_macs(crop.size) for crop in views.crops)
    return sum(p.numel() for p in backbone.parameters()), macs


def _unequal(points: Sequence[Point]) -> Problem | None:
    """Where recipes are of other lengths, by more than a batch."""
    low, high = (f(points, key=lambda p: p.config.train.total_samples) for f in (min, max))
    difference = high.config.train.total_samples - low.config.train.total_samples
    if difference < max(p.config.train.global_batch for p in points):
        return None
    samples = f"{low.config.train.total_samples:,} of {low.size} and {high.config.train.total_samples:,} of {high.size}"
    rule = f"is not the same for all sizes: {samples}"
    return Problem("train.total_samples", NOTHING, rule, "give --train.total_samples N, or --equal compute")


def _of_equal_compute(points: Sequence[Point]) -> list[Point]:
    """Each with as many samples, in whole batches, as the compute of the first one's recipe allows."""
    compute, equal = points[0].compute, []
    for point in points:
        batch = point.config.train.global_batch
        samples = batch * max(1, round(compute / FLOP_PER_MAC / point.macs / batch))
        given = merge(point.given, {"train": {"total_samples": samples}})
        try:
            equal.append(_point(point.name, point.size, given, point.images, point.seed, is_local=False))
        except UserError as error:
            raise error.prefixed(point.name) from error
    return equal


def changed(point: Point, then: dict[str, Any]) -> list[str]:
    """What its run, with the recipe `then`, was given otherwise, of what it learns from."""
    of_result = (*OF_RESULT, f"{point.config.method.name}.")
    return [str(change) for change in resume.changes(then, point.config) if change.key.startswith(of_result)]
