"""Who takes part in a run: ranks, devices, process groups, and the few collectives the rest of the house uses.

`start()` recognises our launcher, torchrun and srun, or stays a world of one; all of them meet in the run's folder
(`rendezvous`). What is decided on the host goes over gloo, connected as it is needed: a rank has some log2(ranks)
connections, rank 0 one more to each.
"""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from seer_scale.errors import NOTHING, Problem, RankError, StartStopped, UserError
from seer_scale.rank_info import TORCHRUN, RankInfo, detect
from seer_scale.rendezvous import meet
from seer_scale.timeouts import Timeouts

T = TypeVar("T")
RESERVED_FILES = 64
"""Open files that a rank needs beside its connections: libraries, logs, images, loader processes."""


@dataclass(frozen=True)
class World:
    """The ranks of a run as seen by one of them.

    control: a gloo group for decisions made on the host. timeout: of every process group. store: what all ranks can
    write to, at rank 0; None where there is one rank (and in tests).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None
    timeout: timedelta = Timeouts().groups
    store: dist.Store | None = None
    _groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def group(self, use: str, size: int, stride: int = 1) -> dist.ProcessGroup | None:
        """The group of this rank and its neighbours, `size` ranks `stride` apart, for one `use`; None for groups of
        one.

        A communicator runs one collective at a time, in the order they are issued: what shall overlap needs a group of
        its own, also where its ranks are all there are. Collective over the group on first use.
        """
        if size <= 1 or self.size == 1:
            return None
        first = self.rank // (size * stride) * size * stride + self.rank % stride
        ranks = tuple(range(first, first + size * stride, stride))
        if (use, ranks) not in self._groups:
            group = dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True, group_desc=use)
            # of the default group's kind, which need not be NCCL on GPUs: ranks that share one use gloo
            self._groups[use, ranks] = joined(group)
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

    def from_main(self, make: Callable[[], T]) -> T:
        """What make() returns on rank 0, on every rank; its UserError is raised on all."""
        value, problem = None, None
        if self.is_main:
            try:
                value = make()
            except UserError as error:
                problem = error
        value, problem = self.broadcast_object((value, problem))
        if problem is not None:
            raise problem
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """What ends the body on one rank ends it on all: a UserError is raised on each, for anything else the others
        raise one that says so. Collective, at the end of the body, but for an error of a single rank within a
        collective, of which the others learn as it ends."""
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            if isinstance(e, UserError) and e.single_rank:
                raise
            error = e
        told = error if isinstance(error, UserError) else None
        if error is not None and told is None:
            rule = f"ended ({type(error).__name__}: {error})"
            told = UserError(Problem(f"Rank {self.rank}", NOTHING, rule))
        first = next((e for e in self.gather_objects(told) if e is not None), None)
        if error is not None and not isinstance(error, UserError):
            raise error
        if first is not None:
            raise first from error

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """`x` summed over all ranks, in place; one all-reduce."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


def joined(group: dist.ProcessGroup | int) -> dist.ProcessGroup:
    """What dist.new_group gives to a rank of the group; a number is for those that are not in it."""
    if isinstance(group, int):
        raise AssertionError("a rank that is not in a group has asked for it")
    return group


