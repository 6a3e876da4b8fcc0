"""Where each element of a state lies in the files of a checkpoint: planned once a run, the same on all ranks.

Each rank writes one file in the safetensors format, of what it alone holds and of a share of what others hold, too. The
layout is kept beside them as JSON, so a reader opens the files it needs and no other, and nothing is unpickled.
"""

from __future__ import annotations

import bisect
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seer_scale.distributed import World
from seer_scale.parallel.shard import Shard

BYTES_A_WRITER = 64 << 20
"""Bytes that one rank writes of what several hold alike before the next one joins in: each more is one more file to
open."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The words of safetensors."""
_WORDS = {dtype: word for word, dtype in SAFETENSORS_DTYPES.items()}


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, in row-major order, `offset` bytes into the data of the file of rank
    `file`."""

    start: int
    stop: int
    file: int
    offset: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the state; its parts, sorted, tile it."""

    dtype: torch.dtype
    shape: torch.Size
    parts: list[Part]

    def within(self, start: int, stop: int) -> Iterator[Part]:
        """Of the elements [start, stop) where each lies: parts, cut to that."""
        first = bisect.bisect_right(self.parts, start, key=lambda p: p.start) - 1
        for i in range(max(0, first), len(self.parts)):
            part = self.parts[i]
            if part.start >= stop:
                return
            low, high = max(part.start, start), min(part.stop, stop)
            if low < high:
                yield Part(low, high, part.file, part.offset + (low - part.start) * self.dtype.itemsize)


class Layout:
    def __init__(self, tensors: dict[str, Stored]):
        self.tensors = tensors
        self._written: dict[int, dict[str, Part]] = {}
        self._headers: dict[int, bytes] = {}
        self._json: bytes | None = None

    @classmethod
    def plan(cls, state: Mapping[str, Tensor], world: World) -> Layout:
        """For a state of which each rank holds a run of every tensor, alone or as others do. Collective (one gather).

        Of what several ranks hold alike each writes a share, if there is enough of it.
        """
        runs = np.array([run_of(t) for t in state.values()], dtype=np.int64).reshape(-1, 2)
        names = zlib.crc32("\n".join(state).encode())
        known, everyone = zip(*world.gather_objects((names, runs)))
        assert len(set(known)) == 1, "the ranks hold states of other names"
        parts = _share_out(np.stack(everyone), [t.itemsize for t in state.values()])
        ends: dict[int, int] = {}
        tensors = {}
        for (name, tensor), pieces in zip(state.items(), parts):
            pieces.sort()
            edges = [0, *(stop for _, stop, _ in pieces)]
            assert edges[-1] == tensor.numel() and all(p[0] == e for p, e in zip(pieces, edges)), (
                f"{name} is not covered once"
            )
            stored = Stored(tensor.dtype, tensor.shape, [])
            for start, stop, file in pieces:
                offset = ends.get(file, 0)
                stored.parts.append(Part(start, stop, file, offset))
                ends[file] = offset + (stop - start) * tensor.itemsize
            tensors[name] = stored
        return cls(tensors)

    def prepare(self, world: World) -> None:
        """Make now what every save will write of it: later that would hold the interpreter beside training."""
        self.header(world.rank)
        if world.is_main:
            self.to_json()

    def written_by(self, rank: int) -> dict[str, Part]:
        """What `rank` writes of each tensor, in the order of its file; at most one part of each."""
        if rank not in self._written:
            self._written[rank] = {name: p for name, s in self.tensors.items() for p in s.parts if p.file == rank}
        return self._written[rank]

    def header(self, rank: int) -> bytes:
        """What the file of `rank` begins with: a length and a JSON object, as safetensors has it."""
        if rank not in self._headers:
            words = {}
            for name, (start, stop, _, offset) in self.written_by(rank).items():
                stored = self.tensors[name]
                whole = stop - start == stored.shape.numel()
                words[name if whole else f"{name}[{start}:{stop}]"] = {
                    "dtype": _WORDS[stored.dtype], "shape": list(stored.shape) if whole else [stop - start],
                    "data_offsets": [offset, offset + (stop - start) * stored.dtype.itemsize],
                }  # fmt: skip
            text = json.dumps(words, separators=(",", ":"), allow_nan=False).encode()
            text += b" " * (-len(text) % 8)
            self._headers[rank] = len(text).to_bytes(8, "little") + text
        return self._headers[rank]

    def to_json(self) -> bytes:
        if self._json is None:
            rows = {
                name: {
                    "dtype": _WORDS[s.dtype],
                    "shape": list(s.shape),
                    "parts": [[p.start, p.file, p.offset] for p in s.parts],
                }
                for name, s in self.tensors.items()
            }
            self._json = json.dumps(rows, separators=(",", ":"), allow_nan=False).encode()
        return self._json

    @classmethod
    def from_json(cls, text: bytes) -> Layout:
        """Raises ValueError, KeyError, TypeError or AttributeError where `text` is no layout."""
        tensors = {}
        for name, row in json.loads(text).items():
            shape = torch.Size(row["shape"])
            edges = [*(start for start, _, _ in row["parts"]), shape.numel()]
            if edges[0] or any(a >= b for a, b in zip(edges, edges[1:])):
                raise ValueError(f"its parts of {name} do not tile it")
            parts = [Part(start, stop, file, offset) for (start, file, offset), stop in zip(row["parts"], edges[1:])]
            tensors[name] = Stored(SAFETENSORS_DTYPES[row["dtype"]], shape, parts)
        return cls(tensors)


def run_of(tensor: Tensor) -> tuple[int, int]:
    """The elements [start, stop) of a tensor that this rank holds."""
    return (tensor.start, tensor.stop) if isinstance(tensor, Shard) else (0, tensor.numel())


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return (tensor.local if isinstance(tensor, Shard) else tensor).detach()


def _share_out(runs: np.ndarray, itemsizes: list[int]) -> list[list[tuple[int, int, int]]]:
    """For each tensor (start, stop, rank that writes them), of runs [ranks, tensors, 2]."""
    alike: dict[
        bytes, list[tuple[int, int, int]]
    ] = {}  # ranks -> (tensor, start, stop) of what these and no others hold
    for i in range(runs.shape[1]):
        holders = np.flatnonzero(runs[:, i, 0] < runs[:, i, 1])
        held = runs[holders, i]
        order = np.argsort(held[:, 0], kind="stable")
        for ranks in np.split(holders[order], np.flatnonzero(np.diff(held[order, 0])) + 1) if len(holders) else ():
            alike.setdefault(ranks.tobytes(), []).append((i, *runs[ranks[0], i].tolist()))
    parts: list[list[tuple[int, int, int]]] = [[] for _ in itemsizes]
    for key, items in alike.items():
        ranks = np.frombuffer(key, dtype=np.intp).tolist()
        nbytes = sum((stop - start) * itemsizes[i] for i, start, stop in items)
        share = -(-nbytes // min(len(ranks), -(-nbytes // BYTES_A_WRITER)))
        done = 0
        for i, start, stop in items:
            while start < stop:
                writer = done // share
                num = min(
                    stop - start, -(-((writer + 1) * share - done) // itemsizes[i])
                )  # rounded up: one part a rank
                parts[i].append((start, start + num, ranks[writer]))
                start, done = start + num, done + num * itemsizes[i]
    return parts
