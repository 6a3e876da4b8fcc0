"""seer-scale inspect, report, compare, bench"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seer_scale.bench import BENCHES
from seer_scale.cli.modules import add_module_commands
from seer_scale.cli.parser import add_command
from seer_scale.errors import EXIT_DONE, EXIT_FAILED, NOTHING, Problem, UserError
from seer_scale.files import shown, to_json

INSPECT = (
    "Of a checkpoint: what is in it, who wrote it, whether it is whole; this reads no tensor. Of a run: where its "
    "time went."
)

COMPARE = (
    "One page, which needs nothing else, with the curves of several runs over images seen, time and compute, the keys "
    "of their recipes that differ, where each stands, and what eval has measured. Runs may have different lengths, and "
    "may still be running."
)


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands, "inspect", inspect, "show what is in a checkpoint, or where a run's time went", description=INSPECT
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a checkpoint, such as runs/demo/checkpoints/samples-000000012800, or a run's folder",
    )
    parser.add_argument(
        "--verify", action="store_true", help="of a checkpoint: read all its files and verify their checksums"
    )
    parser.add_argument(
        "--tensors", type=int, default=0, metavar="N", help="of a checkpoint: also list the N largest tensors"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")

    parser = add_command(commands, "report", report, "write a run's report.html again")
    parser.add_argument(
        "run_dir", metavar="RUN", nargs="?", type=Path, help="a run's folder (default: the newest in runs/)"
    )

    parser = add_command(
        commands,
        "compare",
        compare,
        "show several runs in one page",
        takes_plugins=True,
        description=COMPARE,
    )
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", type=Path, help="runs' folders, two or more")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (default: compare.html)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")

    add_module_commands(
        commands, "bench", "measure speed and memory against a reference in the same run", BENCHES, words
    )


def inspect(args: argparse.Namespace) -> int:
    from seer_scale.observe import progress, time_account, time_table

    if (args.path / "metrics.jsonl").is_file():
        if args.verify or args.tensors:
            option = "--verify" if args.verify else "--tensors"
            fix = f"give a checkpoint, such as those in {args.path / 'checkpoints'}"
            raise UserError(Problem(option, NOTHING, f"is for checkpoints, and {args.path} is a run", fix))
        found = time_account.read_time_account(args.path)
        print(to_json(found.to_dict(), indent=1) if args.json else time_table.text(found))
        return EXIT_DONE
    if not args.path.exists():
        is_name = (Path("runs") / args.path).is_dir()
        fix = (
            f"did you mean {Path('runs') / args.path}?" if is_name else "give a run's folder or one of its checkpoints"
        )
        raise UserError(Problem("PATH", args.path, "it does not exist", fix))
    if any((args.path / name).exists() for name in ("launch", "config.yaml", progress.FILE)):  # a run that starts
        found = time_account.read_time_account(args.path)
        print(to_json(found.to_dict(), indent=1) if args.json else time_table.text(found))
        return EXIT_DONE
    from seer_scale.checkpoint import inspect as checkpoints  # and torch with it

    facts = checkpoints.describe(args.path, verify=args.verify)
    print(to_json(facts, indent=1) if args.json else checkpoints.text(facts, tensors=args.tensors))
    return EXIT_FAILED if facts["problem"] else EXIT_DONE


def report(args: argparse.Namespace) -> int:
    from seer_scale.observe.report import write_report

    run_dir = args.run_dir or _newest_run()
    if not any((run_dir / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        why = "it has neither config.yaml nor metrics.jsonl" if run_dir.is_dir() else "it does not exist"
        raise UserError(Problem("RUN", run_dir, f"that is no run's folder: {why}", ("runs/demo",)))
    print(shown(write_report(run_dir)))
    return EXIT_DONE


def compare(args: argparse.Namespace) -> int:
    from seer_scale.models.compute import training_flops
    from seer_scale.observe.report import compared_run, write_comparison

    runs = write_comparison(args.run_dirs, args.out, training_flops)
    if args.json:
        print(to_json({"page": shown(args.out), **compared_run.to_dict(runs)}, indent=1))
    else:
        print(f"{compared_run.text(runs)}\n\n{shown(args.out)}")
    return EXIT_DONE


def _newest_run() -> Path:
    logs = sorted(Path("runs").glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    if not logs:
        raise UserError(Problem("RUN", NOTHING, "is missing, and there is no run in runs/", ("runs/demo",)))
    return logs[-1].parent
