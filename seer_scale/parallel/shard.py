"""What a rank holds of a tensor, in the one form all engines share: a contiguous run of its elements.

Row-major order makes every sharding such a run: the rows FSDP2 gives a rank, DeepSpeed's pieces of a flat partition,
fairscale's whole parameters, and what is not sharded at all. So norms, updates and checkpoints are written once.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Shard(Tensor):
    """A tensor of which this rank holds `local`: the elements [start, start + local.numel()) in row-major order.

    Shape and dtype are the whole tensor's; no operation takes it.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: torch.Size) -> Shard:
        assert local.is_contiguous() and 0 <= start <= start + local.numel() <= shape.numel(), (
            local.shape,
            start,
            shape,
        )
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.start = local, start
        return self

    def __init__(self, local: Tensor, start: int, shape: torch.Size):
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch gives its own function there, not a class's method
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> NoReturn:
        raise NotImplementedError(f"a Shard is not computed with: use its .local, not {func}")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]  # mypy drops names of special methods' keywords
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

    def with_local(self, local: Tensor) -> Shard:
        """The same run of another tensor of this shape, such as a parameter's momentum."""
        return Shard(local, self.start, self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.local.numel()
