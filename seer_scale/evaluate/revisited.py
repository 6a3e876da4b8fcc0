"""The revisited Oxford and Paris protocol of landmark retrieval (Radenovic et al., arXiv 1803.11285).

Queries are cropped to their boxes. Of each query images of the database are easy, hard or junk; a setup counts some of
them as right, and leaves others out as if they were not there. Figures are those of the published `compute_map`.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seer_scale.data.sources import Source
from seer_scale.data.sources.base import NamesBuilder
from seer_scale.data.sources.files import Files
from seer_scale.data.transforms.decode import decode
from seer_scale.errors import NOTHING, DataError, Problem
from seer_scale.evaluate.layouts import find
from seer_scale.evaluate.shards import EncodePixels, Features
from seer_scale.evaluate.splits import DataSet, Split

REVISITED = ("roxford5k", "rparis6k")
SETUPS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""What counts as right, and what is left out."""
MAX_GND_BYTES = 64 << 20


# ------------------------------------------------------------------------------------------------ what is there


def open_revisited(word: str, root: Path) -> DataSet:
    """gnd_WORD.pkl, or a .json of the same, beside jpg/. Raises DataError."""
    path = find(root, f"gnd_{word}.json", f"gnd_{word}.pkl")
    found = read_gnd(path)
    try:
        names, asked, gnd = [list(map(str, found[key])) for key in ("imlist", "qimlist")] + [found["gnd"]]
        num = len(names)
        truth = [{kind: _numbers(path, of[kind], num) for kind in ("easy", "hard", "junk")} for of in gnd]
        boxes = np.array([of["bbx"] for of in gnd], float).reshape(-1, 4)
    except (KeyError, TypeError, ValueError) as error:
        rule = f"is no list of imlist, qimlist and gnd with bbx, easy, hard and junk ({error})"
        raise DataError(Problem(str(path), NOTHING, rule, "fetch it again")) from None
    if len(truth) != len(asked) or not np.isfinite(boxes).all():
        raise DataError(Problem(str(path), NOTHING, f"tells of {len(truth)} of its {len(asked)} queries"))
    images = find(root, "jpg", "images")
    database = Split(_files(images, names), np.zeros(len(names), np.int64), [word], "database")
    queries = Split(Cropped(_files(images, asked), boxes), np.zeros(len(asked), np.int64), [word], "queries")
    protocol = f"{word}: {len(asked)} queries, cropped to their boxes, in {len(names):,} images; junk is left out."
    return DataSet(word, database, queries, protocol, {"gnd": truth})


def _numbers(path: Path, numbers: Any, num: int) -> list[int]:
    listed = [int(n) for n in numbers]
    if listed and not 0 <= min(listed) <= max(listed) < num:
        raise DataError(Problem(str(path), max(listed), f"a number of its {num:,} images must be below that"))
    return listed


def _files(root: Path, names: Sequence[str]) -> Files:
    builder = NamesBuilder()
    for name in names:
        builder.add(name if name.lower().endswith(".jpg") else f"{name}.jpg")
    source = Files(str(root), builder.build(), None, (), {})
    source.arrive()
    return source


class Cropped(Source):
    """Images cropped to boxes float [n, 4] of left, top, right, bottom, in pixels."""

    labels = None

    def __init__(self, source: Source, boxes: np.ndarray):
        self._source, self._boxes = source, boxes

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> bytes:
        image = Image.fromarray(decode(self._source.read(i)))
        out = io.BytesIO()
        image.crop(tuple(self._boxes[i].round().astype(int).tolist())).save(out, "png", compress_level=1)
        return out.getvalue()

    def name(self, i: int) -> str:
        return self._source.name(i)

    def arrive(self) -> None:
        self._source.arrive()


# ------------------------------------------------------------------------------------------------ the truth


