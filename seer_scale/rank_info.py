"""Which rank this process is, by what its environment says. Loads no torch, so that launchers may ask, too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from seer_scale.errors import NOTHING, Problem, RankError

LAUNCHER = "SEER_SCALE_LAUNCHER"
"""Our launchers' mark: which variables they number their ranks with. No other variable counts then."""
LOCAL, SLURM, TORCHRUN = "local", "slurm", "TORCHELASTIC_RUN_ID"
"""The two values of that mark, and the variable that torchrun alone sets."""
TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM_NAMES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
RANK_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|NODE_RANK|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|SEER_SCALE_LAUNCHER"
    r"|SLURM_(PROCID|LOCALID|NODEID|NTASKS|NPROCS|NTASKS_PER_NODE|STEP_ID|STEPID|STEP_TASKS_PER_NODE)"
)


@dataclass(frozen=True)
class RankInfo:
    """size: ranks in all; local: of this machine. source: the variable that says how many there are, for messages."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = ""


def without_rank_variables(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what any launcher numbers its ranks with."""
    return {name: value for name, value in env.items() if not RANK_VARIABLES.fullmatch(name)}


def detect(env: Mapping[str, str] = os.environ) -> RankInfo:
    """This process's place among those of our launchers, torchrun, srun, or whoever sets RANK and WORLD_SIZE; else
    alone.

    MASTER_ADDR and MASTER_PORT are not read: ranks meet in the run's folder. Raises RankError where variables
    contradict each other or are no numbers.
    """
    given = [name for name in TORCH_NAMES[:2] if name in env]
    mark = env.get(LAUNCHER)
    if mark == LOCAL or not mark and TORCHRUN in env:
        return _read(env, TORCH_NAMES)
    if mark == SLURM:
        return _read(env, SLURM_NAMES)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        info = _read(env, SLURM_NAMES)
        for name, value in (("RANK", info.rank), ("WORLD_SIZE", info.size)):
            if name in env and env[name] != str(value):
                other = SLURM_NAMES[TORCH_NAMES.index(name)]
                rule = f"this is task {info.rank} of the {info.size} that srun has started ({other} is {value})"
                names = " and ".join(given)
                fix = f"unset {names} for one rank a task, or SLURM_PROCID for the ranks that {names} count"
                raise RankError(Problem(name, env[name], rule, fix))
        return info
    if len(given) == 1:
        missing = next(name for name in TORCH_NAMES[:2] if name not in env)
        fix = f"set both for one rank of several, or unset {given[0]}"
        raise RankError(Problem(given[0], env[given[0]], f"{missing} is not set", fix))
    return _read(env, TORCH_NAMES) if given else RankInfo()


def _read(env: Mapping[str, str], names: tuple[str, ...]) -> RankInfo:
    rank, size = _number(env, names[0]), _number(env, names[1])
    local_rank = _number(env, names[2], 0)
    if names is SLURM_NAMES:  # "8(x64)" or "8,4": tasks on each node
        words = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get(names[3], "1"))
        tasks_per_node = [int(num) for num, times in words for _ in range(int(times or 1))]
        node = _number(env, "SLURM_NODEID", 0)
        local_size = tasks_per_node[min(node, len(tasks_per_node) - 1)] if tasks_per_node else 1
    else:
        local_size = _number(env, names[3], 1)
    if not 0 <= rank < size:
        raise RankError(Problem(names[0], rank, f"must be from 0 to {size - 1}, as {names[1]} is {size}"))
    return RankInfo(rank, size, local_rank, local_size, names[1])


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    if not re.fullmatch(r"\d+", text := env.get(name, "").strip()):
        pair = " and ".join((SLURM_NAMES if name.startswith("SLURM_") else TORCH_NAMES)[:2])
        fix = f"{pair} say which rank of how many this is: set both right, or unset both for one rank alone"
        given, rule = (env[name], "must be a whole number") if name in env else (NOTHING, "is not set")
        raise RankError(Problem(name, given, rule, fix))
    return int(text)
