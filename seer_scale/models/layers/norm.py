"""Batch normalisation of several resolutions at once, with statistics shared by a group of ranks if wished.

Every entry of a list is normalised by its own batch statistics, as if the layer were called once an entry in order.
A group of ranks exchanges the statistics of all entries together: one all-gather forward, one all-reduce backward.
Unequal counts are combined after Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979); the gradient is Ioffe and Szegedy's (arXiv 1502.03167), its sums taken over the group.
On CUDA the kernels are those of torch.nn.SyncBatchNorm. On the CPU, which has none of them, a pass costs what it
allocates: few temporaries, and variances in two passes, which are faster than torch.var_mean by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from seer_scale.distributed import all_gather
from seer_scale.models.layers.stateful import Tape

EMPTY = 1e-30
"""The count an empty entry sends: no weight among others, yet no 0/0 where it comes first."""


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d (parameters, buffers and defaults) over a list of tensors, one a resolution.

    `process_group`: None for local statistics, or the group of ranks whose batches count as one. `joint`: entries of
    a list count as one batch, too, as where each is an image of another size. `estimating`: in eval mode, too, a batch
    is normalised by its own statistics, of this rank alone, which take the place of the running ones
    (`estimate_statistics`). Statistics and affine maths are fp32 whatever the input; the gradients of weight and bias
    are this rank's sums.
    """

    process_group: dist.ProcessGroup | None = None
    joint: bool = False
    estimating: bool = False
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def reset_buffers(self) -> None:
        self.reset_running_stats()

    def share_statistics(self, group: dist.ProcessGroup | None) -> None:
        self.process_group = group

    @overload
    def forward(self, xs: Tensor) -> Tensor: ...

    @overload
    def forward(self, xs: list[Tensor]) -> list[Tensor]: ...

    def forward(self, xs: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        """[N_r, C, H_r, W_r] or [N_r, C] each -> the same shapes and dtypes; a single tensor gives a tensor.

        In training with a group of several ranks: one all-gather of [R, 2C+1] fp32 here, one all-reduce of [R, 2, C]
        fp32 in backward. All its ranks give equally many entries; N_r may differ, and be 0 on some of them.
        """
        if isinstance(xs, Tensor):
            return self.forward([xs])[0]
        if self.joint and (self.training or self.estimating) and len(xs) > 1:
            return _entries_of(BatchNorm.forward(self, [_one_entry(xs)])[0], xs)
        mean, var = self.running_mean, self.running_var
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)  # fp32, but where all was cast, as for ONNX
        if self.estimating:
            return [F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps) for x in xs]
        if not self.training:
            return [F.batch_norm(x, mean, var, weight, bias, eps=self.eps) for x in xs]
        tape = Tape.current()
        replayed = tape if tape is not None and tape.replay else None
        if replayed is not None:
            # autograd must find as many saved tensors in a recompute as the first time, so None would not do
            mean, var = mean.clone(), var.clone()
        else:
            self.num_batches_tracked.add_(len(xs))
        if self.process_group is None or dist.get_world_size(self.process_group) == 1:
            return [F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps) for x in xs]
        if replayed is not None:
            stats = replayed.next()
        else:
            stats = _group_statistics(xs, mean, var, self.momentum, self.eps, self.process_group)
            if tape is not None:
                tape.write(stats)
        return list(_Normalise.apply(self.process_group, self.eps, stats, weight, bias, *xs))


@torch.no_grad()
def estimate_statistics(
    module: nn.Module, forwards: Iterable[int], sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x
) -> int:
    """Running statistics of every BatchNorm in `module` become the mean of those of batches; returns of how many images
    (0: there is no BatchNorm, or no image, and nothing is changed).

    forwards: runs the next batch through `module`, in eval mode, whenever it is asked for one, and says how many images
    count (0: none of it does). Each layer sees what those before it make of the same batch by its own statistics, so
    one pass is enough. sum_over_ranks: of a vector in fp64; the one collective.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    if not layers:
        return 0
    running = [t for layer in layers for t in (layer.running_mean, layer.running_var)]
    sums = torch.zeros(1 + sum(t.numel() for t in running), dtype=torch.float64, device=running[0].device)
    for layer in layers:
        layer.estimating = True
    try:
        for num in forwards:
            if num:
                sums += num * torch.cat([sums.new_ones(1), *running])
    finally:
        for layer in layers:
            layer.estimating = False
    count, *means = sum_over_ranks(sums).split([1, *(t.numel() for t in running)])
    if count:
        for statistics, mean in zip(running, means):
            statistics.copy_(mean / count)
    return int(count)


def _one_entry(xs: list[Tensor]) -> Tensor:
    """[N_r, C, H_r, W_r] each -> [1, C, sum of N_r * H_r * W_r, 1]"""
    return torch.cat([x.movedim(1, 0).flatten(1) for x in xs], dim=1)[None, ..., None]


def _entries_of(y: Tensor, xs: list[Tensor]) -> list[Tensor]:
    """The way back from `_one_entry`, to the shapes of `xs`."""
    parts = y[0, ..., 0].split([x.numel() // x.shape[1] for x in xs], dim=1)
    return [part.view(x.movedim(1, 0).shape).movedim(0, 1).contiguous() for part, x in zip(parts, xs)]


@torch.no_grad()
def _group_statistics(
    xs: list[Tensor], running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The group's mean [R, C] and invstd [R, C] in fp32 and count [R] in int32; updates the running statistics.

    invstd stands for the variance on the wire too: it keeps variance + eps to fp32 accuracy. One all-gather.
    """
    parts = []
    for x in xs:
        mean, invstd = _moments(x, eps)
        parts += [mean, invstd, mean.new_full((1,), x.numel() / x.shape[1] or EMPTY)]
    everyone = all_gather(torch.cat(parts), group)
    everyone = everyone.view(len(everyone), len(xs), -1)  # [ranks, R, 2C+1]
    mean, invstd, count = everyone.split([len(running_mean), len(running_mean), 1], dim=2)
    return *_combine(mean, invstd, count, running_mean, running_var, momentum, eps), count[..., 0].sum(0).int()


