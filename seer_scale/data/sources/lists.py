"""Images named in a text file, one path or URL a line. What is kept of it is the place of every STRIDE-th line: 13 MB
for 10^8."""

from __future__ import annotations

import os
import re
import zlib
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property, partial
from typing import BinaryIO

import numpy as np

from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    LabelsBuilder,
    Source,
    another_than_on_rank_0,
    cache_place,
    cached_index,
    changed,
    encode_labels,
    file_version,
    is_image,
    must_exist,
)
from seer_scale.data.sources.files import read_file
from seer_scale.data.sources.left_out import COMMENTS, FURTHER_COLUMNS, HEADERS, described
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable
from seer_scale.files import shown, written_whole

LIST_INDEX_VERSION = 3
STRIDE = 64
LIST_CHUNK_BYTES = 1 << 26
CACHED_FROM = 1 << 26
"""Bytes of a list whose index is kept on disk: smaller ones are read faster than their index is looked for."""
MARK = b"\xef\xbb\xbf"
SAMPLED_LINES, SAMPLED_URLS, PROBES = 100, 32, 8
"""Lines that are looked at before a run begins; URLs among them; and at once."""
HEAD, LINES_AFTER_HEADER = 1 << 16, 8
"""Bytes in which a line of column names is looked for; lines after it that are looked at."""
PATH_COLUMNS = frozenset(
    "path file filename filepath fileurl image imagename imagefile imagefilename imagepath imageurl img imgname "
    "imgfile imgpath imgurl url uri".split()
)
"""What tables call their column of images, in small letters and without what parts words."""