def all_gather(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """`x` of every rank of the group, [ranks, *x.shape], in rank order; one all-gather."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
    gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def init(
    rendezvous: Path, attempt: str = "", *, device: str = "auto", timeouts: Timeouts = Timeouts(),
    asked_to_stop: Callable[[], str | None] = lambda: None, check: Callable[[], object] = lambda: None,
) -> World:  # fmt: skip
    """Join the run. Collective over all its ranks.

    rendezvous: a folder all ranks see; attempt: a word all ranks of this start share and no other start has (under
    SLURM the job, step and restart are one; torchrun has one for all its restarts, and an old address is tried in
    vain). device: cpu, cuda, or auto. asked_to_stop: the name of a signal, which ends the wait for other ranks. check:
    what this rank looks at before any takes its GPU. Raises UserError where the GPUs or open files of a rank do not
    suffice or its check does, on all ranks; where the other ranks do not come; StartStopped for a signal.
    """
    info = detect()
    rank, size = info.rank, info.size
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    where, problem = torch.device("cpu"), None
    try:
        check()
        if cuda:
            where = _gpu_of(info)
        if size > 1:
            allow_open_files(rank, size)
    except UserError as error:
        if size == 1:
            raise
        problem = error
        problem.retryable = rank > 0  # rank 0 sees what the recipe has wrong; this may be one machine's trouble
    store = None
    if size > 1:
        step = ".".join(os.environ.get(k, "0") for k in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
        word = re.sub(r"[^\w.-]", "_", attempt or os.environ.get(TORCHRUN) or step)
        place = rendezvous / f"rendezvous-{word}"
        try:
            store = meet(
                place,
                info,
                timeout_s=timeouts.meet_s,
                later=timeouts.groups,
                asked_to_stop=asked_to_stop,
                problem=problem,
                device="cuda" if cuda else "cpu",
            )
        except (RankError, StartStopped):
            if not problem:
                raise
            problem.single_rank = True  # no other rank has heard of it
            raise problem from None
    if cuda:
        torch.cuda.set_device(where)
    if store is None:
        return World(device=where, timeout=timeouts.groups)
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # else a group connects each rank to every other
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeouts.groups
    )
    control = joined(dist.new_group(backend="gloo", timeout=timeouts.groups))
    world = World(rank, size, info.local_rank, info.local_size, where, control, timeouts.groups, store)
    if cuda:  # also where a rank is alone on its machine and sees one GPU: the others wait for it
        refuse_shared_gpus(world)
    return world


def _gpu_of(info: RankInfo) -> torch.device:
    """This rank's: it sees all GPUs of its machine, or its own alone where SLURM binds one to each task. Raises
    UserError."""
    gpus = torch.cuda.device_count()
    own = gpus == 1 < info.local_size
    if info.local_rank >= gpus and not own or own and not bound_to_one():
        rule, fix = f"has {gpus} GPUs for {info.local_size} ranks", f"start {max(1, gpus)} a machine"
        raise UserError(Problem(socket.gethostname(), NOTHING, rule, f"{fix}, or give parallel.device cpu"))
    return torch.device("cuda", min(info.local_rank, gpus - 1))


def refuse_shared_gpus(world: World) -> None:
    """Raises UserError on all ranks where two of them have the same GPU. Collective over all ranks."""
    mine = f"{socket.gethostname()} {torch.cuda.get_device_properties(world.device).uuid}"
    first: dict[str, int] = {}
    for rank, gpu in enumerate(world.gather_objects(mine)):
        if (other := first.setdefault(gpu, rank)) != rank:
            fix = "give each task one of its own, or parallel.device cpu"
            raise UserError(Problem(f"Ranks {other} and {rank}", NOTHING, f"have the same GPU ({gpu})", fix))


def allow_open_files(rank: int, size: int) -> None:
    """Raise this process's limit of open files as far as it may go. Raises UserError where rank `rank` of `size` needs
    more.

    Rank 0 has a connection to each rank for the store, and two more while checkpoints are planned; the others have some
    to neighbours.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says "unlimited" and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = RESERVED_FILES + 8 * size.bit_length() + (3 * size if rank == 0 else 0)
    if soft != resource.RLIM_INFINITY and soft < needed:
        rule = f"may open {soft} files, but needs about {needed} (a connection is one)"
        how = "ulimit -Hn; in a service or container LimitNOFILE or --ulimit nofile"
        fix = f"raise the hard limit ({how}) to {needed} or more"
        raise UserError(Problem(f"Rank {rank} of {size}", NOTHING, rule, fix))


def limit_groups(world: World) -> None:
    """Every process group there is by now, also those that libraries have made, gets the run's time limit."""
    set_timeout = (
        getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    )  # its name before torch 2.14
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(world.timeout, group)


def bound_to_one() -> bool:
    """Whether each task may have been given a GPU of its own: by SLURM (--gpus-per-task, --gpu-bind, --ntasks-per-gpu),
    or by a wrapper that sets CUDA_VISIBLE_DEVICES. Which GPU that is, `refuse_shared_gpus` looks at."""
    by_slurm = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU")
    return any(k in os.environ for k in by_slurm) or bool(
        re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    )


def shutdown(world: World) -> None:
    """Leave the run; collective."""
    if dist.is_initialized():  # also by an engine, on one rank
        world.barrier()
        dist.destroy_process_group()


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in (
            "Connection closed by peer",
            "Connection reset by peer",
            "Connection refused",
            "Broken pipe",
            "imed out",
        )
    )
