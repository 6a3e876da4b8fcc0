"""The order of images: a bijection each epoch, another one each epoch and seed, the same for any number of ranks."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.data.sampling.order import Order, permute
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler, needed


def sampler_of(n, seed, global_batch, block=1, interleave=1):
    return ElasticSampler([DataVersion(0, (("all", n),), block, interleave)], seed, global_batch)


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
    n=st.integers(1, 500), seed=seeds, block=st.integers(0, 9), interleave=st.integers(1, 30),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=12),
)  # fmt: skip
def test_every_image_once_an_epoch_over_any_resizes(n, seed, block, interleave, worlds):
    """Batches of 12 by another number of ranks each step: the same images as on one rank, each once an epoch."""
    sampler = sampler_of(n, seed, 12, block, interleave)
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
        sampler_of(10**9, seed, 8192).slots(position, 3, 4)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    tracemalloc.start()
    try:
        sampler_of(10**9, 7, 8192).slots(position, 3, 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_cannot_be_asked():
    for ask in (
        lambda: sampler_of(0, 0, 4),
        lambda: sampler_of(10, 0, 4).slots(0, 0, 3),
        lambda: sampler_of(10, 0, 4).slots(0, 2, 2),
        lambda: permute(np.array([10]), 10, 0, 0),
        lambda: permute(np.array([-1]), 10, 0, 0),
    ):
        with pytest.raises(ValueError):
            ask()


# ---------------------------------------------------------------------------------------- neighbours read together

blocks = st.integers(1, 40)


@settings(deadline=None)
@given(n=small, seed=seeds, epoch=st.integers(0, 100), block=blocks, interleave=blocks)
def test_an_order_by_blocks_is_a_bijection(n, seed, epoch, block, interleave):
    order = Order(n, seed, block, interleave)
    images = order.at(epoch, np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))
    assert np.array_equal(images[::-7], order.at(epoch, np.arange(n)[::-7]))  # by index, whatever else is asked for


@settings(deadline=None)
@given(n=st.integers(40, 20_000), seed=seeds, block=st.integers(2, 40), interleave=blocks)
def test_a_lane_reads_one_block_after_the_other(n, seed, block, interleave):
    """Every interleave-th position: block for block, each whole; the last rows, of fewer blocks, excepted."""
    order = Order(n, seed, block, interleave)
    images, window = order.at(1, np.arange(n)), interleave * min(block, n)
    for start in range(0, n // window * window, window):
        for lane in {0, interleave // 2, interleave - 1}:
            places = start + lane + interleave * np.arange(order.block)
            first, num, _ = order.block_of(1, int(places[0]), int(images[places[0]]))
            assert num == order.block and sorted((images[places] - first) % n) == list(range(num))
            assert [order.block_of(1, int(p), int(images[p])) for p in places] == [(first, num, n) for n in range(num)]
    assert all(order.block_of(1, p, int(images[p])) is None for p in range(n // window * window, n))


def test_how_well_blocks_are_mixed():
    """Mixing, measured: where neighbours in storage come in the order, against the order that knows no blocks."""
    n, batch, block = 200_000, 512, 32

    def facts(order):
        images = order.at(0, np.arange(n))
        place = np.empty(n, np.int64)
        place[images] = np.arange(n)
        same_batch = np.mean(place[:-1] // batch == place[1:] // batch)
        moved = np.mean(np.abs(place - np.arange(n))) / n
        shards = np.mean([len(np.unique(images[b : b + batch] // 2000)) for b in range(0, n - batch, batch)])
        again, apart = order.at(1, np.arange(n)), np.abs(np.diff(place)) // batch
        return (
            same_batch,
            moved,
            shards,
            np.corrcoef(images, np.arange(n))[0, 1],
            np.corrcoef(images, again)[0, 1],
            apart,
        )

    free, by_blocks = facts(Order(n, 0)), facts(Order(n, 0, block, batch))
    assert by_blocks[0] < 1.5 * free[0]  # two neighbours in one batch: hardly ever, as by chance
    assert abs(by_blocks[1] - 1 / 3) < 0.01 and abs(free[1] - 1 / 3) < 0.01  # as far as in a uniform shuffle
    assert by_blocks[2] > 0.98 * free[2]  # tars of 2,000 images that one batch draws from, of 100
    assert abs(by_blocks[3]) < 0.05 and abs(by_blocks[4]) < 0.05
    # what it costs: neighbours in storage, if not in one batch, come within as many batches as a block has images
    assert np.mean(by_blocks[5] < block) > 0.95 > 0.2 > np.mean(free[5] < block) and np.median(by_blocks[5]) > block / 4


# ------------------------------------------------------------------------------------------------------- refresh


@settings(deadline=None, max_examples=200)
@given(seed=seeds, data=st.data())
def test_every_image_once_an_epoch_over_any_refreshes(seed, data):
    """Parts come, go, come back and change places in mid-epoch, several times: no image twice in an epoch, and none
    forgotten but those that were gone for a while."""
    batch, numbers, names = data.draw(st.integers(1, 20)), st.integers(1, 60), iter(range(10**6))
    known, versions, sampler, seen, shown, was, gone, before = {}, [], None, 0, [], -1.0, {}, set()
    for _ in range(data.draw(st.integers(1, 5))):
        kept = [p for p in known.items() if data.draw(st.booleans())]
        new = [(f"part {next(names)}", data.draw(numbers)) for _ in range(data.draw(st.integers(0 if kept else 1, 2)))]
        parts = data.draw(st.permutations([*kept, *new]))
        known |= dict(new)
        reading = tuple(parts), data.draw(st.integers(0, 6)), batch
        versions = needed((*versions, sampler.next_version(seen, *reading))) if versions else [DataVersion(0, *reading)]
        assert versions[0].remaining == 0 or versions[0].epoch < versions[-1].epoch or len(versions) == 1
        sampler = ElasticSampler(versions, seed, batch)
        epoch = int(sampler.locate(np.array([seen]))[0][0])
        for name in before - dict(parts).keys():
            gone.setdefault(epoch, set()).add(name)
        before = dict(parts).keys()
        everything = [(name, i) for name, num in parts for i in range(num)]
        for _ in range(data.draw(st.integers(0, 12))):
            assert was <= sampler.progress(seen)
            was = sampler.progress(seen)
            epochs, _, images = sampler.slots(seen, 0, 1)
            shown += [(everything[i], e) for i, e in zip(images.tolist(), epochs.tolist())]
            seen += batch
        assert len(set(shown)) == len(shown)
        (epoch,), (offset,) = sampler.locate(np.array([seen]))
        rest = {everything[i] for i in sampler.at(int(epoch), np.arange(offset, sampler.size(int(epoch)))).tolist()}
        had = {image for image, e in shown if e == epoch}
        stayed = {image for image in everything if image[0] not in gone.get(int(epoch), ())}
        assert not rest & had and stayed <= rest | had and sampler.left(seen) == len(rest)
        assert int(sampler.progress(seen)) == epoch


def refreshed(versions, seed, batch, since, parts, block=1, interleave=1):
    before = ElasticSampler(versions, seed, batch)
    return ElasticSampler((*versions, before.next_version(since, parts, block, interleave)), seed, batch)


def test_new_and_old_parts_come_in_proportion():
    old, new = 40_000, 10_000
    sampler = refreshed([DataVersion(0, (("old", old),))], 0, 100, 20_000, (("old", old), ("new", new)))
    images = sampler.at(0, np.arange(sampler.size(0)))
    share = (images.reshape(-1, 300) >= old).mean(axis=1)
    assert len(images) == 30_000 and np.all(np.abs(share - 1 / 3) < 0.01)
    assert sampler.progress(20_000) == 0.5 and sampler.progress(35_000) == 0.75 and sampler.progress(50_000) == 1


def test_what_follows_a_stream_is_shuffled():
    sampler = refreshed([DataVersion(0, (("stream", 1000),), 0)], 0, 8, 64, (("a", 500), ("b", 500)))
    images = sampler.at(0, np.arange(200))
    assert abs((images < 500).mean() - 0.5) < 0.2 and np.mean(np.diff(images) == 1) < 0.1


def test_a_part_that_goes_is_counted_once_and_not_stored():
    versions = [DataVersion(0, (("a", 300_000), ("b", 300_000)))]
    sampler = refreshed(versions, 3, 64, 1024, (("b", 300_000),))
    sampler.slots(1024, 0, 1)
    begin = time.perf_counter()
    for p in range(2000):  # as loaders ask, one by one
        sampler.at(0, np.array([p]))
    assert time.perf_counter() - begin < 2 and sampler._partial_epoch._counts.nbytes < 4000
    again = refreshed([*sampler.versions], 3, 64, 64 * 10_000, (("b", 300_000), ("c", 10)))  # epochs later
    assert needed(again.versions)[0].since == 1024 and again.version.epoch == 2
    late = refreshed(needed(again.versions), 3, 64, 64 * 30_000, (("b", 300_000),))
    assert [e.since for e in needed(late.versions)] == [64 * 10_000, 64 * 30_000]
