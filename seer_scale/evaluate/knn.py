"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978, section 3.4).

Cosine similarity; each of the k nearest bank images votes for its class with exp(similarity / temperature). The bank
streams past the queries: no bank feature is kept, and no similarity matrix larger than queries x batch is made.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seer_scale.config import Config, Knn
from seer_scale.data.sources import Source, open_data, open_source
from seer_scale.data.sources.files import folders_in
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, CheckpointError, DataError, Problem
from seer_scale.evaluate.features import (
    Encode,
    FeatureTable,
    draw_indices,
    extract_features,
    gather_features,
    gather_rows,
)
from seer_scale.evaluate.metrics import share_right, weighted_votes
from seer_scale.files import shown
from seer_scale.formatting import counted


@dataclass(frozen=True)
class LabelledImages:
    """Bank and query images; `classes` names the labels of both."""

    bank: Source
    bank_indices: np.ndarray
    queries: Source
    query_indices: np.ndarray
    classes: list[str]
    query_to_bank: np.ndarray
    """Label of a query class in the bank's numbering."""
    protocol: str
    """Which images vote and which are classified, and by what names: a sentence."""

    def measurement(self, config: Knn) -> str:
        """Stands for what figures depend on beside the network, but for the folders, which may be moved: only figures
        of one measurement compare."""
        words = [len(self.bank), len(self.queries), *self.classes, config.k, config.temperature, config.size]
        crc = zlib.crc32(repr(words).encode(errors="backslashreplace"))
        for numbers in (self.bank_indices, self.query_indices, self.query_to_bank):
            crc = zlib.crc32(np.asarray(numbers, np.int64).tobytes(), crc)
        return f"{crc:08x}"


@dataclass(frozen=True)
class Neighbours:
    """What kNN found for Q queries: image numbers [Q], bank image numbers and similarities [Q, k], nearest first."""

    queries: Tensor
    bank: Tensor
    similarity: Tensor


SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
"""Names of folders that are parts of a data set, and no classes: the first there holds the bank, the next the
queries."""
DATE = re.compile(r"(19|20)\d\d([-_. ]?[01]?\d([-_. ]?[0-3]?\d)?)?")
MAX_NAMES = 5
VOTE, TRAIN = "{bank} vote on {queries}", "Trained on {bank}, tested on {queries}"
"""What labelled images are for, in a protocol."""


@dataclass(frozen=True)
class Words:
    """What a user has called the images of the bank and of the queries by; trains: whether data.path is trained on;
    task, roles: who needs classes, and for what (VOTE, TRAIN)."""

    bank: str = "knn.bank"
    queries: str = "knn.queries"
    otherwise: str = ", or leave knn.bank and knn.queries out"
    without: str = " (knn.enabled false, or knn.bank)"
    trains: bool = True
    task: str = "kNN"
    roles: str = VOTE


