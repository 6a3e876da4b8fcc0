"""The real update of a recipe as one rank of many makes it, on tensors without values: every operation, every
collective and every byte that is held, in order.

What runs is the engine's own code (`Engine.gradients`, `Engine.update`) over the method's; engines whose libraries
refuse such tensors are stood in for (`stand_ins`: DDP). A host synchronisation is noted with the line that makes it.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import seer_scale
from seer_scale.config import Config, Photometric
from seer_scale.data.batch import Batch
from seer_scale.data.transforms.on_device import mean_and_scale, micro_batches
from seer_scale.data.transforms.photometric import draw, encode
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.methods.base import Method
from seer_scale.methods.registry import build_method
from seer_scale.models.execution import MEMORY_FORMATS
from seer_scale.parallel import ENGINES, load
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.fsdp import filled_up_once
from seer_scale.plan.accelerator import GPU, FakeWorld, Stream, current_stream, fake_world, no_values, register
from seer_scale.plan.operations import cpu_workspace, flops, group_width, moved_bytes, tensors
from seer_scale.plan.stand_ins import already_there, engine_class, on_many_gpus

Phase = Literal["build", "views", "targets", "forward", "recompute", "backward", "update"]
Kind = Literal[
    "parameters",
    "optimiser state",
    "gradients",
    "moving averages",
    "buffers",
    "gathered units",
    "half-precision weights",
    "activations",
    "views",
    "loss",
    "communication",
    "update",
]
"""What is held for. half-precision weights: autocast's copies. loss: scores, codes, and their gradients."""


@dataclass
class Collective:
    """nbytes: of the largest tensor each rank gives or gets: what a link carries follows from it and the kind. group:
    what it is for. root: who sends or gets all, as counted in the group; -1 where all ranks are alike. op: how values
    are reduced, as sum. where: the line that asks for it."""

    kind: str
    nbytes: int
    dtype: torch.dtype
    ranks: tuple[int, ...]
    group: str
    where: str = field(default="", compare=False)
    root: int = -1
    op: str = ""


@dataclass
class Op:
    """One operation on the device. nbytes: read and written. workspace: bytes held while it runs, beside its result.
    group_width: channels of a group of a grouped convolution."""

    name: str
    phase: Phase
    unit: str
    stream: int
    flops: int
    nbytes: int
    dtype: torch.dtype
    workspace: int = 0
    collective: Collective | None = None
    group_width: int = 0


@dataclass(frozen=True)
class Wait:
    """What follows in `stream` begins after the first `mark` operations of the update in stream `on`."""

    stream: int
    on: int
    mark: int


@dataclass
class Held:
    """A run of memory. stream: that it was made for. born, freed: how many operations there were before; freed -1: none
    of the update frees it. is_output: of a unit, so that another takes it."""

    nbytes: int
    kind: Kind
    phase: Phase
    unit: str
    stream: int
    born: int
    freed: int = -1
    is_output: bool = False


@dataclass(frozen=True)
class Sync:
    """The host waits for the device or for other ranks, or copies what it cannot send ahead."""

    what: str
    where: str


@dataclass
class Trace:
    """The second update after the start (the first makes what stays). `steps`: in the order the host gives them.
    `changes`: runs of memory as they come (True) and go, those alive before first. shapes: of the parameters."""

    config: Config
    engine: str
    world_size: int
    rank: int
    device: str
    steps: list[Op | Wait]
    changes: list[tuple[Held, bool]]
    syncs: list[Sync]
    units: list[str]
    shapes: dict[str, torch.Size]

    @property
    def ops(self) -> list[Op]:
        return [step for step in self.steps if isinstance(step, Op)]

    @property
    def collectives(self) -> list[Collective]:
        return [op.collective for op in self.ops if op.collective]

    @property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())


