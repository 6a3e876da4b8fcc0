"""DistributedDataParallel: every rank holds everything; one bucketed all-reduce of the gradients."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seer_scale.parallel.engine import Engine

warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # channels-last; costs a copy


class DDP(Engine):
    name = "ddp"
    module: DistributedDataParallel

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers, older torch knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.module.no_sync()
