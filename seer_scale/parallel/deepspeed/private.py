"""The only module that touches DeepSpeed's inner parts: DEEPSPEED_PARTS lists them, `Stage12` and `Stage3` make of
them what an engine needs.

DeepSpeed documents few of them, so any version may move one; `moved_parts(DEEPSPEED_PARTS)` names it. Modules are
imported, and parts looked up where they are used, so that DEEPSPEED_PARTS can be read whatever has moved.
"""

from __future__ import annotations

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seer_scale.parallel.deepspeed import as_found_here

with as_found_here():
    import deepspeed
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3

from seer_scale.distributed import World
from seer_scale.parallel.delegating_optimizer import DelegatingOptimizer
from seer_scale.parallel.private_parts import PrivatePart

RUNTIME, ZERO_MODULE = "deepspeed.runtime", "deepspeed.runtime.zero"
_STAGE12 = f"{ZERO_MODULE}.stage_1_and_2", "DeepSpeedZeroOptimizer"
_STAGE3 = f"{ZERO_MODULE}.stage3", "DeepSpeedZeroOptimizer_Stage3"
_ENGINE = f"{RUNTIME}.engine", "DeepSpeedEngine"
_INIT = f"{ZERO_MODULE}.partition_parameters", "Init._convert_to_deepspeed_param"
_ORDER = f"{ZERO_MODULE}.partitioned_param_coordinator", "PartitionedParameterCoordinator"
_GATHER = f"{ZERO_MODULE}.partition_parameters", "AllGatherCoalescedHandle"
_SCATTER = f"{RUNTIME}.comm.coalesced_collectives"
_FRAGMENT = "deepspeed.utils.tensor_fragment"


def _part(where: tuple[str, str], name: str, used_for: str, takes: tuple[str, ...] | None = None) -> PrivatePart:
    return PrivatePart(where[0], f"{where[1]}.{name}", used_for, takes)


