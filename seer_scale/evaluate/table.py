"""The features of a split as one matrix in a file, which all ranks map: those of a node share its pages, which the
system may drop and read again, and none holds the matrix (ImageNet's of a backbone 10,444 wide is 53 GB). What goes
over it takes a block of rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seer_scale.evaluate.shards import Shards, npy_rows, read_safetensors
from seer_scale.files import safetensors_header, written_whole

MAX_ROWS = 8192
MAX_BLOCK_BYTES = 1 << 26
"""A block has no more rows, and none wider than float32 of so many bytes."""


@dataclass(frozen=True)
class Table:
    """Features of a split: float32 [n, D], mapped, so not to be written to, of the images `rows` (int64 [n], in order)
    of the split, those that could be read; targets: of these. folder: where its file is."""

    features: Tensor
    rows: np.ndarray
    targets: np.ndarray
    folder: Path


@dataclass(frozen=True)
class Rows:
    """Rows `index` (int64 [n]) of a matrix [m, D]; what is asked for is copied, the rest is not."""

    matrix: Tensor
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), self.matrix.shape[1]

    def __getitem__(self, at: slice | Tensor) -> Tensor:
        return self.matrix[torch.from_numpy(self.index)[at]]


def rows_a_block(rows: Tensor | Rows) -> int:
    return max(1, min(MAX_ROWS, MAX_BLOCK_BYTES // (4 * max(1, rows.shape[1]))))


def blocks(rows: Tensor | Rows) -> Iterator[Tensor]:
    """[n, D] a block after the other; one at least."""
    step = rows_a_block(rows)
    for start in range(0, max(1, len(rows)), step):
        yield rows[start : start + step]


def by_blocks(make: Callable[[Tensor], Tensor], rows: Tensor | Rows) -> Tensor:
    """What `make` gives of each block, joined."""
    return torch.cat([make(block) for block in blocks(rows)])


def as_float64(make: Callable[[Tensor], Tensor], rows: Tensor | Rows) -> Tensor:
    """`by_blocks` in float64, for solvers that want all of it: nothing else of its size is made."""
    whole, start = torch.empty(0, dtype=torch.float64), 0
    for block in blocks(rows):
        part = make(block)
        if not start:
            whole = torch.empty(len(rows), part.shape[1], dtype=torch.float64)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


# ------------------------------------------------------------------------------------------------ its file


def matrix_path(folder: Path) -> Path:
    return folder / "matrix.npy"


def is_joined(folder: Path) -> bool:
    return npy_rows(matrix_path(folder)) >= 0


def join(shards: Shards) -> int:
    """Make one file of all features, beside the shards, which are removed once it is on the disk; how many rows it has
    (of none there is no file). Holds a shard at a time. Not collective. Raises OSError."""
    folder, paths = shards.folder, [shards.path(i) for i in range(len(shards))]
    shapes = [safetensors_header(path)["features"]["shape"] for path in paths]
    if not (num := sum(n for n, _ in shapes)):
        return 0
    about = {"descr": "<f4", "fortran_order": False, "shape": (num, max(width for _, width in shapes))}
    numbers: list[Tensor] = []
    with written_whole(matrix_path(folder), durable=True) as file:
        np.lib.format.write_array_header_1_0(file, about)
        for path in paths:
            part = read_safetensors(path)
            numbers.append(part.numbers)
            file.write(part.features.numpy().data)
        with written_whole(_rows_path(folder), durable=True) as beside:  # whole before the matrix is
            np.save(beside, torch.cat(numbers).numpy(), allow_pickle=False)
    for path in paths:
        path.unlink()
    return num


def open_matrix(folder: Path) -> tuple[Tensor, np.ndarray]:
    """What `join` has made: float32 [n, D], mapped to be read, and the images' numbers, int64 [n]."""
    mapped = np.load(matrix_path(folder), mmap_mode="r", allow_pickle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(mapped), np.load(_rows_path(folder), allow_pickle=False)


def _rows_path(folder: Path) -> Path:
    return folder / "rows.npy"
