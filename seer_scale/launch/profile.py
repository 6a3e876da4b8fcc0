"""Cluster profiles: what a SLURM cluster wants to be told, in one YAML file for all recipes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from seer_scale.config import opt, read_section, read_yaml
from seer_scale.errors import ConfigError, UserError, nearest

FOLDER = Path("slurm")
EXAMPLE = Path(__file__).parents[1] / "profiles" / "example.yaml"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A key each; `environment` and `sbatch` are mappings, `before` a list of lines."""

    partition: str = opt("", "partition; empty = the cluster's default")
    account: str = opt("", "account that is charged")
    qos: str = opt("", "quality of service")
    constraint: str = opt("", "features that nodes must have")
    exclude: str = opt("", "nodes never to be used")
    reservation: str = opt("", "reservation to run in")
    time: str = opt(
        "24:00:00", "time limit of a job, as [DAYS-]HOURS:MINUTES:SECONDS or minutes; the run goes on in the next job"
    )
    gpus_per_node: int = opt(8, "GPUs a node; 0 = train on CPUs", ge=0)
    ranks_per_node: int = opt(0, "processes a node; 0 = one a GPU", ge=0)
    cpus_per_rank: int = opt(0, "CPUs for a rank and its loader processes; 0 = as the cluster gives them", ge=0)
    mem: str = opt("", "memory a node, such as 480G; 0 = all of it; empty = the cluster's default")
    grace_s: int = opt(180, "seconds before the time limit at which the run saves and goes back to the queue", ge=10)
    restarts: int = opt(2, "starts of the ranks in a row, within a job, without a new checkpoint", ge=0)
    requeues: int = opt(3, "returns to the queue in a row without a new checkpoint", ge=0)
    environment: dict[str, str] = field(default_factory=dict, metadata={"help": "variables for all ranks"})
    before: list[str] = field(
        default_factory=list, metadata={"help": "lines of shell before the run, such as module load cuda"}
    )
    sbatch: dict[str, str | bool] = field(
        default_factory=dict,
        metadata={"help": "any further option of sbatch, without its dashes; true for one without a value"},
    )

    @property
    def ranks_a_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node

    @property
    def minutes(self) -> int:
        return minutes(self.time)


OURS = {
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus-per-node",
    "gres",
    "job-name",
    "output",
    "error",
    "signal",
    "requeue",
    "no-requeue",
    "array",
    "open-mode",
    "time",
    "partition",
    "account",
    "qos",
    "constraint",
    "exclude",
    "reservation",
    "mem",
    "cpus-per-task",
    "cpus-per-gpu",
    "mincpus",
    "parsable",
    "test-only",
    "wait",
    "wrap",
    "export",
    "export-file",
    "chdir",
    "quiet",
    "help",
    "usage",
    "version",
}
"""Options of sbatch that have a key of their own here, or that the launcher decides."""
LONGEST_GRACE_S = 65535
"""sbatch --signal knows no more."""


def load_profile(path: str) -> Profile:
    """A profile's file. Raises ConfigError with all that is wrong with it, UserError where there is none."""
    place = Path(path)
    if not os.path.isfile(place):
        there = sorted(p.as_posix() for p in FOLDER.glob("*.yaml"))
        raise UserError(
            f"--profile {path} is no file; "
            f"{nearest(path, there) if there else 'seer-scale launch --print-profile prints one to fill in.'}"
        )
    given = read_yaml(place, "keys, such as 'partition: gpu'")
    profile, problems = read_profile(given)
    if problems:
        raise ConfigError([f"{path}: {p}" for p in problems], what="The profile")
    return profile


