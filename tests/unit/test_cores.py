"""How many cores a process may use: bound to, granted by cgroups, given by SLURM; and what else is busy on them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from seer_scale import cores
from seer_scale.config import Data
from seer_scale.cores import Contention, available_cores, cgroup_quota, rank_cores, told_threads
from seer_scale.distributed import World


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "4:cpu,cpuacct:/jobs/7\n3:memory:/jobs/7\n1:name=systemd:/jobs/7\n"
QUOTAS = {
    "v2 of our own group": (
        {"proc/self/cgroup": "0::/user/run\n", "sys/fs/cgroup/user/run/cpu.max": "250000 100000\n"},
        2.5,
    ),
    "v2 of a group above": (
        {
            "proc/self/cgroup": "0::/user/run\n",
            "sys/fs/cgroup/user/run/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user/cpu.max": "150000 50000\n",
        },
        3,
    ),
    "v2 within a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
    "v2 without a limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
    "v1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "600000",
            "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000",
        },
        6,
    ),
    "v1 whose path is the host's": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    "v1 without a limit": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        float("inf"),
    ),
    "macOS": ({}, float("inf")),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_of_cgroups(tmp_path, name):
    files, quota = QUOTAS[name]
    assert cgroup_quota(tree(tmp_path, files)) == quota


def on_a_machine_of(num: int, monkeypatch, quota: float = float("inf")) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: num)
    monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)


def test_the_fewest_of_all_limits_and_never_none(monkeypatch):
    for num, quota, env, expected in (
        (8, float("inf"), {}, 8), (8, 2.5, {}, 2), (8, 0.3, {}, 1), (2, 6, {}, 2),
        (64, float("inf"), {"SLURM_CPUS_PER_TASK": "12"}, 12), (8, float("inf"), {"SLURM_CPUS_PER_TASK": "none"}, 8),
    ):  # fmt: skip
        on_a_machine_of(num, monkeypatch, quota)
        assert available_cores(env) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores({}) == 8


class Ranks(World):
    """A world whose other ranks said what is given."""

    def gather_objects(self, value):
        return [value, *self.others]


def test_ranks_share_the_cores_they_are_bound_to_together(monkeypatch):
    on_a_machine_of(8, monkeypatch)
    world = Ranks()
    host = cores.socket.gethostname()
    for others, expected in (
        ([], 8),
        ([(host, hex(0xFF), 8, True)] * 3, 2),  # four ranks, none bound
        ([(host, hex(0xFF00), 8, True)] * 3, 2),  # the three others share other cores: the fewest of any rank
        ([(host, hex(0xFF00), 8, True)], 8),  # each bound to its own
        ([("elsewhere", hex(0xFF), 8, True)], 8),
    ):
        object.__setattr__(world, "others", others)
        assert rank_cores(world) == expected
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")  # SLURM has shared them out
    object.__setattr__(world, "others", [(host, hex(0xFF), 4, False)])
    assert rank_cores(world) == 4


def test_loader_processes_are_those_given_or_as_many_as_cores():
    assert [Data().num_workers(cores) for cores in (1, 2, 4, 64)] == [1, 2, 4, 4]
    assert [Data(workers=given).num_workers(2) for given in (0, 1, 8)] == [0, 1, 8]


def test_threads_asked_for():
    assert [told_threads({"OMP_NUM_THREADS": w}) for w in ("3", "4,2", " 2 ", "0", "", "x")] == [3, 4, 2, 0, 0, 0]
    assert told_threads({}) == 0


def test_contention_is_what_others_took_of_the_cores_we_planned_for(monkeypatch):
    on_a_machine_of(4, monkeypatch)
    now = {"wall": 0.0, "own": 0.0, "busy": 100.0, "stolen": 5.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["own"])
    monkeypatch.setattr(cores, "_machine_times", lambda: (now["busy"], now["stolen"]))

    def found(*, own: float, others: float, stolen: float = 0.0, ours: int = 1) -> str:
        watch = Contention(4, ours)
        now["wall"] += 2.0
        now["own"] += 2 * own
        now["busy"] += 2 * (ours * own + others)
        now["stolen"] += 2 * stolen
        return watch.found()

    assert found(own=4, others=0) == found(own=1, others=1.5) == found(own=2, others=0, ours=2) == ""
    assert found(own=1, others=3) == "other processes used 3.0 of 4 cores meanwhile"
    assert found(own=1, others=2, ours=2) == "other processes used 2.0 of 4 cores meanwhile"
    assert (
        found(own=2, others=0.5, stolen=1.5)
        == "other processes used 0.5 of 4 cores meanwhile, and the machine's host 1.5"
    )
    monkeypatch.setattr(cores, "_machine_times", lambda: None)
    assert Contention(4).found() == ""
