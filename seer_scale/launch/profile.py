"""Cluster profiles: what has to be known of a SLURM cluster, in one YAML file for all recipes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from seer_scale.config import opt, read_section, read_yaml
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError, nearest

PROFILES_DIR = Path("slurm")
EXAMPLE_PROFILE = Path(__file__).parents[1] / "profiles" / "example.yaml"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A key each; `environment`, `sbatch` and `evaluation` are mappings, `before` a list of lines."""

    partition: str = opt("", "partition; empty = the cluster's default")
    account: str = opt("", "account that is charged")
    qos: str = opt("", "quality of service")
    constraint: str = opt("", "features that nodes must have")
    exclude: str = opt("", "nodes never to be used")
    reservation: str = opt("", "reservation to run in")
    time: str = opt(
        "24:00:00", "time limit of a job, as [DAYS-]HOURS:MINUTES:SECONDS or minutes; the run resumes in the next job"
    )
    gpu: str = opt(
        "",
        "the GPU, as seer-scale plan --device has it, such as h100 or a file: what does not fit is not submitted; "
        "empty = nothing is planned",
    )
    gpus_per_node: int = opt(8, "GPUs a node; 0 = train on CPUs", ge=0)
    ranks_per_node: int = opt(0, "processes a node; 0 = one a GPU", ge=0)
    cpus_per_rank: int = opt(0, "CPUs for a rank and its loader processes; 0 = as the cluster gives them", ge=0)
    mem: str = opt("", "memory a node, such as 480G; 0 = all of it; empty = the cluster's default")
    grace_s: int = opt(180, "seconds before the time limit at which the run saves and is requeued", ge=10)
    restarts: int = opt(2, "starts of the ranks in a row, within a job, without a new checkpoint", ge=0)
    requeues: int = opt(3, "times in a row the job is requeued without a new checkpoint", ge=0)
    environment: dict[str, str] = field(default_factory=dict, metadata={"help": "variables for all ranks"})
    before: list[str] = field(
        default_factory=list, metadata={"help": "lines of shell before the run, such as module load cuda"}
    )
    sbatch: dict[str, str | bool] = field(
        default_factory=dict,
        metadata={"help": "any further option of sbatch, without its dashes; true for one without a value"},
    )
    evaluation: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "keys of this list that are otherwise for the evaluations of a sweep, each on one node"},
    )

    @property
    def resolved_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node

    @property
    def minutes(self) -> int:
        return minutes(self.time)

    def for_evaluation(self) -> Profile:
        return dataclasses.replace(self, **self.evaluation, evaluation={})


