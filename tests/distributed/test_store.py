"""A state saved by one number of ranks loads on any other, and ranks fail together."""

import errno
import io
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from seer_scale.checkpoint import store
from seer_scale.checkpoint.layout import local_of
from seer_scale.checkpoint.lock import RunLock
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, UserError
from seer_scale.parallel.shard import Shard as Run
from tests.ranks import run_ranks

SHAPES = {"even": (8, 3), "uneven": (7, 5), "fewer_rows_than_ranks": (2, 6), "one": (1,)}
META = {"samples_seen": 640, "world_size": 4}


def whole(name: str) -> torch.Tensor:
    shape = SHAPES[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def sharded(mesh, placements, fill) -> store.State:
    """Sharded, replicated and plain tensors, as engines hold them."""
    state = {}
    for n in SHAPES:
        tensor = distribute_tensor(fill(whole(n)), mesh, placements)
        state[f"model/{n}"] = Run.of(tensor if placements[-1] == Shard(0) else tensor.to_local())
    state["optim/plain"] = fill(torch.arange(10, dtype=torch.int64))
    state["scaler/scale"] = fill(torch.tensor(2.0**16))
    state["flag"] = fill(torch.tensor([True, False, True]))
    return state


def world_of(rank: int, size: int) -> World:
    return World(rank, size, rank, control=dist.new_group(backend="gloo"))


def check_load(path: Path, world: World, mesh, placements) -> None:
    state = sharded(mesh, placements, torch.zeros_like)
    store.load(path, state, world)
    for key, want in sharded(mesh, placements, torch.clone).items():
        got = state[key]
        assert torch.equal(local_of(got), local_of(want)), key


class FullDisk(io.FileIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_four(rank: int, size: int, folder: Path) -> None:
    world = world_of(rank, size)
    mesh = init_device_mesh("cpu", (size,))
    path = store.save(folder, sharded(mesh, [Shard(0)], torch.clone), META, world)
    assert path == folder / "samples-000000000640" and store.latest(folder, world) == path
    opened, whole_open = [], Path.open
    Path.open = lambda self, *a, **k: (opened.append(self.name), whole_open(self, *a, **k))[1]
    check_load(path, world, mesh, [Shard(0)])
    Path.open = whole_open
    files = {f"state-{r:05d}.safetensors" for r in (0, rank)}  # its own, and the one of what all hold alike
    assert {f for f in opened if f.startswith("state")} == files and len(opened) == len(files) + 2 * world.is_main, (
        opened
    )

    # Replicas are written once: HSDP and plain tensors take no more room.
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    hybrid = sharded(replicas, [Replicate(), Shard(0)], torch.clone) | {"optim/big": torch.ones(10**6)}
    hybrid_path = store.save(folder / "hybrid", hybrid, META, world)
    assert sum(f.stat().st_size for f in hybrid_path.iterdir()) < 1.1 * 4 * 10**6

    # A flipped byte in any rank's file is seen by all.
    for victim in sorted(hybrid_path.glob("*.safetensors")):
        if world.is_main:
            content = victim.read_bytes()
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
        world.barrier()
        assert victim.name in store.validate(hybrid_path, world).rule
        assert store.latest(folder / "hybrid", world, warn=lambda _: None) is None
        world.barrier()
        if world.is_main:
            victim.write_bytes(content)
        world.barrier()
    assert store.validate(hybrid_path, world) is None

    # One rank's disk is full: all hear the same sentence, and what was there stays.
    for broken in range(size):
        whole_writer = store._Checksummed
        if rank == broken:
            store._Checksummed = type("Failing", (store._Checksummed, FullDisk), {})
        with pytest.raises(CheckpointError) as caught:
            store.save(folder, sharded(mesh, [Shard(0)], torch.zeros_like), META | {"samples_seen": 650}, world)
        store._Checksummed = whole_writer
        sentences = set(world.gather_objects(str(caught.value)))
        assert len(sentences) == 1 and "No space left on device" in sentences.pop()
        assert store.latest(folder, world) == path and sorted(os.listdir(folder)) == ["hybrid", path.name]
        world.barrier()

    # One rank holds another shape: all are told, none waits.
    state = sharded(mesh, [Shard(0)], torch.zeros_like)
    if rank == 2:
        state["optim/plain"] = torch.zeros(11, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"optim/plain is int64 \[10\] in the checkpoint and int64 \[11\]"):
        store.load(path, state, world)
    with pytest.raises(CheckpointError, match="no manifest.json"):
        store.load(folder, state, world)

    # Rank 0 alone holds the lock; all ranks of a second run are refused.
    with RunLock(folder, world), pytest.raises(UserError, match="is in use by pid"):
        RunLock(folder, world)

    store.save(folder, sharded(mesh, [Shard(0)], torch.zeros_like), META | {"samples_seen": 1000}, world)
    store.prune(folder, 1, 600, world)
    assert path.exists()
    store.prune(folder, 1, 0, world)
    assert not path.exists()
    store.save(folder, sharded(mesh, [Shard(0)], torch.clone), META | {"samples_seen": 1280}, world)
    world.barrier()


def on_three(rank: int, size: int, path: Path) -> None:
    world = world_of(rank, size)
    assert store.read_meta(path) == META | {"samples_seen": 1280}
    check_load(path, world, init_device_mesh("cpu", (size,)), [Shard(0)])
    check_load(path, world, init_device_mesh("cpu", (size,)), [Replicate()])
    # Two of them, and one, as worlds of their own.
    pair, pair_mesh = dist.new_group([0, 1], backend="gloo"), DeviceMesh("cpu", [0, 1])
    lone_mesh = DeviceMesh("cpu", [2])
    if rank < 2:
        check_load(path, World(rank, 2, rank, control=pair), pair_mesh, [Shard(0)])
    else:
        check_load(path, World(), lone_mesh, [Shard(0)])


def test_saved_on_four_ranks_loads_on_any_other_and_failures_are_shared(tmp_path):
    run_ranks(4, on_four, tmp_path)
    path = store.latest(tmp_path, World())
    assert path.name == "samples-000000001280"
    run_ranks(3, on_three, path)
    state = {f"model/{n}": torch.zeros(s) for n, s in SHAPES.items()}  # and on one that knows nothing of ranks
    store.load(path, state, World(), prefixes="model/")
    assert all(torch.equal(state[f"model/{n}"], whole(n)) for n in SHAPES)
