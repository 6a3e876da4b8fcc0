"""Activation checkpointing of segments: units that are recomputed together.

A recomputed segment keeps its inputs in forward and runs again in backward. The second run takes BatchNorm's
statistics from a tape of the first, so it repeats no exchange of them and updates no running statistics; nothing in a
unit draws random numbers. What FSDP2 gathers inside backward it keeps until the backward of that unit or part is over
(FSDPParamGroup.post_forward), so the second run gathers only what backward needs anyway, and all of a segment at once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seer_scale.errors import UserError
from seer_scale.models.norm import StatsTape

OPTION = "parallel.activation_checkpoint"


def find_segments(setting: str | tuple[tuple[int, ...], ...], stages: list[list[str]]) -> list[list[str]]:
    """Names of consecutive units that are recomputed together; a segment lies within one of `stages`.

    setting: "none"; "every N", segments of N units, and what is left at the end of a stage; or for each stage the
    numbers, from 1, of the units that end a segment (VISSL's REGNET.stage_checkpoints): units after the last number are
    a segment too, and a stage without numbers is not recomputed. Raises UserError for anything else.
    """
    if setting == "none":
        return []
    if isinstance(setting, str):
        word, _, number = setting.partition(" ")
        if word != "every" or not number.isdecimal() or int(number) < 1:
            raise UserError(f'{OPTION} is "{setting}", but must be none, every N or a list a stage; nearest: every 1.')
        setting = tuple((*range(int(number), len(names), int(number)), len(names)) for names in stages)
    if len(setting) != len(stages):
        raise UserError(f"{OPTION} has {len(setting)} lists, but must have one for each of the {len(stages)} stages.")
    out = []
    for stage, (names, ends) in enumerate(zip(stages, setting), 1):
        near = sorted({min(max(end, 1), len(names)) for end in ends})
        if list(ends) != near:
            rule = f"stage {stage} needs rising numbers from 1 to {len(names)}"
            raise UserError(f"{OPTION} has {list(ends)}, but {rule}, the blocks that end a segment; nearest: {near}.")
        out += [names[a:b] for a, b in pairwise((0, *ends, len(names))) if ends and a < b]
    return out


def recompute(backbone: nn.Module, segments: list[list[str]]) -> None:
    """Make each segment run again in the backward pass while training; call once, before sharding.

    A segment of one unit runs again inside that unit's forward, where its sharded parameters are gathered already.
    """
    units, plain = backbone.units(), backbone.chain
    for names in segments:
        if len(names) == 1:
            units[names[0]].forward = _recomputing(backbone, units[names[0]].forward)
    first = {names[0]: names for names in segments if len(names) > 1}
    together = _recomputing(backbone, plain)

    def chain(names: list[str], xs: list[Tensor]) -> list[Tensor]:
        while names:
            segment = first.get(names[0], names[:1])
            xs = (together if len(segment) > 1 else plain)(segment, xs)
            names = names[len(segment) :]
        return xs

    backbone.chain = chain


def _recomputing(backbone: nn.Module, forward: Callable) -> Callable:
    def recomputing(*args):
        if not backbone.training:
            return forward(*args)
        contexts = StatsTape().contexts
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    return recomputing
