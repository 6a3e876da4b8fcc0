"""A demo corpus: JPEG files of ten kinds of texture, made from nothing but a seed, for a first run on a laptop.

What a class shares is what two crops of one image share: its structure. Colour, brightness, contrast, scale,
rotation, phase, lighting and clutter vary within a class as much as between classes, so raw pixels say little and
there is something to learn. `Difficulty` holds what makes it hard.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from seer_scale.errors import NOTHING, DataError, Problem
from seer_scale.files import to_json
from seer_scale.rng import numpy_generator

DEMO_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What hides the class of an image; every pair is a range drawn from uniformly."""

    size: tuple[int, int] = (64, 96)  # height and width in pixels, each on its own
    period: tuple[float, float] = (8.0, 14.0)  # pixels from one element of the texture to the next
    rotation: tuple[float, float] = (-0.25, 0.25)  # radians; views are not rotated, so a wide range splits a class
    warp: tuple[float, float] = (0.0, 0.15)  # bending of the texture, in periods
    colour: tuple[float, float] = (0.0, 0.4)  # saturation: 0 is grey, 1 any colour of the cube
    contrast: tuple[float, float] = (0.45, 0.85)  # distance of the two colours, where 1 is black from white
    lighting: tuple[float, float] = (0.0, 0.35)  # brightness lost from one side of the image to the other
    clutter: tuple[int, int] = (0, 2)  # plain shapes that lie over the texture
    clutter_size: tuple[float, float] = (0.05, 0.18)  # their half axes, as a share of the image's side
    noise: tuple[float, float] = (1.0, 6.0)  # standard deviation of the sensor's noise, in levels of 255
    quality: tuple[int, int] = (70, 95)  # of the JPEG


# Textures: (x, y, draw) -> values in [0, 1]. x and y are float32 [H, W] in periods, rotated, shifted and warped.

Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
_TURN = 2 * np.pi


def _soft(values: np.ndarray, sharpness: float) -> np.ndarray:
    """Values around 0 as a soft step from 0 to 1."""
    return 0.5 + 0.5 * np.tanh(sharpness * values)


