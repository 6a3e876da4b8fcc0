"""The command line: `seer-scale COMMAND`, one tree of commands. Each is one call into the package."""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib import metadata

from seer_scale import __version__, console
from seer_scale.cli import data, embed, evaluate, export, imports, launch, plan, reports, sweep, train
from seer_scale.cli.parser import Parser, split_overrides, split_switches
from seer_scale.config import plugins_of
from seer_scale.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, NOTHING, Problem, UserError, print_error
from seer_scale.plugins import load_plugins

UNREADABLE = (errno.EACCES, errno.ENAMETOOLONG)
DESCRIPTION = "Self-supervised pretraining of vision backbones, from a laptop to 512 GPUs."
MAIN_EPILOG = """--section.key value sets a key of a recipe; seer-scale train RECIPE --help shows all keys. A bool
alone is true; --section alone sets its key enabled, as in --probe.
--plugin MODULE (a name, or the path of a .py file) brings methods and backbones; it may be given more than once.
Exit status: 0 done (or submitted), 1 failed, 2 bad input, 75 stopped with its state saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed, 2 bad input, 75 stopped with its state saved)."""
    words = list(sys.argv[1:] if argv is None else argv)
    console.install()
    if argv is None:
        os.environ["PYTHONSAFEPATH"] = "1"  # of whatever Python is started from here
    goes_on = words[:1] in (["eval"], ["embed"], ["sweep"])
    if goes_on and argv is None and os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) == "1":
        # as Ctrl-C; several processes end at once, as one that waits for another in a collective hears no Python
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(words)
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        if goes_on:
            print("Stopped. The same command goes on with what was done.", file=sys.stderr, flush=True)
            return EXIT_STOPPED
        lost = ": what was done since the newest checkpoint, if anything, is lost" if words[:1] == ["train"] else ""
        print(f"Stopped at once{lost}.", file=sys.stderr, flush=True)
        return EXIT_FAILED


def run(words: Sequence[str]) -> int:
    """As `main`. Raises UserError."""
    if not words or words[0] == "help":
        words = [*words[1:], "--help"]
    load_plugins(plugins_of({}, split_overrides(words)[1]))  # what they bring is known to all that follows
    own, overrides = split_overrides(words)
    try:
        args, more = build_parser(own).parse_known_args(own)
    except SystemExit as asked:  # of --help and --version
        return int(asked.code or EXIT_DONE)
    if more and args.takes_overrides:
        switched, more = split_switches(more)
        overrides += switched
    if more:
        args.parser.unexpected(more, args.takes_overrides)
    if args.takes_plugins and overrides[:1] == ["--run.plugins"]:  # loaded above
        overrides = overrides[2:]
    if overrides and not args.takes_overrides:
        fix = args.instead_of_overrides if "instead_of_overrides" in args else "leave it out"
        raise UserError(Problem(overrides[0], NOTHING, f"has no effect with {args.parser.prog}", fix))
    args.overrides = overrides
    if not args.is_run:
        console.wait_for_readers()
    try:
        status = args.run(args)
    except OSError as error:  # pathlib raises where a path can be neither found nor missing
        if args.is_run or error.errno not in UNREADABLE or not error.filename:
            raise
        raise UserError(Problem(error.filename, NOTHING, f"cannot be looked at ({error.strerror})")) from error
    sys.stdout.flush()
    problem = console.lost(sys.stdout)
    if problem and problem.errno != errno.EPIPE and status == EXIT_DONE and not args.is_run:  # | head has read enough
        print(f"What this command prints could not be written ({problem.strerror}).", file=sys.stderr)
        return EXIT_FAILED
    return status


def build_parser(words: Sequence[str]) -> Parser:
    """The whole tree; of commands that take long to load, only what `words` ask for is filled in."""
    parser = Parser(prog="seer-scale", description=DESCRIPTION, epilog=MAIN_EPILOG)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for room in (train, launch, plan, sweep, evaluate, embed, export, imports, reports, data):
        room.add_commands(commands, words)
    return parser


def _version() -> str:
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return f"seer-scale {__version__} (torch {torch}, Python {platform.python_version()})"
