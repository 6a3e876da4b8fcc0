"""The engine: what holds a method's parameters, gradients and optimiser state, and makes an update of a batch.

`Engine` is the unsharded engine of one rank and the frame of all others, which override how the method is wrapped
(parallelize.py has the order), how gradients are averaged and over which ranks a tensor is spread. An engine knows no
method, but what one declares (methods/base.py). What a rank updates of a parameter is a `Shard`, a run of its elements
in fp32; state leaves and enters in that form, so a run may change engine and size on a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seer_scale.config import Config, EngineName
from seer_scale.distributed import World
from seer_scale.methods.base import BufferKind, Features, LossOutput, Method, PatchFeatures, Reconstructions
from seer_scale.methods.groups import recipe_groups
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.models.init import initial_values
from seer_scale.models.registry import reset_buffers
from seer_scale.optim.optimizers import alike, build_optimizer
from seer_scale.optim.parameter_groups import check_groups, frozen_parameters, normalized_parameters
from seer_scale.optim.schedules import weight_decay
from seer_scale.parallel.loss_scaler import LossScaler
from seer_scale.parallel.parallelize import parallelize
from seer_scale.parallel.shard import Shard

MicroBatch = Callable[[], list[Tensor]]
"""Makes the views of one micro-batch, for each resolution [num * B, 3, H, W], crop-major, float, normalised."""


class Engine:
    """`single`. `method` comes on the meta device and leaves materialised, wrapped and initialised."""

    name: EngineName = "single"

    def __init__(self, method: Method[Any, Any], config: Config, world: World, loaded: tuple[str, ...] = ()):
        """loaded: beginnings of the names of parameters that a checkpoint will bring; "" is all of them."""
        self.method, self.config, self.world, self._loaded = method, config, world, loaded
        self._initialisers = method.initialisers()
        self.groups = recipe_groups(method, config)
        self._normalized = normalized_parameters(self.groups)
        self.averages = {n: group.average_of for n, group in self.groups.items() if group.average_of}
        later = [n for n, source in self.averages.items() if source in self.averages]
        self._average_order = [[n for n in self.averages if n not in later], later]
        for name in self.averages:
            method.get_parameter(name).requires_grad_(False)
        self.dtype = COMPUTE_DTYPES[config.train.precision]
        self.scaler = LossScaler(world.device, dynamic=self.dtype == torch.float16)
        self.shapes = {n: p.shape for n, p in method.named_parameters()}
        check_groups(self.groups, self.shapes)
        self.vectors = {n for n, shape in self.shapes.items() if len(shape) < 2}
        self.module, self.buffers = parallelize(method, config, world, self)
        self.shards: dict[str, Shard] = self._shards()
        trained = {n: s.local for n, s in self.shards.items() if n not in self.averages}
        spread = [self._is_spread(n) for n in trained]
        self._spread = torch.tensor(spread, dtype=torch.float32, device=world.device)
        self.optimizer = build_optimizer(trained, self.vectors, config.optim, self.groups)
        clips = list(dict.fromkeys(self.groups[n].clip for n in trained))
        self._num_clips = len(clips)
        self._clips = torch.tensor([clips.index(self.groups[n].clip) for n in trained], device=world.device)
        self._normalize_rows(self._normalized, torch.zeros((), device=world.device))
        self.refresh()
        self._begin_averages()

    # --- what the engines differ in

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        """Shard the method, still on the meta device."""
        return method

    @torch.no_grad()
    def materialise(self) -> None:
        """Materialise, and fill what this rank holds of each parameter."""
        self.method.to_empty(device=self.world.device)
        for name, shard in Engine._shards(self).items():
            self._initialise(shard.local, name, shard.start)
        self._reset_buffers()

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        """Wrap the materialised method."""
        return module

    def recomputing(self, units: list[nn.Module]) -> AbstractContextManager[None]:
        """Around the second run of units that are recomputed together."""
        return nullcontext()

    def _shards(self) -> dict[str, Shard]:
        """What this rank updates of each parameter."""
        return {n: Shard.of(p.detach()) for n, p in self.method.named_parameters()}

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        """The ranks over which one copy of the parameters is spread, and this rank's place among them."""
        return None, 0

    def _is_spread(self, name: str) -> bool:
        """Whether the ranks of `_shard_group` hold different runs of it, rather than each the whole."""
        return False

    def _accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one of several micro-batches."""
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters but moving averages, by name."""
        return ((n, p) for n, p in self.method.named_parameters() if n not in self.averages)

    def _gradients(self) -> list[Tensor]:
        """Of this rank's shards, averaged over all ranks but still scaled; none of moving averages."""
        out = []
        for _, p in self._trained():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            out.append(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)
        return out

    def _step_within(self, apply: Callable[[], None]) -> None:
        """Average what backward has not, `apply` the update to the shards, and bring it to where forward reads."""
        apply()

    def _drop_gradients(self) -> None:
        for p in self.method.parameters():
            p.grad = None

    def _sources(self, names: Sequence[str]) -> list[Tensor]:
        """Of each of these moving averages, of which this rank holds a run, the same run of what it is one of."""
        return [self.shards[self.averages[name]].local for name in names]

    @torch.no_grad()
    def _begin_averages(self) -> None:
        """As their sources, whose draws they have, but not yet their rows of unit length. What a checkpoint brings to
        either is its affair."""
        for names in self._average_order:
            for name, run in zip(names, self._sources(names), strict=True):
                source = self._root(name)
                if source in self._normalized and not source.startswith(self._loaded):
                    self.shards[name].local.copy_(run)

    def _root(self, name: str) -> str:
        """The trained parameter that a moving average follows, directly or not; itself where it is none."""
        while name in self.averages:
            name = self.averages[name]
        return name

    def _average(self, skipped: Tensor, samples_seen: int) -> None:
        """Moving averages follow, on what this rank holds: average <- momentum average + (1 - momentum) source; those
        of trained parameters first. What is frozen stays, and all of it where the update is skipped, but that a copy
        (a momentum of 0) is taken in any case: its source is what it was, and the time for it does not come again."""
        for names in self._average_order:
            for momentum, pick in alike(names, lambda name: self.method.average_momentum(name, samples_seen)):
                follows = [n for n in pick(names) if not momentum or not self.groups[n].is_frozen(samples_seen)]
                if momentum < 1 and follows:
                    self._follow(follows, momentum, skipped)

    def _follow(self, names: Sequence[str], momentum: float, skipped: Tensor) -> None:
        averages = [self.shards[name].local for name in names]
        steps = [s.to(a.device) for s, a in zip(self._sources(names), averages, strict=True)]
        if not momentum:
            torch._foreach_copy_(averages, steps)
            return
        share = (1 - momentum) * (1 - skipped.to(averages[0].device))
        torch._foreach_lerp_(averages, steps, [share] * len(averages))  # in place: what is averaged may be large

    def refresh(self) -> None:
        """Bring what was written into the shards outside an update to where forward reads. Collective."""

    def close(self) -> None:
        """Let go of what the engine keeps outside itself."""

    # --- the step

    def gradients(self, batches: Sequence[MicroBatch], *, samples_seen: int, with_metrics: bool = False) -> LossOutput:
        """Forward and backward of this rank's share of the global batch, in micro-batches of equal size.

        Returns the method's loss over it, detached, and features of its images in their order, if it gives some. With
        several micro-batches a forward without gradients comes first, where the method has targets (SwAV's codes),
        which are then those of the whole global batch; running statistics move once, by the mean over micro-batches, as
        they would over groups of ranks.
        """
        self.buffers.keep()
        if len(batches) == 1:
            out = self._run("loss", batches[0](), samples_seen=samples_seen, with_metrics=with_metrics)
            self._backward(out.loss * self.scaler.scale)
            return out._replace(loss=out.loss.detach())
        num, outs = len(batches), []
        targets: list[Any] = self._targets(batches, samples_seen) if self.method.has_batch_targets else [None] * num
        for i, (batch, own) in enumerate(zip(batches, targets, strict=True)):
            with self._accumulating(i == num - 1), self.buffers.of_losses.micro_batch(i, num):
                told = dict(samples_seen=samples_seen, part=(i, num), targets=own, with_metrics=with_metrics)
                out = self._run("loss", batch(), **told)
                self._backward(out.loss * self.scaler.scale / num)
            outs.append(out._replace(loss=out.loss.detach()))
        metrics = {k: torch.stack([out.metrics[k] for out in outs]).mean(0) for k in outs[0].metrics}
        features = [out.features for out in outs if out.features is not None]
        return LossOutput(
            torch.stack([out.loss for out in outs]).mean(0), metrics, torch.cat(features) if features else None
        )

    def _targets(self, batches: Sequence[MicroBatch], samples_seen: int) -> list[Any]:
        """Of each micro-batch, over the whole global batch."""
        inputs, num, buffers = [], len(batches), self.buffers
        with torch.no_grad(), buffers.of_losses.unmoved():
            for i, batch in enumerate(batches):
                with buffers.of_targets.micro_batch(i, num):
                    inputs.append(self._run("prepare_targets", batch(), samples_seen=samples_seen, part=(i, num)))
            return self.method.targets(inputs, samples_seen)

    def _run(self, entrance: str, *args: Any, **kwargs: Any) -> Any:
        """One of the method's entrances that run the network, through what the method is wrapped in."""
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(entrance, *args, **kwargs)

    def encode(self, images: Tensor) -> Features:
        """What the method makes of normalised images. Every rank must call it as often as the others."""
        return self._evaluate("encode", images)

    def encode_patches(self, images: Tensor) -> PatchFeatures:
        """The same of their patches."""
        return self._evaluate("encode_patches", images)

    def reconstruct(self, images: Tensor, numbers: Sequence[int]) -> Reconstructions:
        """What it makes of what it does not see of them."""
        return self._evaluate("reconstruct", images, numbers)

    @torch.no_grad()
    def _evaluate(self, entrance: str, *args: Any) -> Any:
        self.module.eval()
        out = self._run(entrance, *args)
        self.module.train()
        return out

    @torch.no_grad()
    def update(self, lr: float, samples_seen: int) -> dict[str, Tensor]:
        """Average, unscale, agree whether all gradients are finite, clip, update or skip, normalise rows, let moving
        averages follow, drop gradients.

        Collectives: one stacked all-reduce of norms and finiteness over the shard group, and what the engine needs
        (docs/engines.md). No host synchronisation. Returns device scalars for the log, and `grad_norms` [P].
        """
        stats: dict[str, Tensor] = {}
        frozen = frozen_parameters(self.groups, samples_seen)
        decay = weight_decay(self.config, samples_seen)
        self._step_within(lambda: stats.update(self._apply(lr, decay, frozen)))
        if self.averages:
            self._average(stats["skipped"], samples_seen)
        self._drop_gradients()
        return stats

    def _apply(self, lr: float, decay: float, frozen: frozenset[str]) -> dict[str, Tensor]:
        grads = self._gradients()
        norms, found_inf = self._norms(grads, self.scaler.unscale_(grads))
        where = grads[0].device
        self.optimizer.update(grads, lr, self._clip(grads, norms).to(where), found_inf.to(where), frozen, decay)
        self.scaler.update(found_inf)
        # a forward that was not finite must not stay in the running statistics; a method's own buffers are its affair
        self.buffers.restore_where(found_inf > 0)
        self._normalize_rows([n for n in self._normalized if n not in frozen], found_inf)
        return {
            "grad_norm": norms[1].norm(),
            "param_norm": norms[0].norm(),
            "skipped": found_inf,
            "grad_norms": norms[1],
        }

    def _clip(self, grads: list[Tensor], norms: Tensor) -> Tensor:
        """Shorten the gradients of each clipping group to optim.clip_norm together (torch.nn.utils.clip_grad_norm_);
        the norms of what they are now."""
        max_norm = self.config.optim.clip_norm
        if not max_norm:
            return norms
        squares = norms[1].new_zeros(self._num_clips).index_add_(0, self._clips, norms[1].square())
        share = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)[self._clips]
        torch._foreach_mul_(grads, list(share.to(grads[0].device).unbind()))
        return torch.stack([norms[0], norms[1] * share])

    def _norms(self, grads: list[Tensor], found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """Norms [2, P] of the whole trained parameters and their gradients, and found_inf agreed by all ranks."""
        params = list(self.optimizer.pieces.values())
        norms = torch.stack([torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))])
        norms = norms.to(self.world.device)
        group, place = self._shard_group()
        if group is None:
            return norms, found_inf
        squares = norms.square()
        if place:  # what every rank of the group holds whole counts once
            squares = torch.where(self._spread > 0, squares, 0.0)
        together = torch.cat([squares.flatten(), found_inf.view(1)])
        dist.all_reduce(together, group=group)
        return together[:-1].view_as(norms).sqrt(), together[-1].clamp(max=1.0)

    @torch.no_grad()
    def _normalize_rows(self, names: Sequence[str], skipped: Tensor) -> None:
        """Rows are whole on one rank here, so this needs no collective. (What is frozen keeps its last bit.)"""
        for name in names:
            rows = self.shards[name].local
            unit = torch.nn.functional.normalize(rows.view(-1, self.shapes[name][1]), dim=1).view_as(rows)
            rows.copy_(torch.where(skipped.to(rows.device) > 0, rows, unit))

    # --- state

    def is_finite(self) -> bool:
        """Whether all weights and running statistics of all ranks are; a host synchronisation and an all-reduce."""
        norms = torch.stack(torch._foreach_norm([s.local for s in self.shards.values()])).to(self.world.device)
        return bool(self.world.sum_(norms.sum() + self.buffers.all.norm()).isfinite())

    def _initialise(self, local: Tensor, name: str, start: int) -> None:
        """Fill `local`, the elements of a parameter from `start` on: functions of (seed, name, index) alone.

        What a checkpoint will bring is not drawn; NaN tells of what it did not.
        """
        if name.startswith(self._loaded):
            local.fill_(torch.nan)
        else:
            source = self._root(name)  # a moving average begins as what it follows
            init, seed = self._initialisers[source], self.config.run.seed
            local.copy_(
                initial_values(init, self.shapes[name], seed, source, start, start + local.numel()).view_as(local)
            )

    def _reset_buffers(self) -> None:
        for _, buffer in self.method.named_buffers():
            buffer.zero_()
        reset_buffers(self.method)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Running statistics become their mean over all ranks; one all-reduce, none where all share them."""
        shared_by = self.config.parallel.sync_bn_group or self.world.size
        if shared_by != self.world.size and self.buffers.statistics.numel():
            dist.all_reduce(self.buffers.statistics)
            self.buffers.statistics /= self.world.size

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A parameter's full fp32 value on every rank; collective where it is spread."""
        shard = self.shards[name]
        group, _ = self._shard_group()
        if group is None or not self._is_spread(name):
            return shard.local.view(shard.shape)
        whole = torch.zeros(shard.shape, device=self.world.device)
        whole.view(-1)[shard.start : shard.stop] = shard.local.view(-1)
        dist.all_reduce(whole, group=group)
        return whole

    def state(self) -> dict[str, Tensor]:
        """The neutral state, by reference. Call `average_buffers` before saving it, and `refresh` after loading into
        it.

        model/ holds weights (`Shard`s) and running statistics, optim/ and scaler/ what updates need, and memory/ what a
        method remembers of past samples and can fill anew (SwAV's queue).
        """
        out: dict[str, Tensor] = {f"model/{n}": s for n, s in self.shards.items()}
        places = {BufferKind.STATISTICS: "model", BufferKind.MEMORY: "memory"}
        for name, buffer in self.method.named_buffers():
            if place := places.get(self.method.buffer_kind(name)):
                out[f"{place}/{name}"] = buffer
        for slot, t in self.optimizer.state.items():
            shard = self.shards[slot.rpartition("/")[0]]
            out[f"optim/{slot}"] = shard.with_local(t) if t.shape == shard.local.shape else t
        return out | self.scaler.state()
