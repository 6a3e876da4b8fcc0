"""seer-scale plan"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_scale.cli.parser import OTHERS_WORDS, Parser, add_command
from seer_scale.config import Config, Train, divisor_near, merge, parse_overrides
from seer_scale.errors import EXIT_DONE, EXIT_FAILED, NOTHING, Problem, UserError
from seer_scale.files import shown, to_json
from seer_scale.launch.options import parse, parse_whole_number

if TYPE_CHECKING:
    from seer_scale.plan.devices import Device
    from seer_scale.plan.plan import Plan

WHAT = "what a recipe takes of so many GPUs, in memory and time, and what failures cost; needs none"
PLAN_HELP = """\
Memory of a GPU by what it is for, time of an update by what it goes into, whether it fits and the smallest change that
does, days and GPU-hours: of the recipe's own update, made on tensors without values by one rank of --gpus. Nothing but
a CPU is needed. --fit looks for the fastest way that fits and writes a recipe of it. --failures adds what failures cost
that run; without RECIPE it weighs a job that is described by its options.
Exit status: 0 it fits, 1 it cannot, 2 bad input. docs/plan.md says how true it is."""
OF_A_RECIPE = ("device", "price", "fit", "plot", "published")
"""Options that only a recipe gives a meaning."""


@dataclass(frozen=True)
class _Asked:
    """given: the recipe's mapping with what the command line sets. rate: of a GPU-hour. out: the recipe that --fit
    writes. plot: the picture."""

    config: Config
    given: dict[str, Any]
    gpus: int
    device: Device
    rate: float | None
    out: Path | None
    plot: Path | None


def add_commands(commands: Any, words: Sequence[str]) -> None:
    parser = add_command(
        commands,
        "plan",
        plan,
        WHAT,
        description=PLAN_HELP,
        takes_overrides=True,
    )
    parser.hints = OTHERS_WORDS
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
    add("--fit", action="store_true", help="the fastest engine x recomputation x micro-batch x copies that fits")
    add("--out", default="", metavar="FILE", help="the recipe of --fit (default: RECIPE-GPUSxDEVICE.yaml, here)")
    add(
        "--plot",
        default="",
        metavar="FILE",
        help="memory over an update, and its time, as a picture: .png, .svg or .pdf",
    )
    add(
        "--published",
        action="store_true",
        help="of SEER's 128GF or 256GF, its published update on 512 V100 beside, planned for either",
    )
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
    from seer_scale.plan import failures, plots, search
    from seer_scale.plan.memory import GIVES_BACK
    from seer_scale.plan.plan import facts, failures_of, lines, make_plan, plan_published

    given = args.parser.given
    own = [name for name in [*failures.FAILURE_OPTIONS, "interval"] if name != "gpus"]
    if not args.failures and (unused := [name for name in own if name in given]):
        option = f"--{unused[0].replace('_', '-')}"
        raise UserError(Problem(option, NOTHING, "has no effect without --failures", "add --failures, or leave it out"))
    if "images_per_second" in given:
        rule = "has no effect beside RECIPE, whose own are planned"
        raise UserError(Problem("--images-per-second", args.images_per_second, rule, "leave it out"))
    if args.out and not args.fit:
        raise UserError(Problem("--out", args.out, "has no effect without --fit", "add --fit, or leave it out"))
    asked = _asked(args)
    published = plan_published(asked.config) if args.published else None
    found = search.fit(asked.config, asked.gpus, asked.device) if args.fit else []
    if not found:
        search.tell(f"planning {search.told(asked.config, asked.gpus, asked.device)} ...")
    made = _proved(found[0].plan if found else make_plan(asked.config, asked.gpus, asked.device))
    memory, fits = made.memory, made.memory.fits
    change, tried = None, list[int]()
    if memory.cannot_fit:
        change, tried = search.smallest_change(asked.config, asked.gpus, asked.device)
    if change:
        _proved(change.plan)  # nothing is offered that would hang
    text, failure = failures_of(made, _failure_words(args, own)) if args.failures else ("", None)
    if fits and asked.out:
        search.write_recipe(asked.out, asked.given, found[0])
    if asked.plot:
        plots.draw(made, asked.plot, Path(args.recipe).stem)
    if args.json:
        told = facts(made, asked.rate, failure, published)
        if memory.cannot_fit:
            told |= {"smallest_change": change.facts() if change else None, "tried_gpus": tried}
        elif not fits:
            told |= {"smallest_change": {"environment": GIVES_BACK}}
        told |= {"fit": [c.facts() for c in found], "written": str(asked.out) if fits else None} if args.fit else {}
        print(to_json(told, indent=1))
    else:
        out = [*search.lines(found), ""] if found else []
        out += lines(made, asked.rate, published)
        if not fits:
            out += search.change_lines(change, tried) if memory.cannot_fit else search.environment_lines()
        out += ["", *text.splitlines()] if text else []
        out += ["", *made.time.assumptions]
        written = [asked.out if fits else None, asked.plot]
        out += [f"written: {shown(str(path))}" for path in written if path]
        print("\n".join(out))
    return EXIT_FAILED if made.memory.cannot_fit or args.fit and not fits else EXIT_DONE


def _proved(plan: Plan) -> Plan:
    """Raises UserError with what would hang, or wait for the device."""
    from seer_scale.plan.plan import proved
    from seer_scale.plan.search import tell

    if plan.gpus > 1:
        tell(f"tracing the same update as the last rank, {plan.gpus - 1:,} ...")
    return proved(plan)


def _asked(args: argparse.Namespace) -> _Asked:
    """Raises UserError with every problem."""
    from seer_scale.launch.prepare import ranks_of_recipe
    from seer_scale.plan.devices import load_device
    from seer_scale.plan.outputs import free_place
    from seer_scale.plan.plots import PICTURES
    from seer_scale.training.start import read_recipe, resolve_given

    errors: list[UserError] = []
    device = parse(args.device, load_device, None, errors)
    rate = parse(args.price, partial(parse_number, "--price"), None, errors) if args.price else None
    is_given = "gpus" in args.parser.given
    gpus = parse(str(args.gpus), partial(parse_whole_number, "--gpus", least=1), 0, errors) if is_given else 0
    given, _ = read_recipe(args.recipe, args.overrides)
    over, _ = parse_overrides(args.overrides)
    own = merge(given, over)
    if not (own.get("data") or {}).get("path"):
        given = merge(given, {"data": {"path": "-"}})  # which images there are says nothing of what is planned
    ranks, config = gpus or ranks_of_recipe(own), None
    batch = (own.get("train") or {}).get("global_batch", Train.global_batch)
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
    out = None
    if args.fit and device:
        out = parse(args.out or f"{Path(args.recipe).stem}-{ranks}x{device.name}.yaml", free_place, None, errors)
    plot = parse(args.plot, partial(free_place, endings=PICTURES), None, errors) if args.plot else None
    if errors or device is None or config is None:
        raise UserError.joined(errors)
    return _Asked(config, own, ranks, device, rate, out, plot)


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
