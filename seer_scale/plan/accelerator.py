"""An accelerator that no driver is needed for: tensors without values on a device of its own, ranks without peers.

torch's PrivateUse1 key is a backend whose device guard, streams and kernels are written in Python; under FakeTensorMode
its tensors have shapes, types and a device and no memory. So the update of a rank of 512 runs on a laptop by the paths
a GPU takes: streams and events, autocast, the kernels of synchronised BatchNorm, a process group of the real size whose
collectives return at once. What a process registers here stays for its life.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.parallel import leave_groups
from seer_scale.plan.fakes import FastFakeTensorMode

GPU = "gpu"
"""What torch calls the device here."""
AUTOCAST = "AutocastPrivateUse1"
CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
HALF = (
    *("conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "mv", "bmm", "addmm", "addbmm", "baddbmm"),
    *("einsum", "scaled_dot_product_attention"),
)
SINGLE = (
    *("log_softmax.int", "softmax.int", "exp", "log", "pow.Tensor_Scalar", "rsqrt", "reciprocal", "sum"),
    *("sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim", "prod", "cumsum", "softplus", "layer_norm", "group_norm"),
    *("cosine_similarity", "mse_loss", "nll_loss", "l1_loss", "binary_cross_entropy_with_logits"),
)
"""What CUDA's autocast does in half and in single precision (aten/src/ATen/autocast_mode.h), as far as methods and
backbones use it."""


class Listener(Protocol):
    """Who is told of what streams do."""

    def waits(self, stream: Stream, other: Stream, mark: int) -> None:
        """What is given to `stream` from now on begins after the first `mark` things given to `other`."""

    def synchronises(self, what: str) -> None:
        """The host waits for the device."""

    def asks(self, call: str) -> NoReturn:
        """The host asks by `call` for values, which there are not."""


class _Nobody:
    def waits(self, stream: Stream, other: Stream, mark: int) -> None:
        pass

    def synchronises(self, what: str) -> None:
        pass

    def asks(self, call: str) -> NoReturn:
        raise RuntimeError(f"{call} asks for values, which no tensor of a plan has.")


class Stream:
    """A queue of the device; `given` counts what was put into it."""

    def __init__(self, *_: object, **__: object) -> None:
        self.given = 0

    def wait_stream(self, other: Stream) -> None:
        _state.listener.waits(self, other, other.given)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _state.listener.synchronises("Stream.synchronize")

    def query(self) -> bool:
        return True


class Event:
    """A place in a stream."""

    def __init__(self, *_: object, **__: object) -> None:
        self._at: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _state.stream
        self._at = stream, stream.given

    def wait(self, stream: Stream | None = None) -> None:
        if self._at:
            _state.listener.waits(stream or _state.stream, *self._at)

    def synchronize(self) -> None:
        _state.listener.synchronises("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        _state.listener.asks("Event.elapsed_time()")

    def query(self) -> bool:
        return True


@dataclass
class _State:
    """Of this process: which stream work is given to, who listens, how values are left out, and autocast's cache."""

    stream: Stream
    listener: Listener
    mode: FakeTensorMode | None = None
    casts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    libraries: list[torch.library.Library] = field(default_factory=list)


_state = _State(Stream(), _Nobody())


class _DeviceModule:
    """What torch asks of `torch.gpu`, as of torch.cuda."""

    def __init__(self) -> None:
        self.Stream, self.Event = Stream, Event

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def current_stream(self, device: object = None) -> Stream:
        return _state.stream

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: object = None) -> None:
        _state.listener.synchronises("synchronize")

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before = _state.stream
        _state.stream = stream or before
        try:
            yield
        finally:
            _state.stream = before

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield


# ------------------------------------------------------------------------------------------------ kernels


def _valueless(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What is made outside of the mode has no values either."""

    def kernel(*sizes: Any, dtype: Any = None, **_: Any) -> Tensor:
        if _state.mode is None:
            raise RuntimeError(f"A tensor on {GPU} is made outside of a plan.")
        with _state.mode:
            return make(*sizes, dtype=dtype, device=GPU)

    return kernel


def _channel_sums(*_: Any, like: Tensor, num: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape[-1]) for _ in range(num))


KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, eps: tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2)),
    "batch_norm_elemt": lambda x, weight, bias, mean, invstd, eps: torch.empty_like(x),
    "batch_norm_gather_stats_with_counts": lambda x, mean, *rest: _channel_sums(like=mean, num=2),
    "batch_norm_backward_reduce": lambda dy, x, mean, *rest: _channel_sums(like=mean, num=4),
    "batch_norm_backward_elemt": lambda dy, x, *rest: torch.empty_like(x),
    "_fused_sgd_": lambda *args, **kwargs: None,
    "_fused_sgd_.tensor_lr": lambda *args, **kwargs: None,
    "_fused_adamw_": lambda *args, **kwargs: None,
    "_amp_foreach_non_finite_check_and_unscale_": lambda *args, **kwargs: None,
    "_amp_update_scale_": lambda scale, *args, **kwargs: scale,
}
"""Shapes of what torch's own fakes do not cover, or not in every version."""


def _autocasting(name: str, to: Callable[[], torch.dtype]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST))

    def cast(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [cast(y) for y in x]
        if not isinstance(x, Tensor) or x.device.type != GPU or x.dtype not in CASTABLE or x.dtype == (dtype := to()):
            return x
        if not (torch.is_autocast_cache_enabled() and x.is_leaf and x.requires_grad and dtype != torch.float32):
            return x.to(dtype)
        if id(x) not in _state.casts:  # a weight once a forward, whatever the number of resolutions
            _state.casts[id(x)] = x, x.to(dtype)
        return _state.casts[id(x)][1]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*map(cast, args), **kwargs)

    return kernel


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """By the kernels that CUDA takes: flash attention in half precision and without a mask, else the efficient one."""
    if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return torch._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    efficient = torch._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]


