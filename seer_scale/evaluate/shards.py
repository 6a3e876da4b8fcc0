"""Features of images, in shards on the disk.

Which images a shard holds, and how they are batched, is a function of their numbers alone: any number of ranks makes
the same shards, and what is whole is not made again.
"""

from __future__ import annotations

import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from seer_scale.cores import rank_cores, told_threads
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import Source
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, CheckpointError, Problem, UserError
from seer_scale.extras import how_to_install
from seer_scale.files import safetensors_header, to_json, write_whole, written_whole
from seer_scale.formatting import dtype_name
from seer_scale.observe.progress import Progress

EncodePixels = Callable[[Tensor, np.ndarray], Tensor]
"""uint8 images [n, 3, S, S] on the device, and their numbers -> features [n, D]."""


class Features(NamedTuple):
    """Of the images of a shard that could be read: features [n, D] on the host, image numbers int64 [n], labels int64
    [n] (-1: none)."""

    features: Tensor
    numbers: Tensor
    labels: Tensor


FeatureStream = Callable[[np.ndarray], Iterator[Features]]
"""Image numbers -> their features, a part at a time, in order."""


# ------------------------------------------------------------------------------------------------ making them


MAX_WORKERS = 8


def share_cores(world: World, workers: int) -> int:
    """Loader processes of this rank, `workers` of them, or (-1) as many as its cores leave; torch gets as many threads
    as it was told, or has cores. Collective."""
    cores = rank_cores(world)
    torch.set_num_threads(told_threads() or cores)
    return workers if workers >= 0 else min(MAX_WORKERS, max(0, cores - 1))


@torch.no_grad()
def encode_images(
    encode: EncodePixels, source: Source, indices: np.ndarray, *, size: int, batch: int, workers: int,
    device: torch.device, within: int = sys.maxsize,
) -> Iterator[Features]:  # fmt: skip
    """The features of `indices`, a batch at a time, in order; those that cannot be read are left out. within: no batch
    reaches over a multiple of so many indices. On a GPU a batch is made while the one before is copied and written."""
    stream = eval_batches(source, indices, size, batch=batch, workers=workers, within=within)
    if device.type != "cuda":
        for pixels, labels, numbers in stream:
            yield Features(encode(pixels.to(device), numbers.numpy()).cpu(), numbers, labels)
        return
    waiting: list[tuple[torch.cuda.Event, Features]] = []
    for pixels, labels, numbers in stream:
        on_device = encode(pixels.pin_memory().to(device, non_blocking=True), numbers.numpy())
        ahead = Features(on_device.to("cpu", non_blocking=True), numbers, labels)
        copied = torch.cuda.Event()
        copied.record()
        waiting.append((copied, ahead))
        if len(waiting) > 1:
            yield _copied(*waiting.pop(0))
    for last in waiting:
        yield _copied(*last)


def _copied(event: torch.cuda.Event, features: Features) -> Features:
    event.synchronize()
    return features


@dataclass(frozen=True)
class Shards:
    """Images 0 to num - 1 in files of `folder`, `size` a file, in `format`."""

    folder: Path
    num: int
    size: int
    format: ShardFormat
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return -(-self.num // self.size)

    def path(self, i: int) -> Path:
        return self.folder / f"features-{i:06d}{self.format.suffix}"

    def images(self, i: int) -> np.ndarray:
        return np.arange(i * self.size, min((i + 1) * self.size, self.num))

    def write(self, stream: FeatureStream, source: Source, *, world: World, progress: Progress, label: str) -> None:
        """Those that are not there, shared out among the ranks. Collective. stream: gives the features of images, a
        part at a time, in order; `encode_images` with `within=size`, or another that no part leads over a shard. Raises
        UserError on all ranks: CheckpointError where features are not finite."""
        done = world.from_main(lambda: [self.format.count(self.path(i)) >= 0 for i in range(len(self))])
        todo = [i for i, is_whole in enumerate(done) if not is_whole]
        mine = todo[world.rank :: world.size]
        left = sum(len(self.images(i)) for i in todo)
        with progress.doing(label, self.num, done=self.num - left), world.together():
            indices = np.concatenate([np.empty(0, np.int64), *map(self.images, mine)])
            parts: list[Features] = []
            for part in stream(indices):
                while int(part.numbers[0]) // self.size != mine[0]:
                    self._write(mine.pop(0), source, parts)
                    parts = []
                parts.append(part)
                progress.advance(len(part.numbers) * world.size)
            while mine:
                self._write(mine.pop(0), source, parts)
                parts = []

    def _write(self, i: int, source: Source, parts: list[Features]) -> None:
        none = torch.empty(0, dtype=torch.int64)
        whole = Features(*map(torch.cat, zip(*parts))) if parts else Features(torch.empty(0, 0), none, none)
        stored = whole.features.to(self.dtype)
        if not whole.features.isfinite().all():
            raise CheckpointError(not_finite())
        if not stored.isfinite().all():
            dtype = dtype_name(self.dtype)
            rule = f"is too narrow: a feature is {whole.features.abs().max():.3g}"
            raise UserError(Problem("--dtype", dtype, rule, "give --dtype float32"))
        self.format.write(self.path(i), whole._replace(features=stored), source)


def not_finite() -> Problem:
    fix = "use an earlier checkpoint"
    return Problem(
        "The features", NOTHING, "are not finite, so they mean nothing: weights or BatchNorm statistics are broken", fix
    )


# ------------------------------------------------------------------------------------------------ files of them


class ShardFormat(ABC):
    suffix: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)

    @abstractmethod
    def write(self, path: Path, shard: Features, source: Source) -> None:
        """The whole file, or none."""

    @abstractmethod
    def count(self, path: Path) -> int:
        """The images in a file; -1 where it is not there, or not whole."""


