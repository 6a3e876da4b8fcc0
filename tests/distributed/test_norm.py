"""Grouped SyncBN: each group of ranks normalises as one rank holding the group's whole batch."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from seer_scale.bench.collectives import CollectiveCounter
from seer_scale.models.layers.norm import BatchNorm
from seer_scale.models.layers.stateful import Tape
from seer_scale.models.regnet import Block
from tests.ranks import run_ranks

CHANNELS = 4
LAYOUTS = [("cpu", torch.contiguous_format), ("cpu", torch.channels_last)]
if torch.cuda.is_available():
    LAYOUTS += [("cuda", torch.contiguous_format), ("cuda", torch.channels_last)]


def batches(rank: int, group_size: int) -> list[torch.Tensor]:
    """Unequal local batches in two resolutions and one without; rank 0 has none of the last if its group is shared."""
    generator = torch.Generator().manual_seed(rank)
    last = 2 * rank + 2 * (group_size == 1)
    shapes = [(rank + 2, CHANNELS, 5, 5), (3 - rank % 2, CHANNELS, 3, 2), (last, CHANNELS)]
    return [torch.randn(shape, generator=generator) * (1 + rank) + rank for shape in shapes]


def affine(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        layer.bias.copy_(torch.linspace(1, 0, CHANNELS))
    return layer


def loss(ys: list[torch.Tensor]) -> torch.Tensor:
    return sum((y.cos() + 0.1 * y.square()).sum() for y in ys)


def assert_close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-5) -> None:
    """torch.testing's, without its import of DTensor, which takes seconds on every rank."""
    gap = (a - b).abs()
    assert a.shape == b.shape and bool((gap <= within * (1 + b.abs())).all()), f"differs by up to {gap.max()}"


def kinds(seen: CollectiveCounter) -> list[str]:
    return [kind for kind, *_ in seen.calls]


def equals_the_groups_whole_batch(rank, group, members, device, layout):
    whole = affine(nn.BatchNorm2d(CHANNELS))
    whole._check_input_dim = lambda x: None  # [N, C] too
    per_rank = [[x.requires_grad_() for x in batches(r, len(members))] for r in members]
    expected = [whole(torch.cat(entry)) for entry in zip(*per_rank)]
    loss(expected).backward()
    mine = members.index(rank)
    expected = [y.split([len(x) for x in entry])[mine] for y, entry in zip(expected, zip(*per_rank))]

    ours = affine(BatchNorm(CHANNELS)).to(device)
    ours.process_group = group
    xs = [x.to(device) for x in batches(rank, len(members))]
    xs = [(x.contiguous(memory_format=layout) if x.dim() == 4 else x).requires_grad_() for x in xs]
    with CollectiveCounter() as seen:
        ys = ours(xs)
        shared = len(members) > 1
        assert kinds(seen) == ["all_gather"] * shared
        loss(ys).backward()
        assert kinds(seen) == ["all_gather", "all_reduce"] * shared
    for y, y_whole, x, x_whole in zip(ys, expected, xs, per_rank[mine]):
        assert_close(y.cpu(), y_whole)
        assert_close(x.grad.cpu(), x_whole.grad)
    for p, p_whole in zip(ours.parameters(), whole.parameters()):
        gradient = p.grad.cpu()
        dist.all_reduce(gradient, group=group)  # a layer's gradients are its rank's sums
        assert_close(gradient, p_whole.grad, within=1e-5 if device == "cpu" else 5e-5)  # sums over blocks of threads
    for b, b_whole in zip(ours.buffers(), whole.buffers()):
        assert_close(b.cpu(), b_whole)

    # half precision in, the same out, within its rounding
    with torch.no_grad():
        for y, y_whole in zip(ours([x.half() for x in xs]), expected):
            assert y.dtype == torch.half
            assert_close(y.cpu().float(), y_whole, within=1e-2)


def recomputing_repeats_nothing(group, device):
    """A block under activation checkpointing: the same bits, the same collectives, even when backward runs twice."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        block = Block(8, 16, stride=2, group_width=8, se_ratio=0.25)
        for p in block.parameters():
            nn.init.uniform_(p, -0.5, 0.5)
        block.to(device)
        norms = [m for m in block.modules() if isinstance(m, BatchNorm)]
        for m in norms:
            m.process_group = group
        torch.manual_seed(1 + dist.get_rank())
        xs = [torch.randn(n, 8, size, size, device=device, requires_grad=True) for n, size in ((2, 6), (3, 4))]
        with CollectiveCounter() as seen:
            if recompute:
                ys = checkpoint(block, xs, use_reentrant=False, context_fn=Tape.contexts)
            else:
                ys = block(xs)
            loss(ys).backward(retain_graph=True)
            assert kinds(seen) == ["all_gather"] * len(norms) + ["all_reduce"] * len(norms)
            loss(ys).backward()
            assert kinds(seen) == ["all_gather"] * len(norms) + ["all_reduce"] * 2 * len(norms)
        results.append([*ys, *(x.grad for x in xs), *(p.grad for p in block.parameters()), *block.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def check_groups(rank, world_size):
    for size in (1, 2, 4):
        groups = [list(range(start, start + size)) for start in range(0, world_size, size)]
        group, _ = dist.new_subgroups_by_enumeration(groups)
        for device, layout in LAYOUTS:
            equals_the_groups_whole_batch(rank, group, groups[rank // size], device, layout)


def check_recomputing(rank, world_size):
    for device in {device for device, _ in LAYOUTS}:
        recomputing_repeats_nothing(dist.group.WORLD, device)


def test_a_group_of_ranks_is_one_rank_with_the_whole_batch():
    run_ranks(4, check_groups)


def test_recomputing_changes_no_bit_and_repeats_no_exchange():
    run_ranks(2, check_recomputing)
