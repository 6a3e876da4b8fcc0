"""A sweep, point by point: trained by the launcher, evaluated by the suite, told as a table. What is done stays."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from seer_scale.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Problem, UserError
from seer_scale.evaluate.suite import Item, run_suite
from seer_scale.files import shown, to_json, write_whole
from seer_scale.formatting import counted
from seer_scale.launch.options import Options
from seer_scale.launch.runs import command_here
from seer_scale.launch.submit import launch
from seer_scale.sweep.points import Asked, Point, points_of
from seer_scale.sweep.results import Result, check_unchanged, name_of, result_of
from seer_scale.sweep.table import as_text, draw, to_dict

RECIPES_DIR = "recipes"
"""In a sweep's folder: the recipe of each point."""
TABLE_FILE, PLOT_FILE = "sweep.json", "sweep.svg"


@dataclass(frozen=True, kw_only=True)
class How:
    """cluster ... time: as of `launch.options.Options`. items: what is measured of each point. evaluation: the words
    after `eval suite RUN` that measure that. only_table: nothing is started."""

    cluster: str
    items: Sequence[Item]
    evaluation: Sequence[str] = ()
    profile: str = ""
    nodes: str = ""
    ranks: str = ""
    time: str = ""
    dry_run: bool = False
    only_table: bool = False
    as_json: bool = False


def sweep(asked: Asked, how: How) -> int:
    """Train and evaluate what is missing, write the table and print it; returns the exit status: 1 where points are
    missing at the end, unless they were submitted or nothing was to be started. Raises UserError."""
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
    status = EXIT_DONE
    if not how.only_table:
        with contextlib.redirect_stdout(sys.stderr) if how.as_json else contextlib.nullcontext():
            status = _submit(results, asked, how) if how.cluster == "slurm" else _run_here(results, asked, how)
        results = [result_of(point, how.items) for point in points]
    _write(results, asked, how)
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
    if left and how.cluster == "slurm":
        with tempfile.TemporaryDirectory() as folder:
            return launch(_options(left, Path(folder), asked, how))
    return EXIT_DONE


def _recipe(point: Point, folder: Path) -> Path:
    path = folder / f"{point.name}.yaml"
    write_whole(path, yaml.safe_dump(point.given, sort_keys=False))
    return path


def _options(points: Sequence[Point], folder: Path, asked: Asked, how: How) -> Options:
    """One launch of all of them, an array where they are several."""
    paths = [str(_recipe(point, folder)) for point in points]
    name = asked.out.name if len(paths) > 1 else f"{asked.out.name}-{points[0].name}"
    array = [f"recipe={','.join(paths)}"] if len(paths) > 1 else []
    return Options(
        recipe=paths[0], cluster=how.cluster, profile=how.profile, nodes=how.nodes, ranks=how.ranks, time=how.time,
        name=name if how.cluster == "slurm" else "", array=array, dry_run=how.dry_run,
    )  # fmt: skip


def _run_here(results: Sequence[Result], asked: Asked, how: How) -> int:
    """Each to its end, one after the other; what fails is told, and the others go on."""
    status = EXIT_DONE
    for number, result in enumerate(results, 1):
        if not result.lacks(how.items):
            continue
        point = result.point
        with _failing(point.name) as failed:
            if not result.is_trained:
                print(f"[{number} of {len(results)}] {point.name}", file=sys.stderr, flush=True)
                ended = launch(_options([point], asked.out / RECIPES_DIR, asked, how))
                if ended == EXIT_STOPPED:
                    return ended
                if ended:
                    failed.append(ended)
            if not failed and result_of(point, how.items).is_trained:
                run_suite(point.run_dir, how.items, which="last", initial=["trained"], out=None, device="auto")
        status = EXIT_FAILED if failed else status
    return status


@contextlib.contextmanager
def _failing(name: str) -> Iterator[list[int]]:
    """A list that holds what failed in the body: exit statuses."""
    failed: list[int] = []
    try:
        yield failed
    except UserError as error:
        print(error.prefixed(name), file=sys.stderr, flush=True)
        failed.append(EXIT_FAILED)


def _submit(results: Sequence[Result], asked: Asked, how: How) -> int:
    """All that are neither trained nor in the queue, and how to evaluate those that are trained."""
    left = [result.point for result in results if not result.is_trained and not result.is_running]
    if left:
        launch(_options(left, asked.out / RECIPES_DIR, asked, how))
    for result in results:
        if result.is_trained and result.lacks(how.items):
            words = shlex.join(["eval", "suite", str(result.point.run_dir), *how.evaluation])
            print(f"{result.point.name} is trained; evaluate it by: srun {command_here()} {words}")
    return EXIT_DONE
