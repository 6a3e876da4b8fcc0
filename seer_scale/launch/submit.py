"""Start a recipe on several processes, here or on SLURM; a run is started by one command at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


def launch(options: Options) -> int:
    """Start what was asked for: a job, the jobs of a grid, or ranks on this machine, which are followed to their end;
    returns the exit status. Raises UserError."""
    if not Path(options.recipe).is_file() and options.recipe not in recipe_names():
        rule = "no file and no shipped recipe has that name"
        raise UserError(Problem("RECIPE", options.recipe, rule, nearest(options.recipe, recipe_names())))
    if not options.cluster:
        raise UserError(Problem("--cluster", NOTHING, "is missing", "give --cluster local or --cluster slurm"))
    if options.cluster not in CLUSTERS:
        near = (found,) if (found := closest(options.cluster, CLUSTERS)) else ""
        raise UserError(Problem("--cluster", options.cluster, f"must be {' or '.join(CLUSTERS)}", near))
    is_local = options.cluster == "local"
    for key in NEEDS_QUEUE if is_local else ():
        if getattr(options, key):
            option = f"--{key.replace('_', '-')}"
            raise UserError(Problem(option, NOTHING, "has no effect with --cluster local", "leave it out"))
    print(f"seer-scale {__version__}: checking {shown(options.recipe)} ...", file=sys.stderr, flush=True)
    prepared = _prepare_all(options)
    for note in dict.fromkeys(note for _, _, notes in prepared for note in notes):
        print(note)
    if is_local:
        return _run_here(prepared)
    return _print_scripts(prepared) if options.dry_run else _submit(prepared)


def _prepare_all(options: Options) -> list[Prepared]:
    """All runs, checked; all problems are reported at once. Raises UserError."""
    from seer_scale.launch.prepare import Request, prepare  # loads torch, which the other commands do without

    errors: list[UserError] = []
    if options.cluster == "slurm" and not options.profile:
        fix = (
            "give the profile of your cluster, as in --profile slurm/NAME.yaml "
            "(seer-scale launch --print-profile prints one to fill in)"
        )
        errors.append(UserError(Problem("--profile", NOTHING, "is missing", fix)))
    profile = parse(options.profile, load_profile, Profile(gpus_per_node=0), errors)
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


def _print_scripts(prepared: list[Prepared]) -> int:
    from seer_scale.launch import slurm
    from seer_scale.launch.prepare import own_plugins

    for group in group_by_nodes(prepared):
        first, plugins = group[0][0], list(own_plugins(group[0][1]).values())
        print(
            slurm.script(dataclasses.replace(first, code=snapshot(first.launch_dir, plugins, write=False)), len(group))
        )
        if len(group) > 1:
            print("\n".join(f"# {n}: {display_name(job)}" for n, (job, _, _) in enumerate(group)))
    return EXIT_DONE


def _submit(prepared: list[Prepared]) -> int:
    from seer_scale.launch import slurm
    from seer_scale.launch.prepare import write_job

    slurm.check_installed()
    before = {job.run_dir for job, _, _ in prepared if os.path.exists(job.run_dir)}
    locked: list[Job] = []
    with ExitStack() as locks:
        try:
            for job, _, _ in prepared:
                locks.enter_context(start_lock(job))
                locked.append(job)
            for group in group_by_nodes(prepared):
                for job in slurm.submit([write_job(job, recipe) for job, recipe, _ in group]):
                    nodes = "-".join(map(str, dict.fromkeys((job.node_counts[0], job.node_counts[-1]))))
                    where = f"{nodes} node{'s' * (nodes != '1')} of {counted(job.ranks_per_node, 'rank')}"
                    look = f"{command_here()} status {shlex.quote(display_name(job))}"
                    print(shown(f"Submitted {job.name} as job {job.job_id} on {where}: {look}"))
        finally:
            for job in locked:
                if job.run_dir not in before and not job.record.exists():
                    shutil.rmtree(job.run_dir, ignore_errors=True)
    return EXIT_DONE


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
