"""Batch normalisation of several resolutions at once, with statistics shared by a group of ranks if wished.

Every entry of a list is normalised by its own batch statistics, as if the layer were called once an entry in order.
A group of ranks exchanges the statistics of all entries together: one all-gather forward, one all-reduce backward.
Unequal counts are combined after Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979); the gradient is Ioffe and Szegedy's (arXiv 1502.03167), its sums taken over the group.
The CUDA kernels are those of torch.nn.SyncBatchNorm.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EMPTY = 1e-30
"""The count an empty entry sends: no weight among others, yet no 0/0 where it comes first."""


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d (parameters, buffers and defaults) over a list of tensors, one a resolution.

    `process_group`: None for local statistics, or the group of ranks whose batches count as one. Statistics and affine
    maths are fp32 whatever the input; the gradients of weight and bias are this rank's sums.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, xs: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        """[N_r, C, H_r, W_r] or [N_r, C] each -> the same shapes and dtypes; a single tensor gives a tensor.

        In training with a group of several ranks: one all-gather of [R, 2C+1] fp32 here, one all-reduce of [R, 2, C]
        fp32 in backward. All its ranks give equally many entries; N_r may differ, and be 0 on some of them.
        """
        if isinstance(xs, Tensor):
            return self.forward([xs])[0]
        weight, bias = self.weight.float(), self.bias.float()
        running = self.running_mean, self.running_var
        if not self.training:
            return [F.batch_norm(x, *running, weight, bias, eps=self.eps) for x in xs]
        tape = getattr(_thread, "tape", None)
        recomputing = tape is not None and tape.replay
        if recomputing or getattr(_thread, "kept", False):
            # autograd must find as many saved tensors in a recompute as the first time, so None would not do
            running = [r.clone() for r in running]
        else:
            self.num_batches_tracked.add_(len(xs))
        if self.process_group is None or dist.get_world_size(self.process_group) == 1:
            return [F.batch_norm(x, *running, weight, bias, True, self.momentum, self.eps) for x in xs]
        if recomputing:
            stats = next(tape.left)
        else:
            stats = _group_statistics(xs, *running, self.momentum, self.eps, self.process_group)
            if tape is not None:
                tape.stats.append(stats)
        return list(_Normalise.apply(self.process_group, self.eps, stats, weight, bias, *xs))


_thread = threading.local()


@contextmanager
def running_statistics_kept() -> Iterator[None]:
    """Forward passes in training mode inside leave this thread's running statistics and batch counts as they are."""
    _thread.kept = True
    try:
        yield
    finally:
        _thread.kept = False


@dataclass
class _Pass:
    """A context in which this thread's BatchNorm layers write their statistics to a list, or read them back."""

    stats: list[tuple[Tensor, Tensor, Tensor]]
    replay: bool
    left: Iterator = field(default=iter(()), init=False)

    def __enter__(self) -> None:
        assert getattr(_thread, "tape", None) is None, "recomputed units do not nest"
        self.left = iter(self.stats)  # a graph kept for a second backward is recomputed from the first layer again
        _thread.tape = self

    def __exit__(self, *_: object) -> None:
        _thread.tape = None


class StatsTape:
    """Lets a block with BatchNorm be recomputed in backward without a second exchange or running-stat update.

    Use: `torch.utils.checkpoint.checkpoint(block, xs, use_reentrant=False, context_fn=StatsTape.contexts)`.
    """

    @staticmethod
    def contexts() -> tuple[_Pass, _Pass]:
        """(first, again): two contexts of a new tape, the first to record a forward and the second to repeat it."""
        stats: list[tuple[Tensor, Tensor, Tensor]] = []
        return _Pass(stats, replay=False), _Pass(stats, replay=True)