def _combine(
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Of ranks [ranks, R, C], [ranks, R, C], [ranks, R, 1] -> mean, invstd [R, C]; updates the running statistics."""
    if mean.device.type != "cpu":
        combine, running = torch.batch_norm_gather_stats_with_counts, (running_mean, running_var)
        of_one = zip(mean.unbind(1), invstd.unbind(1), count.unbind(1))
        combined = [combine(m, m, i, *running, momentum, eps, n.flatten()) for m, i, n in of_one]
        group_mean, group_invstd = map(torch.stack, zip(*combined))
        return group_mean, group_invstd
    total = count.sum(0)
    share = count / total
    group_mean = (share * mean).sum(0)
    var = (share * (invstd**-2 - eps + (mean - group_mean) ** 2)).sum(0)
    for m, v in zip(group_mean, var * (total / (total - 1))):
        running_mean.lerp_(m, momentum)
        running_var.lerp_(v, momentum)
    return group_mean, (var + eps).rsqrt()


class _Context(FunctionCtx):
    """What autograd makes of a forward for its backward, to type checkers."""

    group: dist.ProcessGroup
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Normalise(torch.autograd.Function):
    """xs -> (x - mean) * invstd * weight + bias each, where mean and invstd depend on the batches of all the group."""

    @staticmethod
    def forward(
        ctx: _Context,
        group: dist.ProcessGroup,
        eps: float,
        stats: tuple[Tensor, Tensor, Tensor],
        weight: Tensor,
        bias: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        xs = [x.contiguous(memory_format=_layout(x)) for x in given]
        ctx.group = group
        ctx.save_for_backward(weight, *stats, *xs)
        mean, invstd, _ = stats
        return tuple(_affine(x, weight, bias, mean[r], invstd[r], eps) for r, x in enumerate(xs))

    @staticmethod
    def backward(ctx: _Context, *given: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, invstd, count, *xs = ctx.saved_tensors
        dys = [dy.contiguous(memory_format=_layout(x)) for dy, x in zip(given, xs)]
        each = [t for r, (dy, x) in enumerate(zip(dys, xs)) for t in _sums(dy, x, mean[r], invstd[r], weight)]
        sums = torch.stack(each).view(len(xs), 2, -1)  # of dy and of dy * (x - mean), for each resolution and channel
        dbias, dweight = sums[:, 0].sum(0), (sums[:, 1] * invstd).sum(0)
        if not any(ctx.needs_input_grad[5:]):
            return None, None, None, dweight, dbias, *[None] * len(xs)
        dist.all_reduce(sums, group=ctx.group)
        dxs = [
            _input_gradient(dy, x, mean[r], invstd[r], weight, sums[r, 0], sums[r, 1], count[r : r + 1])
            for r, (dy, x) in enumerate(zip(dys, xs))
        ]
        return None, None, None, dweight, dbias, *dxs


def _layout(x: Tensor) -> torch.memory_format:
    is_nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_nhwc else torch.contiguous_format


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean [C], 1 / sqrt(biased variance + eps) [C] in fp32."""
    if x.numel() == 0:
        return torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
    if x.device.type != "cpu":
        return torch.batch_norm_stats(x.contiguous(memory_format=_layout(x)), eps)
    dims = _all_but_channels(x)
    mean = x.mean(dims, dtype=torch.float32)
    return mean, ((x - _per_channel(mean, x)).square_().mean(dims) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" and x.numel():
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
    scale = invstd * weight
    return (x * _per_channel(scale, x)).add_(_per_channel(bias - mean * scale, x)).to(x.dtype)


def _sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dy and dy * (x - mean) over all but channels: [C], [C] in fp32."""
    if x.device.type != "cpu" and x.numel():
        return torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, False, False)[:2]
    dims = _all_but_channels(x)
    return dy.sum(dims, dtype=torch.float32), (x - _per_channel(mean, x)).mul_(dy).sum(dims)


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    if x.device.type != "cpu" and x.numel():
        return torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count)
    by_dy = invstd * weight
    by_x = -by_dy * invstd**2 * sum_dy_xmu / count
    rest = -by_dy * sum_dy / count - by_x * mean
    dx = (x * _per_channel(by_x, x)).add_(_per_channel(rest, x))
    return dx.addcmul_(dy.float(), _per_channel(by_dy, x)).to(x.dtype)
