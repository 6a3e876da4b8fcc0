"""The engine: what holds a method's parameters, gradients and optimiser state, and makes an update of a batch.

`Engine` is the unsharded engine of one rank and the frame of all others, which override how the method is wrapped,
how gradients are averaged and over which ranks a tensor is spread. An engine knows no method: it asks one for its
units, initial values, unit-length rows and frozen names. State leaves and enters in the neutral form: parameter name
-> fp32 tensor (a DTensor where sharded), so a run may change engine and size when it resumes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seer_scale.config import Config
from seer_scale.models.norm import BatchNorm
from seer_scale.optim.optimizers import build_optimizer, local
from seer_scale.parallel.recompute import recompute
from seer_scale.parallel.scaling import LossScaler
from seer_scale.rng import draw
from seer_scale.world import World

COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Engine:
    """`single`. `method` comes on the meta device and leaves materialised, wrapped and initialised."""

    def __init__(self, method: nn.Module, config: Config, world: World):
        self.method, self.config, self.world = method, config, world
        self.dtype = COMPUTE[config.train.precision]
        # fp32 means fp32: on recent GPUs convolutions would otherwise round their inputs to TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.dtype != torch.float32
        self.scaler = LossScaler(world.device, dynamic=self.dtype == torch.float16)
        group = world.group(config.parallel.sync_bn_group or world.size)
        for module in method.modules():
            if isinstance(module, BatchNorm):
                module.process_group = group
        for stage in config.parallel.activation_checkpoint:
            for name in method.backbone.stage_units()[stage - 1]:
                recompute(method.backbone.units()[name])
        self.module = self._wrap(method)
        self.params: dict[str, Tensor] = dict(method.named_parameters())
        self._initialise()
        self._statistics, self._before = _one_tensor(method)
        self.module = self._finish(self.module)
        self.optimizer = build_optimizer(self.params, config.optim)
        self._is_sharded = torch.tensor([isinstance(p, DTensor) for p in self.params.values()], device=world.device)
        self._restore_unit_rows(torch.zeros((), device=world.device))

    # --- what the engines differ in

    def _wrap(self, method: nn.Module) -> nn.Module:
        """Shard the method, still on the meta device."""
        return method

    def _finish(self, module: nn.Module) -> nn.Module:
        """Wrap the materialised method."""
        return module

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        """The ranks over which one copy of the parameters is spread, and this rank's place among them."""
        return None, 0

    def _average_gradients(self) -> None:
        """What backward has not averaged over the ranks yet."""

    # --- the step

    def forward(self, views: list[Tensor], *, samples_seen: int, watch: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss over this rank's views (float, normalised), and what it watches."""
        self._before.copy_(self._statistics)
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(views, samples_seen=samples_seen, watch=watch)

    @torch.no_grad()
    def represent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and unit-length embeddings [N, dim] of normalised images, fp32, with running statistics.

        Every rank must call it as often as the others.
        """
        self.module.eval()
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.module([images])
        self.module.train()
        return out

    def backward(self, loss: Tensor) -> None:
        (loss * self.scaler.scale).backward()

    @torch.no_grad()
    def update(self, lr: float, frozen: frozenset[str] = frozenset()) -> dict[str, Tensor]:
        """Average, unscale, agree whether all gradients are finite, update or skip, restore unit rows, drop gradients.

        Collectives: one stacked all-reduce of norms and finiteness over the shard group, and what
        `_average_gradients` needs. No host synchronisation. Returns device scalars for the log.
        """
        self._average_gradients()
        for p in self.params.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        found_inf = self.scaler.unscale_([local(p.grad) for p in self.params.values()])
        norms, found_inf = self._norms(found_inf)
        self.optimizer.update(lr, norms, found_inf, frozen)
        self.scaler.update(found_inf)
        # a forward that was not finite must not stay in the running statistics
        self._statistics.copy_(torch.where(found_inf > 0, self._before, self._statistics))
        self._restore_unit_rows(found_inf)
        for p in self.params.values():
            p.grad = None
        return {"grad_norm": norms[1].norm(), "param_norm": norms[0].norm(), "skipped": found_inf}

    def _norms(self, found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """Norms [2, P] of the whole parameters and gradients, and found_inf agreed by all ranks."""
        params = [local(p) for p in self.params.values()]
        grads = [local(p.grad) for p in self.params.values()]
        norms = torch.stack([torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))])
        group, place = self._shard_group()
        if group is None:
            return norms, found_inf
        squares = norms.square()
        if place:  # what is not sharded is whole on every rank, and counts once
            squares = torch.where(self._is_sharded, squares, 0.0)
        together = torch.cat([squares.flatten(), found_inf.view(1)])
        dist.all_reduce(together, group=group)
        return together[:-1].view_as(norms).sqrt(), together[-1].clamp(max=1.0)

    @torch.no_grad()
    def _restore_unit_rows(self, skipped: Tensor) -> None:
        """Rows are whole on one rank (sharding is along dimension 0), so this needs no collective."""
        for name in self.method.unit_rows:
            shard = local(self.params[name])
            shard.copy_(torch.where(skipped > 0, shard, torch.nn.functional.normalize(shard, dim=1)))

    # --- state

    def is_finite(self) -> bool:
        """Whether all weights and running statistics of all ranks are; a host synchronisation and an all-reduce."""
        norms = torch._foreach_norm([*(local(p.detach()) for p in self.params.values()), self._statistics])
        return bool(self.world.sum_(torch.stack(norms).sum()).isfinite())

    @torch.no_grad()
    def _initialise(self) -> None:
        """Materialise and fill: values depend on (seed, name) alone, one whole parameter at a time on the CPU."""
        self.method.to_empty(device=self.world.device)
        inits, seed = self.method.initialisers(), self.config.run.seed
        missing = set(self.params) ^ set(inits)
        assert not missing, f"parameters and initial values differ in {sorted(missing)}"
        self.params = dict(self.method.named_parameters())
        for name, p in self.params.items():
            whole = draw(inits[name], p.shape, seed, name)
            if isinstance(p, DTensor):
                mesh = p.device_mesh
                whole = _chunk(whole, mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))
            local(p).copy_(whole)
        for module in self.method.modules():
            if isinstance(module, BatchNorm):
                module.reset_running_stats()
        for _, buffer in self.method.named_buffers(recurse=False):
            buffer.zero_()

    @torch.no_grad()
    def average_buffers(self) -> None:
        """BatchNorm's running statistics become their mean over all ranks; one all-reduce, none where all share."""
        if (self.config.parallel.sync_bn_group or self.world.size) != self.world.size:
            dist.all_reduce(self._statistics)
            self._statistics /= self.world.size

    def whole(self, name: str) -> Tensor:
        """A parameter's full value on every rank; collective where it is sharded."""
        p = self.params[name].detach()
        return p.full_tensor() if isinstance(p, DTensor) else p

    def state(self) -> dict[str, Tensor]:
        """The neutral state, by reference: loading writes into it. Call `average_buffers` before saving.

        model/ holds weights and BatchNorm statistics, optim/ and scaler/ what updates need, and memory/ what a method
        remembers of past samples and can fill anew (SwAV's queue).
        """
        out = {f"model/{n}": p.detach() for n, p in self.params.items()}
        own = dict(self.method.named_buffers(recurse=False))
        out |= {f"memory/{n}" if n in own else f"model/{n}": b for n, b in self.method.named_buffers()}
        out |= {f"optim/{n}": t for n, t in self.optimizer.state.items()}
        return out | self.scaler.state()


def _one_tensor(method: nn.Module) -> tuple[Tensor, Tensor]:
    """The method's float buffers become views of one tensor, so that keeping and restoring them is one copy each."""
    owners = [(m, n, b) for m in method.modules() for n, b in m.named_buffers(recurse=False) if b.is_floating_point()]
    flat = torch.cat([b.flatten() for _, _, b in owners])
    first = 0
    for module, name, b in owners:  # .data: views proper share a version, and autograd would see all change with one
        setattr(module, name, flat.data[first : first + b.numel()].view_as(b))
        first += b.numel()
    return flat, flat.clone()


def _chunk(whole: Tensor, parts: int, index: int) -> Tensor:
    """The piece of dimension 0 that torch's Shard(0) gives to `index`."""
    pieces = whole.chunk(parts)
    return pieces[index] if index < len(pieces) else whole[:0]
