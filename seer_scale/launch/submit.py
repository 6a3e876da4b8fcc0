"""Start a recipe on several processes, here or on SLURM; a run is started by one command at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from seer_scale import __version__
from seer_scale.config import recipe_names
from seer_scale.errors import EXIT_DONE, NOTHING, Problem, UserError, closest, nearest
from seer_scale.files import shown
from seer_scale.formatting import counted
from seer_scale.launch.job import START_LOCK, Job, cannot_hold_run, snapshot
from seer_scale.launch.options import (
    CLUSTERS,
    NEEDS_QUEUE,
    Options,
    expand_grid,
    parse,
    parse_node_range,
    parse_whole_number,
    with_time,
)
from seer_scale.launch.profile import Profile, load_profile
from seer_scale.launch.runs import ago, command_here, display_name, is_running

NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.,=+@ -]*"
Prepared = tuple[Job, dict[str, Any], list[str]]
"""What `prepare` makes of one run."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of the run in run_dir, by one job on one node. tasks: as of `suite.to_entries`. plugins: of the run's recipe.
    after: the number of the job that trains it; empty where none does any more."""

    name: str
    run_dir: Path
    tasks: Sequence[dict[str, Any]]
    plugins: Sequence[str] = ()
    after: str = ""


def launch(options: Options) -> int:
    """Start what was asked for: a job, the jobs of a grid, or ranks on this machine, which are followed to their end;
    returns the exit status. Raises UserError."""
    prepared = _check(options)
    if options.cluster == "local":
        return _run_here(prepared)
    _enqueue([(group, "") for group in group_by_nodes(prepared)], dry_run=options.dry_run)
    return EXIT_DONE


def submit(options: Options) -> list[Job]:
    """As `launch`, on SLURM; the jobs with their numbers, or with what stands for these in a dry run."""
    return _enqueue([(group, "") for group in group_by_nodes(_check(options))], dry_run=options.dry_run)


def submit_evaluations(asked: Sequence[Evaluation], *, profile: str, dry_run: bool = False) -> list[Job]:
    """On SLURM, each after the good end of its training: where that fails, it is cancelled. Raises UserError."""
    from seer_scale.launch import slurm
    from seer_scale.launch.prepare import prepare_evaluation

    errors: list[UserError] = []
    own = _read_profile("slurm", profile, errors).for_evaluation()
    if errors:
        raise UserError.joined(errors)
    prepared = [prepare_evaluation(e.name, e.run_dir, e.tasks, e.plugins, own) for e in asked]
    _check_folders([job for job, _, _ in prepared], is_slurm=True)
    waits = slurm.dependencies([e.after for e in asked])
    return _enqueue([([prepared[i] for i in group], dependency) for dependency, group in waits], dry_run=dry_run)


def _check(options: Options) -> list[Prepared]:
    """What was asked for, prepared; says what the user should know. Raises UserError."""
    if not Path(options.recipe).is_file() and options.recipe not in recipe_names():
        rule = "no file and no shipped recipe has that name"
        raise UserError(Problem("RECIPE", options.recipe, rule, nearest(options.recipe, recipe_names())))
    if not options.cluster:
        raise UserError(Problem("--cluster", NOTHING, "is missing", "give --cluster local or --cluster slurm"))
    if options.cluster not in CLUSTERS:
        near = (found,) if (found := closest(options.cluster, CLUSTERS)) else ""
        raise UserError(Problem("--cluster", options.cluster, f"must be {' or '.join(CLUSTERS)}", near))
    for key in NEEDS_QUEUE if options.cluster == "local" else ():
        if getattr(options, key):
            option = f"--{key.replace('_', '-')}"
            raise UserError(Problem(option, NOTHING, "has no effect with --cluster local", "leave it out"))
    print(f"seer-scale {__version__}: checking {shown(options.recipe)} ...", file=sys.stderr, flush=True)
    prepared = _prepare_all(options)
    for note in dict.fromkeys(note for _, _, notes in prepared for note in notes):
        print(note)
    return prepared


def _read_profile(cluster: str, path: str, errors: list[UserError]) -> Profile:
    """The profile; what is wrong with it is added to `errors`."""
    if cluster == "slurm" and not path:
        fix = (
            "give the profile of your cluster, as in --profile slurm/NAME.yaml "
            "(seer-scale launch --print-profile prints one to fill in)"
        )
        errors.append(UserError(Problem("--profile", NOTHING, "is missing", fix)))
    return parse(path, load_profile, Profile(gpus_per_node=0), errors)


def _prepare_all(options: Options) -> list[Prepared]:
    """All runs, checked; all problems are reported at once. Raises UserError."""
    from seer_scale.launch.prepare import Request, prepare  # loads torch, which the other commands do without

    errors: list[UserError] = []
    profile = _read_profile(options.cluster, options.profile, errors)
    nodes = parse(options.nodes, parse_node_range, None, errors)
    ranks = parse(options.ranks, partial(parse_whole_number, "--ranks", least=1), 0, errors)
    knows_nodes = not errors
    profile = parse(options.time, partial(with_time, profile), profile, errors)
    restarts = parse(options.restarts, partial(parse_whole_number, "--restarts", least=0), profile.restarts, errors)
    if options.name and not re.fullmatch(NAME_PATTERN, options.name):
        rule = "must begin with a letter or digit, and hold only those and _ . , = + @ - (the folder is run.dir)"
        errors.append(UserError(Problem("--name", options.name, rule)))
    prepared, runs = [], expand_grid(options.recipe, options.name, options.array)
    for recipe, name, more in runs:
        overrides = [*options.overrides, *more]
        request = Request(
            recipe=recipe, overrides=overrides, name=name, cluster=options.cluster if knows_nodes else "local",
            node_range=nodes if knows_nodes else None, ranks_per_node=ranks,
            profile=dataclasses.replace(profile, restarts=restarts),
        )  # fmt: skip
        try:
            prepared.append(prepare(request, options.to_words(recipe, name, overrides)))
        except UserError as error:
            errors.append(error.prefixed(name) if len(runs) > 1 else error)
    if errors:
        raise UserError.joined(errors)
    _check_folders([job for job, _, _ in prepared], is_slurm=options.cluster == "slurm")
    if profile.gpu and not options.no_plan:
        from seer_scale.launch.planned import plan_all

        prepared = plan_all(prepared, profile.gpu)
    return prepared


def _check_folders(jobs: list[Job], *, is_slurm: bool) -> None:
    """Raises UserError where submitit, SLURM or the ranks would read a run's folder as something else."""
    folders = [job.run_dir for job in jobs]
    replaces, pattern = ("SLURM", r"%") if is_slurm else ("submitit", "%[jtAa]")
    if folder := next((folder for folder in folders if re.search(pattern, folder)), None):
        raise UserError(Problem("run.dir", folder, f"{replaces} replaces what follows a %", "choose another"))
    if folder := next((folder for folder in folders if os.pathsep in folder), None):
        rule = f"the copy of the code in it is found by PYTHONPATH, which splits at {os.pathsep}"
        raise UserError(Problem("run.dir", folder, rule, "choose another"))
    names = [*folders, *(job.folder for job in jobs)] if is_slurm else []
    if odd := next((name for name in names if "\n" in name or any("\udc80" <= c <= "\udcff" for c in name)), None):
        fix = "choose another run.dir, or start from another folder"
        raise UserError(Problem(odd, NOTHING, "cannot stand in a batch script, which is UTF-8", fix))
    if len(set(folders)) < len(folders):
        rule = f"it would be the folder of all {len(folders)} runs of --array"
        fix = "leave it out, and each run has runs/NAME (--name sets the beginning of NAME)"
        raise UserError(Problem("run.dir", folders[0], rule, fix))


