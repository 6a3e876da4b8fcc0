"""What an update moves: its collectives by kind, type, elements and group, and the time they take by themselves."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

COLLECTIVE_KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
}


class Call(NamedTuple):
    """A collective as issued on this rank. numel: elements of the whole, that is of what an all-gather makes, what a
    reduce-scatter takes, and what the others carry. group: its group's name; WORLD's is "default_pg"."""

    kind: str
    dtype: torch.dtype
    numel: int
    group: str


class CollectiveCounter(TorchDispatchMode):
    """Under it, `calls` collects what is issued."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._repeats: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            kind = next(
                (COLLECTIVE_KINDS[k] for k in sorted(COLLECTIVE_KINDS, key=len, reverse=True) if name.startswith(k)),
                None,
            )
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if kind and tensors:
                largest = max(tensors, key=Tensor.numel)
                groups = (a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
                group = next((dist.ProcessGroup.unbox(g).group_desc for g in groups), "")
                self.calls.append(Call(kind, largest.dtype, largest.numel(), group))
                self._repeats.append(_repeat(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def count(self, kind: str) -> int:
        return sum(call.kind == kind for call in self.calls)

    def elements(self, kind: str, dtype: torch.dtype | None = None) -> int:
        return sum(call.numel for call in self.calls if call.kind == kind and dtype in (None, call.dtype))

    @property
    def nbytes(self) -> int:
        return sum(call.numel * call.dtype.itemsize for call in self.calls)

    def table(self) -> dict[str, tuple[int, int]]:
        """kind -> (calls, bytes)."""
        out: collections.defaultdict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
        for kind, dtype, numel, _ in self.calls:
            calls, size = out[kind]
            out[kind] = calls + 1, size + numel * dtype.itemsize
        return dict(out)

    def repeat(self) -> None:
        """All of them once more, each waited for before the next, on tensors of the same sizes. Collective."""
        for again in self._repeats:
            again()


def _repeat(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    def layout(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    device = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)).device
    args, kwargs = tree_map_only(Tensor, layout, (args, kwargs))

    def again() -> None:
        tensors = tree_map_only(Tensor, lambda t: torch.zeros_like(t, device=device), (args, kwargs))
        for work in tree_leaves(func(*tensors[0], **tensors[1])):
            if isinstance(work, torch.ScriptObject) and (waits := dist.Work.unbox(work)):  # NCCL's is none, before 2.14
                waits.wait()

    return again
