"""A run of a tensor's elements as boxes, and through a checkpoint, whatever the sharding that wrote it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from seer_scale.checkpoint import store
from seer_scale.parallel.shard import Shard, boxes
from seer_scale.world import World

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_tile_the_run_in_order(shape, data):
    numel = torch.Size(shape).numel()
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    tiles = boxes(shape, start, stop)
    parts = [whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].flatten() for offsets, sizes in tiles]
    assert torch.cat([*parts, torch.empty(0, dtype=whole.dtype)]).tolist() == list(range(start, stop))
    assert len(tiles) <= 2 * len(shape) - 1


def test_any_run_loads_from_a_whole_tensor_and_back(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(7, 3, 2)
    saved = store.save(tmp_path, {"w": whole.clone(), "s": torch.tensor(3.0)}, {"samples_seen": 1}, World())
    for start, stop in ((0, 42), (5, 31), (11, 12), (6, 18), (40, 42), (42, 42)):
        run = Shard(torch.zeros(stop - start), start, whole.shape)
        store.load(saved, {"w": run, "s": torch.zeros(())}, World())
        assert torch.equal(run.local, whole.flatten()[start:stop]) and torch.equal(run.cut(whole), run.local)