def stripes(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return _soft(np.sin(_TURN * x) + draw.uniform(-0.4, 0.4), draw.uniform(1, 4))


def checks(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return _soft(np.sin(np.pi * x) * np.sin(np.pi * y), draw.uniform(3, 8))


def dots(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    row = np.floor(y / 0.866)
    u, v = (x + 0.5 * (row % 2)) % 1 - 0.5, (y / 0.866) % 1 - 0.5
    return _soft(draw.uniform(0.22, 0.36) - np.hypot(u, 0.866 * v), draw.uniform(8, 20))


def rings(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    u, v = x - x.mean() + draw.uniform(-1.5, 1.5), y - y.mean() + draw.uniform(-1.5, 1.5)
    return _soft(np.sin(_TURN * np.hypot(u, v)), draw.uniform(1, 4))


def bricks(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    row = np.floor(1.4 * y)
    along, across = (0.7 * x + 0.5 * (row % 2)) % 1, (1.4 * y) % 1
    joint = np.minimum(np.minimum(along, 1 - along) / 0.7, np.minimum(across, 1 - across) / 1.4)
    return _soft(joint - draw.uniform(0.08, 0.14), draw.uniform(15, 30))


def waves(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return _soft(np.sin(_TURN * (x + draw.uniform(0.35, 0.6) * np.sin(_TURN * y / 1.5))), draw.uniform(1, 4))


def cells(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Walls between the nearest of random centres, one in each cell of a jittered lattice (Worley)."""
    left, top = int(np.floor(x.min())) - 1, int(np.floor(y.min())) - 1
    columns, rows = int(np.ceil(x.max())) + 2 - left, int(np.ceil(y.max())) + 2 - top
    centre_x = (np.arange(columns) + left + draw.random((rows, columns))).astype(np.float32)
    centre_y = (np.arange(rows)[:, None] + top + draw.random((rows, columns))).astype(np.float32)
    i, j = np.floor(x).astype(int) - left, np.floor(y).astype(int) - top
    near = [np.hypot(x - centre_x[j + b, i + a], y - centre_y[j + b, i + a]) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    first, second = np.partition(np.stack(near), 1, axis=0)[:2]
    return _soft(second - first - draw.uniform(0.1, 0.2), draw.uniform(8, 15))


def _value_noise(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Smooth noise in [-1, 1] with one random value at each whole (x, y)."""
    left, top = x.min() - 2, y.min() - 2
    lattice = draw.uniform(-1, 1, (int(y.max() - top) + 4, int(x.max() - left) + 4)).astype(np.float32)
    u, v = x - left, y - top  # 2 at least, and further than that from the other end
    i, j = u.astype(int), v.astype(int)
    across, down = _cubic(u - i), _cubic(v - j)
    return sum(down[b] * across[a] * lattice[j + b - 1, i + a - 1] for a in range(4) for b in range(4))


def _cubic(t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights of the four neighbours of what lies t in [0, 1) behind the second (Keys, with a = -3/4)."""
    near = [((1.25 * s - 2.25) * s) * s + 1 for s in (t, 1 - t)]
    before = ((-0.75 * (t + 1) + 3.75) * (t + 1) - 6) * (t + 1) + 3
    return before, *near, 1 - before - near[0] - near[1]


def filaments(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Curved threads: where smooth noise crosses zero."""
    return _soft(draw.uniform(0.08, 0.14) - np.abs(_value_noise(x, y, draw)), draw.uniform(12, 25))


def clouds(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.clip(0.5 + 0.8 * sum(_value_noise(x * 2**k / 3, y * 2**k / 3, draw) / 2**k for k in range(4)), 0, 1)


def shards(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Flat triangles over one another."""
    height, width = x.shape
    period = 1 / max(np.hypot(x[0, 1] - x[0, 0], y[0, 1] - y[0, 0]), 1e-3)
    canvas = Image.new("F", (width, height), draw.random())
    for _ in range(int(3 * height * width / period**2)):
        centre = draw.random(2) * (width, height)
        corners = centre + draw.normal(0, 0.7 * period, (3, 2))
        ImageDraw.Draw(canvas).polygon(corners.round().ravel().tolist(), fill=draw.random())
    return np.asarray(canvas)


TEXTURES: tuple[Texture, ...] = (stripes, checks, dots, rings, bricks, waves, cells, filaments, clouds, shards)
CLASSES = tuple(sorted(t.__name__ for t in TEXTURES))


def photograph(texture: Texture, draw: np.random.Generator, difficulty: Difficulty = Difficulty()) -> np.ndarray:
    """One image of a texture, RGB uint8 [H, W, 3]; everything but the texture's structure is drawn anew."""
    d = difficulty
    height, width = draw.integers(d.size[0], d.size[1] + 1, 2)
    v, u = np.mgrid[:height, :width].astype(np.float32)
    angle, period = draw.uniform(*d.rotation), draw.uniform(*d.period)
    shift, bend = draw.uniform(0, 50, 2), draw.uniform(*d.warp)
    x = (np.cos(angle) * u - np.sin(angle) * v) / period + shift[0]
    y = (np.sin(angle) * u + np.cos(angle) * v) / period + shift[1]
    x, y = x + bend * np.sin(_TURN * (y / 3 + draw.random())), y + bend * np.sin(_TURN * (x / 3 + draw.random()))
    pattern = texture(x.astype(np.float32), y.astype(np.float32), draw)[..., None]

    saturation = draw.uniform(*d.colour)
    one, other = _two_colours(draw, saturation, draw.uniform(*d.contrast))
    image = one + (other - one) * pattern
    for _ in range(draw.integers(d.clutter[0], d.clutter[1] + 1)):
        _cover(image, draw, _colours(draw, saturation), d.clutter_size)
    direction = draw.uniform(0, _TURN)
    ramp = np.cos(direction) * (u / width - 0.5) + np.sin(direction) * (v / height - 0.5)
    image *= (1 - draw.uniform(*d.lighting) * (ramp + 0.5).clip(0, 1))[..., None]
    image = 255 * image + draw.uniform(*d.noise) * draw.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _colours(draw: np.random.Generator, saturation: float, *shape: int) -> np.ndarray:
    """Random colours float32 [*shape, 3] in [0, 1], drawn towards their own grey."""
    colours = draw.random((*shape, 3), np.float32)
    grey = colours.mean(-1, keepdims=True)
    return grey + np.float32(saturation) * (colours - grey)


def _two_colours(draw: np.random.Generator, saturation: float, distance: float) -> np.ndarray:
    """Two colours [2, 3] `distance` apart (root mean square over the channels), as nearly as fifty draws come to it."""
    pairs = _colours(draw, saturation, 50, 2)
    apart = np.sqrt(((pairs[:, 0] - pairs[:, 1]) ** 2).mean(-1))
    return pairs[np.abs(apart - distance).argmin()]


def _cover(image: np.ndarray, draw: np.random.Generator, colour: np.ndarray, sizes: tuple[float, float]) -> None:
    """Draw a plain ellipse or rectangle over float32 [H, W, 3]."""
    height, width = image.shape[:2]
    centre = draw.random(2) * (width, height)
    axes = draw.uniform(*sizes, 2) * (width, height)
    angle = np.radians(draw.uniform(0, 180))
    y, x = np.mgrid[:height, :width] - centre[::-1, None, None]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if draw.random() < 0.5:
        within = axes.min() * (1 - np.hypot(u / axes[0], v / axes[1]))
    else:
        within = np.minimum(axes[0] - np.abs(u), axes[1] - np.abs(v))
    covered = np.clip(within + 0.5, 0, 1)[..., None].astype(np.float32)
    image += covered * (colour - image)


def write_demo_corpus(
    folder: str | Path, *, train: int = 4000, test: int = 1000, seed: int = 0, difficulty: Difficulty = Difficulty()
) -> Path:
    """folder/train/CLASS/NNNN.jpg and folder/test/CLASS/NNNN.jpg, as many of each class; returns `folder`.

    Published by one rename; a corpus already there with the same manifest is left as it is. Raises DataError when
    something else is there, or the classes do not divide a count.
    """
    folder = Path(folder)
    if train % len(CLASSES) or test % len(CLASSES):
        name, given = ("train", train) if train % len(CLASSES) else ("test", test)
        rule, nearest = f"must be a multiple of the {len(CLASSES)} classes", len(CLASSES) * -(-given // len(CLASSES))
        raise DataError(Problem(name, given, rule, nearest))
    about = dict(version=DEMO_VERSION, train=train, test=test, seed=seed, difficulty=dataclasses.asdict(difficulty))
    manifest = to_json(about, indent=1)
    if _holds(folder, manifest):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        rule = "holds something other than this demo corpus"
        raise DataError(Problem(str(folder), NOTHING, rule, "remove it or give another folder"))
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    textures = {t.__name__: t for t in TEXTURES}
    for split, count in ("train", train), ("test", test):
        for name in CLASSES:
            (aside / split / name).mkdir(parents=True)
            for n in range(count // len(CLASSES)):
                draw = numpy_generator(seed, "demo", split, name, n)
                image = photograph(textures[name], draw, difficulty)
                quality = int(draw.integers(difficulty.quality[0], difficulty.quality[1] + 1))
                Image.fromarray(image).save(aside / split / name / f"{n:04d}.jpg", quality=quality)
    (aside / "manifest.json").write_text(manifest)
    try:
        aside.rename(folder)
    except OSError:  # another process may have been first
        shutil.rmtree(aside)
        if not _holds(folder, manifest):
            raise
    return folder


def _holds(folder: Path, manifest: str) -> bool:
    path = folder / "manifest.json"
    return path.is_file() and path.read_text() == manifest