DEEPSPEED_PARTS = (
    # all stages
    PrivatePart("deepspeed.comm.torch", "build_shm_op", "starting without a C++ extension", ()),
    PrivatePart("deepspeed.accelerator.real_accelerator", "set_accelerator", "the device", ("accel_obj",)),
    PrivatePart("deepspeed.accelerator.cuda_accelerator", "CUDA_Accelerator.device_name", "one GPU", ("device_index",)),
    PrivatePart("deepspeed.accelerator.cuda_accelerator", "CUDA_Accelerator.set_device", "one GPU", ("device_index",)),
    PrivatePart("deepspeed.comm.comm", "cdb", "leaving process groups and joining others"),
    PrivatePart(f"{ZERO_MODULE}.parameter_offload", "FWD_MODULE_STACK", "letting go of a method that was trained"),
    _part(_ENGINE, "set_gradient_accumulation_boundary", "micro-batches", ("is_boundary",)),
    _part(_ENGINE, "_backward_prologue", "backward", ()),
    _part(_ENGINE, "backward", "backward", ("loss", "retain_graph", "scale_wrt_gas")),
    _part(_ENGINE, "destroy", "letting go of the engine", ()),
    # stages 1 and 2
    *(_part(_STAGE12, name, use, takes) for name, use, takes in (
        ("single_partition_of_fp32_groups", "a rank's part of the master copy", None),
        ("clear_backward_seen_flag", "a forward without backward", ()),
        ("step", "the update", ()),
        ("zero_grad", "dropping gradients", ("set_to_none",)),
        ("update_lp_params", "bringing loaded weights to where forward reads", ()),
        ("compute_grad_norm", "having norms of our own", None),
        ("check_grad_overflow", "having checks of our own", None),
        ("set_norm_for_param_grad_in_gpu", "having norms of our own, with offload", ("param",)),
        ("update_offload_overflow_tracker_for_param_grad", "having checks of our own, with offload", ("param",)),
        ("_hp_mapping", "where a parameter lies in the master copy", None),
    )),
    PrivatePart(_FRAGMENT, "tensor_fragment.lp_fragment_address", "where a rank's run begins in a parameter"),
    PrivatePart(_FRAGMENT, "tensor_fragment.hp_fragment_address", "where a rank's run begins in the master copy"),
    PrivatePart(_FRAGMENT, "fragment_address.start", "where a rank's run begins"),
    PrivatePart(_FRAGMENT, "fragment_address.numel", "how long a rank's run is"),
    # stage 3
    PrivatePart("deepspeed.utils.z3_leaf_module", "set_z3_leaf_module", "gathering units whole", ("model", "flag")),
    PrivatePart(f"{RUNTIME}.torch_autocast", "PARAM_COMM_DTYPE_ATTR_NAME", "gathering in the compute type"),
    PrivatePart(f"{ZERO_MODULE}.parameter_offload", "ds_z3_leaf_module", "reducing gradients a parameter at a time"),
    PrivatePart(_INIT[0], _INIT[1], "sharding a parameter as it is made", ("param",)),
    *(_part(_INIT, name, use, takes) for name, use, takes in (
        ("ds_tensor", "a rank's run of a parameter", None),
        ("ds_numel", "the size of a sharded parameter", None),
        ("ds_shape", "the shape of a sharded parameter", None),
        ("ds_zero_partition_rank", "where a rank's run begins", None),
        ("ds_persist", "vectors that stay whole", None),
        ("ds_active_sub_modules", "keeping what was gathered", None),
        ("ds_status", "plans of many ranks", None),
        ("partition", "sharding a parameter", ()),
        ("all_gather_coalesced", "gathering vectors at once", ("params",)),
    )),
    *(_part(_STAGE3, name, use, takes) for name, use, takes in (
        ("create_reduce_and_remove_grad_hooks", "reducing gradients a parameter at a time", ()),
        ("clear_backward_seen_flag", "a forward without backward", ()),
        ("step", "the update", ()),
        ("zero_grad", "dropping gradients", ("set_to_none",)),
        ("parameter_offload", "the order of gathers", None),
        ("_get_norm_groups", "having norms of our own", ()),
        ("_constant_buffered_norm2", "having norms of our own, with offload", ("input",)),
        ("fp32_partitioned_groups_flat", "a rank's part of the master copy", None),
        ("fp16_partitioned_groups_flat", "a rank's part of the weights", None),
        ("averaged_gradients", "gradients that are not copied", None),
        ("grad_partitions_flat_buffer", "a rank's part of the gradients", None),
        ("_prepare_fp32_grad_for_sub_group", "gradients that are not copied", ("sub_group_id",)),
        ("grad_position", "where a parameter lies in the master copy", None),
        ("get_param_id", "where a parameter lies in the master copy", ("param",)),
        ("_partition_all_parameters", "bringing loaded weights to where forward reads", ()),
        ("_reassign_or_swap_out_partitioned_parameters", "the same", ("sub_group_id",)),
    )),
    PrivatePart(
        f"{ZERO_MODULE}.parameter_offload", "DeepSpeedZeRoOffload.get_param_coordinator", "the order of gathers", ()
    ),
    *(_part(_ORDER, name, "needing no order of gathers", ()) for name in (
        "is_invalid_trace", "_invalidate_trace", "reset_step",
    )),
    # stage 3, planned
    PrivatePart(_GATHER[0], "ZeroParamStatus.AVAILABLE", "plans of many ranks"),
    _part(_GATHER, "wait", "plans of many ranks", ("handle_dependency",)),
    *(_part(_GATHER, name, "plans of many ranks") for name in (
        "allgather_handle", "params", "partitions", "complete", "data_buffer",
    )),
    PrivatePart(_SCATTER, "reduce_scatter_coalesced", "plans of many ranks", ("tensors", "group")),
    PrivatePart(_SCATTER, "_torch_reduce_scatter_fn", "the same", ("input_tensor", "output_tensor", "group")),
)  # fmt: skip
"""Every inner part of DeepSpeed's that is touched below."""

_comm, _leaf_module = map(import_module, ("deepspeed.comm.torch", "deepspeed.utils.z3_leaf_module"))
"""By import_module: as attributes of their packages, these names are torch itself and a function."""

