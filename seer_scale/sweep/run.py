"""A sweep, point by point: trained by the launcher, evaluated by the suite, told as a table. What is done stays."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from seer_scale.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Problem, UserError
from seer_scale.evaluate.suite import Item, run_suite, to_entries
from seer_scale.files import shown, to_json, write_whole
from seer_scale.formatting import counted
from seer_scale.launch.options import Options
from seer_scale.launch.submit import Evaluation, launch, submit, submit_evaluations
from seer_scale.sweep.points import Asked, Point, points_of
from seer_scale.sweep.results import Result, check_unchanged, name_of, result_of
from seer_scale.sweep.table import as_text, draw, to_dict
from seer_scale.training.data_history import training_images

RECIPES_DIR = "recipes"
"""In a sweep's folder: the recipe of each point."""
TABLE_FILE, PLOT_FILE = "sweep.json", "sweep.svg"


@dataclass(frozen=True, kw_only=True)
class How:
    """cluster ... time: as of `launch.options.Options`. items: what is measured of each point. only_table: nothing is
    started."""

    cluster: str
    items: Sequence[Item]
    profile: str = ""
    nodes: str = ""
    ranks: str = ""
    time: str = ""
    dry_run: bool = False
    only_table: bool = False
    as_json: bool = False


def sweep(asked: Asked, how: How) -> int:
    """Train and evaluate what is missing, write the table and print it; returns the exit status: 1 where points are
    missing at the end, unless they were submitted or nothing was to be started.

    Raises UserError; and KeyboardInterrupt, once the table of what was done by then is printed.
    """
    if set(",[](){}'\"") & set(str(asked.out)):
        rule = "names in it are listed to the launcher, which splits at commas outside of brackets and quotes"
        raise UserError(Problem("--out", asked.out, rule, "choose a name without these"))
    if how.only_table and not asked.out.is_dir():
        raise UserError(Problem("--out", shown(asked.out), "there is no such folder, so no table", "leave --table out"))
    points = points_of(asked)
    check_unchanged(points)
    results = [result_of(point, how.items) for point in points]
    if how.dry_run:
        return _dry_run(results, asked, how)
    status, stopped = EXIT_DONE, None
    if asked.images and not how.only_table and how.cluster == "local":
        training_images(max(points, key=lambda point: point.images).config)  # refused now, and not after all the others
    if not how.only_table:
        with contextlib.redirect_stdout(sys.stderr) if how.as_json else contextlib.nullcontext():
            if how.cluster == "slurm":
                _submit(results, asked.out / RECIPES_DIR, asked, how)
            else:
                try:
                    status = _run_here(results, asked, how)
                except KeyboardInterrupt as stop:  # of an evaluation; a training saves its state and ends
                    stopped = stop
        results = [result_of(point, how.items) for point in points]
    _write(results, asked, how)
    if stopped:
        raise stopped
    is_complete = not any(result.lacks(how.items) for result in results)
    if status or is_complete or how.cluster == "slurm" and not how.only_table:
        return status
    return EXIT_FAILED


def _write(results: Sequence[Result], asked: Asked, how: How) -> None:
    """The table, on the disk and on the console."""
    told = to_dict(results, how.items, asked.equal)
    write_whole(asked.out / TABLE_FILE, to_json(told, indent=1) + "\n")
    is_drawn = draw(results, list(map(name_of, how.items)), asked.out / PLOT_FILE)
    if how.as_json:
        print(to_json(told))
        return
    print(as_text(results, how.items))
    print(f"Written: {shown(asked.out / TABLE_FILE)}{f', {shown(asked.out / PLOT_FILE)}' * is_drawn}")


def _dry_run(results: Sequence[Result], asked: Asked, how: How) -> int:
    told = to_dict(results, how.items, asked.equal)
    if how.as_json:
        print(to_json(told))
        return EXIT_DONE
    print(as_text(results, how.items))
    left = [result.point for result in results if not result.is_trained]
    compute = sum(point.compute for point in left)
    print(f"{counted(len(left), 'run')} to train, {compute:.2e} FLOP in all; nothing was started.")
    if how.cluster == "slurm":
        with tempfile.TemporaryDirectory() as folder:
            _submit(results, Path(folder), asked, how)
    return EXIT_DONE


def _recipe(point: Point, folder: Path) -> Path:
    path = folder / f"{point.name}.yaml"
    write_whole(path, yaml.safe_dump(point.given, sort_keys=False))
    return path


def _options(points: Sequence[Point], folder: Path, asked: Asked, how: How) -> Options:
    """One launch of all of them, an array where they are several."""
    paths = [str(_recipe(point, folder)) for point in points]
    array = [f"recipe={','.join(paths)}"] if len(paths) > 1 else []
    name = asked.out.resolve().name  # in an array, what the names of its runs begin with
    if not array:
        name = "" if how.cluster == "local" else f"{name}-{points[0].name}"
    return Options(
        recipe=paths[0], cluster=how.cluster, profile=how.profile, nodes=how.nodes, ranks=how.ranks, time=how.time,
        name=name, array=array, dry_run=how.dry_run,
    )  # fmt: skip


def _run_here(results: Sequence[Result], asked: Asked, how: How) -> int:
    """Each to its end, one after the other; what fails is told, and the others go on."""
    status = EXIT_DONE
    for number, result in enumerate(results, 1):
        if not result.lacks(how.items):
            continue
        print(f"[{number} of {len(results)}] {result.point.name}", file=sys.stderr, flush=True)
        try:
            ended = _run_point(result, asked, how)
        except UserError as error:
            print(error.prefixed(result.point.name), file=sys.stderr, flush=True)
            ended = EXIT_FAILED
        if ended == EXIT_STOPPED:
            return ended
        status = EXIT_FAILED if ended else status
    return status


def _run_point(result: Result, asked: Asked, how: How) -> int:
    """Train and evaluate what is missing of it; the exit status. Raises UserError."""
    if not result.is_trained:
        if ended := launch(_options([result.point], asked.out / RECIPES_DIR, asked, how)):
            return ended
    summary = run_suite(result.point.run_dir, how.items, which="last", initial=["trained"], out=None, device="auto")
    for problem in summary["problems"]:
        print(f"{result.point.name}: {problem['problem']}", file=sys.stderr, flush=True)
    return EXIT_FAILED if summary["problems"] else EXIT_DONE


def _submit(results: Sequence[Result], recipes: Path, asked: Asked, how: How) -> None:
    """The trainings that are missing, and of each point the evaluation that is, after its training. recipes: where the
    recipe of each training is written. What a launcher on this machine trains is left to it. Raises UserError."""
    results = [result for result in results if not result.training or result.training.cluster == "slurm"]
    jobs = {result.point.run_dir: result.training.job_id for result in results if result.training}
    if left := [result.point for result in results if not result.is_trained and not result.training]:
        submitted = {job.run_dir: job.job_id for job in submit(_options(left, recipes, asked, how))}
        jobs |= {point.run_dir: submitted[os.path.abspath(point.run_dir)] for point in left}
    tasks, sweep_name = to_entries(how.items), asked.out.resolve().name
    evaluations = [
        Evaluation(
            name=f"{sweep_name}-{result.point.name}-eval", run_dir=result.point.run_dir, tasks=tasks,
            plugins=result.point.config.run.plugins, after=jobs.get(result.point.run_dir, ""),
        )
        for result in results if result.lacks(how.items) and not result.evaluation
    ]  # fmt: skip
    if evaluations:
        submit_evaluations(evaluations, profile=how.profile, dry_run=how.dry_run)
