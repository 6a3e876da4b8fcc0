"""Masks: blocks, who is masked, strata and buffers, the same for any part of the global batch."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.methods.masking import BlockMasking, Masks, block_mask
from seer_scale.rng import numpy_generator


@pytest.mark.parametrize("batch, side, bound", [(12, 16, 967), (32, 16, 2496), (64, 16, 4941), (64, 14, 3771)])
def test_half_of_the_crops_and_the_published_bound(batch, side, bound):
    """What the released code reserves for a GPU with the whole batch; DINOv3's rule fills it."""
    for exact in (False, True):
        masking = BlockMasking(seed=1, grid=(side, side), global_batch=batch, exact=exact)
        masks = masking.draw(0, 0, batch)
        counts = masks.masked.sum(1)
        assert masking.bound(batch) == len(masks.places) == bound
        assert int((counts > 0).sum()) == batch and int(counts.max()) <= side**2 // 2
        assert int(counts.sum()) == bound if exact else 0.9 * bound < int(counts.sum()) < bound


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    high=st.integers(1, 16),
    wide=st.integers(1, 16),
    target=st.integers(0, 300),
    exact=st.booleans(),
)
def test_blocks_never_mask_more_than_asked(seed, high, wide, target, exact):
    target = min(target, high * wide)
    count = int(block_mask(numpy_generator(seed), (high, wide), target, exact=exact).sum())
    assert count == target if exact else count <= target


def test_blocks_fall_hardly_short():
    counts = [int(block_mask(numpy_generator(i), (16, 16), 77).sum()) for i in range(500)]
    assert 76.8 < np.mean(counts) <= 77 and 73 <= min(counts) and max(counts) == 77


def released(draw, side, target):
    """DINOv2's MaskingGenerator (data/masking.py), written out patch by patch."""
    mask, count = np.zeros((side, side), bool), 0
    while count < target:
        most, delta = min(target - count, side * side / 2), 0
        for _ in range(10):
            area, aspect = draw.uniform(4, most), math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if w < side and h < side:
                top, left = draw.randint(0, side - h), draw.randint(0, side - w)
                inside = [(i, j) for i in range(top, top + h) for j in range(left, left + w)]
                new = sum(not mask[place] for place in inside)
                if 0 < new <= most:
                    for place in inside:
                        mask[place] = True
                    delta = new
                    break
        if not delta:
            break
        count += delta
    return mask


def test_blocks_lie_as_the_released_ones():
    """How often each patch is masked, alone and with its neighbours, over many masks of either."""
    draw, figures = random.Random(0), []
    theirs = np.stack([released(draw, 12, 40) for _ in range(1500)])
    ours = np.stack([block_mask(numpy_generator(i), (12, 12), 40) for i in range(1500)])
    for masks in (ours, theirs):
        beside, above = masks[:, :, 1:] & masks[:, :, :-1], masks[:, 1:] & masks[:, :-1]
        figures.append([masks.mean(0).ravel(), beside.mean(0).ravel(), above.mean(0).ravel()])
    for a, b in zip(*figures, strict=True):  # five standard errors of the difference
        assert np.abs(a - b).max() < 5 * math.sqrt(2 * 0.25 / 1500) and abs(a.mean() - b.mean()) < 0.002
        assert np.corrcoef(a, b)[0, 1] > 0.9 and a.max() > 2 * a.min()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    samples_seen=st.integers(0, 10**9),
    views=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]),
    exact=st.booleans(),
)
def test_parts_of_a_batch_have_its_masks(seed, ranks, samples_seen, views, share, exact):
    """On any number of ranks, which all reserve as much; and what is packed is what is masked."""
    masking = BlockMasking(seed=seed, grid=(7, 5), global_batch=12, views=views, share=share, exact=exact)
    own = 12 // ranks
    whole = masking.draw(samples_seen, 0, 12)
    parts = [masking.draw(samples_seen, own * rank, own) for rank in range(ranks)]
    by_view = torch.cat([part.masked.unflatten(0, (views, own)) for part in parts], 1).flatten(0, 1)
    assert torch.equal(by_view, whole.masked)
    assert {len(part.places) for part in parts} == {masking.bound(own)}
    assert int((whole.masked.sum(1) > 0).sum()) <= masking.num_masked == int(share * views * 12 + 1e-6)
    for masks in (whole, *parts):
        assert_packed(masks)


def assert_packed(masks: Masks) -> None:
    counts = masks.masked.sum(1)
    num = int(counts.sum())
    assert num <= len(masks.places) == len(masks.counts) and len(masks.places) > 0
    assert masks.places[:num].tolist() == masks.masked.flatten().nonzero()[:, 0].tolist()
    assert not masks.places[num:].any() and not masks.counts[num:].any()
    crops = masks.places[:num] // masks.masked.shape[1]
    torch.testing.assert_close(masks.counts[:num], counts[crops].float())


def test_every_image_has_one_masked_view_of_two_and_every_stratum_one_crop():
    masking = BlockMasking(seed=3, grid=(32, 32), global_batch=64, exact=True)
    views = []
    for step in range(20):
        counts = masking.draw(64 * step, 0, 64).masked.sum(1).view(2, 64)
        assert ((counts > 0).sum(0) == 1).all()
        strata = [int(1024 * edge + 1e-6) for edge in np.linspace(0.1, 0.5, 65)[1:]]
        assert sorted(counts.sum(0).tolist()) == strata
        views.append((counts[0] > 0).double())
    assert 0.45 < torch.stack(views).mean() < 0.55


def test_a_place_in_the_batch_gets_every_share():
    masking = BlockMasking(seed=3, grid=(16, 16), global_batch=64, exact=True)
    counts = [int(masking.draw(64 * step, 10, 1).masked.sum()) for step in range(400)]
    assert np.mean(counts) == pytest.approx(0.303 * 256, rel=0.05) and np.std(counts) == pytest.approx(29.6, rel=0.1)


@pytest.mark.parametrize("batch, images", [(3072, 12), (3072, 6), (2048, 64), (4096, 8), (1000, 10)])
def test_the_bound_of_a_part_holds_and_is_near_what_fills_it(batch, images):
    masking = BlockMasking(seed=0, grid=(16, 16), global_batch=batch, exact=True)
    bound = masking.bound(images)
    assert bound < 1.2 * 0.3 * 256 * images
    for step in range(20):
        masks = masking.draw(batch * step, images * (step % (batch // images)), images)
        assert int(masks.masked.sum()) <= bound