_KEPT, _RECOMPUTED = -1, -2
"""Users of parameters, besides modules: while there is one, DeepSpeed does not free it."""


class _Partition(Tensor):
    ds_numel: int


class _Parameter(nn.Parameter):
    """What DeepSpeed makes of a parameter, to type checkers."""

    _hp_mapping: Any  # of its stages 1 and 2; the rest are stage 3's
    ds_tensor: _Partition
    ds_numel: int
    ds_shape: torch.Size
    ds_zero_partition_rank: int
    ds_persist: bool
    ds_active_sub_modules: set[int]
    partition: Callable[[], None]
    all_gather_coalesced: Callable[[Sequence[nn.Parameter]], Any]


def _known(p: nn.Parameter) -> _Parameter:
    return cast(_Parameter, p)


class Place(NamedTuple):
    """Where a rank's run of a parameter begins in it, where in the flat master copy, and how long it is."""

    start: int
    in_flat: int
    numel: int


def accelerator_for(device: torch.device) -> CPU_Accelerator | CUDA_Accelerator:
    """What DeepSpeed asks for its device. It would take CUDA wherever there is some, and the GPU of LOCAL_RANK's number
    also where each task sees one GPU alone."""
    if device.type == "cpu":
        return CPU_Accelerator()
    if device.type != "cuda":
        return _OtherDevice(device)

    class OneGpu(CUDA_Accelerator):
        def device_name(self, device_index: int | str | None = None) -> str:
            return "cuda" if device_index is None else str(device)

        def set_device(self, device_index: int | str | torch.device) -> None:
            torch.cuda.set_device(device)

    return OneGpu()


class _OtherDevice(CPU_Accelerator):
    """A device that torch knows by its module, with streams of its own."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device, self._module = device, torch.get_device_module(device)
        self._communication_backend_name = "fake"

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return self._device.type if device_index is None else str(self._device)

    def current_device_name(self) -> str:
        return str(self._device)

    def current_device(self) -> int:
        return self._device.index

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device.type

    def synchronize(self, device_index: int | None = None) -> None:
        self._module.synchronize()

    def Stream(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - DeepSpeed's name
        return self._module.Stream(*args, **kwargs)

    def Event(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - DeepSpeed's name
        return self._module.Event(*args, **kwargs)

    def stream(self, stream: Any) -> Any:
        return self._module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return self._module.current_stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return self._module.current_stream()


def join(world: World) -> None:
    """Let DeepSpeed take this rank's device and the process group there is; on one rank that has none, one of it."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # a C++ extension for collectives of inference, built at first use: never needed here
    vars(_comm)["build_shm_op"] = lambda: None
    # its gathers and reductions have names of which newer torch says so at every call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed wants it to be there
    deepspeed.accelerator.set_accelerator(accelerator_for(world.device))
    if not dist.is_initialized():  # one rank, with offload
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Destroy all process groups, those that DeepSpeed remembers among them; `join` may follow."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
    elif dist.is_initialized():
        dist.destroy_process_group()


class Stage(ABC):
    """DeepSpeed's engine around a module, and its optimiser.

    flat: this rank's part of the fp32 master copy, one vector, as there is one parameter group; flat.grad, between
    backward and `step`, has its averaged gradients.
    """

    flat: Tensor

    def __init__(self, module: nn.Module, optimizer: DelegatingOptimizer, config: dict[str, Any], *, offload: bool):
        with _reduction_by_parameter():
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._silence(offload)
        self.flat = self._flat(offload)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def set_boundary(self, is_boundary: bool) -> None:
        """Whether the next backward is the last before an update."""
        self._engine.set_gradient_accumulation_boundary(is_boundary)

    def before_forward(self) -> None:
        """There may have been a forward without backward."""
        self._optimizer.clear_backward_seen_flag()

    def backward(self, loss: Tensor) -> None:
        self._engine._backward_prologue()
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """The delegating optimiser's step, on averaged gradients; then weights are brought to where forward reads."""
        self._optimizer.step()

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def close(self, method: nn.Module) -> None:
        self._engine.destroy()
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [m for m in stack if m is not method]

    @abstractmethod
    def _silence(self, offload: bool) -> None:
        """DeepSpeed's own norms and checks of finiteness wait for the device; ours replace them."""

    @abstractmethod
    def _flat(self, offload: bool) -> Tensor:
        """Find, or make, `flat`."""

    @abstractmethod
    def place(self, p: nn.Parameter) -> Place:
        """Of this rank's run of a parameter."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring what was written into `flat` to where forward reads; collective."""


