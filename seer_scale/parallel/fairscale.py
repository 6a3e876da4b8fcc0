"""fairscale's OSS and ShardedDataParallel: each parameter's update belongs to one rank.

Every rank holds all weights; a gradient is reduced to its parameter's owner, which alone keeps optimiser state,
updates, and broadcasts the result. Parameters are dealt out largest first, so that the ranks hold about as much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim.oss import OSS
from torch import Tensor, nn

from seer_scale.parallel.delegating_optimizer import DelegatingOptimizer, aligned
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.private_parts import PrivatePart
from seer_scale.parallel.shard import Shard

_OSS = "fairscale.optim.oss"
FAIRSCALE_PARTS = (
    PrivatePart(_OSS, "OSS._per_device_params", "dealing out parameters in an order that keeps them aligned"),
    PrivatePart(_OSS, "OSS._param_to_rank", "which parameters a rank owns"),
    PrivatePart(_OSS, "OSS._broadcast_params", "bringing loaded weights to all ranks", ()),
    PrivatePart(_OSS, "OSS.optim", "the optimiser that makes our update"),
    PrivatePart("fairscale.nn.data_parallel.sharded_ddp", "ShardedDataParallel.refresh_trainable", "buckets", ()),
)
"""Every inner part of fairscale's that is touched here."""


class Fairscale(Engine):
    name = "fairscale"
    module: ShardedDataParallel

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        trained = (p for p in module.parameters() if p.requires_grad)
        largest_first = sorted(trained, key=lambda p: p.numel(), reverse=True)
        root = logging.getLogger()
        handlers = root.handlers[:]
        self.oss = OSS(largest_first, optim=lambda groups: DelegatingOptimizer(groups))
        # freezing is ours, so nothing about the parameters changes that fairscale should look for
        wrapped = ShardedDataParallel(
            module, self.oss, broadcast_buffers=False, sync_models_at_startup=False, auto_refresh_trainable=False
        )
        for owned in (params for of_ranks in self.oss._per_device_params.values() for params in of_ranks):
            owned[:] = aligned(owned)
        wrapped.refresh_trainable()  # else the first forward does, and moves the parameters
        root.handlers[:] = handlers  # it logs by root's own functions, which give root a handler for everybody's words
        root.setLevel(logging.WARNING)
        return wrapped

    def _owns(self, p: Tensor) -> bool:
        return not p.requires_grad or self.oss._param_to_rank[p] == self.world.rank  # each has all moving averages

    def _shards(self) -> dict[str, Shard]:
        named = self.method.named_parameters()
        return {n: Shard.of(p.detach()) if self._owns(p) else Shard(p.new_empty(0), 0, p.shape) for n, p in named}

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        return dist.group.WORLD, self.world.rank

    def _is_spread(self, name: str) -> bool:
        return name not in self.averages

    def _sources(self, names: Sequence[str]) -> list[Tensor]:
        return [self.method.get_parameter(self.averages[name]).detach() for name in names]

    def _accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.module.no_sync()

    def _gradients(self) -> list[Tensor]:
        nothing = torch.empty(0, device=self.world.device)
        return [self._gradient(p) if self._owns(p) else nothing for _, p in self._trained()]

    def _gradient(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad

    def _step_within(self, apply: Callable[[], None]) -> None:
        self.oss.optim.apply = apply
        self.oss.step()

    def _drop_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)  # small ones are views of a buffer and must stay

    def refresh(self) -> None:
        self.oss._broadcast_params()


@contextmanager
def broadcasting(around: Callable[[Callable[[OSS], None]], Callable[[OSS], None]]) -> Iterator[None]:
    """Inside, parameters are broadcast by what `around` makes of fairscale's own method."""
    with mock.patch.object(OSS, "_broadcast_params", around(OSS._broadcast_params)):
        yield
