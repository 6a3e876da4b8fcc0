"""Ranks of a bench: fresh processes on this machine, one thread each, that measure the same thing together."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seer_scale.distributed import World, joined
from seer_scale.errors import Problem, UserError


def run_ranks(measure: Callable[[World, Any], Any], given: Any, *, ranks: int, device: str) -> Any:
    """measure(world, given) on every rank, gloo on the CPU and nccl on GPUs; returns what rank 0 returned.

    `measure` is a module's function, and its result pickles. Raises UserError, also one of rank 0.
    """
    if ranks < 1:
        raise UserError(Problem("--ranks", ranks, "must be at least 1", (1,)))
    if device == "cuda" and ranks > torch.cuda.device_count():
        num_gpus = torch.cuda.device_count()
        raise UserError(Problem("--ranks", ranks, f"there are {num_gpus} GPUs here", (num_gpus, "--device cpu")))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, ranks, device, measure, given), nprocs=ranks)
        error, value = pickle.loads((Path(folder) / "result").read_bytes())
    if error:
        raise error
    return value


def _rank(rank: int, folder: str, size: int, device: str, measure: Callable, given: Any) -> None:
    os.dup2(2, 1)  # what libraries print is not the bench's output
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    control = joined(dist.new_group(backend="gloo"))
    problem, value = None, None
    try:
        value = measure(World(rank, size, rank, size, where, control), given)
    except UserError as error:
        problem = error
    if rank == 0:
        (Path(folder) / "result").write_bytes(pickle.dumps((problem, value)))
    dist.barrier(group=control)
    dist.destroy_process_group()


def seconds(work: Callable[[], Any], world: World) -> float:
    """From the moment all ranks are ready to the moment the last has done `work`."""
    wait(world.device)
    world.barrier()
    begin = time.perf_counter()
    work()
    wait(world.device)
    world.barrier()
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def where(device: torch.device) -> str:
    """The device in words, with torch's version."""
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads a process"
    )
    return f"{name}, torch {torch.__version__}"
