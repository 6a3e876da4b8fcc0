"""DeepSpeed's ZeRO: stage 1 shards optimiser state, 2 gradients too, 3 weights too.

DeepSpeed keeps, reduces and gathers; the update is ours, on this rank's runs of its flat fp32 master copy. To it the
model is fp32 without loss scaling: autocast, the scaler and the agreement to skip are the engine's, as everywhere.
A unit is gathered as a whole (DeepSpeed's "leaf module").
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from seer_scale.methods.base import Method
from seer_scale.models.execution import COMPUTE_DTYPES
from seer_scale.parallel.deepspeed.config import deepspeed_config
from seer_scale.parallel.delegating_optimizer import DelegatingOptimizer, aligned
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.recast_linear import keep_parameters_only
from seer_scale.parallel.shard import Shard
from seer_scale.parallel.units import compute_type, sharded_units

KEPT, RECOMPUTED = -1, -2
"""Users of parameters, besides modules: while there is one, DeepSpeed does not free it."""

deepspeed.utils.logger.setLevel(logging.ERROR)
vars(import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
"""A C++ extension for collectives of inference, built at first use: never needed here."""
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
"""DeepSpeed's gathers and reductions have names of which newer torch says so at every call."""


class _Partition(Tensor):
    ds_numel: int


class _Partitioned(nn.Parameter):
    """What DeepSpeed makes of a parameter, to type checkers: its own attributes, of which nobody else knows."""

    _hp_mapping: Any  # of its stages 1 and 2; the rest are stage 3's
    ds_tensor: _Partition
    ds_numel: int
    ds_shape: torch.Size
    ds_zero_partition_rank: int
    ds_persist: bool
    ds_active_sub_modules: set[int]
    comm_dtype: torch.dtype
    partition: Callable[[], None]
    all_gather_coalesced: Callable[[Sequence[nn.Parameter]], Any]


def _known(p: nn.Parameter) -> _Partitioned:
    return cast(_Partitioned, p)


def _accelerator(device: torch.device) -> CPU_Accelerator | CUDA_Accelerator:
    """What DeepSpeed asks for its device. It would take CUDA wherever there is some, and the GPU of LOCAL_RANK's number
    also where each task sees one GPU alone."""
    if device.type == "cpu":
        return CPU_Accelerator()

    class OneGpu(CUDA_Accelerator):
        def device_name(self, device_index: int | str | None = None) -> str:
            return "cuda" if device_index is None else str(device)

        def set_device(self, device_index: int | str | torch.device) -> None:
            torch.cuda.set_device(device)

    return OneGpu()