def read_profile(given: dict[str, Any]) -> tuple[Profile, list[str]]:
    """The profile of a mapping, with what is wrong with it."""
    free = ("environment", "sbatch", "before")
    problems: list[str] = []
    taken = {k: given[k] for k in given if k in free}
    known = [f.name for f in fields(Profile)]
    unknown = [k for k in given if k not in known]
    problems += [
        (
            f"{k} is not a key; "
            f"{nearest(str(k), known)}{' The keys are ' + ', '.join(known) + '.' if k == unknown[-1] else ''}"
        )
        for k in unknown
    ]
    plain = read_section(Profile, {k: v for k, v in given.items() if k in known and k not in free}, "", problems)
    values = {f.name: getattr(plain, f.name) for f in fields(Profile)}
    for key, value in taken.items():
        if key == "before" and isinstance(value, list):
            values[key] = [str(v) for v in value]
            problems += [
                f"{key} holds {v!r}, but must hold lines of shell; quote the line."
                for v in value
                if not isinstance(v, str)
            ]
        elif key != "before" and isinstance(value, dict):
            values[key] = {str(k): v if v is True and key == "sbatch" else str(v) for k, v in value.items()}
            problems += [
                (
                    f"{key}.{k} is {'empty' if v is None else str(v).lower()}; give a "
                    f"value{', or true for an option without one' * (key == 'sbatch')}, or leave it out."
                )
                for k, v in value.items()
                if v is None or v is False and key == "sbatch"
            ]
            problems += [
                f"{key}.{k} is read as {v!r}, which is no text; put it in quotes as it is meant."
                for k, v in value.items()
                if isinstance(v, list | dict) or isinstance(v, bool) and key == "environment"
            ]
        else:
            what = "a list of lines" if key == "before" else "a mapping of names to values"
            problems.append(f"{key} is {value!r}, but must be {what}.")
    problems += [
        f"environment.{k} is no name of a variable; use letters, digits and _."
        for k in values["environment"]
        if not re.fullmatch(r"[A-Za-z_]\w*", k)
    ]
    if "" in (k.lstrip("-") for k in values["sbatch"]):
        problems.append("sbatch has an option without a name; remove it.")
    problems += [
        f"sbatch.{k} is short for an option; write the long one, as in nodelist for w."
        for k in values["sbatch"]
        if len(k.lstrip("-")) == 1
    ]
    for option in values["sbatch"]:
        if (name := option.lstrip("-").replace("_", "-")) in OURS:
            key = name.replace("-", "_")
            problems.append(
                f"sbatch.{option} is "
                f"{'the key ' + key + ' of the profile' if key in known else 'for the launcher to decide'}; remove "
                "it."
            )
    try:
        limit = minutes(values["time"])
        if values["grace_s"] > LONGEST_GRACE_S:
            problems.append(
                f"grace_s is {values['grace_s']}, but SLURM takes at most {LONGEST_GRACE_S}; nearest: "
                f"{LONGEST_GRACE_S}."
            )
        if limit * 60 <= values["grace_s"]:
            problems.append(
                f"grace_s is {values['grace_s']}, but a job has only {limit * 60} s (time); nearest: {limit * 20}."
            )
    except UserError as error:
        problems.append(str(error))
    if not (values["ranks_per_node"] or values["gpus_per_node"]):
        problems.append("gpus_per_node is 0, so ranks_per_node must say how many processes a node has; nearest: 1.")
    return Profile(**values), problems


def minutes(time: str) -> int:
    """SLURM's ways to write a time limit (man sbatch, --time), in minutes, rounded up. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(
            f"time is {time!r}, but must be written as DAYS-HOURS:MINUTES:SECONDS, HOURS:MINUTES:SECONDS or "
            "minutes, such as 2-00:00:00."
        )
    days, *rest = match.groups()
    parts = [int(p) for p in rest if p is not None]
    if days is not None:
        hours, mins, secs = (parts + [0, 0])[:3]
        total = (int(days) * 24 + hours) * 3600 + mins * 60 + secs
    else:
        total = (
            parts[0] * 60
            if len(parts) == 1
            else parts[0] * 60 + parts[1]
            if len(parts) == 2
            else parts[0] * 3600 + parts[1] * 60 + parts[2]
        )
    if total < 60:
        raise UserError(f"time is {time!r}, but SLURM counts in whole minutes; nearest: 1.")
    return -(-total // 60)
