"""seer-scale sweep"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import add_command
from seer_scale.errors import NOTHING, ConfigError, Problem, closest
from seer_scale.launch.options import CLUSTERS

SWEEP_DESCRIPTION = """\
Trains several sizes of a network, or one on several numbers of images, with as many samples or as much compute,
evaluates each, and fits accuracy = a + b log10(size): what the smaller sizes predict of the largest is held against
what was measured there. The same command goes on with what is missing, and says which points are.

RECIPE ... are the sizes. Of one recipe with model.name regnety, sizes are multiples of its width (--widths; without it
and --images: 1, 1.5, 2.25, 3.5, 5.5): w0, wa and group_width times it, at the same depth, so that parameters and
multiply-accumulates grow with its square."""
SWEEP_EPILOG = """\
--section.key value sets a key of every recipe. Compute is 3 x 2 x MACs of the backbone over all crops x samples.
--cluster local trains and evaluates point after point; Ctrl-C saves and stops. --cluster slurm submits the trainings
that are missing as an array, and as another the evaluations, each after its training (`evaluation` in the profile says
on what); --table shows what is there, and the same command submits what has failed.
Exit status: 0 all is there (or submitted), 1 points are missing, 2 bad input, 75 stopped with its state saved."""


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands, "sweep", sweep, "train and evaluate several sizes, and fit accuracy against size",
        description=SWEEP_DESCRIPTION, epilog=SWEEP_EPILOG, takes_overrides=True, takes_plugins=True, is_run=True,
    )  # fmt: skip
    add = parser.add_argument
    add("recipes", metavar="RECIPE", nargs="+", help="shipped recipes' names or YAML files")
    add("--out", type=Path, required=True, metavar="DIR", help="the sweep's folder: a run each point, table and plot")
    add("--widths", default="", metavar="X,Y,...", help="sizes as multiples of the one recipe's width")
    add("--images", default="", metavar="N,M,...", help="numbers of unique images, at equal updates (data.max_images)")
    add("--seeds", default="1", metavar="N", help="runs a point, with run.seed and those after it (default: 1)")
    add(
        "--equal", default="samples", choices=["samples", "compute"],
        help="what all sizes get as much of; compute: that of the first (default: samples)",
    )  # fmt: skip
    add("--tasks", default="knn,linear", help="what is measured: as of eval suite (default: knn,linear)")
    add("--data", default="", help="labelled images for it; those of the recipe otherwise")
    add("--test", default="", help="labelled images to test on")
    add("--cluster", default="local", metavar="|".join(CLUSTERS), help="where to train (default: local)")
    add("--profile", default="", metavar="FILE", help="slurm: the description of the cluster")
    add("--nodes", default="", metavar="N|MIN-MAX", help="slurm: nodes of each run")
    add("--ranks", default="", metavar="N", help="processes a node (default on local: parallel.ranks)")
    add("--time", default="", metavar="T", help="slurm: time limit of a job")
    add("--dry-run", action="store_true", help="print the points, their cost and batch scripts, and start nothing")
    add("--table", action="store_true", help="print the table of what is there, and start nothing")
    add("--json", action="store_true", help="one JSON object instead of the table")


def sweep(args: argparse.Namespace) -> int:
    from seer_scale.evaluate.suite import read_suite
    from seer_scale.sweep.points import LADDER, Asked
    from seer_scale.sweep.run import How
    from seer_scale.sweep.run import sweep as run_sweep

    problems: list[Problem] = []
    widths = _numbers("--widths", args.widths, float, problems)
    images = [int(n) for n in _numbers("--images", args.images, int, problems)]
    seeds = [int(n) for n in _numbers("--seeds", args.seeds, int, problems)]
    if len(seeds) > 1:
        problems.append(Problem("--seeds", args.seeds, "must be how many, one number"))
    if widths and len(args.recipes) > 1:
        problems.append(Problem("--widths", args.widths, "they are of one recipe, and several are given", "give one"))
    if args.cluster not in CLUSTERS:
        near = (found,) if (found := closest(args.cluster, CLUSTERS)) else ""
        problems.append(Problem("--cluster", args.cluster, f"must be {' or '.join(CLUSTERS)}", near))
    for option in ("profile", "nodes", "time") if args.cluster == "local" else ():
        if getattr(args, option):
            problems.append(Problem(f"--{option}", NOTHING, "has no effect with --cluster local", "leave it out"))
    if args.dry_run and args.table:
        problems.append(Problem("--table", NOTHING, "has no effect with --dry-run", "leave one out"))
    if problems:
        raise ConfigError(problems, "The sweep")
    labelled = {key: value for key in ("data", "test") if (value := getattr(args, key))}
    items = read_suite(args.tasks, labelled)
    if not widths and not images and len(args.recipes) == 1:
        widths = list(LADDER)
    asked = Asked(
        recipes=args.recipes, out=args.out, widths=widths, images=images, seeds=seeds[0], equal=args.equal,
        overrides=args.overrides, is_local=args.cluster == "local",
    )  # fmt: skip
    how = How(
        cluster=args.cluster, items=items, profile=args.profile, nodes=args.nodes, ranks=args.ranks, time=args.time,
        dry_run=args.dry_run, only_table=args.table, as_json=args.json,
    )  # fmt: skip
    return run_sweep(asked, how)


def _numbers(option: str, text: str, kind: type, problems: list[Problem]) -> list[float]:
    """Those of a list; what is none, or comes twice, is a problem."""
    try:
        found = [kind(word) for word in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if any(not 0 < n < float("inf") for n in found) or len(set(found)) < len(found):
        what = "positive whole numbers" if kind is int else "positive numbers"
        problems.append(Problem(option, text, f"must be {what}, each once", "such as 1,2,4"))
        return []
    return found