class Zero(Engine):
    """Stages 1 and 2: weights are whole on every rank."""

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        os.environ.setdefault("LOCAL_RANK", str(self.world.local_rank))  # DeepSpeed wants it to be there
        deepspeed.accelerator.set_accelerator(_accelerator(self.world.device))
        if not dist.is_initialized():  # one rank, with offload
            backend = "cpu:gloo,cuda:nccl" if self.world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the process group there is
        self.ds_config = deepspeed_config(self.config, self.world.size, sum(s.numel() for s in self.shapes.values()))
        return method

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        self.delegate = DelegatingOptimizer(aligned(p for p in module.parameters() if p.requires_grad))
        with _reduction_by_parameter():
            self.deepspeed, self.zero, *_ = deepspeed.initialize(
                model=module, optimizer=self.delegate, config=self.ds_config, dist_init_required=False
            )
        self._silence()
        self.flat = self._flat()
        return self.deepspeed.module

    def _silence(self) -> None:
        """DeepSpeed's own norms and checks of finiteness wait for the device; ours replace them."""
        self.zero.compute_grad_norm = self.zero.check_grad_overflow = False
        if self.config.parallel.offload:
            self.zero.set_norm_for_param_grad_in_gpu = lambda p: None
            self.zero.update_offload_overflow_tracker_for_param_grad = lambda p: None

    def _flat(self) -> Tensor:
        """This rank's part of the fp32 master copy: one vector, as there is one parameter group."""
        (flat,) = self.zero.single_partition_of_fp32_groups
        return flat

    def _place(self, p: nn.Parameter) -> tuple[int, int, int]:
        """Where this rank's run of `p` begins in it, where in the flat vector, and how long it is."""
        m = _known(p)._hp_mapping
        return (
            (0, 0, 0)
            if m is None
            else (m.lp_fragment_address.start, m.hp_fragment_address.start, m.hp_fragment_address.numel)
        )

    def _shards(self) -> dict[str, Shard]:
        self.places = {n: self._place(p) for n, p in self._trained()}
        flat = self.flat.detach()
        runs = {n: Shard(flat[at : at + k], first, self.shapes[n]) for n, (first, at, k) in self.places.items()}
        runs |= {n: self._average_shard(n) for n in self.averages}
        return {n: runs[n] for n in self.shapes}

    def _average_shard(self, name: str) -> Shard:
        """Weights are whole here, so moving averages are, too."""
        return Shard.of(self.method.get_parameter(name).detach())

    def _sources(self) -> list[Tensor]:
        return [self.method.get_parameter(source).detach() for source in self.averages.values()]

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        return dist.group.WORLD, self.world.rank

    def _is_spread(self, name: str) -> bool:
        return name not in self.averages

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield
        self.deepspeed.set_gradient_accumulation_boundary(True)

    def _run(self, entrance: str, *args: Any, **kwargs: Any) -> Any:
        self.zero.clear_backward_seen_flag()
        return super()._run(entrance, *args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed._backward_prologue()
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        grad = self.flat.grad
        if grad is None:
            raise RuntimeError("DeepSpeed has no gradients: backward has not run.")
        return [grad[at : at + k] for _, at, k in self.places.values()]

    def _step_within(self, apply: Callable[[], None]) -> None:
        self.delegate.apply = apply
        self.zero.step()

    def _drop_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)

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
        lengths = together.sqrt().clamp(min=1e-12).to(self.flat.device).split([len(s) for s in squares])
        for name, length in zip(names, lengths):
            local = self.shards[name].local
            local.copy_(torch.where(skipped.to(local.device) > 0, local, local / length[rows[name]]))

    @torch.no_grad()
    def refresh(self) -> None:
        self.zero.update_lp_params()

    def close(self) -> None:
        self.deepspeed.destroy()
        FWD_MODULE_STACK[:] = [m for m in FWD_MODULE_STACK if m is not self.method]


class Zero1(Zero):
    name = "zero1"


class Zero2(Zero):
    name = "zero2"


