"""Who takes part in a run: ranks, devices, process groups, and the few collectives the rest of the house uses.

`start()` recognises our launcher, torchrun and srun, or stays a world of one. No port is ever fixed: rank 0 listens on a
free one and publishes its address in a file of the run directory (torchrun brings its own rendezvous).
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seer_scale.errors import UserError
from seer_scale.files import write_whole

TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(hours=1)
"""Decisions on the host may wait for rank 0 to list or index the images; a rank that ends is noticed at once."""


@dataclass(frozen=True)
class World:
    """The ranks of a run as seen by one of them. `control` is a gloo group for decisions made on the host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None
    timeout: timedelta = TIMEOUT
    _groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def group(self, use: str, size: int, stride: int = 1) -> dist.ProcessGroup | None:
        """The group of this rank and its neighbours, `size` ranks `stride` apart, for one `use`; None for groups of one.

        A communicator runs one collective at a time, in the order they are issued: what shall overlap needs a group of
        its own, also where its ranks are all there are. Collective over the group on first use.
        """
        if size <= 1 or self.size == 1:
            return None
        first = self.rank // (size * stride) * size * stride + self.rank % stride
        ranks = tuple(range(first, first + size * stride, stride))
        if (use, ranks) not in self._groups:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            self._groups[use, ranks] = dist.new_group(
                list(ranks), timeout=self.timeout, backend=backend, use_local_synchronization=True, group_desc=use
            )
        return self._groups[use, ranks]

    # Host-side decisions: blocking, over gloo, never between two updates unless something is due.

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.control)
        return out

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def first_problem(self, error: BaseException | None) -> str | None:
        """The text of the first rank's error, agreed by all ranks; None where no rank has one."""
        texts = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        return next((t for t in texts if t), None)

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """`x` summed over all ranks, in place; one all-reduce."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


def all_gather(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """`x` of every rank of the group, [ranks, *x.shape], in rank order; one all-gather."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
    gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


@dataclass(frozen=True)
class Place:
    """Where the environment says this process stands; `torchrun` brings its own rendezvous."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    torchrun: bool = False


def detect(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place in a run started by torchrun, our launcher or srun; else a world of one."""
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return Place()
    # SLURM writes "8(x64)" or "8,4": the first number serves
    given = (re.match(r"\d+", env.get(n, default)) for n, default in zip(names, ("0", "1", "0", "1")))
    rank, size, local_rank, local_size = (int(m.group()) for m in given)
    return Place(rank, size, local_rank, local_size, names[0] == "RANK" and "MASTER_ADDR" in env)


def start(rendezvous: Path, attempt: str = "", *, device: str = "auto", patience_s: float = 0.0) -> World:
    """Join the run. Collective over all its ranks.

    rendezvous: a folder all ranks see; attempt: a word all ranks of this start share and no other start has (under
    SLURM the job, step and restart are one).
    device: cpu, cuda, or auto. patience_s: how long a rank may let the others wait, if longer than the usual timeout.
    Raises UserError where the GPUs do not suffice, or the other ranks do not come within the
    timeout.
    """
    place = detect()
    rank, size = place.rank, place.size
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    gpus = torch.cuda.device_count() if cuda else 0
    # a rank sees all GPUs of its machine, or its own alone where SLURM binds one to each task
    if cuda and place.local_rank >= gpus and gpus != 1 or cuda and gpus == 1 < place.local_size and not bound_to_one():
        raise UserError(f"This machine has {gpus} GPUs for {place.local_size} ranks: start {max(1, gpus)} a machine, or give parallel.device cpu.")
    where = torch.device("cuda", min(place.local_rank, gpus - 1)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if size == 1:
        return World(device=where)
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", max(TIMEOUT, timedelta(seconds=patience_s))
    published = None
    if place.torchrun:
        dist.init_process_group(backend, timeout=timeout)
    else:
        slurm = [os.environ.get(k, "0") for k in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
        published = rendezvous / f"rendezvous-{attempt or '.'.join(slurm)}"
        store = _store(published, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    if published and rank == 0:
        published.unlink(missing_ok=True)  # all have read it, and a later start must not
    return World(rank, size, place.local_rank, place.local_size, where, control, timeout)


def bound_to_one() -> bool:
    """Whether SLURM has given each task a GPU of its own (--gpus-per-task, --gpu-bind)."""
    return any(k in os.environ for k in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"))


def stop(world: World) -> None:
    """Leave the run; collective."""
    if dist.is_initialized():  # also by an engine, on one rank
        world.barrier()
        dist.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")
    )


def _store(published: Path, rank: int, size: int) -> dist.TCPStore:
    if rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        host = "127.0.0.1" if "SLURM_PROCID" not in os.environ else socket.gethostname()
        try:
            write_whole(published, f"{host}:{store.port}")
        except OSError as error:
            raise UserError(f"{published.parent} cannot be written ({error.strerror}): choose another run.dir.") from error
        return store
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not published.exists():
        if time.monotonic() > deadline:
            raise UserError(f"Rank 0 did not publish its address in {published}: is {published.parent} on a file system all nodes share?")
        time.sleep(0.05)
    host, port = published.read_text().rsplit(":", 1)
    return dist.TCPStore(host, int(port), size, is_master=False, timeout=TIMEOUT)
