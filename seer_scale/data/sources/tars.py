"""Images in WebDataset tars, walked once and then read at their offsets."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from seer_scale.data.sources.base import (
    SUFFIXES,
    LabelsBuilder,
    Names,
    NamesBuilder,
    Source,
    cached_index,
    few,
    first_folder,
    is_image,
    number,
)
from seer_scale.errors import DataError

INDEX_VERSION = 1
OPEN_TARS = 64


class Tars(Source):
    """Images in tars, read at their offsets; members are never unpacked, and links are never followed.

    A label is the text of KEY.cls beside KEY.jpg, or else the member's first folder (where there are two or more).
    """

    def __init__(self, paths: Sequence[str]):
        """paths: tars. Raises DataError for one that is cut short or no tar, or when there is no image in any."""
        self._paths = list(paths)
        parts = [cached_index(p, INDEX_VERSION, partial(_walk_tar, p)) for p in self._paths]
        self._starts = np.cumsum([0, *(len(p["offset"]) for p in parts)])
        if not self._starts[-1]:
            looked = ", ".join(SUFFIXES)
            raise DataError(f"{few(self._paths)} holds no image: looked for members that end in {looked}.")
        self._offset, self._size = (np.concatenate([p[k] for p in parts]) for k in ("offset", "size"))
        blob_starts = np.cumsum([0, *(len(p["names"]) for p in parts)])
        ends = np.concatenate([p["name_ends"] + s for p, s in zip(parts, blob_starts)])
        self._names = Names(np.concatenate([p["names"] for p in parts]), ends)
        classes = _read_classes(self._paths[0])
        for source in ("cls", "folder"):
            codes, values = merge(parts, source)
            if (codes >= 0).any() if source == "cls" else codes.min() >= 0 and len(values) > 1:
                self.labels, self.classes = number(codes, values, classes, few(self._paths))
                break
        self._open: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self._offset)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def read(self, i: int) -> bytes:
        shard, size = self._shard(i), int(self._size[i])
        try:
            if (file := self._open.get(shard)) is None:
                while len(self._open) >= OPEN_TARS:  # the oldest is closed once nobody uses it
                    self._open.pop(next(iter(self._open)))
                file = self._open[shard] = open(self._paths[shard], "rb", buffering=0)
            data = os.pread(file.fileno(), size, int(self._offset[i]))
        except OSError as error:
            raise DataError(f"{self.name(i)} cannot be read ({error.strerror}).") from error
        if len(data) != size:
            raise DataError(f"{self.name(i)} is cut short: the tar changed after it was indexed; fetch it again.")
        return data

    def name(self, i: int) -> str:
        return f"{self._paths[self._shard(i)]}::{self._names[i]}"


def merge(parts: list[dict[str, np.ndarray]], source: str) -> tuple[np.ndarray, list[str]]:
    """Codes of all tars into one list of label texts."""
    values: dict[str, int] = {}
    codes = []
    for part in parts:
        own = Names(part[f"{source}_values"], part[f"{source}_ends"])
        table = [values.setdefault(own[i], len(values)) for i in range(len(own))]
        codes.append(np.array([*table, -1], np.int32)[part[source]])
    return np.concatenate(codes), list(values)


def _read_classes(tar: str) -> list[str]:
    path = Path(tar).parent / "classes.txt"
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def _walk_tar(tar: str, size: int) -> dict[str, np.ndarray]:
    """Offsets, sizes, names and label texts of the images in one tar; only headers and .cls members are read."""
    offsets, sizes = array("q"), array("q")
    names, folders, keys = NamesBuilder(), LabelsBuilder(), []
    cls: dict[str, str] = {}
    last = "no member is whole"
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all
                if member.offset_data + member.size > size and member.isreg():
                    raise tarfile.ReadError("unexpected end of data")
                last = f"the last whole member is {member.name}"
                if not member.isreg() or member.sparse is not None:
                    continue
                name = member.name.removeprefix("./")
                head, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                if extension.lower() == "cls":
                    text = os.pread(file.fileno(), min(member.size, 256), member.offset_data)
                    cls[f"{head}/{stem}"] = text.decode("utf-8", "replace").strip()
                elif is_image(name):
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                    names.add(name)
                    folders.add(first_folder(name))
                    keys.append(f"{head}/{stem}")
            tail = os.pread(file.fileno(), 1 << 20, archive.offset)
    except tarfile.ReadError as error:
        if not len(offsets) and "end of data" not in str(error):
            raise DataError(f"{tar} is not a plain tar ({error}); unpack a compressed one first.") from error
        raise DataError(f"{tar} is cut short ({last}); fetch it again or remove it.") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{tar} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if len(tail) < 512 or any(tail[:512]):  # whole tars end in blocks of zeros; tarfile takes any end for the end
        raise DataError(f"{tar} is cut short ({last}); fetch it again or remove it.")
    if any(tail):
        raise DataError(f"{tar} holds more after its end mark ({last}): it was joined from several tars; use those.")
    labels = LabelsBuilder()
    for key in keys:
        labels.add(cls.get(key))
    index = {"offset": np.array(offsets, np.int64), "size": np.array(sizes, np.int64)}
    for field, builder in ("cls", labels), ("folder", folders):
        values = NamesBuilder()
        for value in builder.values:
            values.add(value)
        texts = values.build()
        index |= {field: np.array(builder.codes, np.int32), f"{field}_values": texts.blob, f"{field}_ends": texts.ends}
    built = names.build()
    return {**index, "names": built.blob, "name_ends": built.ends}
