"""A run of a tensor's elements, through a checkpoint, whatever the sharding that wrote it."""

from __future__ import annotations

import torch

from seer_scale.checkpoint import store
from seer_scale.distributed import World
from seer_scale.parallel.shard import Shard


def test_any_run_loads_from_a_whole_tensor_and_back(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(7, 3, 2)
    saved = store.save(tmp_path, {"w": whole.clone(), "s": torch.tensor(3.0)}, {"samples_seen": 1}, World())
    for start, stop in ((0, 42), (5, 31), (11, 12), (6, 18), (40, 42), (42, 42)):
        run = Shard(torch.zeros(stop - start), start, whole.shape)
        store.load(saved, {"w": run, "s": torch.zeros(())}, World())
        assert torch.equal(run.local, whole.flatten()[start:stop])
