"""Activation checkpointing of segments: units that are recomputed together.

A recomputed segment keeps its inputs in forward and runs again in backward. The second run takes what stateful layers
(BatchNorm) exchanged from a tape of the first, so it repeats no exchange and moves no running statistics; nothing in a
unit draws random numbers. What the second run gathers stays for the backward of that unit or part: FSDP2 does so by
itself (FSDPParamGroup.post_forward), other engines by `during`. So it gathers only what backward needs anyway, and all
of a segment at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seer_scale.errors import Problem, UserError, closest
from seer_scale.methods.base import UnitSequence
from seer_scale.models.layers.stateful import Tape

OPTION = "parallel.activation_checkpoint"
EACH_ALONE = "units"


def find_segments(setting: str | tuple[tuple[int, ...], ...], stages: list[list[str]]) -> list[list[str]]:
    """Names of consecutive units that are recomputed together; a segment lies within one of `stages`.

    setting: "none"; "every N", segments of N units, and what is left at the end of a stage; "units NAME NAME ...", a
    segment each, in any order; or for each stage the numbers, from 1, of the units that end a segment (VISSL's
    REGNET.stage_checkpoints): units after the last number are a segment too, and a stage without numbers is not
    recomputed. Raises UserError for anything else.
    """
    if setting == "none":
        return []
    if isinstance(setting, str):
        word, _, number = setting.partition(" ")
        if word == EACH_ALONE:
            return _alone(number.split(), stages)
        if word != "every" or not number.isdecimal() or int(number) < 1:
            rule = "it must be none, every N, units NAME NAME ... or a list a stage"
            raise UserError(Problem(OPTION, setting, rule, "nearest: every 1"))
        setting = tuple((*range(int(number), len(names), int(number)), len(names)) for names in stages)
    if len(setting) != len(stages):
        given = [list(ends) for ends in setting]
        raise UserError(Problem(OPTION, given, f"it must have one list for each of the {len(stages)} stages"))
    out = []
    for stage, (names, ends) in enumerate(zip(stages, setting), 1):
        near = sorted({min(max(end, 1), len(names)) for end in ends})
        if list(ends) != near:
            rule = f"stage {stage} needs rising numbers from 1 to {len(names)}, the blocks that end a segment"
            raise UserError(Problem(OPTION, list(ends), rule, near))
        out += [names[a:b] for a, b in pairwise((0, *ends, len(names))) if ends and a < b]
    return out


def _alone(given: list[str], stages: list[list[str]]) -> list[list[str]]:
    """These units in order of use, a segment each. Raises UserError."""
    names = sum(stages, [])
    if not given:
        raise UserError(Problem(OPTION, EACH_ALONE, "it names no unit", f"nearest: {EACH_ALONE} {names[0]}, or none"))
    problems = [
        Problem(
            OPTION,
            f"{EACH_ALONE} {name}",
            f"the stages have no such unit, only {names[0]} to {names[-1]}",
            f"nearest: {EACH_ALONE} {closest(name, names, alike=0)}",
        )
        for name in dict.fromkeys(given)
        if name not in names
    ]
    problems += [
        Problem(OPTION, f"{EACH_ALONE} {name} {name}", "each unit is named once", f"nearest: {EACH_ALONE} {name}")
        for name in names
        if given.count(name) > 1
    ]
    if problems:
        raise UserError(*problems)
    return [[name] for name in names if name in given]


During = Callable[[list[nn.Module]], AbstractContextManager[None]]
Lists = Callable[[list[Tensor]], list[Tensor]]


def apply_activation_checkpointing(
    sequence: UnitSequence, segments: list[list[str]], during: During = lambda units: nullcontext()
) -> None:
    """Make each segment run again in the backward pass while training; call once, before sharding.

    during: makes a context around the second run of a segment of such units.
    A segment of one unit runs again inside that unit's forward, where its sharded parameters are gathered already.
    """
    units, plain = sequence.shard_units(), sequence.forward_units
    for names in segments:
        if len(names) == 1:
            unit = units[names[0]]
            unit.forward = _recomputing(sequence, unit.forward, partial(during, [unit]))
    longer = [names for names in segments if len(names) > 1]
    runs = {
        names[0]: _recomputing(sequence, partial(plain, names), partial(during, [units[n] for n in names]))
        for names in longer
    }
    lengths = {names[0]: len(names) for names in longer}

    def forward_units(names: list[str], xs: list[Tensor]) -> list[Tensor]:
        while names:
            run = runs.get(names[0])
            xs = run(xs) if run else plain(names[:1], xs)
            names = names[lengths.get(names[0], 1) :]
        return xs

    vars(sequence)["forward_units"] = forward_units  # before that of its class
    vars(sequence)["__deepcopy__"] = _refuse_copy


def _refuse_copy(_: object) -> None:
    """A copy would run the units of what it was copied from."""
    raise TypeError("what recomputes cannot be copied: build another and load its state_dict")


def _recomputing(sequence: UnitSequence, forward: Lists, during: Callable[[], AbstractContextManager[None]]) -> Lists:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        first, again = Tape.contexts()
        return first, _both(again, during)

    def recomputing(xs: list[Tensor]) -> list[Tensor]:
        if not sequence.training:
            return forward(xs)
        return checkpoint(forward, xs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    return recomputing


@contextmanager
def _both(one: AbstractContextManager[None], other: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(one)
        stack.enter_context(other())
        yield
