"""What an update moves: collectives by kind, count, elements and type, as issued on this rank."""

from __future__ import annotations

import collections

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allgather": "all_gather", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce",
    "all_reduce": "all_reduce", "broadcast": "broadcast", "reduce": "reduce",
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Under it, `calls` collects (kind, dtype, elements) of every collective: elements of the whole, that is of what an
    all-gather makes, what a reduce-scatter takes, and what the others carry. `groups` collects (kind, name of the group),
    WORLD's being "default_pg"."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []
        self.groups: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            kind = next((KINDS[k] for k in sorted(KINDS, key=len, reverse=True) if name.startswith(k)), None)
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if kind and tensors:
                largest = max(tensors, key=torch.Tensor.numel)
                self.calls.append((kind, largest.dtype, largest.numel()))
                self.groups += [(kind, dist.ProcessGroup.unbox(a).group_desc) for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        return func(*args, **(kwargs or {}))

    def count(self, kind: str) -> int:
        return sum(k == kind for k, *_ in self.calls)

    def elements(self, kind: str, dtype: torch.dtype | None = None) -> int:
        return sum(n for k, t, n in self.calls if k == kind and dtype in (None, t))

    def table(self) -> dict[str, tuple[int, int]]:
        """kind -> (calls, bytes)."""
        out: collections.defaultdict = collections.defaultdict(lambda: (0, 0))
        for kind, dtype, n in self.calls:
            calls, size = out[kind]
            out[kind] = calls + 1, size + n * dtype.itemsize
        return dict(out)
