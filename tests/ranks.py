"""Start gloo ranks for a test: `run_ranks(n, fn, *args)` runs fn(rank, world_size, *args) in n fresh forks.

Results come back in rank order; an exception on any rank fails the call with that rank's traceback. Each rank has
one torch thread, and a FutureWarning of torch.distributed is an error. Group many checks in one call: starting
processes costs more than the checks.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from pathlib import Path

from tests.forks import Queue, fork


def _rank_main(rank, world_size, rendezvous, fn, args, queue):
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        warnings.filterwarnings("error", category=FutureWarning, module=r"torch\.distributed")  # users see none
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo", store=dist.FileStore(rendezvous, world_size), rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args)
        dist.barrier()
        dist.destroy_process_group()
        queue.put((rank, True, result))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_ranks(world_size: int, fn, *args, timeout: float = 400.0, fresh: bool = False) -> list:
    """fn must be importable (module level); its result must pickle: return numbers, lists or numpy arrays. fresh:
    processes that import everything themselves, for what is read as a process begins, such as malloc's settings."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue() if fresh else Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "store")
        given = [(r, world_size, rendezvous, fn, args, queue) for r in range(world_size)]
        processes = [spawn.Process(target=_rank_main, args=g) if fresh else fork(_rank_main, *g) for g in given]
        for p in processes:
            p.start()
        results = {}
        try:
            for _ in range(world_size):
                rank, ok, value = queue.get(timeout=timeout)
                if not ok:
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
            for p in processes:
                p.join(timeout=30)
        finally:
            for p in processes:
                if p.is_alive():
                    p.kill()
    return [results[r] for r in range(world_size)]