@torch.no_grad()
def _group_statistics(xs, running_mean, running_var, momentum, eps, group) -> tuple[Tensor, Tensor, Tensor]:
    """The group's mean [R, C] and invstd [R, C] in fp32 and count [R] in int32; updates the running statistics.

    invstd stands for the variance on the wire too: it keeps variance + eps to fp32 accuracy. One all-gather.
    """
    parts = []
    for x in xs:
        mean, invstd = _moments(x, eps)
        parts += [mean, invstd, mean.new_full((1,), x.numel() / x.shape[1] or EMPTY)]
    mine = torch.cat(parts)
    num_ranks, channels = dist.get_world_size(group), len(running_mean)
    everyone = mine.new_empty(num_ranks * len(mine))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    mean, invstd, count = everyone.view(num_ranks, len(xs), -1).split([channels, channels, 1], dim=2)  # [ranks, R, .]
    combine = torch.batch_norm_gather_stats_with_counts if mine.is_cuda else _combine
    combined = [
        combine(mine, mean[:, r], invstd[:, r], running_mean, running_var, momentum, eps, count[:, r, 0])
        for r in range(len(xs))
    ]
    return *map(torch.stack, zip(*combined)), count[..., 0].sum(0).int()


def _combine(_, mean, invstd, running_mean, running_var, momentum, eps, count) -> tuple[Tensor, Tensor]:
    """torch.batch_norm_gather_stats_with_counts for the CPU: [ranks, C], [ranks, C], [ranks] -> mean, invstd [C]."""
    share = (count / count.sum())[:, None]
    total_mean = (share * mean).sum(0)
    var = (share * (invstd**-2 - eps + (mean - total_mean) ** 2)).sum(0)
    running_mean.lerp_(total_mean, momentum)
    running_var.lerp_(var * (count.sum() / (count.sum() - 1)), momentum)
    return total_mean, (var + eps).rsqrt()


class _Normalise(torch.autograd.Function):
    """xs -> (x - mean) * invstd * weight + bias each, where mean and invstd depend on the batches of all the group."""

    @staticmethod
    def forward(ctx, group, eps, stats, weight, bias, *xs):
        xs = [x.contiguous(memory_format=_layout(x)) for x in xs]
        ctx.group = group
        ctx.save_for_backward(weight, *stats, *xs)
        mean, invstd, _ = stats
        return tuple(_affine(x, weight, bias, mean[r], invstd[r], eps) for r, x in enumerate(xs))

    @staticmethod
    def backward(ctx, *dys):
        weight, mean, invstd, count, *xs = ctx.saved_tensors
        dys = [dy.contiguous(memory_format=_layout(x)) for dy, x in zip(dys, xs)]
        sums = [t for r, (dy, x) in enumerate(zip(dys, xs)) for t in _sums(dy, x, mean[r], invstd[r], weight)]
        sums = torch.stack(sums).view(len(xs), 2, -1)  # of dy and of dy * (x - mean), for each resolution and channel
        dbias, dweight = sums[:, 0].sum(0), (sums[:, 1] * invstd).sum(0)
        if not any(ctx.needs_input_grad[5:]):
            return None, None, None, dweight, dbias, *[None] * len(xs)
        dist.all_reduce(sums, group=ctx.group)
        dxs = [
            _input_gradient(dy, x, mean[r], invstd[r], weight, *sums[r], count[r : r + 1])
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
    if x.is_cuda:
        return torch.batch_norm_stats(x.contiguous(memory_format=_layout(x)), eps)
    var, mean = torch.var_mean(x.float(), _all_but_channels(x), correction=0)
    return mean, (var + eps).rsqrt()


def _affine(x, weight, bias, mean, invstd, eps) -> Tensor:
    if x.is_cuda and x.numel():
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
    xmu = x.float() - _per_channel(mean, x)
    return torch.addcmul(_per_channel(bias, x), xmu, _per_channel(invstd * weight, x)).to(x.dtype)


def _sums(dy, x, mean, invstd, weight) -> tuple[Tensor, Tensor]:
    """The sums of dy and dy * (x - mean) over all but channels: [C], [C] in fp32."""
    if x.is_cuda and x.numel():
        return torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, False, False)[:2]
    dims, dy = _all_but_channels(x), dy.float()
    return dy.sum(dims), (dy * (x.float() - _per_channel(mean, x))).sum(dims)


def _input_gradient(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count) -> Tensor:
    if x.is_cuda and x.numel():
        return torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count)
    xmu = x.float() - _per_channel(mean, x)
    through_var = xmu * _per_channel(sum_dy_xmu * invstd**2 / count, x)
    dx = (dy.float() - _per_channel(sum_dy / count, x) - through_var) * _per_channel(invstd * weight, x)
    return dx.to(x.dtype)
