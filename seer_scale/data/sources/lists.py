"""Images named in a text file, one path or URL a line. What is kept of it is the place of every STRIDE-th line: 13 MB for 10^8."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    LabelsBuilder,
    Source,
    cache_place,
    cached_index,
    must_exist,
    number,
    stamp_of,
)
from seer_scale.data.sources.files import read_file
from seer_scale.errors import DataError
from seer_scale.files import shown, written_whole

INDEX_VERSION = 1
STRIDE = 64
CHUNK = 1 << 26
CACHED_FROM = 1 << 26
"""Bytes of a list whose index is kept on disk: smaller ones are read faster than their index is looked for."""
MARK = b"\xef\xbb\xbf"


class ListFile(Source):
    """Each line is a URL or a path, relative to the list's own folder, and on all lines or none a tab and a label.

    Raises DataError when there is none, or none of the first hundred exists (of URLs, the first).
    """

    def __init__(self, path: str):
        """path: a file, or a URL that is copied to the user's cache folder."""
        if not (is_url := remote.is_url(path)):
            must_exist(path)
        self._path, self._file = path, _fetched(path) if is_url else path
        self._root = os.path.dirname(path.partition("?")[0] if is_url else path)
        try:
            size = os.path.getsize(self._file)
            build = partial(_scan, self._file, path)
            index = cached_index(self._file, INDEX_VERSION, build) if size >= CACHED_FROM else build(size)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        self._starts, self._num, self._is_labelled = index["starts"], int(index["count"]), bool(index["labelled"])
        if not self._num:
            raise DataError(f"{path} lists no image: it needs one path a line.")
        first = [self._path_of(i) for i in range(min(100, self._num))]
        if not any(os.path.exists(name) for name in first if not remote.is_url(name)) and not _is_there(first):
            raise DataError(
                f"{path} lists {first[0]!r}, which does not exist, nor do the lines after it; "
                "relative paths are taken from the list's own folder."
            )

    def __len__(self) -> int:
        return self._num

    def read(self, i: int) -> bytes:
        return read_file(self._path_of(i))

    def name(self, i: int) -> str:
        return shown(self._path_of(i))

    def arrive(self) -> None:
        if remote.is_url(self._path) and not os.path.exists(self._file):  # another machine's copy
            self._file = _fetched(self._path)
        must_exist(self._file)
        if os.path.getsize(self._file) != int(self._starts[-1]):
            raise DataError(f"{self._path} is another list here than where it was listed: bring the same to every node.")

    def _path_of(self, i: int) -> str:
        lines = self._lines(i // STRIDE)
        if i % STRIDE >= len(lines):
            raise DataError(f"{self._path} has changed since it was indexed: start again.")
        name = os.fsdecode(lines[i % STRIDE].partition(b"\t")[0])
        return name if remote.is_url(name) else os.path.join(self._root, name)

    @property
    def has_labels(self) -> bool:
        return self._is_labelled

    @property
    def labels(self) -> np.ndarray | None:
        return self._numbered[0] if self._is_labelled else None

    @property
    def classes(self) -> Sequence[str]:
        return self._numbered[1] if self._is_labelled else ()

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, list[str]]:
        """Read when an evaluation asks for them."""
        seen = LabelsBuilder()
        for block in range(len(self._starts) - 1):
            for line in self._lines(block):
                seen.add(line.partition(b"\t")[2].decode("utf-8", "surrogateescape").strip())
        return number(np.array(seen.codes, np.int32), list(seen.values), (), self._path)

    def _lines(self, block: int) -> list[bytes]:
        """The lines of one block, read anew: a mapped file that somebody cuts would end the process."""
        begin, end = self._starts[block : block + 2].tolist()
        try:
            with open(self._file, "rb", buffering=0) as file:
                text = os.pread(file.fileno(), end - begin, begin)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error.strerror}).") from error
        return [line.removesuffix(b"\r") for line in text.split(b"\n") if not _is_blank(line)]


def _is_blank(line: bytes) -> bool:
    return not line.partition(b"\t")[0].strip()


def _is_there(names: list[str]) -> bool:
    """Whether the first URL among `names` is: a question to a server, so no other is asked for."""
    url = next(filter(remote.is_url, names), None)
    try:
        return url is not None and bool(remote.stat(url))
    except remote.Refused:
        return False


def _fetched(url: str) -> str:
    """This machine's copy of a list; another one when the list has changed."""
    size, mark = stamp_of(url)
    place = cache_place(url, size, mark, suffix=".list")
    try:
        if not place.exists():
            with written_whole(place) as file:
                for offset in range(0, size, CHUNK):
                    file.write(remote.read(url, offset, min(CHUNK, size - offset)))
    except OSError as error:
        raise DataError(f"{url} cannot be copied to {place} ({error.strerror or error}); free some space there.") from error
    return str(place)


def _scan(file: str, path: str, size: int) -> dict[str, np.ndarray]:
    """Of the list `path`, read from `file`: starts int64 (where every STRIDE-th line that is not blank begins, and the end
    of the file), count, labelled."""
    starts, count, labelled, number_of_lines = array("q"), 0, None, 0
    with open(file, "rb") as lines:
        offset = len(MARK) if lines.read(len(MARK)) == MARK else 0
        lines.seek(offset)
        rest, at_end = b"", False
        while not at_end:
            more = lines.read(CHUNK)
            at_end = not more
            data = rest + (more or b"\n")
            whole = data.rfind(b"\n") + 1
            text = np.frombuffer(data, np.uint8, whole)
            ends = np.flatnonzero(text == 10)
            begins = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
            if zeros := data.count(b"\0"):
                line = number_of_lines + data.count(b"\n", 0, data.find(b"\0")) + 1
                raise DataError(f"{path} is not a list of paths: line {line} holds binary data ({zeros} bytes of it there).")
            # most lines begin with a printing character; the others are looked at one by one
            kept = text[begins] > 32
            for i in np.flatnonzero(~kept).tolist():
                kept[i] = not _is_blank(data[begins[i] : ends[i]])
            has_tab = np.zeros(len(ends), bool)
            has_tab[np.searchsorted(ends, np.flatnonzero(text == 9))] = True
            begins, has_tab = begins[kept], has_tab[kept]
            if labelled is None and len(has_tab):
                labelled = bool(has_tab[0])
            if (odd := np.flatnonzero(has_tab != labelled)).size:
                line = number_of_lines + np.flatnonzero(kept)[odd[0]] + 1
                raise DataError(
                    f"{path}: line {line} has {'no' if labelled else 'a'} label, unlike the lines before; "
                    "give every line a tab and a label, or none."
                )
            starts.extend((begins[-count % STRIDE :: STRIDE] + offset).tolist())
            count, number_of_lines, offset, rest = count + len(begins), number_of_lines + len(ends), offset + whole, data[whole:]
    starts.append(size)
    return {"starts": np.array(starts, np.int64), "count": np.array(count), "labelled": np.array(bool(labelled))}
