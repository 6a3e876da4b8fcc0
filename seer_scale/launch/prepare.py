"""From a recipe and the launcher's options to a checked `Job`: all that is wrong is told before anything is started."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seer_scale.config import Config, Train, as_asked, load_recipe, merge, parse_overrides, resolve
from seer_scale.errors import ConfigError, UserError
from seer_scale.files import write_whole
from seer_scale.launch.job import Job, snapshot
from seer_scale.launch.profile import Profile
from seer_scale.training import resume
from seer_scale.training.start import resolve_given, run_dir_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for. nodes: (fewest, most), or None: what the recipe's parallel.ranks need. ranks: those of one
    node; 0 = the profile's, or all of the recipe's on one node."""

    recipe: str
    overrides: Sequence[str] = ()
    name: str = ""
    cluster: str = "local"
    nodes: tuple[int, int] | None = None
    ranks: int = 0
    profile: Profile = Profile()


def prepare(request: Request, command: Sequence[str]) -> tuple[Job, dict[str, Any], list[str]]:
    """(the job, the recipe that travels with it, what the user should know). Writes nothing. Raises UserError."""
    given, (over, problems) = load_recipe(request.recipe), parse_overrides(list(request.overrides))
    if problems:
        resolve_given(given, list(request.overrides), 1)  # tells them, and all others
    given, note = as_asked(request.recipe, given, over)
    given = merge(given, over)
    if request.name and not (given.get("run") or {}).get("dir"):
        given = merge(given, {"run": {"dir": str(Path("runs") / request.name)}})
    ranks = _ranks(given)
    each = request.ranks or request.profile.ranks_a_node or ranks
    if request.nodes is None and ranks % each and request.cluster != "local":
        problem = (
            f"parallel.ranks is {ranks}, which fill no whole nodes of {each}: give --nodes, such as "
            f"{-(-ranks // each)}."
        )
        try:
            resolve_given(given, {}, ranks)
        except ConfigError as others:
            raise ConfigError([*others.problems, problem]) from others
        raise UserError(problem)
    config, fits, notes = _fits(given, request.nodes or (max(1, ranks // each),) * 2, each, request.cluster != "local")
    run_dir = run_dir_of(config, request.recipe)
    notes += filter(None, [note, resume.validate_resume(config, run_dir)])
    job = Job(
        name=request.name or run_dir.name,
        run_dir=os.path.abspath(run_dir),
        cluster=request.cluster,
        command=list(command),
        folder=os.getcwd(),
        code="",
        ranks_per_node=each,
        fits=fits,
        restarts=request.profile.restarts,
        requeues=request.profile.requeues,
        profile=dataclasses.asdict(request.profile),
        submitted=time.time(),
    )
    return job, merge(given, {"run": {"dir": str(run_dir)}}), notes


def write_job(job: Job, recipe: dict[str, Any]) -> Job:
    """Write what travels with the job, its code and its recipe; the job that knows where. Raises UserError."""
    try:
        job.place.mkdir(parents=True, exist_ok=True)
        job.logs.mkdir(exist_ok=True)
        write_whole(job.recipe, yaml.safe_dump(recipe, sort_keys=False))
        return dataclasses.replace(job, code=snapshot(job.place))
    except OSError as error:
        raise UserError(f"{job.run_dir} cannot hold a run ({error.strerror}): choose another run.dir.") from error


def _ranks(given: dict[str, Any]) -> int:
    """parallel.ranks, where it is a number; what is wrong with it is told by `resolve`."""
    section = given.get("parallel")
    ranks = section.get("ranks", 1) if isinstance(section, dict) else 1
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


def _fits(
    given: dict[str, Any], nodes: tuple[int, int], each: int, has_nodes: bool
) -> tuple[Config, list[int], list[str]]:
    """(Config for the fewest nodes, the numbers of nodes that can take the recipe, notes). Raises ConfigError."""
    problems: dict[int, list[str]] = {}
    configs: list[Config] = []
    for num in dict.fromkeys(nodes):  # all checks for both ends; between them, those of ranks
        try:
            configs.append(resolve_given(given, {}, num * each))
        except ConfigError as error:
            problems[num] = [str(problem) for problem in error.problems]
    if problems:
        several = list(dict.fromkeys(p for of_one in problems.values() for p in of_one))
        batch = _batch(given)
        num = next((n for n in nodes if batch % (n * each)), 0)
        below, above = range(min(num - 1, batch // each), 0, -1), range(num + 1, batch // each + 1)
        here = _problems(given, num * each) if num else set()
        near = [
            n
            for side in (below, above)
            if (n := next((n for n in side if batch % (n * each) == 0 and _problems(given, n * each) < here), 0))
        ]
        if num and near and has_nodes:
            several.append(
                f"--nodes is {'-'.join(map(str, dict.fromkeys(nodes)))}, but {num} of {each} ranks each cannot "
                "share the batch evenly; nearest numbers that the recipe can take: "
                f"{', '.join(map(str, near))}."
            )
        raise ConfigError(several)
    batch = configs[0].train.global_batch
    fits = [
        n
        for n in range(nodes[0], nodes[1] + 1)
        if n in nodes or batch % (n * each) == 0 and not _problems(given, n * each)
    ]
    left = sorted(set(range(nodes[0], nodes[1] + 1)) - set(fits))
    notes = (
        [
            (
                f"The recipe can be shared among {', '.join(str(n * each) for n in fits)} ranks: of {nodes[0]} to "
                f"{nodes[1]} nodes it uses {', '.join(map(str, fits))}, the next lower of these."
            )
        ]
        if left
        else []
    )
    return configs[0], fits, notes


def _batch(given: dict[str, Any]) -> int:
    """train.global_batch, where it is a number; what is wrong with it is told by `resolve`."""
    section = given.get("train")
    batch = section.get("global_batch", Train.global_batch) if isinstance(section, dict) else Train.global_batch
    return batch if isinstance(batch, int) and batch > 0 else 1


def _problems(given: dict[str, Any], world_size: int) -> set[str]:
    try:
        resolve(given, {}, world_size=world_size)
    except ConfigError as error:
        return {str(problem) for problem in error.problems}
    return set()
