"""DeepSpeed's ZeRO: stage 1 shards optimiser state, 2 gradients too, 3 weights too.

DeepSpeed keeps, reduces and gathers; the update is ours, on this rank's runs of its flat fp32 master copy. To it the
model is fp32 without loss scaling: autocast, the scaler and the agreement to skip are the engine's, as everywhere.
A unit is gathered as a whole. All that is DeepSpeed's is behind `private`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel.deepspeed import private
from seer_scale.parallel.deepspeed.config import deepspeed_config
from seer_scale.parallel.delegating_optimizer import DelegatingOptimizer, aligned
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.recast_linear import keep_parameters_only
from seer_scale.parallel.shard import Shard
from seer_scale.parallel.units import compute_type, sharded_units


class Zero(Engine):
    """Stages 1 and 2: weights are whole on every rank."""

    stage_of: type[private.Stage] = private.Stage12
    stage: private.Stage

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        private.join(self.world)
        trained = sum(s.numel() for n, s in self.shapes.items() if n not in self.averages)  # what gradients are of
        self.ds_config = deepspeed_config(self.config, self.world.size, trained)
        return method

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        self.delegate = DelegatingOptimizer(aligned(p for p in module.parameters() if p.requires_grad))
        offload = self.config.parallel.offload
        self.stage = self.stage_of(module, self.delegate, self.ds_config, offload=offload)
        return self.stage.module

    def _shards(self) -> dict[str, Shard]:
        self.places = {n: self.stage.place(p) for n, p in self._trained()}
        flat = self.stage.flat.detach()
        runs = {
            n: Shard(flat[at.in_flat : at.in_flat + at.numel], at.start, self.shapes[n])
            for n, at in self.places.items()
        }
        runs |= {n: self._average_shard(n) for n in self.averages}
        return {n: runs[n] for n in self.shapes}

    def _average_shard(self, name: str) -> Shard:
        """Weights are whole here, so moving averages are, too."""
        return Shard.of(self.method.get_parameter(name).detach())

    def _sources(self, names: Sequence[str]) -> list[Tensor]:
        return [self.method.get_parameter(self.averages[name]).detach() for name in names]

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        return dist.group.WORLD, self.world.rank

    def _is_spread(self, name: str) -> bool:
        return name not in self.averages

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        self.stage.set_boundary(last)
        yield
        self.stage.set_boundary(True)

    def _run(self, entrance: str, *args: Any, **kwargs: Any) -> Any:
        self.stage.before_forward()
        return super()._run(entrance, *args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        self.stage.backward(loss)

    def _gradients(self) -> list[Tensor]:
        grad = self.stage.flat.grad
        if grad is None:
            raise RuntimeError("DeepSpeed has no gradients: backward has not run.")
        return [grad[at.in_flat : at.in_flat + at.numel] for at in self.places.values()]

    def _step_within(self, apply: Callable[[], None]) -> None:
        self.delegate.apply = apply
        self.stage.step()

    def _drop_gradients(self) -> None:
        self.stage.drop_gradients()

    @torch.no_grad()
    def _normalize_rows(self, names: Sequence[str], skipped: Tensor) -> None:
        """A row may lie on two ranks: one all-reduce of the rows' partial squares."""
        if not names:
            return
        rows, squares = {}, []
        for name in names:
            run, (num, width) = self.shards[name], self.shapes[name]
            rows[name] = torch.arange(run.start, run.stop, device=run.local.device) // width
            squares.append(run.local.new_zeros(num).index_add_(0, rows[name], run.local.square()))
        together = torch.cat(squares).to(self.world.device)
        dist.all_reduce(together)
        lengths = together.sqrt().clamp(min=1e-12).to(self.stage.flat.device).split([len(s) for s in squares])
        for name, length in zip(names, lengths):
            local = self.shards[name].local
            local.copy_(torch.where(skipped.to(local.device) > 0, local, local / length[rows[name]]))

    @torch.no_grad()
    def refresh(self) -> None:
        self.stage.refresh()

    def close(self) -> None:
        self.stage.close(self.method)


class Zero1(Zero):
    """Optimiser state is spread. `config.from_recipe` sets DeepSpeed's stage by the engine's name."""

    name = "zero1"


class Zero2(Zero):
    """Gradients are spread, too."""

    name = "zero2"


class Zero3(Zero):
    """Weights are spread too, and gathered a unit at a time; matrices in the compute type, prototypes in fp32."""

    name = "zero3"
    stage_of = private.Stage3
    stage: private.Stage3

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        self.units = sharded_units(method, self.config)  # while parameters still have their sizes
        keep_parameters_only(method)
        return super().shard_on_meta(method)

    @torch.no_grad()
    def materialise(self) -> None:
        """A parameter at a time: no rank ever holds more of the model than one of them and its own runs."""
        partition = private.Partitioner(self.ds_config)
        for prefix, module in self.method.named_modules():
            for name, p in list(module.named_parameters(recurse=False)):
                p = nn.Parameter(torch.empty_like(p, device=self.world.device), requires_grad=p.requires_grad)
                setattr(module, name, p)
                partition(p)
                run, first = private.run_of(p, self.world.rank)
                self._initialise(run, f"{prefix}.{name}" if prefix else name, first)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=self.world.device))
        self._reset_buffers()

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        for name, unit in self.units.items():
            private.gather_whole(unit, COMPUTE_DTYPES[compute_type(name, self.method, self.config)])
        module = super().wrap_materialised(module)
        self.whole_vectors = [p for n, p in self.method.named_parameters() if n in self.vectors]
        private.persist(self.whole_vectors)
        if not self.ds_config["zero_optimization"]["stage3_prefetch_bucket_size"]:
            self.stage.forget_order()
        return module

    def recomputing(self, units: list[nn.Module]) -> AbstractContextManager[None]:
        """What the second run gathers stays for backward, which would gather it once more."""
        return private.kept_for_backward(units)

    def _step_within(self, apply: Callable[[], None]) -> None:
        super()._step_within(apply)
        if not self.averages:
            private.gather(self.whole_vectors)

    def _average(self, skipped: Tensor, samples_seen: int) -> None:
        super()._average(skipped, samples_seen)
        private.gather(self.whole_vectors)

    def _is_spread(self, name: str) -> bool:
        return True

    def _average_shard(self, name: str) -> Shard:
        run, first = private.run_of(self.method.get_parameter(name), self.world.rank)
        return Shard(run, first, self.shapes[name])

    def _sources(self, names: Sequence[str]) -> list[Tensor]:
        return Engine._sources(self, names)

    @torch.no_grad()
    def refresh(self) -> None:
        super().refresh()
        private.gather(self.whole_vectors)
