"""How many CPU cores this process may use: one answer, for threads, loader processes and tools alike."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it loads torch, which loader processes never see
    from seer_scale.distributed import World

ROOT = Path("/")


def available_cores(env: Mapping[str, str] | None = None) -> int:
    """Cores this process may use, with all others that share them: the fewest of those it is bound to, its cgroups'
    CPU quota (whole cores of it) and SLURM_CPUS_PER_TASK. At least 1."""
    limits: list[float] = [len(_affinity()), cgroup_quota()]
    if per_task := _positive((os.environ if env is None else env).get("SLURM_CPUS_PER_TASK", "")):
        limits.append(per_task)
    return max(1, int(min(limits)))


def rank_cores(world: World) -> int:
    """Cores of one rank: of those it may use, its share where other ranks of its machine use the same ones. The fewest
    of any rank, so the same on all. Collective."""
    own, shared = available_cores(), "SLURM_CPUS_PER_TASK" not in os.environ
    mask = sum(1 << core for core in _affinity())
    ranks = world.gather_objects((socket.gethostname(), hex(mask), own, shared))
    shares = []
    for host, cores, num, is_shared in ranks:
        beside = sum(h == host and bool(int(c, 16) & int(cores, 16)) for h, c, *_ in ranks) if is_shared else 1
        shares.append(max(1, num // beside))
    return min(shares)


def told_threads(env: Mapping[str, str] | None = None) -> int:
    """Threads that OMP_NUM_THREADS asks for (of a list, on the first level); 0 where it asks for none."""
    return _positive((os.environ if env is None else env).get("OMP_NUM_THREADS", "").partition(",")[0])


class Contention:
    """Watches, over a piece of work, what else is busy on this machine's cores.

    `ours`: processes of ours here that work alike. `planned`: cores they are meant to use together.
    """

    def __init__(self, planned: int, ours: int = 1):
        self._planned, self._ours = planned, ours
        self._begin, self._own, self._machine = time.perf_counter(), time.process_time(), _machine_times()

    def found(self) -> str:
        """A clause on what others took, empty where they left enough. Without /proc/stat nothing is known."""
        wall_s, now = time.perf_counter() - self._begin, _machine_times()
        if self._machine is None or now is None or wall_s < 0.05:
            return ""
        busy, stolen = ((b - a) / wall_s for a, b in zip(self._machine, now))
        others = busy - self._ours * (time.process_time() - self._own) / wall_s
        cores, few = os.cpu_count() or 1, 0.25 * self._planned
        if others + stolen < few or cores - busy - stolen > few:
            return ""
        by_host = f", and the machine's host {stolen:.1f}" if stolen >= 0.1 else ""
        return f"other processes used {max(0.0, others):.1f} of {cores} cores meanwhile{by_host}"


def _machine_times() -> tuple[float, float] | None:
    """Seconds that all cores together were busy, and were taken by the host of a virtual machine, since it began."""
    with suppress(OSError, ValueError, AttributeError):
        # proc(5): user nice system idle iowait irq softirq steal, in ticks
        ticks = [
            int(x) / os.sysconf("SC_CLK_TCK") for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
        return sum(ticks[:3]) + sum(ticks[5:7]), ticks[7]
    return None


def cgroup_quota(root: Path = ROOT) -> float:
    """Cores' worth of time that the cgroups of this process grant (v2: cpu.max, v1: cpu.cfs_quota_us); inf: no limit.

    Every group from our own up to the root may limit. Where the path in /proc/self/cgroup is the host's, and not to be
    seen from within a container, its nearest visible ancestor serves.
    """
    quota = float("inf")
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, below = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mounts = (
                [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
                if controllers
                else ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
            )
            for mount in mounts:
                group = Path(below.lstrip("/"))
                for folder in (group, *group.parents):
                    quota = min(quota, _quota(root / mount / folder))
    return quota


def _quota(folder: Path) -> float:
    with suppress(OSError, ValueError):
        granted, period = (folder / "cpu.max").read_text().split()
        return float("inf") if granted == "max" else int(granted) / int(period)
    with suppress(OSError, ValueError):
        time_us, period_us = (int((folder / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        return float("inf") if time_us <= 0 else time_us / period_us
    return float("inf")


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS binds no process to cores


def _positive(word: str) -> int:
    word = word.strip()
    return int(word) if word.isdecimal() else 0


def loads_in_processes() -> bool:
    """Whether loader processes work on this system: they need Linux, and elsewhere the process that asks loads by
    itself."""
    return hasattr(os, "pidfd_open") and hasattr(os, "memfd_create")
