"""Convolutions and matrix products that keep their parameter for backward, and nothing made of it.

Autocast's half-precision copy of a weight, and the transpose a matrix product saves, live from forward to backward, and
with them a whole model that an engine believes to have freed. Here backward takes the parameter as it finds it then
(gathered anew) and copies it once more. (DeepSpeed's LinearFunctionForZeroStage3, for convolutions and autocast too.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

_Settings: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Of a convolution: stride, padding, dilation, groups."""


_Layer = TypeVar("_Layer", bound=nn.Module)


class _Padded(nn.Conv2d):
    """A convolution, to type checkers, whose padding is not a word."""

    padding: tuple[int, ...]


def keep_parameters_only(method: nn.Module) -> None:
    """Let each convolution and linear layer of `method` keep no cast copy of its weight for backward."""
    for module in method.modules():
        if _is_plain(module, nn.Linear) or _pads_by_number(module):
            _replace_forward(module, partial(_forward, module))


def compute_small_maps_in_fp32(method: nn.Module) -> None:
    """For half precision on CPUs: convolutions of maps so small that a tap sees padding alone are computed in fp32.

    oneDNN leaves the gradient of such taps as it found the memory (seen with torch 2.11 and 2.14 on
    CPUs with AMX: 3 x 3, stride 2, 8 groups, bf16, over 1 x 1 maps; with AVX-512 alone where they are channels-last).
    """
    for module in method.modules():
        if _pads_by_number(module) and max(module.kernel_size) > 1:
            _replace_forward(module, partial(_small_in_fp32, module, module.forward))


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


def has_idle_tap(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether, along one side of a map, a tap of the kernel sees padding alone."""
    starts = range(-padding, size + padding - dilation * (kernel - 1), stride)  # of the first tap, for each output
    return not all(any(0 <= first + tap * dilation < size for first in starts) for tap in range(kernel))


def _is_plain(module: nn.Module, kind: type[_Layer]) -> TypeGuard[_Layer]:
    """A subclass with a forward of its own may make its weights first, as NFNets do."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _pads_by_number(module: nn.Module) -> TypeGuard[_Padded]:
    return _is_plain(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _small_in_fp32(module: _Padded, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    device = x.device.type
    sides = zip(x.shape[-2:], module.kernel_size, module.stride, module.padding, module.dilation)
    if not any(has_idle_tap(*side) for side in sides):
        return plain(x)
    with torch.autocast(device, enabled=False):
        y = _Product.apply(x.float(), module.weight, module.bias, _settings(module))
    return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y.to(x.dtype)


def _settings(module: _Padded) -> _Settings:
    return module.stride, module.padding, module.dilation, module.groups


def _forward(module: _Padded | nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    conv = _settings(module) if isinstance(module, nn.Conv2d) else None
    return _Product.apply(x, module.weight, module.bias, conv)


class _Context(FunctionCtx):
    """What autograd makes of a forward for its backward, to type checkers."""

    conv: _Settings | None
    bias_type: torch.dtype | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Product(torch.autograd.Function):
    """x [N, C, H, W] or [..., C], weight and bias of a layer -> its output, in x's type; conv: None for a linear
    layer."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, conv: _Settings | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.bias_type = conv, None if bias is None else bias.dtype
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, w, b) if conv is None else F.conv2d(x, w, b, *conv)

    @staticmethod
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        w, has_bias = weight.to(x.dtype), ctx.bias_type is not None
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], has_bias and ctx.needs_input_grad[2])
        if ctx.conv is None:
            dx = dy @ w if need[0] else None
            rows = dy.reshape(-1, dy.shape[-1])  # of tokens too, [..., C]
            dw = rows.t() @ x.reshape(-1, x.shape[-1]) if need[1] else None
            db = rows.sum(0) if need[2] else None
        else:
            stride, padding, dilation, groups = ctx.conv
            bias_sizes = [w.shape[0]] if has_bias else None
            dx, dw, db = torch.ops.aten.convolution_backward(
                dy, x, w, bias_sizes, stride, padding, dilation, False, [0, 0], groups, need
            )
        return dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(ctx.bias_type), None
