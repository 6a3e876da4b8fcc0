"""seer-scale launch, list, status, logs, cancel, resubmit"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.cli.parser import Parser, Print, add_command
from seer_scale.launch import runs
from seer_scale.launch.options import CLUSTERS, Options
from seer_scale.launch.profile import EXAMPLE_PROFILE, Profile

LAUNCH_EPILOG = """\
--section.key value sets a key of the recipe, as with train; seer-scale train RECIPE --help shows all keys.
--cluster local runs the ranks on this machine and prints their output. Ctrl-C saves and stops; the same command
resumes.
--cluster slurm submits a job; the command returns when the job is in the queue."""
NAME_HELP = "a run's folder, or its name in runs/; a pattern such as 'sweep-*' matches the runs of an array"
CHANGE_A_KEY = (
    "to change a key of a run, give its first command again with the new value (status NAME --json shows that command)"
)


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands,
        "launch",
        launch,
        "train a recipe on several processes, on this machine or on SLURM",
        takes_overrides=True,
        is_run=True,
        epilog=LAUNCH_EPILOG,
    )
    parser.hints = {
        f"--{key.replace('_', '-')}": f"{key} is a key of the profile" for key in Profile.__dataclass_fields__
    }
    _add_launch_arguments(parser)

    parser = add_command(
        commands,
        "list",
        lambda args: runs.list_runs(args.folder, as_json=args.json),
        "list launched runs with their states",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="where to look (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON array instead of lines")

    parser = add_command(
        commands,
        "status",
        lambda args: runs.print_status(runs.find_all(args.names), as_json=args.json),
        "show a launched run's job, progress and starts",
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help=NAME_HELP)
    parser.add_argument("--json", action="store_true", help="JSON instead of text")

    parser = add_command(
        commands,
        "logs",
        lambda args: runs.print_logs(runs.find_one(args.name), follow=args.follow),
        "print the output of a launched run",
    )
    parser.add_argument("name", metavar="NAME", help=NAME_HELP)
    parser.add_argument("--follow", action="store_true", help="continue until the run ends")

    parser = add_command(
        commands,
        "cancel",
        lambda args: runs.cancel(runs.find_all(args.names), now=args.now),
        "save and stop launched runs",
        is_run=True,
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help=NAME_HELP)
    parser.add_argument("--now", action="store_true", help="end at once, as scancel does; that leaves seconds to save")

    parser = add_command(
        commands, "resubmit", resubmit, "start a launched run again, from its newest checkpoint", is_run=True
    )
    parser.set_defaults(instead_of_overrides=CHANGE_A_KEY)
    parser.add_argument("name", metavar="NAME", help=NAME_HELP)
    parser.add_argument("--nodes", default="", metavar="N|MIN-MAX", help="another number of nodes, or a range")
    parser.add_argument("--time", default="", metavar="T", help="another time limit")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, and submit nothing")


def _add_launch_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    add("--cluster", default="", metavar="|".join(CLUSTERS), help="where to run the ranks")
    add("--profile", default="", metavar="FILE", help="the description of the cluster")
    add(
        "--print-profile",
        action=Print,
        text=lambda: EXAMPLE_PROFILE.read_text(encoding="utf-8").rstrip(),
        help="print a profile to fill in, with every key explained",
    )
    add(
        "--nodes",
        default="",
        metavar="N|MIN-MAX",
        help="nodes; of a range, as many as are free (default: as many as parallel.ranks need)",
    )
    add(
        "--ranks",
        default="",
        metavar="N",
        help="processes a node (default on local: parallel.ranks; on slurm: one a GPU)",
    )
    add("--time", default="", metavar="T", help="time limit of a job, instead of the profile's")
    add("--name", default="", metavar="NAME", help="the run's name, and its folder runs/NAME (default: the recipe's)")
    add(
        "--array",
        default=[],
        action="append",
        metavar="KEY=A,B,C",
        help="one run for each value; KEY is a key of the recipe, or `recipe`; several options span a grid",
    )
    add(
        "--restarts",
        default="",
        metavar="N",
        help="most starts of the ranks in a row without a new checkpoint; then the job is requeued or ends",
    )
    add("--dry-run", action="store_true", help="print the batch script, and submit nothing")
    add("--no-plan", action="store_true", help="submit also what, as planned, does not fit in the profile's gpu")


def launch(args: argparse.Namespace) -> int:
    from seer_scale.launch import submit

    keys = Options.__dataclass_fields__
    return submit.launch(Options(**{k: v for k, v in vars(args).items() if k in keys}))


def resubmit(args: argparse.Namespace) -> int:
    """The command the run was started with, again, from where it was given."""
    from seer_scale.cli import run

    job = runs.find_one(args.name)
    words = runs.relaunch_words(job, nodes=args.nodes, time=args.time)
    before = os.getcwd()
    os.chdir(job.folder)
    try:
        return run(["launch", *words, *(["--dry-run"] if args.dry_run else [])])
    finally:
        os.chdir(before)