class Stage12(Stage):
    """Weights are whole on every rank."""

    def _silence(self, offload: bool) -> None:
        self._optimizer.compute_grad_norm = self._optimizer.check_grad_overflow = False
        if offload:
            self._optimizer.set_norm_for_param_grad_in_gpu = lambda p: None
            self._optimizer.update_offload_overflow_tracker_for_param_grad = lambda p: None

    def _flat(self, offload: bool) -> Tensor:
        (flat,) = self._optimizer.single_partition_of_fp32_groups
        return flat

    def place(self, p: nn.Parameter) -> Place:
        mapping = _known(p)._hp_mapping
        if mapping is None:
            return Place(0, 0, 0)
        flat = mapping.hp_fragment_address
        return Place(mapping.lp_fragment_address.start, flat.start, flat.numel)

    def refresh(self) -> None:
        self._optimizer.update_lp_params()


class Stage3(Stage):
    """Weights are spread, too."""

    def _silence(self, offload: bool) -> None:
        self._optimizer._get_norm_groups = lambda: [torch.tensor(0.0)]
        if offload:
            self._optimizer._constant_buffered_norm2 = lambda *_, **__: None

    def _flat(self, offload: bool) -> Tensor:
        """On the device, the partition itself is the master copy: both are fp32, and DeepSpeed's clone is given
        back."""
        optimizer = self._optimizer
        (flat,), (stored,) = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
        if not offload:
            flat.data = stored.data

            def lend(_: int) -> None:  # else all gradients are copied to where they are already in order
                flat.grad, optimizer.averaged_gradients[0] = optimizer.grad_partitions_flat_buffer, None

            optimizer._prepare_fp32_grad_for_sub_group = lend
        return flat

    def place(self, p: nn.Parameter) -> Place:
        known = _known(p)
        size = known.ds_tensor.ds_numel
        start = min(size * known.ds_zero_partition_rank, known.ds_numel)
        _, in_flat, _ = self._optimizer.grad_position[self._optimizer.get_param_id(p)]
        return Place(start, in_flat, min(known.ds_numel - start, size))

    def refresh(self) -> None:
        self._optimizer._partition_all_parameters()
        self._optimizer._reassign_or_swap_out_partitioned_parameters(0)

    def forget_order(self) -> None:
        """DeepSpeed records the order of modules to prefetch, and at each forward out of that order starts anew, with
        collectives and waits of its own; not to prefetch is to need no order."""
        order = self._optimizer.parameter_offload.get_param_coordinator()
        if not order.is_invalid_trace():
            order._invalidate_trace()
        order.reset_step = lambda: None


class Partitioner:
    """Shards parameters as they are made."""

    def __init__(self, config: dict[str, Any]):
        self._init = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32)

    def __call__(self, p: nn.Parameter) -> None:
        """Without a broadcast: every rank fills its own run."""
        self._init._convert_to_deepspeed_param(p)
        _known(p).partition()


def run_of(p: nn.Parameter, rank: int) -> tuple[Tensor, int]:
    """What this rank has of a sharded parameter, without padding, and where that begins in it."""
    known = _known(p)
    start = min(known.ds_tensor.ds_numel * rank, known.ds_numel)
    return known.ds_tensor.data[: known.ds_numel - start], start