def read_gnd(path: Path) -> Mapping[str, Any]:
    """A JSON file, or a pickle of plain containers, numbers, texts and numpy's arrays of numbers; whatever else a
    pickle names is refused and not imported. Raises DataError."""
    try:
        if path.stat().st_size > MAX_GND_BYTES:
            raise pickle.UnpicklingError(f"it has {path.stat().st_size:,} bytes")
        data = path.read_bytes()
        found = (
            json.loads(data) if path.suffix == ".json" else _plain(_Plain(io.BytesIO(data), encoding="latin1").load())
        )
    except OSError as error:
        raise DataError(Problem(str(path), NOTHING, f"cannot be read ({error.strerror})")) from error
    except Exception as error:  # a damaged program fails anywhere
        raise DataError(Problem(str(path), NOTHING, f"is no plain data ({error})", "fetch it again")) from None
    if not isinstance(found, dict):
        raise DataError(Problem(str(path), NOTHING, "is no mapping of imlist, qimlist and gnd"))
    return found


class _Dtype:
    """Of numbers alone."""

    def __init__(self, code: str, *_: object):
        if code[:1] not in "biuf" or not code[1:].isdigit():
            raise pickle.UnpicklingError(f"it has an array of {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """What numpy's array is made of; its bytes are in the pickle."""

    values: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, data = state
        raw = data.encode("latin-1") if isinstance(data, str) else data
        flat = np.frombuffer(raw, kind.dtype)
        self.values = flat.reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(data: bytes, kind: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _scalar(kind: _Dtype, data: str | bytes) -> int | float:
    return np.frombuffer(data.encode("latin-1") if isinstance(data, str) else data, kind.dtype)[0].item()


_PICKLED: dict[tuple[str, str], Any] = {
    (f"{numpy}.multiarray", name): made
    for numpy in ("numpy.core", "numpy._core")
    for name, made in (("_reconstruct", lambda *_: _Array()), ("scalar", _scalar))
} | {
    ("numpy.core.numeric", "_frombuffer"): _from_buffer, ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),
}  # fmt: skip


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PICKLED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.values.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ features, figures


def whole_images(
    encode: EncodePixels, source: Source, numbers: np.ndarray, *, side: int, workers: int, device: torch.device
) -> Iterator[Features]:
    """The features of whole images, one at a time, whose long side is `side` where it is longer."""

    def load(i: int) -> Tensor:
        image = decode(source.read(i))
        factor = min(1.0, side / max(image.shape[:2]))
        width, height = (max(1, round(n * factor)) for n in (image.shape[1], image.shape[0]))
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).copy())

    with torch.no_grad(), ThreadPoolExecutor(max(1, workers)) as pool:
        ahead = 4 * max(1, workers)
        for first in range(0, len(numbers), ahead):
            part = numbers[first : first + ahead]
            for i, pixels in zip(part.tolist(), pool.map(load, part.tolist())):
                row = np.array([i])
                features = encode(pixels[None].to(device), row).float().cpu()
                yield Features(features, torch.from_numpy(row), torch.tensor([-1]))


def revisited_scores(
    ranked: np.ndarray, gnd: Sequence[Mapping[str, Sequence[int]]], setup: str, ks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each query average precision [Q] and precision at k [Q, K], as shares; nan where nothing is right. ranked:
    image numbers int64 [Q, n], the most similar first."""
    right, left_out = SETUPS[setup]
    aps, precisions = np.full(len(gnd), np.nan), np.full((len(gnd), len(ks)), np.nan)
    for q, truth in enumerate(gnd):
        wanted = np.concatenate([np.array(truth[kind], np.int64) for kind in right])
        junk = np.concatenate([np.array(truth[kind], np.int64) for kind in left_out])
        if not len(wanted):
            continue
        kept = ranked[q][~np.isin(ranked[q], junk)]
        places = np.flatnonzero(np.isin(kept, wanted))  # from 0
        if not len(places):
            aps[q], precisions[q] = 0.0, 0.0
            continue
        nth = np.arange(len(places))
        before = np.where(places == 0, 1.0, nth / np.maximum(places, 1))
        aps[q] = ((before + (nth + 1) / (places + 1)) / 2).sum() / len(wanted)
        for j, k in enumerate(ks):
            depth = min(int(places[-1]) + 1, k)
            precisions[q, j] = (places < depth).sum() / depth
    return aps, precisions
