"""Several sources as one: a manifest names the parts, and a run may go on with another one (seer-scale data
refresh)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from seer_scale.config import NOT_YAML, yaml_problem
from seer_scale.data.sources.base import Source, must_exist
from seer_scale.data.sources.remote import is_url
from seer_scale.data.sources.tar_paths import OUTSIDE_BRACES
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable, nearest

MANIFEST_SUFFIXES = (".yaml", ".yml", ".json")
KEYS = ("path", "kind", "name", "split", "image_key", "exclude")


@dataclass(frozen=True)
class Part:
    """path: as data.path takes it, absolute. name: by which two manifests mean the same images. split,
    image_key: as data.split and data.image_key, for data sets of the library datasets. exclude: as data.exclude, for
    folders."""

    path: str
    kind: str
    name: str
    split: str = "train"
    image_key: str = ""
    exclude: tuple[str, ...] = ()


class ConcatSource(Source):
    """The images of all parts, one part after the other.

    Labels are there if every part has them; classes of one name are one class. parts: (name, number of images).
    """

    def __init__(self, sources: Sequence[Source], names: Sequence[str]):
        self.parts = tuple((name, len(s)) for name, s in zip(names, sources))
        self.locality = max(s.locality for s in sources)
        self.left_out = sum((Counter(s.left_out) for s in sources), Counter())
        self._sources, self._starts = list(sources), np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> bytes:
        source, own = self._find(i)
        return source.read(own)

    def read_run(self, first: int, num: int) -> list[bytes | DataError]:
        out: list[bytes | DataError] = []
        while len(out) < num:
            source, own = self._find(first + len(out))
            out += source.read_run(own, min(num - len(out), len(source) - own))
        return out

    def name(self, i: int) -> str:
        source, own = self._find(i)
        return source.name(own)

    def arrive(self) -> None:
        for source in self._sources:
            source.arrive()

    @property
    def has_labels(self) -> bool:
        return all(s.has_labels for s in self._sources)

    def unlabelled(self) -> str:
        return next((clause for s in self._sources if (clause := s.unlabelled())), "")

    @cached_property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(name for s in self._sources for name in s.classes)) if self.has_labels else []

    @cached_property
    def labels(self) -> np.ndarray | None:
        if not self.has_labels:
            return None
        number = {name: n for n, name in enumerate(self.classes)}
        return np.concatenate([np.array([number[c] for c in s.classes], np.int32)[s.labels] for s in self._sources])

    def _find(self, i: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._sources[part], i - int(self._starts[part])


def absolute(path: str, root: str = "") -> str:
    """A path as data.path takes it, from any folder: one spelling for all that mean the same. root: the folder that
    relative paths are taken from."""
    if is_url(path) or path.startswith("hf:"):
        return path
    whole = os.path.join(root, path)
    parts = (
        [whole] if os.path.exists(whole) else [os.path.join(root, p.strip()) for p in re.split(OUTSIDE_BRACES, path)]
    )
    return ",".join(p if is_url(p) else os.path.abspath(p) for p in parts)


def open_manifest(path: str, open_source: Callable[..., Source]) -> ConcatSource:
    """Raises DataError, naming the part, for a manifest or a part that cannot be read."""
    parts, sources = read_manifest(path), []
    for part in parts:
        try:
            more = {"split": part.split, "image_key": part.image_key, "exclude": part.exclude}
            sources.append(open_source(part.path, part.kind, **more))
        except DataError as error:
            raise error.prefixed(f"{path}, part {part.name}") from error
    return ConcatSource(sources, [part.name for part in parts])


def read_manifest(path: str) -> list[Part]:
    """The parts that a manifest names: {parts: [{path: ..., kind: auto, name: ...}, ...]}, in YAML or JSON.

    Local paths are relative to the manifest's folder; a name is its path where none is given. Raises DataError.
    """
    must_exist(path)
    try:
        given = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise Unreadable(error.strerror or str(error), path) from error
    except NOT_YAML as error:
        raise DataError(Problem(path, NOTHING, f"is no manifest, as it is not YAML: {yaml_problem(error)}")) from error
    entries = given.get("parts") if isinstance(given, dict) else None
    if not isinstance(entries, list) or not entries:
        fix = "give a list `parts`, each with a path (kind and name are optional)"
        raise DataError(Problem(path, NOTHING, "is no manifest", fix))
    if other := [k for k in given if k != "parts"]:
        raise DataError(Problem(f"{path}: {other[0]}", NOTHING, "is no key of a manifest", "give only parts"))
    root, parts = os.path.dirname(os.path.abspath(path)), []
    for n, entry in enumerate(entries, 1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        part = f"{path}, part {n}"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
            raise DataError(Problem(part, NOTHING, "has no path"))
        if other := [k for k in entry if k not in KEYS]:
            rule = "is no key of a part"
            raise DataError(Problem(f"{part}: {other[0]}", NOTHING, rule, nearest(str(other[0]), KEYS)))
        place = absolute(entry["path"], root)
        kind = "manifest" if place.lower().endswith(MANIFEST_SUFFIXES) else entry.get("kind", "auto")
        if kind in ("manifest", "stream"):
            rule = f"{entry['path']} cannot be a part then"
            raise DataError(Problem(f"{part}: kind", kind, rule, "name what is in it"))
        if only := [k for k in ("split", "image_key") if k in entry and kind != "hub"]:
            rule = "only data sets of kind hub have it"
            raise DataError(Problem(f"{part}: {only[0]}", entry[only[0]], rule, "add kind: hub, or leave it out"))
        exclude = entry.get("exclude", ())
        if "exclude" in entry and (kind != "folder" or not _is_texts(exclude)):
            rule = "must be a list of patterns, for kind: folder"
            raise DataError(Problem(f"{part}: exclude", exclude, rule, "give both, or leave it out"))
        split, image_key = str(entry.get("split", Part.split)), str(entry.get("image_key", Part.image_key))
        name = str(entry.get("name", f"{place}[{split}]" if "split" in entry else place))
        parts.append(Part(place, entry.get("kind", "auto"), name, split, image_key, tuple(exclude)))
    names = [p.name for p in parts]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        rule = f"names the part {twice[0]} twice"
        raise DataError(Problem(path, NOTHING, rule, "give each path once, or different names"))
    return parts


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