class ListFile(Source):
    """Each line is a URL or a path, relative to the list's own folder, and on all lines or none a tab and a label,
    which may be empty; either may stand in double quotes, as csv writers put them. Passed over are a first line of
    column names, columns behind the label, and lines that begin with # and name no file.

    Raises DataError when there is no line, or when of those that are looked at none can be read.
    """

    def __init__(self, path: str):
        """path: a file, or a URL that is copied to the user's cache folder."""
        if not (is_url := remote.is_url(path)):
            must_exist(path)
        self._path, self._file = path, _fetched(path) if is_url else path
        self._root = os.path.dirname(path.partition("?")[0] if is_url else path)
        try:
            size = os.path.getsize(self._file)
            build = partial(_scan, self._file, path, self._root)
            index = cached_index(self._file, LIST_INDEX_VERSION, build) if size >= CACHED_FROM else build(size)
        except OSError as error:
            raise Unreadable(error.strerror or str(error), path) from error
        self._starts, self._num, self._is_labelled = index["starts"], int(index["count"]), bool(index["labelled"])
        self._unlabelled = int(index["unlabelled"])
        self._passed_over, num_headers = index["passed_over"], int(index["headers"])
        comments = len(self._passed_over) - num_headers
        left_out = {HEADERS: num_headers, COMMENTS: comments, FURTHER_COLUMNS: int(index["longer"])}
        self.left_out = {kind: num for kind, num in left_out.items() if num}
        if not self._num:
            more = f"it holds {words}" if (words := described(self.left_out)) else ""
            raise DataError(Problem(path, NOTHING, "lists no image: it needs one path a line", more))
        self._look_at_some()

    def _look_at_some(self) -> None:
        """Whether any of a few lines, spread evenly, can be read. Raises DataError."""
        looked_at = [self._path_of(i) for i in _spread(self._num, SAMPLED_LINES)]
        urls = [name for name in looked_at if remote.is_url(name)]
        urls = [urls[i] for i in _spread(len(urls), SAMPLED_URLS)]
        if any(os.path.isfile(name) for name in looked_at if not remote.is_url(name)):
            return
        if urls:
            if (reason := remote.problem_of(urls[0])) is None:
                return
            pool = ThreadPoolExecutor(PROBES)
            asked = [pool.submit(remote.problem_of, url) for url in urls[1:]]
            is_there = any(answer.result() is None for answer in as_completed(asked))
            pool.shutdown(wait=False, cancel_futures=True)
            if is_there:
                return
        first = looked_at[0]
        if not remote.is_url(first):
            reason = "it is no file" if os.path.exists(first) else "it does not exist"
        num = len(urls) + sum(not remote.is_url(name) for name in looked_at)
        hint = "relative paths are taken from the list's own folder"
        if any(os.path.isfile(name.partition(",")[0]) for name in looked_at):
            hint = "its columns must be parted by tabs, not commas"
        elif any(os.path.isfile(name[: gap.start()]) for name in looked_at for gap in re.finditer(" +", name)):
            hint = "its columns must be parted by tabs, not spaces"
        elif any("~" in name.split("/") for name in looked_at):
            hint = "~ is not expanded: write the whole path"
        elif self._is_labelled and self._has_paths_for_labels():
            hint = "its columns must be a path and then a label, in this order"
        several = f", and of {num} lines looked at, spread over its {self._num:,}, none can be read" if num > 1 else ""
        raise DataError(Problem(self._path, NOTHING, f"lists {shown(first)!r} ({reason}){several}", hint))

    def _has_paths_for_labels(self) -> bool:
        labels = [os.fsdecode(_label(self._line(i))) for i in _spread(self._num, SAMPLED_LINES)]
        return any(label and (remote.is_url(label) or os.path.isfile(self._below(label))) for label in labels)

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
            raise DataError(another_than_on_rank_0(self._path))

    def _line(self, i: int) -> bytes:
        lines = self._lines(i // STRIDE)
        if i % STRIDE >= len(lines):
            raise DataError(changed(self._path))
        return lines[i % STRIDE]

    def _path_of(self, i: int) -> str:
        """As the line has it, where that is a file, else without the quotes and spaces around it."""
        field = self._line(i).partition(b"\t")[0]
        name, bare = os.fsdecode(field), os.fsdecode(_unquoted(field))
        path = name if remote.is_url(name.lstrip()) else self._below(name)
        if name == bare or not remote.is_url(bare) and os.path.exists(path):
            return path
        return bare if remote.is_url(bare) else self._below(bare)

    def _below(self, name: str) -> str:
        return os.path.join(self._root, name)

    @property
    def has_labels(self) -> bool:
        return self._is_labelled and not self._unlabelled

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
                seen.add(os.fsdecode(_label(line)) or None)
        return encode_labels(np.array(seen.codes, np.int32), list(seen.values), (), self._path)

    def _lines(self, block: int) -> list[bytes]:
        """The lines of one block, read anew: a mapped file that somebody cuts would end the process."""
        begin, end = self._starts[block : block + 2].tolist()
        try:
            with open(self._file, "rb", buffering=0) as file:
                text = bytearray(os.pread(file.fileno(), end - begin, begin))
        except OSError as error:
            raise Unreadable(error.strerror or str(error), self._path) from error
        for at in self._passed_over[slice(*np.searchsorted(self._passed_over, (begin, end)))].tolist():
            first = at - begin
            last = text.find(b"\n", first)
            last = len(text) if last < 0 else last
            text[first:last] = b" " * (last - first)
        return [line.removesuffix(b"\r") for line in bytes(text).split(b"\n") if not _is_blank(line)]


def _is_blank(line: bytes) -> bool:
    return not line.partition(b"\t")[0].strip()


def _label(line: bytes) -> bytes:
    return _unquoted(line.split(b"\t", 2)[1])


def _unquoted(field: bytes) -> bytes:
    """A field as csv readers take it, and without spaces around."""
    field = field.strip()
    is_quoted = len(field) > 1 and field[:1] == field[-1:] == b'"'
    return field[1:-1].replace(b'""', b'"').strip() if is_quoted else field


def _path_in(line: bytes) -> str:
    return os.fsdecode(_unquoted(line.partition(b"\t")[0]))


def _is_comment(line: bytes, root: str) -> bool:
    """Whether a line begins with # and names no file; behind a URL a path cannot begin so."""
    return line.startswith(b"#") and (remote.is_url(root) or not os.path.exists(os.path.join(root, _path_in(line))))


def _header(lines: BinaryIO, root: str) -> int:
    """Where a first line begins that names columns, as tables have it, and no file; -1 for none. It is known by its
    words, or because it is not there and could be no image, while one of the lines after it is there."""
    head, at, first = lines.read(HEAD), 0, -1
    num_after = 0
    for line in head.splitlines(keepends=True):
        begin, at = at, at + len(line)
        if _is_blank(line):
            continue
        name = _path_in(line)
        is_there = remote.is_url(name) or not remote.is_url(root) and os.path.isfile(os.path.join(root, name))
        if first >= 0:
            num_after += 1
            if is_there or num_after >= LINES_AFTER_HEADER:
                return first if is_there else -1
            continue
        if is_there:
            return -1
        if re.sub(r"[\W_]", "", name).lower() in PATH_COLUMNS:
            return begin
        if not _is_comment(line, root):
            if is_image(name):
                return -1
            first = begin
    return -1


def _spread(total: int, num: int) -> list[int]:
    num = min(total, num)
    return [i * total // num for i in range(num)]


def _fetched(url: str) -> str:
    """This machine's copy of a list; another one when the list has changed."""
    try:
        size, mark = file_version(url)
    except remote.NoSize:
        data = remote.read(url, max_bytes=remote.MAX_UNDECLARED_BYTES)
        return _kept(url, len(data), zlib.crc32(data), [data])
    parts = (
        remote.read(url, offset, min(LIST_CHUNK_BYTES, size - offset)) for offset in range(0, size, LIST_CHUNK_BYTES)
    )
    return _kept(url, size, mark, parts)


def _kept(url: str, size: object, mark: int, parts: Iterable[bytes]) -> str:
    place = cache_place(url, size, mark, suffix=".list")
    try:
        if not place.exists():
            with written_whole(place) as file:
                for part in parts:
                    file.write(part)
    except OSError as error:
        rule = f"cannot be copied to {place} ({error.strerror or error})"
        raise DataError(Problem(url, NOTHING, rule, "free some space there")) from error
    return str(place)


def _scan(file: str, path: str, root: str, size: int) -> dict[str, np.ndarray]:
    """Of the list `path`, read from `file`: starts int64 (where every STRIDE-th line that is not blank begins, and the
    end of the file), count, whether labelled, passed_over int64 (where lines begin that are passed over), and how many
    lines have no label, have more columns, name columns."""
    starts, passed_over, count, labelled, number_of_lines = array("q"), array("q"), 0, None, 0
    unlabelled = longer = headers = 0
    with open(file, "rb") as lines:
        offset = len(MARK) if lines.read(len(MARK)) == MARK else 0
        lines.seek(offset)
        header = _header(lines, root)
        header += offset if header >= 0 else 0
        lines.seek(offset)
        rest, at_end = b"", False
        while not at_end:
            more = lines.read(LIST_CHUNK_BYTES)
            at_end = not more
            data = rest + (more or b"\n")
            whole = data.rfind(b"\n") + 1
            text = np.frombuffer(data, np.uint8, whole)
            ends = np.flatnonzero(text == 10)
            begins = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
            if zeros := data.count(b"\0"):
                line = number_of_lines + data.count(b"\n", 0, data.find(b"\0")) + 1
                rule = f"holds binary data ({zeros} bytes of it there), which is no list of paths"
                raise DataError(Problem(f"{path}, line {line},", NOTHING, rule))
            # most lines begin with a printing character; the others are looked at one by one
            kept = text[begins] > 32
            for i in np.flatnonzero(~kept).tolist():
                kept[i] = not _is_blank(data[begins[i] : ends[i]])
            for i in np.flatnonzero(kept & ((text[begins] == ord("#")) | (begins + offset == header))).tolist():
                is_header = begins[i] + offset == header
                if is_header or _is_comment(data[begins[i] : ends[i]], root):
                    headers, kept[i] = headers + is_header, False
                    passed_over.append(int(begins[i]) + offset)
            tabs = np.flatnonzero(text == 9)
            lines_of_tabs = np.searchsorted(ends, tabs)
            num_tabs = np.bincount(lines_of_tabs, minlength=len(ends))
            # a label that is not empty mostly begins with a character other than a quote right after the first tab
            doubtful = lines_of_tabs[text[tabs + 1] <= ord('"')]
            for i in dict.fromkeys(doubtful[kept[doubtful]].tolist()):
                unlabelled += not _label(data[begins[i] : ends[i]])
            longer += int((num_tabs[kept] > 1).sum())
            has_tab = num_tabs > 0
            begins, has_tab = begins[kept], has_tab[kept]
            if labelled is None and len(has_tab):
                labelled = bool(has_tab[0])
            if (odd := np.flatnonzero(has_tab != labelled)).size:
                line = number_of_lines + np.flatnonzero(kept)[odd[0]] + 1
                rule = f"has {'no' if labelled else 'a'} label, unlike the lines before"
                raise DataError(
                    Problem(f"{path}, line {line},", NOTHING, rule, "give every line a tab and a label, or none")
                )
            starts.extend((begins[-count % STRIDE :: STRIDE] + offset).tolist())
            count, number_of_lines, offset, rest = (
                count + len(begins),
                number_of_lines + len(ends),
                offset + whole,
                data[whole:],
            )
    starts.append(size)
    return {
        "starts": np.array(starts, np.int64), "count": np.array(count), "labelled": np.array(bool(labelled)),
        "unlabelled": np.array(unlabelled), "longer": np.array(longer), "headers": np.array(headers),
        "passed_over": np.array(passed_over, np.int64),
    }  # fmt: skip
