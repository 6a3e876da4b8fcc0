"""FSDP2 by units: weights, gradients and optimiser state are spread over the ranks, gathered a unit at a time.

Vectors (BatchNorm, biases: about a thousandth of the parameters) are not sharded: they stay fp32 on every rank, are
never gathered, and their gradients are averaged by one stacked all-reduce. With `parallel.replicate` N the ranks form
an N x (ranks / N) mesh (HSDP): sharded within a row, averaged across rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from seer_scale.parallel.engine import Engine
from seer_scale.parallel.units import sharded_units


class FSDP(Engine):
    name = "fsdp"

    def _wrap(self, method: nn.Module) -> nn.Module:
        replicate = self.config.parallel.replicate
        shape = (self.world.size,) if replicate == 1 else (replicate, self.world.size // replicate)
        names = ("shard",) if replicate == 1 else ("replicate", "shard")
        self.mesh = init_device_mesh(self.world.device.type, shape, mesh_dim_names=names)
        vectors = {p for p in method.parameters() if p.ndim < 2}
        units = sharded_units(method, self.config)
        for name, unit in units.items():
            dtype = torch.float32 if name in method.fp32_units else self.dtype
            self._shard(unit, dtype, vectors)
        # told nothing, the first unit's backward would gather what ran before it: the last unit of a look at the batch
        next(iter(units.values())).set_modules_to_backward_prefetch([next(iter(units.values()))])
        self._shard(method, self.dtype, vectors)
        return method

    def _shard(self, module: nn.Module, dtype: torch.dtype, vectors: set[nn.Parameter]) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=self.config.parallel.reshard_after_forward,
            mp_policy=policy,
            ignored_params=vectors,
        )

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        return self.mesh["shard"].get_group(), self.mesh["shard"].get_local_rank()

    def _is_spread(self, name: str) -> bool:
        return name not in self.vectors

    def _around(self, apply: Callable[[], None]) -> None:
        vectors = [p.grad for n, p in self.method.named_parameters() if n in self.vectors and p.grad is not None]
        flat = torch.cat([g.flatten() for g in vectors])
        dist.all_reduce(flat)
        flat /= self.world.size
        torch._foreach_copy_(vectors, [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in vectors]), vectors)])
        apply()
