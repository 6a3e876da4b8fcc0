"""From a recipe and the launcher's options to a checked `Job`: all problems are reported before anything is started."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seer_scale.config import Config, Train, merge, parse_overrides, plugins_of, resolve
from seer_scale.errors import ConfigError, Problem, UserError
from seer_scale.evaluate.run import RESULTS
from seer_scale.files import write_whole
from seer_scale.launch.job import PLUGINS_DIR, Job, cannot_hold_run, snapshot
from seer_scale.launch.profile import Profile
from seer_scale.plugins import module_of, plugin_place
from seer_scale.training import resume
from seer_scale.training.start import read_recipe, resolve_given, run_dir_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for. node_range: (fewest, most); None: as many as the recipe's parallel.ranks need.
    ranks_per_node: 0 = the profile's, or else all of the recipe's ranks on one node."""

    recipe: str
    overrides: Sequence[str] = ()
    name: str = ""
    cluster: str = "local"
    node_range: tuple[int, int] | None = None
    ranks_per_node: int = 0
    profile: Profile = Profile()


def prepare(request: Request, command: Sequence[str]) -> tuple[Job, dict[str, Any], list[str]]:
    """(the job, the recipe that travels with it, what the user should know). Writes nothing. Raises UserError."""
    given, note = read_recipe(request.recipe, list(request.overrides))
    over, problems = parse_overrides(list(request.overrides))
    if problems:
        resolve_given(given, list(request.overrides), 1)  # raises these and all others
    given = merge(given, over)
    if request.name and not (given.get("run") or {}).get("dir"):
        given = merge(given, {"run": {"dir": str(Path("runs") / request.name)}})
    ranks, has_nodes = ranks_of_recipe(given), request.cluster != "local"
    ranks_per_node = request.ranks_per_node or request.profile.resolved_ranks_per_node or ranks
    if request.node_range is None and ranks % ranks_per_node and has_nodes:
        fix = f"give --nodes, such as {-(-ranks // ranks_per_node)}"
        problem = Problem("parallel.ranks", ranks, f"ranks fill whole nodes of {ranks_per_node}", fix)
        try:
            resolve_given(given, {}, ranks)
        except ConfigError as others:
            raise ConfigError([*others.problems, problem]) from others
        raise UserError(problem)
    node_range = request.node_range or (max(1, ranks // ranks_per_node),) * 2
    config, node_counts, notes = _resolve_for_nodes(given, node_range, ranks_per_node, has_nodes)
    run_dir = run_dir_of(config, request.recipe)
    notes += filter(None, [note, resume.validate_resume(config, run_dir)])
    job = Job(
        name=request.name or run_dir.name,
        run_dir=os.path.abspath(run_dir),
        cluster=request.cluster,
        command=list(command),
        folder=os.getcwd(),
        code="",
        ranks_per_node=ranks_per_node,
        node_counts=node_counts,
        restarts=request.profile.restarts,
        requeues=request.profile.requeues,
        profile=dataclasses.asdict(request.profile),
        submitted=time.time(),
    )
    return job, merge(given, {"run": {"dir": str(run_dir)}}), notes


def prepare_evaluation(
    name: str, run_dir: Path, tasks: Sequence[dict[str, Any]], plugins: Sequence[str], profile: Profile
) -> tuple[Job, dict[str, Any], list[str]]:
    """As `prepare`, of a job that measures the run in `run_dir`, on one node. tasks: as of `suite.to_entries`."""
    job = Job(
        name=name,
        run_dir=os.path.abspath(run_dir / RESULTS),
        cluster="slurm",
        command=[],
        folder=os.getcwd(),
        code="",
        ranks_per_node=profile.resolved_ranks_per_node,
        node_counts=[1],
        restarts=profile.restarts,
        requeues=profile.requeues,
        profile=dataclasses.asdict(profile),
        submitted=time.time(),
        is_evaluation=True,
    )
    return job, {"tasks": list(tasks), "run": {"plugins": list(plugins)}}, []


def write_job(job: Job, recipe: dict[str, Any]) -> Job:
    """Write what travels with the job, its code and its recipe; the job that knows where. Raises UserError."""
    try:
        job.launch_dir.mkdir(parents=True, exist_ok=True)
        job.logs.mkdir(exist_ok=True)
        plugins = own_plugins(recipe)
        code = snapshot(job.code_place, list(plugins.values()))
        if plugins:  # ranks take the copies; installed ones are what they are
            copies = {name: str(Path(code) / PLUGINS_DIR / module.name) for name, module in plugins.items()}
            recipe = merge(recipe, {"run": {"plugins": [copies.get(name, name) for name in plugins_of(recipe)]}})
        write_whole(job.recipe, yaml.safe_dump(recipe, sort_keys=False))
        return dataclasses.replace(job, code=code)
    except OSError as error:
        raise cannot_hold_run(job.run_dir, error) from error


def own_plugins(recipe: dict[str, Any]) -> dict[str, Path]:
    """The plugins of a recipe that are files or folders, which travel with a job: as they are named, and where they
    lie."""
    return {name: module_of(place) for name in plugins_of(recipe) if (place := plugin_place(name))}


def ranks_of_recipe(given: dict[str, Any]) -> int:
    """parallel.ranks, where it is a number; what is wrong with it is reported by `resolve`."""
    section = given.get("parallel")
    ranks = section.get("ranks", 1) if isinstance(section, dict) else 1
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


def _resolve_for_nodes(
    given: dict[str, Any], node_range: tuple[int, int], ranks_per_node: int, has_nodes: bool
) -> tuple[Config, list[int], list[str]]:
    """(Config for the fewest nodes, the numbers of nodes that can take the recipe, notes). Raises ConfigError."""
    problems: list[Problem] = []
    configs: list[Config] = []
    for nodes in dict.fromkeys(node_range):  # all checks for both ends; between them, those of ranks
        try:
            configs.append(resolve_given(given, {}, nodes * ranks_per_node))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    batch = _batch_of_recipe(given)

    def shares_batch(nodes: int) -> bool:
        return batch % (nodes * ranks_per_node) == 0

    if problems:
        unfit = next((nodes for nodes in node_range if not shares_batch(nodes)), None)
        if unfit and has_nodes:
            here, most = _rules_broken(given, unfit * ranks_per_node), batch // ranks_per_node
            sides = range(min(unfit - 1, most), 0, -1), range(unfit + 1, most + 1)
            near = [
                next((n for n in side if shares_batch(n) and _rules_broken(given, n * ranks_per_node) < here), 0)
                for side in sides
            ]
            if any(near):
                text = "-".join(map(str, dict.fromkeys(node_range)))
                rule = f"{unfit} of {ranks_per_node} ranks each cannot share the batch evenly"
                problems.append(Problem("--nodes", text, rule, tuple(n for n in near if n)))
        raise ConfigError(problems)
    low, high = node_range
    node_counts = [
        n
        for n in range(low, high + 1)
        if n in node_range or shares_batch(n) and not _rules_broken(given, n * ranks_per_node)
    ]
    if len(node_counts) == high + 1 - low:
        return configs[0], node_counts, []
    note = (
        f"The recipe can be shared among {', '.join(str(n * ranks_per_node) for n in node_counts)} ranks: of {low} to "
        f"{high} nodes it uses {', '.join(map(str, node_counts))}, the next lower of these."
    )
    return configs[0], node_counts, [note]


def _batch_of_recipe(given: dict[str, Any]) -> int:
    """train.global_batch, where it is a number; what is wrong with it is reported by `resolve`."""
    section = given.get("train")
    batch = section.get("global_batch", Train.global_batch) if isinstance(section, dict) else Train.global_batch
    return batch if isinstance(batch, int) and batch > 0 else 1


def _rules_broken(given: dict[str, Any], world_size: int) -> set[tuple[str, str]]:
    """(key, rule) of each problem of the recipe on so many ranks."""
    try:
        resolve(given, {}, world_size=world_size)
    except ConfigError as error:
        return {(problem.key, problem.rule) for problem in error.problems}
    return set()
