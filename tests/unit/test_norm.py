"""BatchNorm on one rank: a list is one call an entry, and recomputation leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seer_scale.models.layers.norm import (
    BatchNorm,
    _affine,
    _combine,
    _input_gradient,
    _moments,
    _sums,
    estimate_statistics,
)
from seer_scale.models.layers.stateful import Tape
from seer_scale.models.registry import build_backbone, initialise

SHAPES = [(3, 4, 5, 5), (6, 4, 3, 2), (5, 4)]


def plain_and_ours(channels: int = 4) -> tuple[nn.BatchNorm2d, BatchNorm]:
    torch.manual_seed(0)
    plain, ours = nn.BatchNorm2d(channels), BatchNorm(channels)
    plain._check_input_dim = lambda x: None  # [N, C] too
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def test_a_list_is_one_call_an_entry_in_order():
    plain, ours = plain_and_ours()
    for training in (True, True, False):
        plain.train(training), ours.train(training)
        xs = [torch.randn(shape) + 1 for shape in SHAPES]
        ys = ours(xs)
        assert all(torch.equal(y, plain(x)) for x, y in zip(xs, ys))
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers()))
    assert ours.num_batches_tracked == 2 * len(SHAPES)
    assert torch.equal(ours(xs[0]), plain(xs[0]))  # a single tensor


def test_jointly_the_entries_of_a_list_are_one_batch():
    plain, ours = plain_and_ours()
    ours.joint = True
    xs = [(torch.randn(shape) + r).requires_grad_() for r, shape in enumerate(SHAPES[:2])]
    whole = torch.cat([x.movedim(1, 0).flatten(1) for x in xs], dim=1).T  # [pixels, C]
    expected = plain(whole).T
    ys = ours(xs)
    torch.testing.assert_close(torch.cat([y.movedim(1, 0).flatten(1) for y in ys], dim=1), expected)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    got, wanted = (torch.autograd.grad(y.square().sum(), xs) for y in (torch.cat([y.flatten() for y in ys]), expected))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for y, x in zip(ours.eval()(xs), xs):
        torch.testing.assert_close(y, plain.eval()(x))


def test_estimated_statistics_are_the_mean_over_batches_and_nothing_else_moves():
    """Of each layer after those before it; in eval mode, and what does not count does not."""
    net = nn.Sequential(BatchNorm(4), nn.Conv2d(4, 3, 1), BatchNorm(3), nn.Dropout(0.5)).eval()
    twin = copy.deepcopy(net)
    batches = [torch.randn(8, 4, 3, 3) * (i + 1) + i for i in range(3)]

    def forwards():
        for i, x in enumerate(batches):
            net(x)
            yield (i % 2 == 0) * len(x)

    found = []
    for x in batches[::2]:
        of_batch = copy.deepcopy(twin).train()
        for layer in of_batch:
            layer.momentum = 1.0
        of_batch(x)
        found.append(of_batch.state_dict())
    assert estimate_statistics(net, forwards()) == 16
    for name, ours in net.state_dict().items():
        is_statistic = "running" in name
        expected = (found[0][name] + found[1][name]) / 2 if is_statistic else twin.state_dict()[name]
        torch.testing.assert_close(ours, expected, msg=name, **({} if is_statistic else {"rtol": 0, "atol": 0}))
    kept = copy.deepcopy(net.state_dict())
    assert estimate_statistics(net, iter([0, 0])) == 0 == estimate_statistics(nn.Linear(1, 1), iter([1]))
    with pytest.raises(ZeroDivisionError):
        estimate_statistics(net, (1 // 0 for _ in range(1)))
    x = batches[0]
    assert torch.equal(net(x)[:2], net(x[:2])), "it is in eval mode again"
    assert all(torch.equal(t, kept[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_in_and_out_with_fp32_statistics(dtype, training):
    plain, ours = plain_and_ours()
    plain.train(training), ours.train(training)
    x = (torch.randn(64, 4, 5, 5) + 8).to(dtype)
    y, expected = ours(x), plain(x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))
    torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-5, atol=1e-6)


DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [[1, 2], [0, 3], [2, 0, 1]])
@pytest.mark.parametrize("device", DEVICES)
def test_the_statistics_of_parts_combine_to_those_of_the_whole(device, splits, dtype, layout):
    """The maths of the grouped path without ranks: any split, even with an empty part first, and its gradient; far from
    zero, where a variance is easily lost. On a GPU these are the kernels that ranks use."""
    plain, ours = (m.to(device) for m in plain_and_ours())
    within = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    whole, parts, xs, expected = [], [], [], []
    for shape in SHAPES:
        x = (torch.randn(shape, device=device) + 10).to(dtype)
        x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
        whole.append(x.float().requires_grad_())
        edges = [round(len(x) * sum(splits[:i]) / 3) for i in range(len(splits) + 1)]
        parts.append([slice(a, b) for a, b in zip(edges, edges[1:])])
        xs.append([x[p] for p in parts[-1]])
        expected.append(plain(whole[-1]))
    dys = [torch.randn_like(y).to(dtype) for y in expected]
    torch.autograd.backward(expected, [dy.float() for dy in dys])
    with torch.no_grad():
        ranks = []
        for of_rank in zip(*xs):
            of_entries = zip(*[_moments(x, 1e-5) for x in of_rank])
            counts = torch.tensor([[x.numel() / 4 or 1e-30] for x in of_rank], device=device)
            ranks.append([*map(torch.stack, of_entries), counts])
        mean, invstd, count = map(torch.stack, zip(*ranks))
        mean, invstd = _combine(mean, invstd, count, ours.running_mean, ours.running_var, 0.1, 1e-5)
        total = count.sum(0).int()
        for r, x in enumerate(xs):
            stats, dy = (mean[r], invstd[r]), [dys[r][p] for p in parts[r]]
            sums = [sum(s) for s in zip(*[_sums(d, part, *stats, ours.weight) for d, part in zip(dy, x)])]
            for p, d, part in zip(parts[r], dy, x):
                y = _affine(part, ours.weight, ours.bias, *stats, 1e-5)
                dx = _input_gradient(d, part, *stats, ours.weight, *sums, total[r])
                assert y.dtype == dx.dtype == dtype
                torch.testing.assert_close(y.float(), expected[r][p], rtol=within, atol=within)
                torch.testing.assert_close(dx.float(), whole[r].grad[p], rtol=within, atol=within)
    torch.testing.assert_close(ours.running_mean, plain.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-4, atol=1e-5)


def test_recomputing_every_unit_changes_no_bit():
    model = build_backbone("regnety", depth=5, w0=8, wa=12.0, wm=2.0, group_width=8)
    initialise(model, 0)
    recomputed = copy.deepcopy(model)
    for unit in recomputed.shard_units().values():
        forward = unit.forward
        unit.forward = lambda xs, forward=forward: checkpoint(
            forward, xs, use_reentrant=False, context_fn=Tape.contexts
        )
    xs = [torch.randn(2, 3, 64, 64), torch.randn(4, 3, 48, 48)]
    for _ in range(2):  # the second step sees the running statistics of the first
        for m in (model, recomputed):
            loss = sum(y.square().mean() for y in m(xs))
            loss.backward(retain_graph=True)
            loss.backward()  # a kept graph is recomputed again
    for a, b in zip(model.parameters(), recomputed.parameters()):
        assert torch.equal(a.grad, b.grad)
    for (name, a), b in zip(model.named_buffers(), recomputed.buffers()):
        assert torch.equal(a, b), name
