"""Convolutions and linear layers as engines replace them give what they gave, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seer_scale.distributed import World
from seer_scale.parallel.recast_linear import compute_small_maps_in_fp32, has_idle_tap, keep_parameters_only
from tests.tiny import micro_batches, tiny


class Convolutions(TorchDispatchMode):
    """Collects the types in which convolutions are computed."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.__name__:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def grads_of(layer: nn.Module, x: Tensor, half: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of input and parameters, in fp32, with memory full of NaN around."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    for numel in (512, 4096, 65536):
        torch.full((numel,), torch.nan, dtype=half or torch.float32)  # given back at once
    with torch.autocast("cpu", half, enabled=half is not None):
        y = layer(x)
    assert y.dtype == (half or torch.float32)
    y.float().square().sum().backward()
    return [t.detach().float() for t in (y, x.grad, *(p.grad for p in layer.parameters()))]


CONVOLUTIONS = [
    (1, 3, 2, 1),
    (1, 3, 1, 1),
    (2, 3, 1, 1),
    (2, 3, 2, 1),
    (3, 3, 1, 1),
    (3, 3, 4, 1),
    (5, 3, 4, 1),
    (4, 3, 1, 2),
    (2, 3, 1, 2),
    (1, 1, 1, 1),
]
"""Size of the map, kernel, stride, dilation; padded by dilation * (kernel // 2)."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3))
def test_an_idle_tap_is_one_whose_gradient_is_zero_whatever_the_map(size, kernel, stride, padding, dilation):
    assume(size + 2 * padding > dilation * (kernel - 1))
    weight = torch.ones(1, 1, kernel, requires_grad=True)
    nn.functional.conv1d(torch.ones(1, 1, size), weight, None, stride, padding, dilation).sum().backward()
    assert has_idle_tap(size, kernel, stride, padding, dilation) == (weight.grad == 0).any().item()


@pytest.mark.parametrize("first", [lambda layer: None, keep_parameters_only])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_small_maps_are_computed_in_fp32_and_others_are_not(half, layout, first):
    """On a CPU whose kernels are at fault, such a gradient is what the memory held before: here NaN."""
    torch.manual_seed(0)
    for size, kernel, stride, dilation in CONVOLUTIONS:
        small = has_idle_tap(size, kernel, stride, dilation * (kernel // 2), dilation)
        layer = nn.Conv2d(16, 16, kernel, stride, dilation * (kernel // 2), dilation, groups=2).to(memory_format=layout)
        x = torch.randn(4, 16, size, size).contiguous(memory_format=layout)
        exact = grads_of(layer, x)
        first(layer)
        compute_small_maps_in_fp32(layer)
        with Convolutions() as seen:
            ours = grads_of(layer, x, half)
        assert seen.dtypes == {torch.float32 if small else half}, (size, kernel, stride)
        for a, b in zip(ours, exact):
            assert torch.isfinite(a).all() and (a - b).norm() <= 0.02 * b.norm(), (size, kernel)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_engine_on_the_cpu_computes_small_maps_so(precision):
    """Maps of 16 pixels come down to 1 x 1, whose 3 x 3 convolutions are of fp32; the rest is in half precision."""
    config, engine = tiny(World(), **{"parallel.engine": "single", "train.precision": precision})
    small = set()
    for module in engine.method.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(lambda _, given: small.add(min(given[0].shape[-2:]) < 2))
    with Convolutions() as seen:
        engine.gradients(micro_batches(config, 0, World()), samples_seen=0)
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert True in small and seen.dtypes == {torch.float32, half}