def gather_whole(unit: nn.Module, dtype: torch.dtype) -> None:
    """All of a unit is gathered at once (DeepSpeed's "leaf module"), its matrices as `dtype`; before DeepSpeed's engine
    is made."""
    _leaf_module.set_z3_leaf_module(unit, True)
    for p in map(_known, unit.parameters()):
        if len(p.ds_shape) > 1:
            setattr(p, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, dtype)


def persist(params: Sequence[nn.Parameter]) -> None:
    """These are never freed."""
    for p in map(_known, params):
        p.ds_persist = True


def gather(params: Sequence[nn.Parameter]) -> None:
    """Gather these in one collective, where DeepSpeed would take one each, and keep them."""
    known = [_known(p) for p in params]
    if known:
        known[0].all_gather_coalesced(known).wait()
    for p in known:
        p.ds_active_sub_modules.add(_KEPT)


@contextmanager
def kept_for_backward(units: Sequence[nn.Module]) -> Iterator[None]:
    """What is gathered of these units within stays gathered."""
    users = [_known(p).ds_active_sub_modules for unit in units for p in unit.parameters()]
    for u in users:
        u.add(_RECOMPUTED)
    try:
        yield
    finally:
        for u in users:
            u.discard(_RECOMPUTED)


@contextmanager
def _reduction_by_parameter() -> Iterator[None]:
    """Units are gathered whole, but their gradients are reduced by hooks of the parameters: DeepSpeed reduces a leaf
    module's in a backward hook of it, which never fires for lists of tensors."""
    optimizer = stage3.DeepSpeedZeroOptimizer_Stage3
    own = optimizer.create_reduce_and_remove_grad_hooks

    def create(self: Any) -> None:
        for p in self.module.parameters():
            if hasattr(p, "ds_z3_leaf_module"):
                del p.ds_z3_leaf_module
        own(self)

    optimizer.create_reduce_and_remove_grad_hooks = create
    try:
        yield
    finally:
        optimizer.create_reduce_and_remove_grad_hooks = own


# ------------------------------------------------------------------------------------------------ plans


@contextmanager
def pieces_at_once() -> Iterator[None]:
    """For tensors without values: stage 3 takes every parameter apart and puts it together a rank's piece at a time, in
    Python. Inside, all pieces are taken at once: the same operations, collectives and memory, without half a million
    views for 512 ranks."""
    gathered, handle = partition_parameters.ZeroParamStatus.AVAILABLE, partition_parameters.AllGatherCoalescedHandle
    with (
        mock.patch.object(handle, "wait", lambda *args, **kwargs: _put_together(gathered, *args, **kwargs)),
        mock.patch.object(stage3, "reduce_scatter_coalesced", _reduce_scatter),
    ):
        yield


def _put_together(gathered: Any, handle: Any, handle_dependency: bool = True) -> None:
    if handle.complete:
        return
    handle.allgather_handle.wait()
    for p in handle.params:
        pieces = handle.partitions[0].as_strided((p.ds_numel,), (1,), 0)  # as many elements, without their padding
        p.data = torch.cat([pieces]).view(p.ds_shape).to(p.ds_tensor.dtype)
        p.ds_status = gathered
    handle.complete = True
    if not handle_dependency:
        handle.data_buffer.append(handle.partitions)


@torch.no_grad()
def _reduce_scatter(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    num, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [-(-t.numel() // num) for t in tensors]
    lengths = [[min(max(t.numel() - at * n, 0), n) for t, n in zip(tensors, sizes)] for at in range(num)]
    if len(tensors) == 1 and sizes[0] * num == tensors[0].numel():
        flat = tensors[0].view(-1)
    else:
        padding = [tensors[0].new_empty(n - own) for row in lengths for n, own in zip(sizes, row) if own < n]
        flat = torch.cat([t.view(-1) for t in tensors] + padding)
    flat.div_(num)
    piece = flat.narrow(0, rank * sum(sizes), sum(sizes))
    coalesced_collectives._torch_reduce_scatter_fn(flat, piece, group=group)
    starts = [0, *accumulate(sizes)]
    return [piece.narrow(0, start, own) for start, own in zip(starts, lengths[rank])]