class _Recorder(TorchDispatchMode):
    """Follows operations and storages; `phase` is set by the engine that is traced. kind: of the tensors it follows."""

    def __init__(self, device: str, kind: type[Tensor] = FakeTensor):
        super().__init__()
        self.device = device
        self._followed = (kind, nn.Parameter)
        self.phase: Phase = "build"
        self.steps: list[Op | Wait] = []
        self.num_ops = 0
        self.is_recording = False
        self.changes: list[tuple[Held, bool]] = []
        self.syncs: list[Sync] = []
        self.units: dict[nn.Module, str] = {}
        self._inside: list[str] = []
        self._spans: tuple[list[int], list[str]] = ([0], [""])  # sequence numbers of autograd's nodes, and their units
        self._streams: dict[Stream, int] = {}
        self._given_before: dict[Stream, int] = {}
        self._alive: dict[int, tuple[weakref.ref, Held]] = {}
        self._parameters: set[int] = set()
        self.ignored: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a trace, and asking costs

    # --- who runs

    def begin_unit(self, module: nn.Module, args: object) -> None:
        if (name := self.units.get(module)) is not None:
            self._inside.append(name)
            self._span(name)

    def end_unit(self, module: nn.Module, args: object, out: object) -> None:
        if module in self.units:
            self._inside.pop()
            self._span(self._inside[-1] if self._inside else "")
            for t in tensors(out):
                if found := self._alive.get(self._key(t)):
                    found[1].is_output = True

    def _span(self, name: str) -> None:
        self._spans[0].append(torch._C._autograd._get_sequence_nr())
        self._spans[1].append(name)

    def _where(self) -> tuple[Phase, str]:
        """The phase and the unit that what runs now belongs to."""
        if self._inside:
            return "recompute" if self.phase == "backward" else self.phase, self._inside[-1]
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        if node is None:
            return self.phase, ""
        return self.phase, self._spans[1][bisect_right(self._spans[0], node._sequence_nr()) - 1]

    # --- streams

    def _number(self, stream: Stream) -> int:
        return self._streams.setdefault(stream, len(self._streams))

    def waits(self, stream: Stream, other: Stream, mark: int) -> None:
        mark -= self._given_before.get(other, 0)
        if mark > 0 and stream is not other and self.is_recording:
            self.steps.append(Wait(self._number(stream), self._number(other), mark))

    def synchronises(self, what: str) -> None:
        self.syncs.append(Sync(what, _user_line()))

    def asks(self, call: str, of_device: bool = False) -> NoReturn:
        rule, fix = "asks for values, which decide then what an update does, so that none can be planned", ON_DEVICE
        if of_device:
            rule = "makes the host wait for values of the device, which an update must not"
        if pickling := _pickling():
            call, rule = pickling, "pickles on the host, which waits there for every rank, which an update must not"
            fix = "tensors of the device, as in dist.all_gather"
        raise UserError(Problem(_user_line(), call, rule, fix)) from None

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked at every turn
            return args[0].device
        if DTensor in types:
            return NotImplemented  # it takes itself apart first, and its local operations come here
        kwargs = kwargs or {}
        name, is_work = call_of(func)
        if name.startswith("prim."):
            return func(*args, **kwargs)
        if name == "aten._local_scalar_dense" and self._is_ours(args[0]):
            self.synchronises("item")
        if name.startswith("_c10d_functional."):
            rule, fix = "is a functional collective, which no plan follows", "dist.all_reduce and the like"
            raise UserError(Problem(_user_line(), _spoken(name), rule, fix))
        out = self._run(func, name, args, kwargs)
        if self.device != "cpu":
            self._watch_host(func, name, args, kwargs)
        if name in ("aten._to_copy", "aten.copy_"):
            self._watch_copy(name, out, args, kwargs)
        if is_work:
            self._note(func, name, out, args, kwargs)
        for t in tensors(out):
            if self._is_ours(t):
                self.see(t.untyped_storage())
        return out

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises UserError for what no update may do."""
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            is_of_device = any(t.device.type == self.device for t in tensors([args, kwargs]))
            self.asks(_spoken(name), self.device != "cpu" and is_of_device)
        except RuntimeError as err:
            if "devices" not in str(err):  # FakeTensorDeviceMismatchError, where torch has it
                raise
            of = sorted({f"{tuple(t.shape)} on {t.device.type}" for t in tensors([args, kwargs])})
            rule = f"takes tensors of two devices: {' and '.join(of)}"
            raise UserError(Problem(_user_line(), _spoken(name), rule, "device=views[0].device")) from None

    def _is_ours(self, t: object) -> bool:
        """DTensor plans with fakes of its own."""
        return type(t) in self._followed and t.device.type == self.device  # type: ignore[attr-defined]

    def _watch_copy(self, name: str, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        to, of = (out, args[0]) if name == "aten._to_copy" else (args[0], args[1])
        kinds = of.device.type, to.device.type
        waits_not = kwargs.get("non_blocking") or (name == "aten.copy_" and len(args) > 2 and args[2])
        if kinds in ((self.device, "cpu"), ("cpu", self.device)) and self.device != "cpu" and not waits_not:
            self.synchronises("copy to the host" if kinds[1] == "cpu" else "copy from the host")

    def _watch_host(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Operations that wait by themselves on a GPU."""
        if name in BARRIERS:
            self.synchronises("barrier")
        elif name.startswith("c10d."):
            if any(t.device.type == "cpu" for t in tensors(args)):
                self.synchronises("a collective of what is on the host")
        elif name in READ_BY_HOST or name.startswith("aten.") and _argument(func, args, kwargs, "check_errors"):
            if name != "aten.multinomial" or not args[2:3] == (True,) or args[1] == 1:
                self.synchronises(f"{_spoken(name)}, whose outcome is read on the host")

    def _note(self, func: Any, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        of_ranks = name.startswith("c10d.")
        given = [t for t in tensors([out, args, kwargs]) if self._is_ours(t)] or [*tensors(args if of_ranks else ())]
        if not given:
            return
        stream = current_stream()
        number = self._number(stream)
        stream.given += 1
        self.num_ops += 1
        if self.is_recording:
            phase, unit = self._where()
            collective = _collective(func, name, args) if of_ranks else None
            first = next((t for t in tensors(args) if self._is_ours(t)), given[0])
            op = Op(
                name.removeprefix("aten."),
                phase,
                unit,
                number,
                flops(name, out, args),
                collective.nbytes if collective else moved_bytes(out, args, kwargs),
                first.dtype,
                cpu_workspace(name, out, args) if self.device == "cpu" else 0,
                collective,
                group_width(name, args),
            )
            self.steps.append(op)
        self._reclassify(name, out, args, kwargs, given)

    def _reclassify(self, name: str, out: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        """What memory is for shows in who uses it."""
        kind: Kind | None = None
        if name.startswith("c10d."):
            kind, given = "communication", list(tensors(args))
        elif name in ("fsdp.all_gather_copy_in", "fsdp.split_with_sizes_copy"):
            kind = "gathered units"
        elif name == "fsdp.chunk_cat":
            kind, given = "gradients", list(tensors(args[0]))
        elif name == "aten._to_copy" and self._key(args[0]) in self._parameters and out.is_floating_point():
            for t in tensors(out):
                self.see(t.untyped_storage(), "half-precision weights")
            return
        for t in given if kind else ():
            found = self._alive.get(self._key(t))
            if found and found[1].kind in PASSING:
                found[1].kind = kind  # type: ignore[assignment]  # not None here

    def _key(self, t: Tensor) -> int:
        return t.untyped_storage()._cdata

    # --- memory

    def see(self, storage: torch.UntypedStorage, kind: Kind | None = None) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.ignored:
            return
        if found := self._alive.get(key):
            if found[1].nbytes == nbytes:
                return
            self._end(found[1])
        phase, unit = self._where()
        if kind is None:
            kind = found[1].kind if found else _kind_by_phase(phase, unit)
        held = Held(nbytes, kind, phase, unit, self._number(current_stream()), self.num_ops)
        self.changes.append((held, True))
        ref = found[0] if found else weakref.ref(storage, lambda _: self._forget(key))
        self._alive[key] = ref, held

    def _forget(self, key: int) -> None:
        self._end(self._alive.pop(key)[1])
        self._parameters.discard(key)  # another may have its address

    def _end(self, held: Held) -> None:
        held.freed = self.num_ops
        self.changes.append((held, False))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 fills and frees what it gathers in place."""
        if storage._cdata in self._alive:
            self.see(storage)
            self._alive[storage._cdata][1].kind = "gathered units"

    def mark(self, found: Iterator[Tensor], kind: Kind) -> None:
        for t in found:
            local = t.to_local() if isinstance(t, DTensor) else t
            if (held := self._alive.get(self._key(local))) is not None:
                held[1].kind = kind
                if kind == "parameters":
                    self._parameters.add(self._key(local))

    def begin(self) -> None:
        """From here on the update is recorded; what is alive was so before."""
        self.is_recording = True
        self._given_before = {stream: stream.given for stream in self._streams}
        gc.collect()
        self.steps, self.syncs, self.num_ops = [], [], 0
        for _, held in self._alive.values():
            held.born, held.freed = 0, -1
        self.changes = [(held, True) for _, held in self._alive.values()]


NO_WORK = {"aten.detach", "aten.empty", "aten.empty_strided", "aten.empty_like", "aten.new_empty", "aten.lift_fresh",
           "aten._unsafe_view", "aten.new_empty_strided", "aten.set_", "aten.resize_", "aten._reshape_alias",
           "aten.is_pinned"}  # fmt: skip
BARRIERS = {"c10d.barrier", "c10d.monitored_barrier_"}
READ_BY_HOST = {"aten._linalg_check_errors", "aten.linalg_eig", "aten._linalg_eigvals", "aten._linalg_eigh",
                "aten._linalg_svd", "aten.linalg_pinv", "aten.multinomial"}  # fmt: skip
"""On CUDA: torch.linalg documents it of its functions; multinomial checks its probabilities, but for several draws with
replacement (aten/src/ATen/native/Distributions.cpp)."""
ON_DEVICE = "torch.where, or another operation on the device"
PASSING: tuple[Kind, ...] = ("activations", "loss", "update")
"""Kinds that a phase gives, which who uses the memory may correct."""


@cache
def call_of(func: Any) -> tuple[str, bool]:
    """Its name, as aten.mm, and whether the device has work to do."""
    name = str(func._overloadpacket)
    return name, not func.is_view and name not in NO_WORK


COLLECTIVES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather",
               "allgather_into_tensor_coalesced_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
               "reduce_scatter_": "reduce-scatter", "reduce_scatter_tensor_coalesced_": "reduce-scatter",
               "broadcast_": "broadcast", "reduce_": "reduce", "alltoall_base_": "all-to-all",
               "alltoall_": "all-to-all", "allreduce_coalesced_": "all-reduce", "allgather_coalesced_": "all-gather",
               "recv_any_source_": "recv", "monitored_barrier_": "barrier"}  # fmt: skip
"""Others by their own names."""


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What an operation is given for its argument `name`; None where it has none."""
    at = _arguments(func).get(name, -1)
    return kwargs.get(name, args[at] if 0 <= at < len(args) else None)


@cache
def _arguments(func: Any) -> dict[str, int]:
    return {argument.name: i for i, argument in enumerate(func._schema.arguments)}


def _collective(func: Any, name: str, args: tuple[Any, ...]) -> Collective:
    short = name.removeprefix("c10d.")
    kind = COLLECTIVES.get(short, short.strip("_"))
    group = dist.ProcessGroup.unbox(_argument(func, args, {}, "process_group"))
    root = _argument(func, args, {}, "root_rank")
    op = getattr(_argument(func, args, {}, "reduce_op"), "op", None)  # torch 2.14 tells
    largest = max(tensors(args), key=lambda t: t.numel() * t.itemsize)
    ranks = tuple(dist.get_process_group_ranks(group))
    nbytes = largest.numel() * largest.itemsize
    return Collective(
        kind, nbytes, largest.dtype, ranks, group.group_desc, _user_line(),
        -1 if root is None else root, dist.ReduceOp.RedOpType(op()).name.lower() if op else "",
    )  # fmt: skip


def _kind_by_phase(phase: Phase, unit: str) -> Kind:
    if phase in ("build", "update"):
        return "update"
    return "views" if phase == "views" else "activations" if unit else "loss"


HOUSE = str(Path(seer_scale.__file__).parent) + "/"
NOT_SHOWN = ("/torch/", "/contextlib.py", "/functools.py", HOUSE + "plan/", HOUSE + "distributed.py",
             HOUSE + "parallel/deepspeed/private.py")  # fmt: skip


def _user_line() -> str:
    """The innermost line outside of torch, of this package's plan, and of what hands collectives on."""
    frame: FrameType | None = sys._getframe(1)
    while frame and any(part in frame.f_code.co_filename for part in NOT_SHOWN):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(HOUSE)}:{frame.f_lineno}" if frame else ""


def _pickling() -> str:
    """The function of torch.distributed for objects, if one is at work."""
    frame: FrameType | None = sys._getframe(1)
    while frame and any(part in frame.f_code.co_filename for part in NOT_SHOWN):
        if (name := frame.f_code.co_name) in OF_OBJECTS:
            return f"dist.{name}"
        frame = frame.f_back
    return ""


OF_OBJECTS = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
              "send_object_list", "recv_object_list"}  # fmt: skip
