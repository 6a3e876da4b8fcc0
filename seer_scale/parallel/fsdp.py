"""FSDP2 by units: weights, gradients and optimiser state are spread over the ranks, gathered a unit, or several small
ones, at a time.

Vectors (BatchNorm, biases: about a thousandth of the parameters) are not sharded: they stay fp32 on every rank, are
never gathered, and their gradients are averaged by one stacked all-reduce. With `parallel.replicate_degree` N the
ranks form an N x (ranks / N) mesh (HSDP): sharded within a row, averaged across rows. On GPUs, where collectives
run beside computing, reduce-scatters have a communicator of their own, lest the next gather wait for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from seer_scale.distributed import World
from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.units import compute_type, joined_units

# of maps with channels last; nothing writes in place to a view that a unit gives
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def overlaps(world: World) -> bool:
    """Whether collectives run beside computing, on streams; on the CPU FSDP2 waits for each."""
    return world.device.type != "cpu"


def _member(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """A group that this rank is in, which the types of torch leave open."""
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError("This rank is in no such process group.")
    return group


def build_mesh(world: World, replicate: int) -> DeviceMesh:
    """All ranks as "shard", or as "replicate" x "shard"; of groups with the world's time limits."""
    kind, shard = world.device.type, world.size // replicate
    if replicate == 1:
        return DeviceMesh.from_group(_member(dist.group.WORLD), kind, mesh_dim_names=("shard",))
    alone = dist.new_group([world.rank], use_local_synchronization=True) if shard == 1 else None
    groups = [_member(world.group("replicate", replicate, stride=shard)), _member(alone or world.group("shard", shard))]
    ranks = torch.arange(world.size).view(replicate, shard)
    return DeviceMesh.from_group(groups, kind, ranks, mesh_dim_names=("replicate", "shard"))


class ReduceScatterOver:
    """FSDP2's reduce-scatter over another group of the same ranks, for `set_custom_reduce_scatter`.

    (`set_separate_reduce_scatter_group` came with torch 2.13, and its group has torch's time limit.)
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        # its name before torch 2.14
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return reduce_scatter(output_tensor, input_tensor, op, self.group, async_op)


class FSDP(Engine):
    name = "fsdp"

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        self.mesh = build_mesh(self.world, self.config.parallel.replicate_degree)
        vectors = {p for p in method.parameters() if p.ndim < 2}
        groups = joined_units(method, self.config)
        for units in groups:
            dtype = compute_type(next(iter(units)), method, self.config)  # of all in the group
            self._shard(list(units.values()), COMPUTE_DTYPES[dtype], vectors)
        # told nothing, the first group's backward would gather what ran before it: the last of a look at the batch
        first = cast(FSDPModule, next(iter(groups[0].values())))
        first.set_modules_to_backward_prefetch([first])
        self._shard([method], self.dtype, vectors)
        if overlaps(self.world):
            group = self.world.group("reduce_scatter", self.mesh.size(-1))
            for module in method.modules():
                if isinstance(module, FSDPModule):
                    # the protocol's class is in a private module of torch
                    module.set_custom_reduce_scatter(ReduceScatterOver(group))  # type: ignore[arg-type]
        return method

    def _shard(self, modules: list[nn.Module], dtype: torch.dtype, vectors: set[nn.Parameter]) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(
            modules,
            mesh=self.mesh,
            reshard_after_forward=self.config.parallel.reshard_after_forward,
            mp_policy=policy,
            ignored_params=vectors,
        )

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        return self.mesh["shard"].get_group(), self.mesh["shard"].get_local_rank()

    def _is_spread(self, name: str) -> bool:
        return name not in self.vectors

    def _step_within(self, apply: Callable[[], None]) -> None:
        vectors = [p.grad for n, p in self.method.named_parameters() if n in self.vectors and p.grad is not None]
        if vectors:
            flat = torch.cat([g.flatten() for g in vectors])
            dist.all_reduce(flat)
            flat /= self.world.size
            torch._foreach_copy_(
                vectors, [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in vectors]), vectors)]
            )
        apply()


@contextmanager
def filled_up_once() -> Iterator[None]:
    """For tensors without values: FSDP2 fills a shard up to the size of the largest, and knows by its address that it
    has. They have none, and would be filled up again in the first forward, beside those that the engine holds."""
    fill_up = FSDPParam.reset_sharded_param

    def once(own: Any) -> None:
        filled, shard = own._sharded_param_data, own.sharded_param._local_tensor
        if type(filled) is not FakeTensor or filled.untyped_storage()._cdata != shard.untyped_storage()._cdata:
            fill_up(own)

    with mock.patch.object(FSDPParam, "reset_sharded_param", once):
        yield
