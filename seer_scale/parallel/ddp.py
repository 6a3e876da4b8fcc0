"""DistributedDataParallel: every rank holds everything; one bucketed all-reduce of the gradients."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seer_scale.parallel.engine import Engine


class DDP(Engine):
    def _finish(self, module: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return module
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers, older torch knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