def _run_here(prepared: list[Prepared]) -> int:
    from seer_scale.launch.local import run_here
    from seer_scale.launch.prepare import write_job

    if len(prepared) > 1:
        raise UserError(Problem("--array", NOTHING, "needs a queue", "with --cluster local start one run at a time"))
    job, recipe, _ = prepared[0]
    with start_lock(job):
        return run_here(write_job(job, recipe))


def _enqueue(groups: Sequence[tuple[list[Prepared], str]], *, dry_run: bool) -> list[Job]:
    """Submit each group as a job, or as an array of several, after what its dependency names; the jobs with their
    numbers. In a dry run the scripts are printed, and JOB1, JOB2 ... stand for the numbers."""
    return _print_scripts(groups) if dry_run else _submit(groups)


def _print_scripts(groups: Sequence[tuple[list[Prepared], str]]) -> list[Job]:
    from seer_scale.launch import slurm
    from seer_scale.launch.prepare import own_plugins

    jobs = []
    for number, (group, dependency) in enumerate(groups, 1):
        first, plugins = group[0][0], list(own_plugins(group[0][1]).values())
        code = snapshot(first.code_place, plugins, write=False)
        print(slurm.script(dataclasses.replace(first, code=code), len(group), dependency))
        if len(group) > 1:
            print("\n".join(f"# {n}: {display_name(job)}" for n, (job, _, _) in enumerate(group)))
        for n, (job, _, _) in enumerate(group):
            jobs.append(dataclasses.replace(job, job_id=f"JOB{number}{f'_{n}' * (len(group) > 1)}"))
    return jobs