class Zero3(Zero):
    """Weights are spread too, and gathered a unit at a time; matrices in the compute type, prototypes in fp32."""

    name = "zero3"

    def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
        self.units = sharded_units(method, self.config)  # while parameters still have their sizes
        keep_parameters_only(method)
        return super().shard_on_meta(method)

    @torch.no_grad()
    def materialise(self) -> None:
        """A parameter at a time: no rank ever holds more of the model than one of them and its own runs."""
        init = deepspeed.zero.Init(config_dict_or_path=self.ds_config, dtype=torch.float32)
        for prefix, module in self.method.named_modules():
            for name, p in list(module.named_parameters(recurse=False)):
                p = nn.Parameter(torch.empty_like(p, device=self.world.device), requires_grad=p.requires_grad)
                setattr(module, name, p)
                init._convert_to_deepspeed_param(p)
                _known(p).partition()  # without a broadcast: every rank fills its own run
                run, first = self._run_of(p)
                self._initialise(run, f"{prefix}.{name}" if prefix else name, first)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=self.world.device))
        self._reset_buffers()

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        for name, unit in self.units.items():
            vars(unit)["_z3_leaf"] = True
            dtype = COMPUTE_DTYPES[compute_type(name, self.method, self.config)]
            for p in map(_known, unit.parameters()):
                if len(p.ds_shape) > 1:
                    p.comm_dtype = dtype
        module = super().wrap_materialised(module)
        self.whole_vectors = [_known(p) for n, p in self.method.named_parameters() if n in self.vectors]
        for p in self.whole_vectors:
            p.ds_persist = True
        if not self.ds_config["zero_optimization"]["stage3_prefetch_bucket_size"]:
            self._forget_order()
        return module

    def _forget_order(self) -> None:
        """DeepSpeed records the order of modules to prefetch, and at each forward out of that order starts anew, with
        collectives and waits of its own; not to prefetch is to need no order."""
        order = self.zero.parameter_offload.get_param_coordinator()
        if not order.is_invalid_trace():
            order._invalidate_trace()
        order.reset_step = lambda: None

    @contextmanager
    def recomputing(self, units: list[nn.Module]) -> Iterator[None]:
        """What the second run gathers stays for backward, which would gather it once more."""
        users = [_known(p).ds_active_sub_modules for unit in units for p in unit.parameters()]
        for u in users:
            u.add(RECOMPUTED)
        try:
            yield
        finally:
            for u in users:
                u.discard(RECOMPUTED)

    def _step_within(self, apply: Callable[[], None]) -> None:
        super()._step_within(apply)
        if not self.averages:
            self._gather_vectors()

    def _average(self, skipped: Tensor, momentum: float) -> None:
        super()._average(skipped, momentum)
        self._gather_vectors()

    def _is_spread(self, name: str) -> bool:
        return True

    def _average_shard(self, name: str) -> Shard:
        run, first = self._run_of(self.method.get_parameter(name))
        return Shard(run, first, self.shapes[name])

    def _run_of(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """What this rank has of a parameter, without padding, and where that begins in it."""
        p = _known(parameter)
        first = min(p.ds_tensor.ds_numel * self.world.rank, p.ds_numel)
        return p.ds_tensor.data[: p.ds_numel - first], first

    def _sources(self) -> list[Tensor]:
        return Engine._sources(self)

    def _gather_vectors(self) -> None:
        """In one all-gather; DeepSpeed would take one each."""
        if not self.whole_vectors:
            return
        self.whole_vectors[0].all_gather_coalesced(self.whole_vectors).wait()
        for p in self.whole_vectors:
            p.ds_active_sub_modules.add(KEPT)

    def _silence(self) -> None:
        self.zero._get_norm_groups = lambda: [torch.zeros(())]
        if self.config.parallel.offload:
            self.zero._constant_buffered_norm2 = lambda *_, **__: None

    def _flat(self) -> Tensor:
        """On the device, the partition itself is the master copy: both are fp32, and DeepSpeed's clone is given
        back."""
        (flat,), (stored,) = self.zero.fp32_partitioned_groups_flat, self.zero.fp16_partitioned_groups_flat
        if not self.config.parallel.offload:
            flat.data = stored.data

            def lend(_: int) -> None:  # else all gradients are copied to where they are already in order
                flat.grad, self.zero.averaged_gradients[0] = self.zero.grad_partitions_flat_buffer, None

            self.zero._prepare_fp32_grad_for_sub_group = lend
        return flat

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        p = _known(parameter)
        size = p.ds_tensor.ds_numel
        first = min(size * p.ds_zero_partition_rank, p.ds_numel)
        _, at, _ = self.zero.grad_position[self.zero.get_param_id(p)]
        return first, at, min(p.ds_numel - first, size)

    @torch.no_grad()
    def refresh(self) -> None:
        self.zero._partition_all_parameters()
        self.zero._reassign_or_swap_out_partitioned_parameters(0)
        self._gather_vectors()


@contextmanager
def _reduction_by_parameter() -> Iterator[None]:
    """Units are gathered whole, but their gradients are reduced by hooks of the parameters: DeepSpeed reduces a leaf
    module's in a backward hook of it, which never fires for lists of tensors."""
    own = DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks

    def create(self: DeepSpeedZeroOptimizer_Stage3) -> None:
        for p in self.module.parameters():
            if hasattr(p, "ds_z3_leaf_module"):
                del p.ds_z3_leaf_module
        own(self)

    DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks = create
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks = own
