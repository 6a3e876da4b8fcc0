"""What an operation of a traced update costs: multiply-adds and bytes, from the shapes it is called with.

A convolution's groups divide its work, also in the gradient of its weight (torch's own counter leaves them out there).
What is not a product of matrices moves bytes: what it reads and what it writes, once each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRODUCTS: dict[str, Callable[..., int]] = {}
"""Floating-point operations (two a multiply-add) of operations whose time is that of multiplying, by name."""


def _of(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def register(count: Callable[..., int]) -> Callable[..., int]:
        PRODUCTS.update(dict.fromkeys(names, count))
        return count

    return register


@_of("aten.convolution")
def _convolution(out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    per_output = math.prod(weight.shape[1:])  # input channels of a group, and the kernel
    is_transposed = rest[4]
    return 2 * (x.numel() if is_transposed else out.numel()) * per_output


@_of("aten.convolution_backward")
def _convolution_backward(out: Any, dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    is_transposed, needed = rest[4], rest[7]
    per_output = math.prod(weight.shape[1:])
    return 2 * (x.numel() if is_transposed else dy.numel()) * per_output * sum(map(bool, needed[:2]))


@_of("aten.mm", "aten.bmm")
def _product(out: Tensor, a: Tensor, b: Tensor, *rest: Any) -> int:
    return 2 * out.numel() * a.shape[-1]


@_of("aten.addmm", "aten.baddbmm")
def _added_product(out: Tensor, added: Tensor, a: Tensor, b: Tensor, *rest: Any) -> int:
    return 2 * out.numel() * a.shape[-1]


@_of("aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
     "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_fused_attention_overrideable",
     "aten._scaled_dot_product_flash_attention_for_cpu")  # fmt: skip
def _attention(out: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


@_of("aten._scaled_dot_product_flash_attention_backward", "aten._scaled_dot_product_efficient_attention_backward",
     "aten._scaled_dot_product_cudnn_attention_backward",
     "aten._scaled_dot_product_fused_attention_overrideable_backward",
     "aten._scaled_dot_product_flash_attention_for_cpu_backward")  # fmt: skip
def _attention_backward(out: Any, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    return 5 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def flops(name: str, out: Any, args: tuple[Any, ...]) -> int:
    """Of one call: `name` as aten.mm. 0: it multiplies no matrices."""
    count = PRODUCTS.get(name)
    return count(out, *args) if count else 0


def group_width(name: str, args: tuple[Any, ...]) -> int:
    """Input channels of a group of a grouped convolution, or of its gradient; 0 of all else."""
    if name == "aten.convolution" and args[8] > 1:
        return args[1].shape[1]
    return args[2].shape[1] if name == "aten.convolution_backward" and args[9] > 1 else 0


def tensors(value: Any) -> list[Tensor]:
    """All within nested lists, tuples and mappings."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for part in value:
            _gather(part, found)
    elif isinstance(value, dict):
        _gather(list(value.values()), found)


def moved_bytes(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Read and written: of each tensor its elements once (an expanded one's as often as it stores them)."""
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors([args, kwargs, out]))


def cpu_workspace(name: str, out: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel of torch's for CPUs takes while it runs, its result among them, in fp32: oneDNN computes on
    blocked copies of weights and of maps with channels first, BatchNorm's backward on a copy of the gradient, and
    gloo's reduce-scatter on one of its input. (Seen with torch 2.14; half precision differs.)
    """
    result = sum(map(_bytes, tensors(out)))
    if name == "aten.convolution" and len(args[0]) >= ONEDNN_BATCH:
        if args[0].is_contiguous(memory_format=torch.channels_last):
            return result + 2 * _bytes(args[1])
        return result + max(_bytes(args[0]) if args[1].shape[1] > 3 else 0, _bytes(out))
    if name == "aten.convolution_backward" and len(args[1]) >= ONEDNN_BATCH:
        if args[1].is_contiguous(memory_format=torch.channels_last):
            return result + 3 * _bytes(args[2])
        y, x, is_image = _bytes(args[0]), _bytes(args[1]), args[2].shape[1] <= 3
        return result + (y if is_image else max(2 * x * bool(args[10][0]), x + y))
    if name == "c10d._reduce_scatter_base_":
        return _bytes(args[1])
    return result + _bytes(args[1]) if name == "aten.native_batch_norm_backward" else 0


ONEDNN_BATCH = 16
"""From so many images on one thread's convolutions are oneDNN's."""


def _bytes(t: Tensor) -> int:
    return t.numel() * t.itemsize
