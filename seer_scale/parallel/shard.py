"""What a rank holds of a tensor, in the one form all engines share: a contiguous run of its elements.

Row-major order makes every sharding such a run: the rows FSDP2 gives a rank, DeepSpeed's pieces of a flat partition,
fairscale's whole parameters, and what is not sharded at all. So norms, updates and checkpoints are written once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


class Shard(Tensor):
    """A tensor of which this rank holds `local`: the elements [start, start + local.numel()) in row-major order.

    Shape and dtype are the whole tensor's; no operation takes it. torch.distributed.checkpoint saves and loads it in
    place (its `_Checkpointable` protocol), so that any number of ranks can read what any other wrote.
    """

    local: Tensor
    start: int
    most: int
    """Bytes of a piece in which it is saved, 0 = any: who reads a part of a piece has to read all of it."""

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: torch.Size, most: int = 0) -> Shard:
        assert local.is_contiguous() and 0 <= start <= start + local.numel() <= shape.numel(), (local.shape, start, shape)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.start, self.most = local, start, most
        return self

    def __init__(self, local: Tensor, start: int, shape: torch.Size, most: int = 0):
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"a Shard is not computed with: use its .local, not {func}")

    def __repr__(self, **_) -> str:
        return f"Shard({self.local.numel()} elements of {list(self.shape)} from {self.start})"

    @classmethod
    def of(cls, tensor: Tensor) -> Shard:
        """Of a plain tensor, which is whole on this rank, or of a DTensor sharded along dimension 0."""
        if not isinstance(tensor, DTensor):
            return cls(tensor, 0, tensor.shape)
        mesh, local = tensor.device_mesh, tensor.to_local()
        rows = -(-tensor.shape[0] // mesh.size(-1))
        first = min(rows * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])
        return cls(local, first * math.prod(tensor.shape[1:]), tensor.shape)

    def like(self, local: Tensor) -> Shard:
        """The same run of another tensor of this shape, such as a parameter's momentum."""
        return Shard(local, self.start, self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's run of `whole`, in the form of `local`."""
        return whole.flatten()[self.start : self.start + self.local.numel()].view_as(self.local)

    # torch.distributed.checkpoint.planner_helpers: the run as boxes, each of which is contiguous in `local`

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in self.boxes()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(MetadataIndex(fqn, c.offsets, i), WriteItemType.SHARD, tensor_data=TensorWriteData(c, properties, self.shape))
            for i, c in enumerate(self.__create_chunk_list__())
        ]  # fmt: skip

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offsets, sizes in self.boxes():
            if torch.Size(offsets) == index.offset:
                first = sum(o * s for o, s in zip(offsets, strides(self.shape))) - self.start
                return self.local.detach().view(-1)[first : first + math.prod(sizes)].view(sizes)
        raise ValueError(f"{index} is not on this rank")

    @property
    def stop(self) -> int:
        return self.start + self.local.numel()

    def boxes(self) -> list[tuple[list[int], list[int]]]:
        """(offsets, sizes) of what it is saved and loaded in: contiguous boxes of at most `most` bytes, or a row."""
        tiles = boxes(self.shape, self.start, self.stop)
        return [part for tile in tiles for part in _rows(*tile, self.most // self.dtype.itemsize)] if self.most else tiles


def strides(shape: tuple[int, ...]) -> list[int]:
    """Elements between neighbours along each dimension, row-major."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """(offsets, sizes) of the fewest boxes that tile the elements [start, stop) of a row-major tensor, in order.

    Each box is contiguous; there are at most 2 * len(shape) - 1 of them.
    """
    if start >= stop:
        return []
    if not shape:
        return [([], [])]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole slices along dimension 0
    if first > last:  # within one slice
        row = start // inner
        return _below(row, boxes(shape[1:], start - row * inner, stop - row * inner))
    out = _below(first - 1, boxes(shape[1:], start - (first - 1) * inner, inner))
    if last > first:
        out.append(([first] + [0] * (len(shape) - 1), [last - first, *shape[1:]]))
    return out + _below(last, boxes(shape[1:], 0, stop - last * inner))


def _below(row: int, of_slice: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    return [([row, *offsets], [1, *sizes]) for offsets, sizes in of_slice]


def _rows(offsets: list[int], sizes: list[int], most: int) -> list[tuple[list[int], list[int]]]:
    """A box cut along its first dimension into boxes of at most `most` elements, or of one row."""
    if not sizes:
        return [(offsets, sizes)]
    each = max(1, most // math.prod(sizes[1:]))
    return [([offsets[0] + row, *offsets[1:]], [min(each, sizes[0] - row), *sizes[1:]]) for row in range(0, sizes[0], each)]
