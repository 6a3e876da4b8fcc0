"""DINO, iBOT, KoLeo and centring against float64 written out, by values and gradients, and by published figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException

from seer_scale.config import Config, Train
from seer_scale.distributed import World
from seer_scale.methods.image_groups import group_problem
from seer_scale.methods.losses.centering import softmax_center
from seer_scale.methods.losses.dino import dino_loss
from seer_scale.methods.losses.gram import gram_loss
from seer_scale.methods.losses.ibot import ibot_loss
from seer_scale.methods.losses.koleo import koleo_loss
from seer_scale.methods.losses.sinkhorn import sinkhorn
from seer_scale.plan.fakes import FastFakeTensorMode
from tests.unit.test_sinkhorn import reference as sinkhorn_of

ROWS = torch.tensor([[0.1, 0.3, -0.2], [0.4, 0.0, 0.2], [-0.3, 0.5, 0.1], [0.2, 0.2, 0.6]])
SIZES = st.integers(1, 5)


def cross_entropy(target, logits, temperature):
    logits = logits / temperature
    return -(target * (logits - logits.exp().sum(-1, keepdim=True).log())).sum(-1)


def dino_reference(global_logits, local_logits, targets, temperature):
    """Every pair apart."""
    pairs = [
        cross_entropy(target, view, temperature).mean()
        for i, target in enumerate(targets)
        for j, view in enumerate([*global_logits, *local_logits])
        if i != j
    ]
    return torch.stack(pairs).mean()


def ibot_reference(logits, targets, crops, temperature):
    """crops: of each token. Crop by crop."""
    total = torch.zeros((), dtype=torch.float64)
    for crop in set(crops):
        own = [i for i, c in enumerate(crops) if c == crop]
        total = total + cross_entropy(targets[own], logits[own], temperature).mean()
    return total


def koleo_reference(features, group):
    total = torch.zeros((), dtype=features.dtype)
    for view in features:
        unit = view / view.norm(dim=1, keepdim=True)
        logs = []
        for i, x in enumerate(unit):
            first = i // group * group
            others = [j for j in range(first, first + group) if j != i]
            nearest = max(others, key=lambda j: float(x.detach() @ unit[j].detach()))
            logs.append(((x - unit[nearest] + 1e-8).square().sum().sqrt() + 1e-8).log())
        total = total - torch.stack(logs).mean()
    return total


def draw(seed, *shape, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def assert_same(ours, theirs, *inputs):
    """Values and gradients of float64 to 1e-9."""
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 3), locals_=st.integers(0, 4), batch=SIZES, k=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_dino_is_the_mean_over_all_pairs(num, locals_, batch, k, seed):
    views, crops = draw(seed, num, batch, k), draw(seed + 1, locals_, batch, k)
    targets = draw(seed + 2, num, batch, k, requires_grad=False).softmax(2)
    ours = dino_loss(views, crops, targets, 0.1)
    assert_same(ours.loss, dino_reference(views, crops, targets, 0.1), views, *([crops] if locals_ else []))
    pairs = num * (num - 1), num * locals_
    both = (ours.between_globals * pairs[0] + ours.local_to_global * pairs[1]) / sum(pairs)
    torch.testing.assert_close(both, ours.loss)


def test_dino_by_published_figures():
    views = torch.tensor([[[0.2, 0.1, 0], [0, 0.3, 0.1]], [[0.1, 0.1, 0.2], [0.3, 0, 0]]])
    crops = torch.tensor([[[0, 0.2, 0.1], [0.1, 0.1, 0.1]], [[0.3, 0.2, 0.1], [0, 0, 0.5]]])
    targets = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [[0.5, 0.3, 0.2], [0.2, 0.6, 0.2]]])
    ours = dino_loss(views, crops, targets, 0.1)
    assert 4 * ours.local_to_global.item() == pytest.approx(8.077210, abs=2e-6)
    assert 2 * ours.between_globals.item() == pytest.approx(3.261910, abs=2e-6)
    assert ours.loss.item() == pytest.approx(1.889853, abs=2e-6)
    with pytest.raises(ValueError, match="was given one"):
        dino_loss(views[:1], crops[:0], targets[:1], 0.1)


@pytest.mark.parametrize(
    "k, dino, local, ibot", [(65_536, 11.090355, 9.858093, 5.545177), (131_072, 11.783502, 10.474224, 5.891751)]
)
def test_losses_of_a_uniform_prediction(k, dino, local, ibot):
    """ln K; of DINO's 18 pairs 16 are of a local view; iBOT's divisor counts the half of all crops without a mask."""
    uniform = torch.full((2, 1, k), 1 / k)
    ours = dino_loss(torch.zeros(2, 1, k), torch.zeros(1, 1, k).expand(8, 1, k), uniform, 0.1)
    assert ours.loss.item() == pytest.approx(dino, rel=1e-6)
    assert 16 / 18 * ours.local_to_global.item() == pytest.approx(local, rel=1e-6)
    assert ibot_loss(torch.zeros(1, k), uniform[0], torch.ones(1), 2, 0.1).item() == pytest.approx(ibot, rel=1e-6)


def test_dino_keeps_one_matrix_a_view():
    """Of 18 pairs of 10 views: their log-probabilities, and the two targets' sum and differences."""
    kept, views, crops = [], torch.randn(2, 3, 50, requires_grad=True), torch.randn(8, 3, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dino_loss(views, crops, torch.rand(2, 3, 50), 0.1)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    assert sum(size for size in sizes.values() if size > 1) == (10 + 2 + 1) * 3 * 50


@settings(max_examples=30, deadline=None)
@given(
    crops=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    padding=st.integers(0, 4),
    k=st.integers(2, 6),
    seed=st.integers(0, 10**6),
)
def test_ibot_is_a_mean_over_the_tokens_of_each_crop_and_padding_is_none(crops, padding, k, seed):
    logits = draw(seed, len(crops) + padding, k)
    targets = draw(seed + 1, len(crops) + padding, k, requires_grad=False).softmax(1)
    counts = torch.tensor([crops.count(c) for c in crops] + [0.0] * padding, dtype=torch.float32)
    theirs = ibot_reference(logits, targets, crops, 0.1) / 7
    assert_same(ibot_loss(logits, targets, counts, 7, 0.1), theirs, logits)


def test_ibot_by_published_figures():
    """Four crops with 2, 0, 1 and 0 masked tokens, of cross-entropies 1, 3 and 5."""
    p = torch.tensor([1.0, 3.0, 5.0]).neg().exp()
    logits = torch.stack([p, 1 - p], 1).log()
    targets, counts = torch.tensor([[1.0, 0.0]]).expand(3, 2), torch.tensor([2.0, 2.0, 1.0])
    assert ibot_loss(logits, targets, counts, 4, 1.0).item() == pytest.approx(1.75)


@settings(max_examples=30, deadline=None)
@given(
    views=SIZES, groups=st.integers(1, 3), group=st.integers(2, 5), dim=st.integers(2, 6), seed=st.integers(0, 10**6)
)
def test_koleo_is_the_distance_to_the_nearest_of_a_group(views, groups, group, dim, seed):
    features = draw(seed, views, groups * group, dim)
    ours = koleo_loss(features, group)
    assert_same(ours, koleo_reference(features, group), features)
    parts = [koleo_loss(part, group) for part in features.split(group, 1)]  # on any ranks, in any micro-batches
    torch.testing.assert_close(torch.stack(parts).mean(), ours)


def test_koleo_by_published_figures():
    features = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]], requires_grad=True)
    loss = koleo_loss(features, 3)
    loss.backward()
    assert loss.item() == pytest.approx(0.342621, abs=1e-6)
    expected = torch.tensor([[0, 1 / 3], [-0.533333, 0.4], [1.0, 0]])
    torch.testing.assert_close(features.grad[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_koleo_of_two_equal_features_is_finite_in_any_precision(dtype):
    same = torch.ones(1, 2, 384, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(same, 2).item() == pytest.approx(15.395588, abs=1e-4)
    for group in (0, 1, 3):
        with pytest.raises(ValueError, match=f"groups of {group} images"):
            koleo_loss(same, group)


def test_koleo_finds_its_neighbours_in_fp32_under_autocast():
    """Of features so near to one another that bf16 would take another for the nearest."""
    features = 1 + 0.01 * torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(0))
    plain = koleo_loss(features, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo_loss(features, 32), plain)


def test_losses_are_fp32_where_the_network_is_not():
    half = torch.randn(2, 4, 8).bfloat16()
    uniform = torch.full((2, 4, 8), 1 / 8, dtype=torch.bfloat16)
    for loss in (dino_loss(half, half, uniform, 0.1).loss, ibot_loss(half[0], uniform[0], torch.ones(4), 2, 0.1)):
        assert loss.dtype == torch.float32


def test_the_centre_follows_one_batch_late():
    center = torch.tensor([0.1, 0.0, -0.05])
    (found,) = softmax_center([ROWS], [center], 0.04, 0.9, World(), [None])
    torch.testing.assert_close(found[1], torch.tensor([0.776966, 0.000430, 0.222604]), atol=1e-6, rtol=0)
    torch.testing.assert_close(center, torch.tensor([0.1, 0.025, -0.0275]))


def test_padding_and_batches_that_are_not_finite_leave_the_centre_alone():
    rows = torch.cat([ROWS, torch.full((2, 3), torch.nan)])
    padded, plain = torch.zeros(3), torch.zeros(3)
    softmax_center([rows], [padded], 0.04, 0.9, World(), [torch.arange(6) < 4])
    softmax_center([ROWS], [plain], 0.04, 0.9, World(), [None])
    assert torch.equal(padded, plain) and plain.any()
    softmax_center([rows], [padded], 0.04, 0.9, World(), [None])
    softmax_center([ROWS], [padded], 0.04, 0.9, World(), [torch.zeros(4, dtype=torch.bool)])
    assert torch.equal(padded, plain)


def test_sinkhorn_by_published_figures():
    (codes,) = sinkhorn([ROWS[None]], 0.07, 3, World())
    expected = [[0.321552, 0.677967, 0.000481], [0.993408, 0.000397, 0.006195]]
    expected += [[0.000090, 0.996962, 0.002949], [0.029379, 0.003558, 0.967064]]
    torch.testing.assert_close(codes[0], torch.tensor(expected), atol=2e-6, rtol=0)
    (codes,) = sinkhorn([ROWS[None]], 1.0, 3, World())
    torch.testing.assert_close(codes[0, 0], torch.tensor([0.365326, 0.381783, 0.252891]), atol=2e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    real=st.lists(st.booleans(), min_size=1, max_size=40),
    k=st.integers(2, 8),
    iterations=st.integers(1, 12),
    above=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 10**6),
)
def test_padding_takes_no_part_in_sinkhorn(real, k, iterations, above, seed):
    """Wherever it stands and however large; beside a set without any."""
    rows, generator = torch.tensor(real), torch.Generator().manual_seed(seed)
    scores, others = torch.randn(1, len(real), k, generator=generator), torch.randn(1, 5, k, generator=generator)
    scores[:, ~rows] += above
    padded, whole = sinkhorn([scores, others], 0.3, iterations, World(), [rows, None])
    assert not padded[:, ~rows].any() and torch.isfinite(padded).all()
    for codes, own in ((padded[0, rows], scores[0, rows]), (whole[0], others[0])):
        torch.testing.assert_close(codes.double(), sinkhorn_of(own, 0.3, iterations), atol=2e-5, rtol=0)


def test_targets_of_large_logits_are_finite():
    """exp(logit / 0.04) overflows fp32 past 3.5489."""
    logits = 1000 * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    (codes,) = sinkhorn([logits], 0.04, 3, World())
    (centred,) = softmax_center([logits[0]], [torch.zeros(16)], 0.04, 0.9, World(), [None])
    assert codes.isfinite().all() and centred.isfinite().all()
    assert torch.tensor([3.5489, 3.5490]).div(0.04).exp().isinf().tolist() == [False, True]


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 48), ranks=st.integers(1, 8), micro_batch=st.integers(0, 12), size=st.integers(1, 20))
def test_a_group_that_no_rank_could_hold_is_refused_with_one_that_fits(batch, ranks, micro_batch, size):
    train = Train(total_samples=1, global_batch=batch, micro_batch=micro_batch)
    config = Config(train=train)
    if batch % ranks:
        assert group_problem("dinov2.koleo_group", size, config, ranks) is None  # told by the batch's own rule
        return
    images = config.images_at_once(ranks)
    problem = group_problem("dinov2.koleo_group", size, config, ranks)
    fits = images % size == 0 and size > 1
    assert (problem is None) == fits
    if fits:
        assert koleo_loss(torch.randn(2, images, 4), size).isfinite()
    else:
        with pytest.raises(ValueError):
            koleo_loss(torch.randn(2, images, 4), size)
        if images > 1:
            assert group_problem("dinov2.koleo_group", problem.nearest, config, ranks) is None