class SafetensorsShards(ShardFormat):
    """features [n, D], numbers [n], labels [n]; `names`, a JSON list, in the file's metadata, where they are asked
    for."""

    suffix = ".safetensors"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, with_names: bool = False):
        self.with_names = with_names

    def write(self, path: Path, shard: Features, source: Source) -> None:
        metadata = {"names": to_json(names_of(shard, source))} if self.with_names else None
        write_whole(path, safetensors.torch.save(shard._asdict(), metadata))

    def count(self, path: Path) -> int:
        header = safetensors_header(path)
        return header["numbers"]["shape"][0] if "numbers" in header else -1


class NumpyShards(ShardFormat):
    """features [n, D] in the .npy; numbers, labels, names in a .json beside it, which is written before."""

    suffix = ".npy"

    def write(self, path: Path, shard: Features, source: Source) -> None:
        beside = {"numbers": shard.numbers, "labels": shard.labels, "names": names_of(shard, source)}
        write_whole(path.with_suffix(".json"), to_json(beside))
        with written_whole(path) as file:
            np.save(file, shard.features.numpy(), allow_pickle=False)

    def count(self, path: Path) -> int:
        return npy_rows(path) if path.with_suffix(".json").exists() else -1


class ParquetShards(ShardFormat):
    """Columns features (a list of fixed size), numbers, labels, names."""

    suffix = ".parquet"

    def __init__(self) -> None:
        """Raises UserError where pyarrow is not installed."""
        try:
            import pyarrow.parquet
        except ImportError as error:
            rule = "is not installed, and writes Parquet"
            raise UserError(Problem("pyarrow", NOTHING, rule, how_to_install("pyarrow"))) from error
        self.pa, self.parquet = pyarrow, pyarrow.parquet

    def write(self, path: Path, shard: Features, source: Source) -> None:
        flat, width = self.pa.array(shard.features.numpy().ravel()), max(1, shard.features.shape[1])
        table = self.pa.table({
            "features": self.pa.FixedSizeListArray.from_arrays(flat, width),
            "numbers": shard.numbers.numpy(), "labels": shard.labels.numpy(), "names": names_of(shard, source),
        })  # fmt: skip
        out = io.BytesIO()
        self.parquet.write_table(table, out)
        write_whole(path, out.getvalue())

    def count(self, path: Path) -> int:
        try:
            return self.parquet.read_metadata(path).num_rows
        except (OSError, self.pa.ArrowInvalid):
            return -1


SHARD_KINDS: dict[str, Callable[[], ShardFormat]] = {
    "safetensors": partial(SafetensorsShards, with_names=True), "npy": NumpyShards, "parquet": ParquetShards,
}  # fmt: skip


def npy_rows(path: Path) -> int:
    """Of the array in a .npy file; -1 where there is none, or not a whole one."""
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return -1


def names_of(shard: Features, source: Source) -> list[str]:
    return [source.name(i) for i in shard.numbers.tolist()]


def read_safetensors(path: Path) -> Features:
    """From bytes, since safetensors takes no names that are not UTF-8."""
    tensors = safetensors.torch.load(path.read_bytes())
    return Features(*(tensors[name] for name in Features._fields))