SPOKEN = {
    "_local_scalar_dense": "item()",
    "equal": "torch.equal",
    "nonzero": "nonzero()",
    "masked_select": "a mask as an index",
    "_linalg_check_errors": "torch.linalg",
}


def _spoken(name: str) -> str:
    """An operation as a program writes it."""
    short = name.rpartition(".")[2]
    return SPOKEN.get(short, f"torch.{short.removeprefix('_').replace('linalg_', 'linalg.')}")


# ------------------------------------------------------------------------------------------------ the update


def _traced(cls: type[Engine], recorder: _Recorder) -> type[Engine]:
    """An engine that says which phase it is in, and shards as every engine does: without fakes, on the meta device."""

    class Traced(cls):  # type: ignore[misc, valid-type]  # a class given as a value
        def shard_on_meta(self, method: Method[Any, Any]) -> nn.Module:
            with _disable_current_modes():  # 512 pieces of every parameter are made there
                return super().shard_on_meta(method)

        def wrap_materialised(self, module: nn.Module) -> nn.Module:
            with already_there():
                return super().wrap_materialised(module)

        def _gradients(self) -> list[Tensor]:
            grads = super()._gradients()
            recorder.mark(iter(grads), "gradients")
            return grads

        def _targets(self, *args: Any) -> list[Any]:
            with _phase(recorder, "targets"):
                return super()._targets(*args)

        def _backward(self, loss: Tensor) -> None:
            with _phase(recorder, "backward"):
                super()._backward(loss)

    return Traced


