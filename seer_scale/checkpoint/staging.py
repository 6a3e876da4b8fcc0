"""What a rank writes of a checkpoint, copied out of the way of training.

A run of a tensor that several ranks hold alike is shared out among them, so that each copies and writes its part of it:
with a replicated model on 512 ranks a 512th of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_scale.parallel.shard import Shard
from seer_scale.world import World

PART = 4 << 20
"""Bytes from which a run is shared out among those who hold it."""

PIECE = 16 << 20
"""Bytes of a piece of a file, the least that a reader of another sharding reads."""


class Staging:
    """Copies on the host of this rank's part of a state; made once, filled at every checkpoint.

    state: name -> Shard, or a contiguous Tensor that every rank holds whole; the same names and runs at every `fill`.
    Collective (one gather). nbytes: of host memory; where the state is on a GPU pinned, which torch gives in powers of two.
    """

    def __init__(self, state: dict[str, Tensor], world: World):
        self._device = next((t.device for t in state.values() if t.device.type == "cuda"), None)
        self._parts: dict[str, tuple[int, int]] = {}
        self.copies: dict[str, Tensor] = {}
        everyone = world.gather_objects({name: _run(t) for name, t in state.items()})
        turn = 0
        for name, tensor in state.items():
            mine = 0, 0
            holders: dict[tuple[int, int], list[int]] = {}
            for rank, runs in enumerate(everyone):
                holders.setdefault(runs[name], []).append(rank)
            for (start, stop), ranks in sorted(holders.items()):
                cuts = _cuts(start, stop, tensor.itemsize, len(ranks))
                for part in zip(cuts, cuts[1:]):
                    if ranks[turn % len(ranks)] == world.rank:
                        mine = part
                    turn += 1
            local = torch.empty(mine[1] - mine[0], dtype=tensor.dtype, pin_memory=self._device is not None)
            self._parts[name] = mine
            self.copies[name] = Shard(local.zero_(), mine[0], tensor.shape, PIECE)  # zeros: the pages are there now
        sizes = [c.local.nbytes for c in self.copies.values()]
        self.nbytes = sum(1 << (n - 1).bit_length() for n in sizes if n) if self._device else sum(sizes)

    @torch.no_grad()
    def fill(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy `state` as it is now; the copies, which the next `fill` overwrites."""
        for name, (start, stop) in self._parts.items():
            local, first = _local(state[name]), _run(state[name])[0]
            self.copies[name].local.copy_(local.view(-1)[start - first : stop - first], non_blocking=True)
        if self._device:
            torch.cuda.current_stream(self._device).synchronize()
        return self.copies


def _local(tensor: Tensor) -> Tensor:
    return tensor.local if isinstance(tensor, Shard) else tensor.detach()


def _run(tensor: Tensor) -> tuple[int, int]:
    return (tensor.start, tensor.stop) if isinstance(tensor, Shard) else (0, tensor.numel())


def _cuts(start: int, stop: int, itemsize: int, holders: int) -> list[int]:
    """Where a run is cut to be shared out among `holders` ranks."""
    num = max(1, min(holders, -(-(stop - start) * itemsize // PART)))
    return [start + (stop - start) * i // num for i in range(num + 1)]
