"""Start a recipe on several processes, here or on SLURM, as one command at a time may."""

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
from seer_scale.errors import EXIT_DONE, UserError, nearest
from seer_scale.files import shown
from seer_scale.formatting import counted
from seer_scale.launch.job import CLAIM, Job, snapshot
from seer_scale.launch.options import (
    CLUSTERS,
    NEEDS_QUEUE,
    Options,
    grid,
    node_range,
    read,
    whole_number,
    with_time,
)
from seer_scale.launch.profile import Profile, load_profile
from seer_scale.launch.runs import ago, called, command_here, is_running

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.,=+@ -]*"
Prepared = tuple[Job, dict[str, Any], list[str]]
"""What `prepare` makes of one run."""


def launch(options: Options) -> int:
    """Start what was asked for: a job, the jobs of a grid, or ranks on this machine, which are followed to their end;
    returns the exit status. Raises UserError."""
    if not Path(options.recipe).is_file() and options.recipe not in recipe_names():
        raise UserError(
            f"{options.recipe!r} is neither a file nor a shipped recipe; {nearest(options.recipe, recipe_names())}"
        )
    if not options.cluster:
        raise UserError("--cluster is missing: say where to start, as in --cluster local or --cluster slurm.")
    if options.cluster not in CLUSTERS:
        near = nearest(options.cluster, CLUSTERS)
        raise UserError(
            f"--cluster is {options.cluster!r}, but must be local or "
            f"slurm{'; ' + near if near.startswith('did') else '.'}"
        )
    is_local = options.cluster == "local"
    for key in NEEDS_QUEUE if is_local else ():
        if getattr(options, key):
            raise UserError(f"--{key.replace('_', '-')} has no effect with --cluster local; leave it out.")
    print(f"seer-scale {__version__}: checking {shown(options.recipe)} ...", file=sys.stderr, flush=True)
    prepared = _prepare_all(options)
    for note in dict.fromkeys(note for _, _, notes in prepared for note in notes):
        print(note)
    if is_local:
        return _run_here(prepared)
    return _print_scripts(prepared) if options.dry_run else _submit(prepared)


def _prepare_all(options: Options) -> list[Prepared]:
    """All runs, checked; all that is wrong is told at once. Raises UserError."""
    from seer_scale.launch.prepare import Request, prepare  # loads torch, which the other commands do without

    problems: list[str] = []
    if options.cluster == "slurm" and not options.profile:
        problems.append(
            "--profile is missing: say which cluster, as in --profile slurm/NAME.yaml "
            "(seer-scale launch --print-profile prints one to fill in)."
        )
    profile = read(options.profile, load_profile, Profile(gpus_per_node=0), problems)
    nodes = read(options.nodes, node_range, None, problems)
    ranks = read(options.ranks, partial(whole_number, "--ranks", least=1), 0, problems)
    knows_nodes = not problems
    profile = read(options.time, partial(with_time, profile), profile, problems)
    restarts = read(options.restarts, partial(whole_number, "--restarts", least=0), profile.restarts, problems)
    if options.name and not re.fullmatch(NAME, options.name):
        problems.append(
            f"--name is {options.name!r}, but must begin with a letter or digit, and hold nothing but those and "
            "_ . , = + @ - (the folder is run.dir)."
        )
    prepared, runs = [], grid(options.recipe, options.name, options.array)
    for recipe, name, more in runs:
        overrides = [*options.overrides, *more]
        request = Request(
            recipe=recipe, overrides=overrides, name=name, cluster=options.cluster if knows_nodes else "local",
            nodes=nodes if knows_nodes else None, ranks=ranks, profile=dataclasses.replace(profile, restarts=restarts),
        )  # fmt: skip
        try:
            prepared.append(prepare(request, options.words(recipe, name, overrides)))
        except UserError as problem:
            problems.append(f"{name}: {problem}" if len(runs) > 1 else str(problem))
    if problems:
        raise UserError(*(line for problem in dict.fromkeys(problems) for line in problem.splitlines()))
    folders = [job.run_dir for job, _, _ in prepared]
    replaces, marks = ("SLURM", r"%") if options.cluster == "slurm" else ("submitit", "%[jtAa]")
    if percent := next((folder for folder in folders if re.search(marks, folder)), None):
        raise UserError(f"run.dir is {percent}, but {replaces} replaces what follows a %: choose another.")
    if split := next((folder for folder in folders if os.pathsep in folder), None):
        raise UserError(
            f"run.dir is {split}, but the copy of the code in it is found by PYTHONPATH, whose folders are "
            f"parted by {os.pathsep} signs: choose another."
        )
    names = [*folders, *(job.folder for job, _, _ in prepared)] if options.cluster == "slurm" else []
    if odd := next((name for name in names if "\n" in name or any("\udc80" <= c <= "\udcff" for c in name)), None):
        raise UserError(
            f"{odd} cannot stand in a batch script, which is UTF-8: choose another run.dir, or start from "
            "another folder."
        )
    if len(set(folders)) < len(folders):
        raise UserError(
            f"--array makes {len(folders)} runs, but run.dir gives them one folder: leave it out, and each has "
            "runs/NAME (--name says how they are called)."
        )
    return prepared