@contextmanager
def _phase(recorder: _Recorder, phase: Phase) -> Iterator[None]:
    before, recorder.phase = recorder.phase, phase
    try:
        yield
    finally:
        recorder.phase = before


def example_batch(config: Config, world: World) -> Batch:
    """Of one rank, its images black; photometrics as they are drawn."""
    num = config.train.global_batch // world.size
    generator = torch.Generator().manual_seed(0)
    on_device = config.data.on_device("cpu" if world.device.type == "cpu" else "cuda")

    def params(kind: Sequence[Photometric]) -> Tensor:
        uniform = iter(lambda: torch.rand((), generator=generator).item(), None)
        return torch.stack([torch.from_numpy(encode(draw(how, uniform))) for how in kind for _ in range(num)])

    return Batch(
        [torch.zeros(crop.num * num, 3, *crop.shape, dtype=torch.uint8) for crop in config.views.crops],
        [params(kind) for kind in config.views.photometric] if on_device else [],
        torch.zeros(num, dtype=torch.int64), 0, [],
    )  # fmt: skip


def trace(
    config: Config, world_size: int, *, rank: int = 0, local_size: int = 8, device: str = GPU,
    method: Callable[[Config, FakeWorld], Method[Any, Any]] = build_method,
) -> Trace:  # fmt: skip
    """One update of rank `rank` of `world_size`, as it is after the first.

    config: checked for that many ranks, with an engine named. device: gpu, or cpu for the paths of a CPU. Raises
    UserError for what the recipe makes no update of.
    """
    register()
    recorder = _Recorder(device)
    with ExitStack() as stack:
        stack.enter_context(_frozen_heap())
        world = stack.enter_context(fake_world(world_size, rank=rank, local_size=local_size, device=device))
        built = method(config, world)
        cls = _traced(engine_class(config, world), recorder)
        stack.enter_context(on_many_gpus(cls))
        stack.enter_context(no_values(recorder))
        with unset_fake_temporarily() if device != "cpu" else nullcontext():  # the host's part has values
            batch = example_batch(config, world)
        return _later_update(recorder, cls, built, config, world, batch)


