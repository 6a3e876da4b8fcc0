"""All tars of a source at once: each is indexed if it has no index yet, and of each a few sums are kept."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from seer_scale.cores import available_cores
from seer_scale.data.sources import remote
from seer_scale.data.sources.base import (
    HEIF,
    cache_place,
    cached_index,
    digest,
    file_version,
    load_arrays,
    save_arrays,
)
from seer_scale.data.sources.left_out import LEFT_OUT_KINDS
from seer_scale.data.sources.tar_index import TAR_INDEX_VERSION, index_tar, is_stale, label_texts
from seer_scale.errors import NOTHING, DataError, Problem, Unreadable
from seer_scale.files import shown

if TYPE_CHECKING:
    from seer_scale.data.loading.worker import ItemTracker

COLLECTION_VERSION = 2 + bool(HEIF)
SUMS = 4 + len(LEFT_OUT_KINDS)
INDEXING_TIMEOUT_S = 3600.0
"""Seconds after which a tar that is still being walked is given to another process; tars may have a terabyte."""
THREADS = 32
ALONE_BELOW_TARS, ALONE_BELOW_BYTES = 32, 1 << 30
"""So little is indexed before other processes have started."""
SURVEY_LOG_EVERY_S = 10.0


def survey(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(stamps int64 [n, 2], sums int64 [n, SUMS] as `_sums` gives them) of the tars; those of an earlier call for the
    same tars are kept in the user's cache folder, so that only a tar that changed since is indexed."""
    absolute = [path if remote.is_url(path) else os.path.abspath(path) for path in paths]
    place = cache_place(COLLECTION_VERSION, TAR_INDEX_VERSION, *absolute, suffix=".tars.npz")
    stamps = all_stamps(paths)
    saved = load_arrays(place)
    is_known = np.zeros(len(paths), bool)
    sums = np.zeros((len(paths), SUMS), np.int64)
    if saved and saved["sums"].shape == sums.shape:
        is_known, sums = (saved["stamps"] == stamps).all(axis=1), saved["sums"]
    todo = np.flatnonzero(~is_known).tolist()
    if todo:
        stamped = [(paths[i], tuple(stamps[i].tolist())) for i in todo]
        for row, i in zip(with_progress("Indexing tars", _index_all(stamped), len(stamped)), todo):
            sums[i] = row
        save_arrays([place], {"stamps": stamps, "sums": sums})
    return stamps, sums


def all_stamps(paths: Sequence[str]) -> np.ndarray:
    """Size and stamp int64 [n, 2] of each tar."""
    with ThreadPoolExecutor(THREADS) as pool:
        step = -(-len(paths) // (8 * THREADS))
        parts = pool.map(_stamps, (paths[i : i + step] for i in range(0, len(paths), step)))
        return np.array([stamp for part in parts for stamp in part], np.int64)


def _stamps(paths: Sequence[str]) -> list[tuple[int, int]]:
    return list(map(file_version, paths))


def _index_all(stamped: list[tuple[str, tuple[int, int]]]) -> Iterator[tuple[int, ...]]:
    """Local tars by processes, as walking one is work; remote ones by threads, as it is waiting."""
    if any(remote.is_url(path) for path, _ in stamped):
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(_sums, stamped)
        return
    cores = min(available_cores(), len(stamped))
    if cores == 1 or len(stamped) < ALONE_BELOW_TARS and sum(size for _, (size, _) in stamped) < ALONE_BELOW_BYTES:
        yield from map(_sums, stamped)
        return
    from seer_scale.data.loading.pool import (
        iterate_batches,  # which stands above the sources, and forks nothing from this process
    )

    indexing = _Indexing(stamped, max(cores, min(8 * cores, len(stamped) // 8)))
    for (sums,), _ in iterate_batches(indexing, indexing.keys(), workers=cores, timeout_s=INDEXING_TIMEOUT_S):
        yield from map(tuple, sums.tolist())


@dataclass
class _Indexing:
    """The sums of tars, `batch` at a time; a row is a tar."""

    stamped: list[tuple[str, tuple[int, int]]]
    batch: int

    def keys(self) -> range:
        return range(0, len(self.stamped), self.batch)

    def buffers(self) -> list[tuple[tuple[int, ...], type]]:
        return [((self.batch, SUMS), np.int64)]

    def rows(self, key: int) -> int:
        return min(self.batch, len(self.stamped) - key)

    def fill(self, key: int, row: int, out: Sequence[np.ndarray], tracker: ItemTracker) -> None:
        try:
            tracker.begin(key + row)
        except Unreadable as error:
            name, rule = self.describe(key + row), f"cannot be indexed ({error.reason})"
            raise DataError(Problem(name, NOTHING, rule, "remove it")) from error
        out[0][row] = _sums(self.stamped[key + row])

    def describe(self, item: int) -> str:
        return shown(self.stamped[item][0])


def _sums(stamped_path: tuple[str, tuple[int, int]]) -> tuple[int, ...]:
    """(images, of which have a .cls, of which lie in a folder, a number for that folder or -1 for several, and what is
    left out, by kind) of a tar."""
    path, stamp = stamped_path
    only = ("cls", "folder", "folder_values", "folder_ends", "left_out")
    index = cached_index(path, TAR_INDEX_VERSION, partial(index_tar, path), stamp, only, is_stale)
    folders = label_texts(index, "folder")
    folder = digest(*folders) >> 65 if len(folders) == 1 else -1
    labelled, sorted_ = int((index["cls"] >= 0).sum()), int((index["folder"] >= 0).sum())
    return len(index["cls"]), labelled, sorted_, folder, *index["left_out"].tolist()


def labelled_by(sums: np.ndarray) -> tuple[str | None, bool]:
    """(what labels the images: "cls", "folder" or nothing, whether every image has a label), from the sums alone."""
    images, with_cls, in_folder, folder = sums[sums[:, 0] > 0, :4].T
    if with_cls.any():
        return "cls", bool((with_cls == images).all())
    is_sorted = bool((in_folder == images).all() and ((folder < 0).any() or len(np.unique(folder)) > 1))
    return ("folder" if is_sorted else None), is_sorted


def first_unlabelled(sums: np.ndarray) -> tuple[int, int, str]:
    """(images without what labels others, the first tar that holds one, "cls" or "folder"), from the sums alone."""
    images, with_cls, in_folder, folder = sums[:, :4].T
    of = folder[in_folder > 0]
    by_cls, by_folder = with_cls.any(), (of < 0).any() or len(np.unique(of)) > 1
    lacking = images - (with_cls if by_cls else in_folder if by_folder else images)
    return int(lacking.sum()), int((lacking > 0).argmax()), "cls" if by_cls else "folder"


def with_progress(what: str, results: Iterable, total: int) -> Iterator:
    """The results, with a line on stderr now and then on how many have come."""
    logged = time.monotonic()
    for count, result in enumerate(results, 1):
        yield result
        if time.monotonic() - logged >= SURVEY_LOG_EVERY_S:
            logged = time.monotonic()
            print(f"{what}: {count:,} of {total:,}.", file=sys.stderr, flush=True)
