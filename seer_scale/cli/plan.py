"""seer-scale plan"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from seer_scale.cli.parser import Parser, add_command
from seer_scale.config import Config, Train, divisor_near, merge, parse_overrides
from seer_scale.errors import EXIT_DONE, EXIT_FAILED, NOTHING, Problem, UserError
from seer_scale.files import to_json
from seer_scale.launch.options import parse, parse_whole_number

if TYPE_CHECKING:
    from seer_scale.plan.devices import Device

WHAT = "what a recipe takes of so many GPUs, in memory and time, and what failures cost; needs none"
PLAN_HELP = """\
Memory of a GPU by what it is for, time of an update by what it goes into, whether it fits and what would, days and
GPU-hours: of the recipe's own update, made on tensors without values by one rank of --gpus. Nothing but a CPU is
needed. --failures adds what failures cost that run; without RECIPE it weighs a job that is described by its options.
Exit status: 0 it fits, 1 it cannot, 2 bad input. docs/performance.md says how true it is."""
OF_A_RECIPE = ("device", "price")
"""Options that only a recipe gives a meaning."""


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands,
        "plan",
        plan,
        WHAT,
        description=PLAN_HELP,
        takes_overrides=True,
    )
    if words[:1] != ["plan"]:
        return
    from seer_scale.plan import failures

    add = parser.add_argument
    add("recipe", metavar="RECIPE", nargs="?", default="", help="a shipped recipe's name or a YAML file")
    add(
        "--device",
        default="h100",
        metavar="NAME|FILE",
        help="the GPU: h200, h100, a100-80gb, a100-40gb, v100-32gb, mi300x, cpu, or a YAML file that seer-scale bench "
        "step --calibrate wrote (default: h100)",
    )
    add("--price", default="", metavar="RATE", help="of a GPU-hour, to print what the run costs")
    add("--failures", action="store_true", help="what failures cost, and the best interval between checkpoints")
    failures.add_arguments(parser)


def plan(args: argparse.Namespace) -> int:
    from seer_scale.plan import failures

    parser: Parser = args.parser
    if args.recipe:
        return _plan_recipe(args)
    if not args.failures:
        raise UserError(Problem(parser.prog, NOTHING, "needs RECIPE, or --failures", f"see {parser.prog} --help"))
    words = [f"--{name}" for name in OF_A_RECIPE if name in parser.given]
    if unused := [*words, *args.overrides[:1]]:
        raise UserError(Problem(unused[0], NOTHING, "has no effect without RECIPE", "name a recipe, or leave it out"))
    print(failures.run(args))
    return EXIT_DONE


def _plan_recipe(args: argparse.Namespace) -> int:
    from seer_scale.plan import failures
    from seer_scale.plan.plan import facts, failures_of, lines, make_plan

    given = args.parser.given
    own = [name for name in [*failures.FAILURE_OPTIONS, "interval"] if name != "gpus"]
    if not args.failures and (unused := [name for name in own if name in given]):
        option = f"--{unused[0].replace('_', '-')}"
        raise UserError(Problem(option, NOTHING, "has no effect without --failures", "add --failures, or leave it out"))
    config, gpus, device, rate = _asked(args)
    found = make_plan(config, gpus, device)
    text, failure = failures_of(found, _failure_words(args, own)) if args.failures else ("", None)
    if args.json:
        print(to_json(facts(found, rate, failure), indent=1))
    else:
        out = lines(found, rate)
        out += ["", *text.splitlines()] if text else []
        print("\n".join([*out, "", *found.time.assumptions]))
    return EXIT_FAILED if found.memory.cannot_fit else EXIT_DONE


def _asked(args: argparse.Namespace) -> tuple[Config, int, Device, float | None]:
    """(recipe, GPUs, device, price of a GPU-hour). Raises UserError with every problem."""
    from seer_scale.launch.prepare import ranks_of_recipe
    from seer_scale.plan.devices import load_device
    from seer_scale.training.start import read_recipe, resolve_given

    errors: list[UserError] = []
    device = parse(args.device, load_device, None, errors)
    rate = parse(args.price, partial(parse_number, "--price"), None, errors) if args.price else None
    is_given = "gpus" in args.parser.given
    gpus = parse(str(args.gpus), partial(parse_whole_number, "--gpus", least=1), 0, errors) if is_given else 0
    given, _ = read_recipe(args.recipe, args.overrides)
    over, _ = parse_overrides(args.overrides)
    if not (merge(given, over).get("data") or {}).get("path"):
        given = merge(given, {"data": {"path": "-"}})  # which images there are says nothing of what is planned
    merged = merge(given, over)
    ranks, config = gpus or ranks_of_recipe(merged), None
    batch = (merged.get("train") or {}).get("global_batch", Train.global_batch)
    if gpus and isinstance(batch, int) and batch > 0 and batch % gpus:
        near = tuple(n for n in (divisor_near(gpus, batch, at_most=True), _next_divisor(gpus, batch)) if n)
        errors.append(
            UserError(Problem("--gpus", gpus, f"train.global_batch {batch} does not divide among them", near))
        )
        raise UserError.joined(errors)
    try:
        config = resolve_given(given, args.overrides, ranks, with_data=False)
    except UserError as error:
        errors.append(error)
    if errors or device is None or config is None:
        raise UserError.joined(errors)
    return config, ranks, device, rate


def _next_divisor(number: int, whole: int) -> int:
    """The least divisor of `whole` above `number`; 0: there is none."""
    return next((n for n in range(number + 1, whole + 1) if whole % n == 0), 0)


def parse_number(option: str, value: str) -> float:
    """Raises UserError."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise UserError(Problem(option, value, "must be a number of at least 0"))
    return number


def _failure_words(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Options of --failures, as they were given."""
    words: list[str] = []
    for name in names:
        if name in args.parser.given:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return words