def register() -> None:
    """Make the device known to torch, once a process. Raises UserError where another backend has taken the place."""
    if _state.libraries:
        return
    named = torch._C._get_privateuse1_backend_name()
    if named != "privateuseone":
        fix = "give the command a process in which it is not loaded (TORCH_DEVICE_BACKEND_AUTOLOAD=0)"
        raise UserError(Problem(f"torch's backend {named}", NOTHING, "stands where a plan needs its own", fix))
    backend_registration._setup_privateuseone_for_python_backend(GPU, backend_module=_DeviceModule())
    keys = (AUTOCAST, "Meta", "PrivateUse1", "AutogradPrivateUse1")
    libraries = {key: torch.library.Library("aten", "IMPL", key) for key in keys}
    rest = torch.library.Library("_", "IMPL", AUTOCAST)
    rest.fallback(torch.library.fallthrough_kernel)
    for names, to in ((HALF, lambda: torch.get_autocast_dtype(GPU)), (SINGLE, lambda: torch.float32)):
        for name in names:
            libraries[AUTOCAST].impl(name, _autocasting(name, to))
    for name, kernel in KERNELS.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            libraries["Meta"].impl(name, kernel)
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        libraries[key].impl("scaled_dot_product_attention", _attention)
    libraries["PrivateUse1"].impl("empty.memory_format", _valueless(torch.empty))
    libraries["PrivateUse1"].impl("empty_strided", _valueless(torch.empty_strided))
    _state.libraries = [*libraries.values(), rest]  # whose kernels go with them


# ------------------------------------------------------------------------------------------------ ranks


@dataclass(frozen=True)
class FakeWorld(World):
    """A rank whose peers say what it says."""

    def barrier(self) -> None:
        pass

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size

    def broadcast_object(self, value: Any) -> Any:
        return value


@contextmanager
def fake_world(size: int, *, rank: int = 0, local_size: int = 8, device: str = GPU) -> Iterator[FakeWorld]:
    """Rank `rank` of `size`, in a process group of that size that moves nothing. No group may stand when it is made."""
    if dist.is_initialized():
        raise RuntimeError("A plan needs a process without process groups.")
    local_size = min(local_size, size)
    where = torch.device(device, 0) if device != "cpu" else torch.device("cpu")
    hook = sys.excepthook  # in front of which every process group puts its rank
    if size > 1:
        dist.init_process_group(
            f"cpu:fake,{GPU}:fake" if device == GPU else "fake", store=FakeStore(), rank=rank, world_size=size
        )
    try:
        control = dist.group.WORLD if size > 1 else None
        yield FakeWorld(rank, size, rank % local_size, local_size, where, control)
    finally:
        leave_groups()
        sys.excepthook = hook


@contextmanager
def no_values(listener: Listener) -> Iterator[FakeTensorMode]:
    """Tensors made inside have no values; `listener` hears of streams."""
    mode = FastFakeTensorMode()
    clear_torchs = torch.clear_autocast_cache

    def clear_casts() -> None:
        clear_torchs()  # of CPUs
        _state.casts.clear()

    before = _state.listener, _state.mode, _state.stream
    lifts = torch._C._only_lift_cpu_tensors()
    _state.listener, _state.mode, _state.stream = listener, mode, Stream()
    torch._C._set_only_lift_cpu_tensors(True)  # a number's tensor is made on the host, and then copied
    try:
        with (
            mock.patch.object(Tensor, "record_stream", lambda self, stream: None),
            mock.patch.object(FakeTensor, "data_ptr", _place_in_storage, create=True),
            mock.patch.object(FakeTensor, "numpy", _no_array, create=True),
            mock.patch.object(FakeTensor, "__repr__", _no_text, create=True),
            mock.patch.object(FakeTensor, "__format__", _no_format, create=True),
            _device_by_all_its_names(),
            mock.patch.object(torch, "clear_autocast_cache", clear_casts),  # as the last autocast ends
            torch.autograd.set_multithreading_enabled(False),
            mode,
        ):
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        _state.listener, _state.mode, _state.stream = before


def _place_in_storage(tensor: Tensor) -> int:
    """For its address, of which libraries ask how it is aligned."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _no_array(tensor: Tensor, *, force: bool = False) -> NoReturn:
    _state.listener.asks("numpy()")


def _no_text(tensor: Tensor, **_: object) -> str:
    if tensor.device.type == GPU:
        _state.listener.synchronises("a tensor as text")
    return f"tensor(..., size={tuple(tensor.shape)}, dtype={tensor.dtype})"


def _no_format(tensor: Tensor, spec: str) -> str:
    return object.__format__(tensor, spec) if tensor.dim() else format(tensor.item(), spec)


@contextmanager
def _device_by_all_its_names() -> Iterator[None]:
    """Programs that name CUDA, or take the accelerator that torch finds, mean the one that a plan has."""
    module = _DeviceModule()
    both: dict[str, Any] = {"synchronize": module.synchronize, "current_stream": module.current_stream}
    classes: dict[str, Any] = {"Stream": Stream, "Event": Event}
    with (
        mock.patch.multiple(torch.accelerator, **both),
        mock.patch.multiple(torch.cuda, stream=module.stream, **both, **classes),
        mock.patch.multiple(torch, **classes),
    ):
        yield


def current_stream() -> Stream:
    return _state.stream