def trace_with_values(config: Config, world: World, *, before: int = 1) -> Trace:
    """The same of an update of real tensors on CPUs, in the process group that stands: what `trace` must agree with.
    before: updates that are made first (DDP's second still agrees with all ranks on its buckets)."""
    recorder = _Recorder("cpu", Tensor)
    built = build_method(config, world)
    module, cls = ENGINES["single" if world.size == 1 else config.parallel.engine]
    traced = _traced(getattr(load(module), cls), recorder)
    with _frozen_heap():
        return _later_update(recorder, traced, built, config, world, example_batch(config, world), before)


def _later_update(
    recorder: _Recorder, cls: type[Engine], method: Method[Any, Any], config: Config, world: World, batch: Batch,
    before: int = 1,
) -> Trace:  # fmt: skip
    with _caches_apart(), filled_up_once(), recorder, _followed(recorder):
        recorder.ignored = {view.untyped_storage()._cdata for view in batch.views}  # the loader's
        recorder.units = {unit: name for name, unit in method.shard_units().items()}
        plain = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False))
        engine = cls(method, plain, world, ("",))  # a compiler would run these operations, too, some of them as one
        seen = config.train.total_samples - config.train.global_batch
        for _ in range(before):
            _mark_state(recorder, engine)
            _update(recorder, engine, config, world, batch, seen)
        recorder.begin()
        _mark_state(recorder, engine)
        _update(recorder, engine, config, world, batch, seen)
        steps, changes = recorder.steps, recorder.changes[:]  # what follows frees all
        engine.close()
        place, units = (world.size, world.rank, recorder.device), list(method.shard_units())
        return Trace(config, cls.name, *place, steps, changes, recorder.syncs, units, engine.shapes)