def _submit(groups: Sequence[tuple[list[Prepared], str]]) -> list[Job]:
    from seer_scale.launch import slurm
    from seer_scale.launch.prepare import write_job

    slurm.check_installed()
    asked = [job for group, _ in groups for job, _, _ in group]
    before = {job.run_dir for job in asked if os.path.exists(job.run_dir)}
    locked: list[Job] = []
    jobs: list[Job] = []
    with ExitStack() as locks:
        try:
            for job in asked:
                locks.enter_context(start_lock(job))
                locked.append(job)
            for group, dependency in groups:
                submitted = slurm.submit([write_job(job, recipe) for job, recipe, _ in group], dependency)
                jobs += submitted
                for job in submitted:
                    nodes = "-".join(map(str, dict.fromkeys((job.node_counts[0], job.node_counts[-1]))))
                    where = f"{nodes} node{'s' * (nodes != '1')} of {counted(job.ranks_per_node, 'rank')}"
                    look = f"{command_here()} status {shlex.quote(display_name(job))}"
                    after = f" after {dependency.partition(':')[2]}" if dependency else ""
                    print(shown(f"Submitted {job.name} as job {job.job_id} on {where}{after}: {look}"))
        finally:
            for job in locked:
                if job.run_dir not in before and not job.record.exists():
                    shutil.rmtree(job.run_dir, ignore_errors=True)
    return jobs


def group_by_nodes(prepared: list[Prepared]) -> list[list[Prepared]]:
    """Runs that want the same nodes, which one array can hold."""
    groups: dict[tuple[int, ...], list[Prepared]] = {}
    for one in prepared:
        job = one[0]
        groups.setdefault((job.node_counts[0], job.node_counts[-1], job.ranks_per_node), []).append(one)
    return list(groups.values())


@contextmanager
def start_lock(job: Job) -> Iterator[None]:
    """Nobody else starts this run meanwhile. Raises UserError where it is in use."""
    try:
        job.launch_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(job.launch_dir / START_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_hold_run(job.run_dir, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _check_not_running(job)
            fix = "wait for that one, or give another --name"
            raise UserError(Problem(job.name, NOTHING, "is being started by another command", fix)) from None
        except OSError as error:  # as on Lustre mounted without flock
            print(
                f"{job.run_dir} is on a file system without locks ({error.strerror}): do not start this run twice at "
                "once.",
                file=sys.stderr,
            )
        _check_not_running(job)
        yield
    finally:
        os.close(lock)


def _check_not_running(job: Job) -> None:
    before = Job.read(job.run_dir)
    if before and is_running(before):
        rule = f"is in use by job {before.job_id}, submitted {ago(before.submitted)}"
        cancel = f"{command_here()} cancel {shlex.quote(display_name(job))}"
        raise UserError(Problem(job.name, NOTHING, rule, f"cancel it ({cancel}), or give another --name"))
