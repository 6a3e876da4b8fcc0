"""How the images of published weights are prepared: by their own metadata, by the files of their library, or as is
assumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.interop.artefact import About

ASSUMED_SIZE = 224
MIN_SIZE = 8
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_SQUASH_FROM = 384
"""From this size on transformers' ConvNextImageProcessor, which RegNet has there, cuts nothing."""


@dataclass(frozen=True)
class Prepared:
    """how: as `eval_preprocessing` gives it. source: what told its size: "--size", "metadata" (ours), the name of a
    library's file, or "assumed". differs: by the keys of `how`, what that file tells and what is done here."""

    how: Mapping[str, Any]
    source: str
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def find_preprocessing(folder: Path | None, about: About | None, size: int) -> Prepared:
    """folder: of a library, with what it keeps beside weights. about: metadata of ours, which go before. size: the one
    that is asked for, 0: as is told. Raises UserError, also for a normalisation that is not ours."""
    if size and size < MIN_SIZE:
        raise UserError(Problem("--size", size, f"it must be at least {MIN_SIZE} pixels", (MIN_SIZE,)))
    if about:
        how = {**about.preprocessing, **(eval_preprocessing(size) if size else {})}
        return Prepared(how, "--size" if size else "metadata")
    told = _told(folder) if folder else None
    if told is None:
        return Prepared(eval_preprocessing(size or ASSUMED_SIZE), "--size" if size else "assumed")
    sides = told.sides
    if not size and (len(set(sides)) > 1 or sides[0] < MIN_SIZE):
        rule = f"images are squares of at least {MIN_SIZE} pixels here"
        raise UserError(Problem(f"{told.file}: {told.keys['size']}", list(sides), rule, "give --size N"))
    ours = eval_preprocessing(min(sides))
    for key in ("mean", "std"):
        if not all(abs(a - b) <= 1e-3 for a, b in zip(told.how[key] or [math.inf], ours[key])):
            rule = "images are normalised with ImageNet's here"
            raise UserError(Problem(f"{told.file}: {told.keys[key]}", told.how[key], rule, (ours[key],)))
    compared = ("resize_short_side", "crop", "interpolation")
    differs = {key: (told.how[key], ours[key]) for key in compared if told.how[key] != ours[key]}
    return Prepared(eval_preprocessing(size) if size else ours, "--size" if size else told.file.name, differs)


@dataclass(frozen=True)
class _Told:
    """sides: height and width. how: the other keys of `eval_preprocessing`. keys: theirs of ours."""

    file: Path
    sides: tuple[int, int]
    how: dict[str, Any]
    keys: dict[str, str]


def _told(folder: Path) -> _Told | None:
    """Of what timm or transformers keep in the folder; None without it."""
    path = folder / CONFIG
    config = read_object(path)
    is_timm = "architecture" in config
    if not is_timm:
        path = folder / PROCESSOR
        config = read_object(path)
    try:
        return _of_timm(path, config) if is_timm else _of_transformers(path, config)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(Problem(str(path), NOTHING, f"is damaged ({error!r})")) from None


def read_object(path: Path) -> dict[str, Any]:
    """A file with one JSON object; an empty one where there is no file. Raises UserError."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(found, dict):
            raise TypeError("it is no object")
        return found
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(Problem(str(path), NOTHING, f"is damaged ({error!r})")) from None


def _of_timm(path: Path, config: Mapping[str, Any]) -> _Told:
    """As `timm.data.resolve_data_config` reads it, with its defaults."""
    is_flat = "pretrained_cfg" not in config  # an older layout
    given = config if is_flat else config["pretrained_cfg"]
    ours = eval_preprocessing(ASSUMED_SIZE)
    _, height, width = given.get("input_size") or (3, ASSUMED_SIZE, ASSUMED_SIZE)
    how = {
        "resize_short_side": math.floor(min(height, width) / (given.get("crop_pct") or 0.875)),
        "crop": _crop(given.get("crop_mode") or "center"),
        "interpolation": given.get("interpolation") or "bicubic",
        "mean": _channels(given.get("mean") or ours["mean"]),
        "std": _channels(given.get("std") or ours["std"]),
    }
    keys = {"size": "input_size", "mean": "mean", "std": "std"}
    return _Told(path, (int(height), int(width)), how, keys if is_flat else _below("pretrained_cfg", keys))


def _of_transformers(path: Path, config: Mapping[str, Any]) -> _Told | None:
    """Of an image processor: one that cuts the centre, ConvNext's (crop_pct), or one that only resizes."""
    if not config.get("size"):
        return None
    resized = _sides(config["size"])
    crop_key = "crop_size" if config.get("crop_size") and config.get("do_center_crop", True) else "size"
    sides, short, crop = _sides(config[crop_key]), min(resized), "centre"
    if "crop_pct" in config and short < _SQUASH_FROM:
        short = int(short / (config["crop_pct"] or 224 / 256))
    elif crop_key == "size":
        crop = "squash"
    resample = config.get("resample")
    is_normalised = config.get("do_normalize", True)
    how = {
        "resize_short_side": short,
        "crop": crop,
        "interpolation": Resampling(Resampling.BILINEAR if resample is None else resample).name.lower(),
        "mean": _channels(config.get("image_mean")) if is_normalised else [0.0] * 3,
        "std": _channels(config.get("image_std")) if is_normalised else [1.0] * 3,
    }
    return _Told(path, sides, how, {"size": crop_key, "mean": "image_mean", "std": "image_std"})


def _below(section: str, keys: Mapping[str, str]) -> dict[str, str]:
    return {ours: f"{section}.{theirs}" for ours, theirs in keys.items()}


def _crop(mode: str) -> str:
    return "centre" if mode == "center" else mode


def _sides(size: Any) -> tuple[int, int]:
    """Of a number, {"shortest_edge": S} or {"height": H, "width": W}."""
    if isinstance(size, dict):
        short = size.get("shortest_edge")
        return (int(size["height"]), int(size["width"])) if short is None else (int(short), int(short))
    return int(size), int(size)


def _channels(values: Any) -> list[float]:
    """Of each channel; of what is not there, none."""
    several = [values] * 3 if isinstance(values, int | float) else values or []
    if several and len(several) != 3:
        raise ValueError(f"{values} is not of three channels")
    return [float(value) for value in several]