def _update(recorder: _Recorder, engine: Engine, config: Config, world: World, batch: Batch, seen: int) -> None:
    form = MEMORY_FORMATS.get(config.train.memory_format, torch.contiguous_format)
    num = config.num_micro_batches(world.size)
    valued = unset_fake_temporarily if recorder.device != "cpu" else nullcontext
    with _phase(recorder, "views"), valued():
        makes = micro_batches(batch, config.views.crops, num, world.device, form)

    def views(make: Callable[[], list[Tensor]]) -> list[Tensor]:
        with _phase(recorder, "views"), valued():
            return make()

    recorder.phase = "forward"
    parts = [partial(views, make) for make in makes]
    engine.gradients(parts, samples_seen=seen)
    del makes, parts
    recorder.phase = "update"
    engine.update(1e-3, seen)


@contextmanager
def _caches_apart() -> Iterator[None]:
    """Neither constants that a process keeps between updates, nor DTensor's plans, which hold process groups, are taken
    from updates before or left to those after."""

    def clear() -> None:
        mean_and_scale.cache_clear()
        _clear_sharding_prop_cache()

    clear()
    try:
        yield
    finally:
        clear()


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """What there was before is not looked through to find what an update leaves behind."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()  # the engine's cycles, lest the next trace freeze them, too
        gc.unfreeze()


def _mark_state(recorder: _Recorder, engine: Engine) -> None:
    """What is alive before an update, by what it is for."""
    recorder.mark(iter(engine.optimizer.state.values()), "optimiser state")
    own = engine.buffers
    beside = [t for part in (own.of_losses, own.of_targets) for t in (part.before, part.sum, *part.counts)]
    recorder.mark(iter([*engine.method.buffers(), own.all, *beside]), "buffers")
    recorder.mark((p for n, p in engine.method.named_parameters() if n not in engine.averages), "parameters")
    recorder.mark((p for n, p in engine.method.named_parameters() if n in engine.averages), "moving averages")
    recorder.mark((s.local for n, s in engine.shards.items() if n not in engine.averages), "parameters")
    recorder.mark((s.local for n, s in engine.shards.items() if n in engine.averages), "moving averages")


@contextmanager
def _followed(recorder: _Recorder) -> Iterator[None]:
    """Units and storages that are filled in place are followed."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        out = resize(storage, size)
        recorder.resized(storage)
        return out

    hooks = [
        register_module_forward_pre_hook(recorder.begin_unit),
        register_module_forward_hook(recorder.end_unit, always_call=True),
    ]
    try:
        with mock.patch.object(torch.UntypedStorage, "resize_", resized):
            yield
    finally:
        for hook in hooks:
            hook.remove()