def labelled_images(config: Config, source: Source | None = None, words: Words = Words()) -> LabelledImages | None:
    """The images kNN is to use; None where there are no labels and none were asked for. Raises DataError.

    source: data.path, already opened. Of a folder of splits (train, val, test) the classes are those below them.
    """
    section = config.knn
    if not section.enabled:
        return None
    bank_path, exclude = (section.bank, ()) if section.bank else (config.data.path, config.data.exclude)
    splits = (
        [] if not section.bank and config.data.kind not in ("auto", "folder") else split_folders(bank_path, exclude)
    )
    beside = [name for name in folders_in(bank_path, exclude) if splits and not is_split(name)]
    passed_over: dict[str, list[str]] = {}
    queries_path, queries = section.queries, open_source(section.queries) if section.queries else None
    if splits and (bank := _with_classes(splits[0], config)):
        bank_path = splits[0]
        for path in () if queries else splits[1:]:
            if not (found := _with_classes(path, config)):
                continue
            if not (more := sorted(set(found.classes) - set(bank.classes))):
                queries, queries_path = found, path
                break
            passed_over[path] = more
    else:
        bank = open_source(section.bank) if section.bank else source or open_data(config.data)
        if bank.has_labels and not are_splits(bank.classes):
            splits, beside = [], []
    if section.queries and os.path.realpath(bank_path) == os.path.realpath(section.queries):
        raise DataError(
            Problem(
                words.queries,
                section.queries,
                "that is the bank itself, where each would find itself",
                f"leave {words.queries} out, and a fifth of the bank is held out to ask about",
            )
        )
    if problem := _without_classes(bank, bank_path, splits, exclude):
        if section.bank or section.queries:
            raise DataError(_needs_classes(problem, f"{words.task} needs classes", words.otherwise))
        return None
    held = 0
    if queries:
        if problem := _without_classes(queries, queries_path, split_folders(queries_path)):
            raise DataError(_needs_classes(problem, f"{words.task} needs classes of {words.queries}"))
        asked = draw_indices(queries, 0, section.limit_queries)
    else:
        queries, asked = bank, draw_indices(bank, 0, min(math.ceil(len(bank) / 5), section.limit_queries or len(bank)))
        held = len(asked)
    kept = draw_indices(bank, held, section.limit)
    unknown = sorted(set(queries.classes) - set(bank.classes))
    if unknown:
        raise DataError(
            Problem(
                words.queries,
                section.queries,
                f"it has {_beyond(unknown, bank_path)}",
                f"use one set of classes for {words.bank} and {words.queries}",
            )
        )
    query_to_bank = np.array([bank.classes.index(name) for name in queries.classes])
    of = f"{len(asked):,} of {shown(queries_path)}" if queries_path else f"{len(asked):,} others of it, held out"
    images = words.roles.format(bank=f"{len(kept):,} images of {shown(bank_path)}", queries=of)
    protocol = f"{images}; {named_classes(bank.classes)}."
    if splits and not section.bank and queries_path and words.trains:
        protocol += (
            f" Pretraining sees the images of {shown(queries_path)}, too, without labels "
            f"(data.path {shown(bank_path)} would not)."
        )
    for path, more in passed_over.items():
        protocol += f" {shown(path)} is left out: it has {_beyond(more, bank_path)}."
    if beside:
        protocol += f" What lies beside them is left out: {some_names(beside)}."
    if not splits and len(called_so := [name for name in bank.classes if is_split(name)]) > 1:
        protocol += (
            f" {some_names(called_so)} are taken for classes, as {len(bank.classes) - len(called_so)} others lie "
            f"beside them; if they are parts of the data set, give {words.bank} and {words.queries}."
        )
    if all(DATE.fullmatch(name) for name in bank.classes):
        protocol += f" These look like dates: if they are no classes, the figures mean nothing{words.without}."
    return LabelledImages(bank, kept, queries, asked, list(bank.classes), query_to_bank, protocol)


def _needs_classes(problem: Problem, needs: str, otherwise: str = "") -> Problem:
    return replace(
        problem,
        rule=f"{problem.rule}, but {needs}, two at least",
        nearest=f"sort the images into one folder a class{otherwise}",
    )


def is_split(name: str) -> bool:
    return name.lower() in SPLITS


def are_splits(names: Sequence[str]) -> bool:
    """Whether folders, by their names alone, are parts of a data set, and no classes: two of them are splits, or all,
    and not more lie beside these."""
    num = sum(map(is_split, names))
    return num >= min(2, max(1, len(names))) and num >= len(names) - num


def split_folders(path: str, exclude: Sequence[str] = ()) -> list[str]:
    """The splits in a folder, in the order of SPLITS; none where its folders are anything else. Folders called so that
    hold two folders of the same names, as classes are, are splits whatever lies beside them."""
    names = folders_in(path, exclude)
    known = {name.lower(): name for name in names}
    splits = [os.path.join(path, known[name]) for name in SPLITS if name in known]
    return splits if are_splits(names) or len(splits) > 1 and _share_classes(splits, exclude) else []


def _share_classes(splits: Sequence[str], exclude: Sequence[str]) -> bool:
    first, *others = (set(folders_in(split, exclude)) for split in splits)
    return any(len(first & other) > 1 for other in others)


def why_unlabelled(config: Config, source: Source | None = None) -> Problem | None:
    """Why there can be no kNN of data.path; its key is the folder. source: data.path, already opened."""
    path, exclude = config.data.path, config.data.exclude
    return _without_classes(source or open_data(config.data), path, split_folders(path, exclude), exclude)


def named_classes(classes: Sequence[str]) -> str:
    return f"{counted(len(classes), 'class')}: {some_names(classes)}"


def _beyond(classes: Sequence[str], bank_path: str) -> str:
    return f"{counted(len(classes), 'class')} that {shown(bank_path)} has not: {some_names(classes)}"


def some_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(shown, names[:MAX_NAMES])) + more


