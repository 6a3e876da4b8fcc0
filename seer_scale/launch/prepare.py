"""From a recipe and the launcher's options to a checked `Job`: all that is wrong is told before anything is started."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from seer_scale.config import load_recipe, merge, parse_overrides
from seer_scale.errors import ConfigError, UserError
from seer_scale.launch.job import FOLDER, Job, snapshot, write_whole
from seer_scale.train.start import resolve_given, run_dir_of

RESTARTS, REQUEUES = 2, 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for. nodes: (fewest, most); ranks_per_node: 0 = all of the recipe's parallel.ranks on one node."""

    recipe: str
    overrides: Sequence[str] = ()
    name: str = ""
    cluster: str = "local"
    nodes: tuple[int, int] = (1, 1)
    ranks_per_node: int = 0
    restarts: int = RESTARTS
    requeues: int = REQUEUES
    profile: dict[str, Any] = field(default_factory=dict)


def prepare(ask: Request, command: Sequence[str]) -> tuple[Job, list[str]]:
    """The job, with what the user should know of it; nothing is written yet but by `stow`. Raises UserError."""
    given, (over, problems) = load_recipe(ask.recipe), parse_overrides(list(ask.overrides))
    if problems:  # the same problems again, among all others
        resolve_given(given, list(ask.overrides), 1)
    merged = merge(given, over)
    if ask.name and not (merged.get("run") or {}).get("dir"):
        merged = merge(merged, {"run": {"dir": str(Path("runs") / ask.name)}})
    each = ask.ranks_per_node or _ranks(merged)
    config, fits, notes = _fits(merged, ask.nodes, each)
    run_dir = run_dir_of(config, ask.recipe)
    job = Job(
        name=ask.name or run_dir.name, run_dir=os.path.abspath(run_dir), cluster=ask.cluster, command=list(command), folder=os.getcwd(), code="",
        ranks_per_node=each, fits=fits, restarts=ask.restarts, requeues=ask.requeues, profile=ask.profile, submitted=time.time(),
    )  # fmt: skip
    return job, notes, merge(merged, {"run": {"dir": str(run_dir)}})


def stow(job: Job, recipe: dict[str, Any]) -> Job:
    """Write what travels with the job: the code and the recipe. Raises UserError."""
    import dataclasses

    try:
        job.place.mkdir(parents=True, exist_ok=True)
        write_whole(job.recipe, yaml.safe_dump(recipe, sort_keys=False))
        return dataclasses.replace(job, code=snapshot(job.place))
    except OSError as error:
        raise UserError(f"{job.run_dir} cannot hold a run ({error.strerror}): choose another run.dir.") from error


def _ranks(merged: dict[str, Any]) -> int:
    """parallel.ranks, where it is a number; what is wrong with it is told by `resolve`."""
    section = merged.get("parallel")
    ranks = section.get("ranks", 1) if isinstance(section, dict) else 1
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


def _fits(merged: dict[str, Any], nodes: tuple[int, int], each: int):
    """(Config for the fewest nodes, numbers of nodes that can take the recipe, notes)."""
    configs, problems = {}, {}
    for num in range(nodes[0], nodes[1] + 1):
        try:
            configs[num] = resolve_given(merged, {}, num * each)
        except ConfigError as error:
            problems[num] = error.problems
    ends = [p for num in nodes if num in problems for p in problems[num]]
    if ends:
        raise ConfigError(list(dict.fromkeys(ends)))
    return configs[nodes[0]], sorted(configs), []