RESERVED_OPTIONS = {
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
FREE_KEYS = ("environment", "sbatch", "before", "evaluation")
"""Keys whose values are no single word."""
MAX_GRACE_S = 65535
"""The most that sbatch --signal takes."""


def load_profile(path: str) -> Profile:
    """A profile's file. Raises ConfigError with all that is wrong with it, UserError where there is none."""
    if not os.path.isfile(path):
        known = sorted(p.as_posix() for p in PROFILES_DIR.glob("*.yaml"))
        fix = nearest(path, known) if known else "seer-scale launch --print-profile prints one to fill in"
        raise UserError(Problem("--profile", path, "there is no such file", fix))
    profile, problems = read_profile(read_yaml(Path(path), "keys, such as 'partition: gpu'"))
    if problems:
        raise ConfigError(problems, what=f"The profile {path}")
    return profile


def read_profile(given: dict[str, Any]) -> tuple[Profile, list[Problem]]:
    """The profile of a mapping, with all that is wrong with it."""
    known = [f.name for f in fields(Profile)]
    problems = [
        Problem(str(key), NOTHING, "is not a key", nearest(str(key), known)) for key in given if key not in known
    ]
    plain = {key: value for key, value in given.items() if key in known and key not in FREE_KEYS}
    section = read_section(Profile, plain, "", problems)
    values = {name: getattr(section, name) for name in known}
    readers: dict[str, Callable[[Any], tuple[Any, list[Problem]]]] = {
        "before": _read_lines,
        "evaluation": partial(_read_evaluation, given),
    }
    for key in (key for key in given if key in FREE_KEYS):
        values[key], wrong = readers.get(key, partial(_read_mapping, key))(given[key])
        problems += wrong
    problems += [
        Problem(f"environment.{name}", NOTHING, "is no name of a variable", "use letters, digits and _")
        for name in values["environment"]
        if not re.fullmatch(r"[A-Za-z_]\w*", name)
    ]
    problems += [problem for option in values["sbatch"] for problem in _check_sbatch(option, known)]
    try:
        limit_s = minutes(values["time"]) * 60
    except UserError as error:
        problems += error.problems
    else:
        grace_s = values["grace_s"]
        if grace_s > MAX_GRACE_S:
            problems.append(Problem("grace_s", grace_s, f"SLURM takes at most {MAX_GRACE_S}", (MAX_GRACE_S,)))
        if limit_s <= grace_s:
            problems.append(Problem("grace_s", grace_s, f"a job has only {limit_s} s (time)", (limit_s // 3,)))
    if not (values["ranks_per_node"] or values["gpus_per_node"]):
        rule = "must say how many processes a node has, as gpus_per_node is 0"
        problems.append(Problem("ranks_per_node", NOTHING, rule, (1,)))
    return Profile(**values), problems


def _read_lines(value: Any) -> tuple[list[str], list[Problem]]:
    """The lines of shell of `before`."""
    if not isinstance(value, list):
        return [], [Problem("before", value, "must be a list of lines")]
    lines = [line for line in value if isinstance(line, str)]
    odd = [line for line in value if not isinstance(line, str)]
    return lines, [Problem("before", line, "must hold lines of shell", "quote the line") for line in odd]


def _read_evaluation(given: dict[str, Any], own: Any) -> tuple[dict[str, Any], list[Problem]]:
    """`evaluation`: its keys are read among the profile's, whose own problems are told once."""
    if not isinstance(own, dict):
        return {}, [Problem("evaluation", own, "must be a mapping of keys of the profile to values")]
    others = {key: value for key, value in given.items() if key != "evaluation"}
    profile, problems = read_profile(others | {key: value for key, value in own.items() if key != "evaluation"})
    known = read_profile(others)[1]
    wrong = [dataclasses.replace(p, key=f"evaluation.{p.key}") for p in problems if p not in known]
    if "evaluation" in own:
        wrong.append(Problem("evaluation.evaluation", NOTHING, "is not a key", "remove it"))
    return {key: getattr(profile, key) for key in own if key in Profile.__dataclass_fields__}, wrong


def _read_mapping(key: str, given: Any) -> tuple[dict[str, Any], list[Problem]]:
    """`environment`, or `sbatch`, whose options may be true, for those without a value."""
    if not isinstance(given, dict):
        return {}, [Problem(key, given, "must be a mapping of names to values")]
    is_sbatch, problems = key == "sbatch", []
    for name, value in given.items():
        if value is None or value is False and is_sbatch:
            fix = f"give a value{', or true for an option without one' * is_sbatch}, or leave it out"
            problems.append(Problem(f"{key}.{name}", value, "needs a value", fix))
        elif isinstance(value, list | dict) or isinstance(value, bool) and not is_sbatch:
            problems.append(Problem(f"{key}.{name}", value, "must be text", "quote it as it is meant"))
    return {str(k): v if v is True and is_sbatch else str(v) for k, v in given.items()}, problems


def _check_sbatch(option: str, known: Sequence[str]) -> list[Problem]:
    key, name = f"sbatch.{option}", option.lstrip("-").replace("_", "-")
    if not name:
        return [Problem("sbatch", NOTHING, "has an option without a name", "remove it")]
    if len(name) == 1:
        return [Problem(key, NOTHING, "is short for an option", "write the long one, as in nodelist for w")]
    if name not in RESERVED_OPTIONS:
        return []
    own = name.replace("-", "_")
    rule = f"is the key {own} of the profile" if own in known else "is for the launcher to decide"
    return [Problem(key, NOTHING, rule, "remove it")]


def minutes(time: str) -> int:
    """SLURM's ways to write a time limit (man sbatch, --time), in minutes, rounded up. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        rule = "must be written as DAYS-HOURS:MINUTES:SECONDS, HOURS:MINUTES:SECONDS or minutes"
        raise UserError(Problem("time", time, rule, ("2-00:00:00",)))
    days, *rest = match.groups()
    parts = [int(p) for p in rest if p is not None]
    if days is not None:
        hours, mins, secs = (*parts, 0, 0)[:3]
    else:  # MINUTES, MINUTES:SECONDS or HOURS:MINUTES:SECONDS
        hours, mins, secs = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    seconds = (int(days or 0) * 24 + hours) * 3600 + mins * 60 + secs
    if seconds < 60:
        raise UserError(Problem("time", time, "SLURM counts in whole minutes", (1,)))
    return -(-seconds // 60)
