"""The order of images: a bijection each epoch, another one each epoch and seed, the same for any number of ranks."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.data.sampler import ElasticSampler, permute

small = st.integers(1, 3000)
seeds = st.integers(0, 2**31)


@settings(deadline=None)
@given(n=small, seed=seeds, epoch=st.integers(0, 10**6))
def test_permute_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(1, 10**12), seed=seeds, data=st.data())
def test_permute_is_injective_and_in_range_at_any_size(n, seed, data):
    positions = np.unique(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=200)))
    images = permute(positions, n, seed, 3)
    assert images.min() >= 0 and images.max() < n and len(np.unique(images)) == len(positions)
    alone = [int(permute(positions[i : i + 1], n, seed, 3)[0]) for i in range(min(5, len(positions)))]
    assert alone == images[: len(alone)].tolist()


def test_epochs_and_seeds_differ():
    n = 10_000
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    for a in range(len(orders)):
        for b in range(a):
            assert (orders[a] == orders[b]).sum() < 10  # chance agrees once; P(10 or more) < 1e-6


@pytest.mark.parametrize("n", [10, 1000, 2**14, 100_003])
def test_order_looks_random(n):
    """Where an image lands is uniform (chi-square, ten bins) and uncorrelated with its neighbour: within 5 sigma."""
    epochs = 20 if n > 10 else 4000
    places = np.stack([permute(np.arange(n), n, 0, e) for e in range(epochs)])
    for position in (0, n // 2, n - 1):
        counts = np.bincount(places[:, position] * 10 // n, minlength=10)
        expected = epochs / 10
        assert ((counts - expected) ** 2 / expected).sum() < 9 + 5 * np.sqrt(18)
    if n > 10:
        x = places[0].astype(float)
        assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 5 / np.sqrt(n)


@settings(deadline=None)
@given(
    n=st.integers(1, 500), seed=seeds, worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=12)
)
def test_every_image_once_an_epoch_over_any_resizes(n, seed, worlds):
    """Batches of 12 by another number of ranks each step: the same images as on one rank, each once an epoch."""
    sampler = ElasticSampler(n, seed, 12)
    got = []
    for step, world in enumerate(worlds):
        parts = [sampler.slots(12 * step, rank, world) for rank in range(world)]
        epochs, offsets, images = (np.concatenate(x) for x in zip(*parts))
        alone = sampler.slots(12 * step, 0, 1)
        assert all(np.array_equal(a, b) for a, b in zip((epochs, offsets, images), alone))
        assert np.array_equal(epochs * n + offsets, 12 * step + np.arange(12))
        got += list(zip(epochs.tolist(), images.tolist()))
    assert len(set(got)) == len(got)


@pytest.mark.parametrize("position", [0, 10**9 - 1000, 123_456_789_012])
def test_a_billion_images_cost_nothing(position):
    """Issue 2: at 1e9 images the first batch within 50 ms and 1 MB, at any position."""
    permute(np.arange(2), 2, 0, 0)  # imports are not the sampler's cost
    times = []
    for seed in range(3):
        start = time.perf_counter()
        ElasticSampler(10**9, seed, 8192).slots(position, 3, 4)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    tracemalloc.start()
    try:
        ElasticSampler(10**9, 7, 8192).slots(position, 3, 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_cannot_be_asked():
    for ask in (
        lambda: ElasticSampler(0, 0, 4),
        lambda: ElasticSampler(10, 0, 4).slots(0, 0, 3),
        lambda: ElasticSampler(10, 0, 4).slots(0, 2, 2),
        lambda: permute(np.array([10]), 10, 0, 0),
        lambda: permute(np.array([-1]), 10, 0, 0),
    ):
        with pytest.raises(ValueError):
            ask()