def test_no_step_of_them_reads_a_device_value():
    """Tensors without values do: nothing is looked at on the host, and no shape follows from a mask."""
    with FastFakeTensorMode():
        views, crops, tokens = torch.empty(2, 4, 8, requires_grad=True), torch.empty(8, 4, 8), torch.empty(6, 8)
        rows, center = torch.empty(6, dtype=torch.bool), torch.empty(8)
        codes = sinkhorn([views.flatten(0, 1)[None], tokens[None]], 0.04, 6, World(), [None, rows])
        centred = softmax_center([tokens], [center], 0.04, 0.9, World(), [rows])[0]
        loss = dino_loss(views, crops, codes[0][0].unflatten(0, (2, 4)), 0.1).loss
        loss = loss + ibot_loss(tokens, centred, torch.empty(6), 8, 0.1) + koleo_loss(views, 2)
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert loss.shape == () and codes[1].shape == (1, 6, 8) and views.grad.shape == views.shape


def test_gram_matrices_of_unit_vectors_are_compared():
    """A published figure; lengths do not count."""
    ours, anchors = torch.eye(2)[None], torch.tensor([[[2.0, 0.0], [0.6, 0.8]]])
    assert gram_loss(ours, anchors).item() == pytest.approx(0.18)
    assert gram_loss(anchors, 3 * anchors).item() == pytest.approx(0, abs=1e-12)