def _with_classes(path: str, config: Config) -> Source | None:
    """The images of a split's folder, if it has some, and classes."""
    try:
        source = open_source(path, exclude=() if config.knn.bank else config.data.exclude)
    except DataError:
        return None
    return source if source.has_labels else None


def _without_classes(source: Source, path: str, splits: Sequence[str], exclude: Sequence[str] = ()) -> Problem | None:
    """Why these images have no classes to classify by; None where they have. Of splits the first is the
    one that must have them."""
    if source.has_labels and not are_splits(source.classes):
        return None
    place, some = splits[0] if splits else path, "" if splits else source.unlabelled()
    if splits and len(folders_in(place, exclude)) > 1:
        with suppress(DataError):
            some = open_source(place, exclude=exclude).unlabelled()
    if some:
        return Problem(shown(place), NOTHING, f"has not a label for each image: {some}")
    if not splits and len(alone := folders_in(path, exclude)) == 1 and not source.classes:
        return Problem(shown(path), NOTHING, f"has one class alone ({shown(alone[0])})")
    parts = [shown(os.path.basename(folder)) for folder in splits] or [shown(name) for name in source.classes]
    why = f"has no classes ({', '.join(parts)}: parts of a data set)" if parts else "has no labels"
    return Problem(shown(path), NOTHING, why)


@torch.no_grad()
def knn(
    encode: Encode,
    images: LabelledImages,
    config: Knn,
    *,
    workers: int,
    world: World,
    queries: FeatureTable | None = None,
    see_bank: Callable[[Tensor], None] | None = None,
) -> tuple[dict[str, float], Neighbours]:
    """Top-1 and top-5 in percent with their standard errors, the share of the commonest class (what is right without a
    network, too), how many queries and classes there were; and the neighbours. Collective; the same result on each
    rank. queries: the features of the query images, where they are known. see_bank: called with the features [b, D] of
    each batch of this rank's images of the bank, which may be empty."""
    how: dict[str, Any] = dict(size=config.size, batch=config.batch, workers=workers, world=world)
    queries = queries or gather_features(encode, images.queries, images.query_indices, **how)
    ids = queries.numbers
    if not len(ids):
        raise DataError(_none_readable("knn.queries", len(images.query_indices)))
    _check_finite(queries.features)
    f = torch.nn.functional.normalize(queries.features, dim=1)
    y = torch.tensor(images.query_to_bank, device=ids.device)[queries.labels]  # what ranks share is read-only

    nearest = f.new_full((len(f), 0), 0.0)
    found = labels = ids.new_empty((len(f), 0))
    for g, _, yb, ib in extract_features(encode, images.bank, images.bank_indices, **how):
        if see_bank:
            see_bank(g)
        similarity = f @ torch.nn.functional.normalize(g, dim=1).T
        nearest, found, labels = _best(
            config.k,
            torch.cat([nearest, similarity], 1),
            torch.cat([found, ib.expand(len(f), -1)], 1),
            torch.cat([labels, yb.expand(len(f), -1)], 1),
        )
    if world.size > 1:
        columns = (gather_rows(x.T.contiguous(), world).T for x in (nearest, found, labels))
        nearest, found, labels = _best(config.k, *columns)
    if not labels.shape[1]:
        raise DataError(_none_readable("knn.bank", len(images.bank_indices)))
    _check_finite(nearest)  # topk takes what is no number for the largest
    votes = weighted_votes(nearest, labels, len(images.classes), config.temperature)
    ranked = votes.topk(min(5, votes.shape[1]), dim=1).indices == y[:, None]
    scores = share_right("knn/top1", ranked[:, 0]) | share_right("knn/top5", ranked.any(1))
    majority = 100 * y.bincount().max().item() / len(y)
    scores |= {"knn/majority": majority, "knn/queries": len(y), "knn/classes": len(images.classes)}
    return scores, Neighbours(ids, found, nearest)


def _check_finite(x: Tensor) -> None:
    """x: the same on all ranks, so that all raise."""
    if not x.isfinite().all():
        raise CheckpointError(
            Problem(
                "The features",
                NOTHING,
                "are not finite, so kNN means nothing: the weights or BatchNorm statistics are broken",
                "use an earlier checkpoint",
            )
        )


def _none_readable(key: str, num: int) -> Problem:
    return Problem(
        key,
        NOTHING,
        f"give nothing: none of {counted(num, 'image')} can be read",
        "check them, or set knn.enabled false",
    )


def _best(k: int, similarity: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The k most similar columns of each row, most similar first."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return top.values, *(x.gather(1, top.indices) for x in others)