def _run_here(prepared: list[Prepared]) -> int:
    from seer_scale.launch.local import run_here
    from seer_scale.launch.prepare import write_job

    if len(prepared) > 1:
        raise UserError("--array needs a queue: with --cluster local start one run after the other.")
    job, recipe, _ = prepared[0]
    with claimed(job):
        return run_here(write_job(job, recipe))


def _print_scripts(prepared: list[Prepared]) -> int:
    from seer_scale.launch import slurm

    for alike in _group_by_nodes(prepared):
        first = alike[0][0]
        print(slurm.script(dataclasses.replace(first, code=snapshot(first.place, write=False)), len(alike)))
        if len(alike) > 1:
            print("\n".join(f"# {n}: {called(job)}" for n, (job, _, _) in enumerate(alike)))
    return EXIT_DONE


def _submit(prepared: list[Prepared]) -> int:
    from seer_scale.launch import slurm
    from seer_scale.launch.prepare import write_job

    slurm.must_be_there()
    before = {job.run_dir for job, _, _ in prepared if os.path.exists(job.run_dir)}
    mine: list[Job] = []
    with ExitStack() as claims:
        try:
            for job, _, _ in prepared:
                claims.enter_context(claimed(job))
                mine.append(job)
            for alike in _group_by_nodes(prepared):
                for job in slurm.submit([write_job(job, recipe) for job, recipe, _ in alike]):
                    nodes = "-".join(map(str, dict.fromkeys((job.fits[0], job.fits[-1]))))
                    where = f"{nodes} node{'s' * (nodes != '1')} of {counted(job.ranks_per_node, 'rank')}"
                    look = f"{command_here()} status {shlex.quote(called(job))}"
                    print(shown(f"Submitted {job.name} as job {job.job_id} on {where}: {look}"))
        finally:
            for job in mine:
                if job.run_dir not in before and not job.record.exists():
                    shutil.rmtree(job.run_dir, ignore_errors=True)
    return EXIT_DONE


def _group_by_nodes(prepared: list[Prepared]) -> list[list[Prepared]]:
    """Those that want the same nodes, which one array can hold."""
    groups: dict[tuple[int, ...], list[Prepared]] = {}
    for one in prepared:
        groups.setdefault((one[0].fits[0], one[0].fits[-1], one[0].ranks_per_node), []).append(one)
    return list(groups.values())


@contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Nobody else starts this run meanwhile. Raises UserError where it is in use."""
    try:
        job.place.mkdir(parents=True, exist_ok=True)
        claim = os.open(job.place / CLAIM, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{job.run_dir} cannot hold a run ({error.strerror}): choose another run.dir.") from error
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _must_be_free(job)
            raise UserError(
                f"The run {job.name} is being started by another command: wait for that one, or give another --name."
            ) from None
        except OSError as error:  # as on Lustre mounted without flock
            print(
                (
                    f"{job.run_dir} is on a file system without locks ({error.strerror}): do not start this run "
                    "twice at once."
                ),
                file=sys.stderr,
            )
        _must_be_free(job)
        yield
    finally:
        os.close(claim)


def _must_be_free(job: Job) -> None:
    before = Job.read(job.run_dir)
    if before and is_running(before):
        raise UserError(
            f"The run {job.name} is in use by job {before.job_id}, submitted {ago(before.submitted)}: "
            f"cancel it ({command_here()} cancel {shlex.quote(called(job))}), or give another --name."
        )
