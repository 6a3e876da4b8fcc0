"""Tensors without values, made quickly.

torch's FakeTensorMode works out what an operation makes of tensors of given shapes, and its own memory of that takes
fourteen times as long to ask as the one here, which keeps what follows from shapes alone and leaves the rest to torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class _Result(NamedTuple):
    """One result of an operation. same: the argument it is; of: the one whose memory it sees, from `offset` elements
    behind where that begins; -1 is none, and then it has memory of its own. Arguments are counted over all tensors that
    are given."""

    same: int
    of: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


Results = tuple[type, tuple[_Result | None, ...]]
"""list or tuple of several, or Tensor or NoneType."""

AS_STRIDED = torch.ops.aten.as_strided.default
"""The only one that counts from the beginning of the memory, and says all itself."""
TO_COPY = torch.ops.aten._to_copy.default
NOT_TENSORS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
OF_MORE_THAN_SHAPES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class FastFakeTensorMode(FakeTensorMode):
    """As FakeTensorMode, for tensors without symbolic shapes."""

    remembered: ClassVar[dict[tuple[Any, ...], Results | None]] = {}
    """Over the process; None: not a function of shapes."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.cache_enabled = False
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking costs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is AS_STRIDED and type(args[0]) is FakeTensor and not kwargs:
            x, shape, stride, *at = args
            begin = (at[0] - x.storage_offset()) if at and at[0] is not None else 0
            return self._make(_Result(-1, 0, shape, stride, begin, x.dtype, x.fake_device), [x])
        if func is TO_COPY and type(args[0]) is FakeTensor and args[0].constant is not None:
            x = args[0]  # its value stays on the host: torch would make a real tensor of the device of it
            args = (self._make(_Result(-1, 0, x.shape, x.stride(), 0, x.dtype, x.fake_device), [x]), *args[1:])
        parts: list[Any] = [func]
        given: list[FakeTensor] = []
        if not _follows_from_shapes(func) or not self._describe_arguments((args, kwargs), parts, given) or not given:
            return super().__torch_dispatch__(func, types, args, kwargs)
        key = tuple(parts)
        known = self.remembered.get(key)
        if known is not None:
            kind, results = known
            made = [result and self._make(result, given) for result in results]
            return made[0] if kind is FakeTensor else kind(made) if made else None
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if key not in self.remembered:
            self.remembered[key] = _describe_results(out, given)
        return out

    def _describe_arguments(self, value: Any, parts: list[Any], given: list[FakeTensor]) -> bool:
        """Adds to `parts` what results depend on, and to `given` the tensors; whether nothing else is in `value`."""
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.fake_mode is not self:
                return False
            given.append(value)
            parts += (value.shape, value.stride(), value.dtype, value.fake_device)
            return True
        if kind in NOT_TENSORS:
            parts += (kind, value)  # 1, 1.0 and True are equal, and make other types
            return True
        if kind is dict:
            parts.append(tuple(value))
            value = value.values()
        elif kind is list or kind is tuple:
            parts.append(len(value))
        else:
            return False
        return all(self._describe_arguments(part, parts, given) for part in value)

    def _make(self, result: _Result, given: list[FakeTensor]) -> Tensor:
        if result.same >= 0:
            return given[result.same]
        with torch._C._DisableTorchDispatch():
            if result.of >= 0:
                of = given[result.of]
                elem = torch.empty(0, dtype=result.dtype, device="meta")
                elem.set_(of.untyped_storage(), of.storage_offset() + result.offset, result.shape, result.stride)
            else:
                elem = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
            return self._wrap(elem, result.device)

    def _wrap(self, elem: Tensor, device: torch.device) -> FakeTensor:
        """As FakeTensor(self, elem, device), whose attributes are the same for all tensors of a device."""
        attributes = self._attributes.get(device)
        if attributes is None:
            attributes = self._attributes[device] = dict(vars(FakeTensor(self, elem, device)))
        made = Tensor._make_subclass(FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        vars(made).update(attributes)
        return made


@cache
def _follows_from_shapes(func: Any) -> bool:
    """Whether what `func` makes may follow from the shapes, strides, types and devices it is given."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or any(t in func.tags for t in OF_MORE_THAN_SHAPES):
        return False
    return not any(a.is_out for a in func._schema.arguments) and func._opname not in ("lift", "lift_fresh", "set_")


def _describe_results(out: Any, given: list[FakeTensor]) -> Results | None:
    """None where something else than fresh tensors, arguments and views of one argument came out."""
    kind = type(out)
    results: list[_Result | None] = []
    owners, fresh = [t.untyped_storage()._cdata for t in given], set[int]()
    for t in out if kind in (list, tuple) else () if out is None else (out,):
        if t is None:
            results.append(None)
            continue
        if type(t) is not FakeTensor or t.constant is not None or t.is_complex() or t.is_neg():
            return None
        owner = t.untyped_storage()._cdata
        seen = [i for i, other in enumerate(owners) if other == owner]
        same = next((i for i in seen if given[i] is t), -1)
        if same < 0 and seen and (len(seen) > 1 or t.dtype != given[seen[0]].dtype):
            return None
        if not seen and (owner in fresh or not _is_all_of_its_memory(t)):
            return None
        fresh.add(owner)
        of = seen[0] if seen else -1
        begin = int(t.storage_offset()) - (int(given[of].storage_offset()) if seen else 0)
        results.append(_Result(same, of, t.shape, t.stride(), begin, t.dtype, t.fake_device))
    return kind, tuple(results)


def _is_all_of_its_memory(t: Tensor) -> bool:
    with torch._C._DisableTorchDispatch():
        like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return int(t.storage_offset()) == 0 and t.untyped_storage().nbytes() == like.untyped_storage().nbytes()
