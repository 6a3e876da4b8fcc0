"""What a rank writes of a checkpoint, copied out of the way of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seer_scale.checkpoint.layout import Layout, local_of, run_of
from seer_scale.distributed import World
from seer_scale.parallel.shard import Shard


class Staging:
    """Copies on the host of this rank's part of a state; made once, filled at every checkpoint.

    state: name -> Shard, or a contiguous Tensor that every rank holds whole; the same names and runs at every `fill`.
    layout: planned here, for all of them. Collective (one gather). nbytes: of host memory; where the state is on a GPU
    pinned, which torch gives in powers of two.
    """

    def __init__(self, state: Mapping[str, Tensor], world: World):
        self._device = next((t.device for t in state.values() if t.device.type == "cuda"), None)
        self.layout = Layout.plan(state, world)
        self.copies: dict[str, Shard] = {}
        for name, part in self.layout.written_by(world.rank).items():
            tensor = state[name]
            local = torch.empty(part.stop - part.start, dtype=tensor.dtype, pin_memory=self._device is not None)
            self.copies[name] = Shard(local.zero_(), part.start, tensor.shape)  # zeros: the pages are there now
        sizes = [c.local.nbytes for c in self.copies.values()]
        self.nbytes = sum(1 << (n - 1).bit_length() for n in sizes if n) if self._device else sum(sizes)

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> dict[str, Shard]:
        """Copy `state` as it is now; the copies, which the next `fill` overwrites."""
        for name, copy in self.copies.items():
            first = run_of(state[name])[0]
            run = local_of(state[name]).view(-1)[copy.start - first : copy.stop - first]
            copy.local.copy_(run, non_blocking=True)
        if self._device:
            torch.cuda.current_stream(self._device).synchronize()
        return self.copies
