"""Which network weights are of, from names and shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.interop.layouts import layouts_matching
from seer_scale.interop.pieces import Shapes
from seer_scale.models.regnet import REGNETY, RegNetSpec, stage_plan
from seer_scale.models.timm_adaptor import TIMM_PREFIX

RESNETS: dict[tuple[int, ...], str] = {
    (False, 2, 2, 2, 2): "resnet18", (False, 3, 4, 6, 3): "resnet34", (True, 3, 4, 6, 3): "resnet50",
    (True, 3, 4, 23, 3): "resnet101", (True, 3, 8, 36, 3): "resnet152",
}  # fmt: skip
"""Whether (1) its blocks are bottlenecks, and how many each stage has: timm's name."""


class Plan(NamedTuple):
    """Of the four stages of a RegNetY: widths, depths, channels a group, and what the first block of each squeezes
    to."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    squeezed: tuple[int, ...]

    @classmethod
    def of(cls, spec: RegNetSpec) -> Plan:
        widths, depths = stage_plan(spec)
        squeezed = [round(spec.se_ratio * w) for w in (spec.stem_width, *widths[:-1])]
        return cls(tuple(widths), tuple(depths), tuple(min(spec.group_width, w) for w in widths), tuple(squeezed))


def find_model(where: str, shapes: Shapes) -> dict[str, Any]:
    """The keys of a recipe's section `model` for the network that these are the tensors of. Raises UserError."""
    if "s1.b1.conv1.conv.weight" in shapes:
        return _regnety(where, shapes)
    if layouts := layouts_matching(shapes):
        return layouts.find(where, shapes)
    if "layer1.0.conv1.weight" in shapes:
        depths = [_count(f"layer{s}.{{}}.conv1.weight", shapes, first=0) for s in (1, 2, 3, 4)]
        if name := RESNETS.get(("layer1.0.conv3.weight" in shapes, *depths)):
            return {"name": TIMM_PREFIX + name}
    rule = "holds a network that its names do not tell"
    raise UserError(Problem(where, NOTHING, rule, f"give --model {TIMM_PREFIX}NAME, one of timm's, or a plugin's"))


def _count(name: str, shapes: Shapes, first: int = 1) -> int:
    return next(i for i in itertools.count(first) if name.format(i) not in shapes) - first


def _regnety(where: str, shapes: Shapes) -> dict[str, Any]:
    depths = tuple(_count(f"s{s}.b{{}}.conv1.conv.weight", shapes) for s in (1, 2, 3, 4))
    try:
        first = [f"s{s}.b1" for s in (1, 2, 3, 4)]
        widths = tuple(shapes[f"{b}.conv1.conv.weight"][0] for b in first)
        groups = tuple(shapes[f"{b}.conv2.conv.weight"][1] for b in first)
        squeezed = tuple(shapes[f"{b}.se.fc1.weight"][0] for b in first)
        stem = shapes["stem.conv.weight"][0]
    except (KeyError, IndexError) as error:
        rule = f"holds no RegNetY of four stages: it lacks {error.args[0]}"
        raise UserError(Problem(where, NOTHING, rule)) from None
    plan = Plan(widths, depths, groups, squeezed)
    if stem != RegNetSpec.stem_width:
        rule = f"holds a RegNetY whose stem has {stem} channels, and {RegNetSpec.stem_width} are what ours have"
        raise UserError(Problem(where, NOTHING, rule))
    for name, spec in REGNETY.items():
        if Plan.of(spec) == plan:
            return {"name": name}
    found = find_generator(plan)
    if found is None:
        rule = (
            f"holds a RegNetY of widths {list(widths)}, depths {list(depths)} and {list(groups)} channels a group, "
            "which no w0, wa, wm and group_width make"
        )
        raise UserError(Problem(where, NOTHING, rule))
    return {"name": "regnety", **{k: v for k, v in asdict(found).items() if k != "stem_width"}}


def find_generator(plan: Plan) -> RegNetSpec | None:
    """A generator that makes this plan; None where none is found. Several may: they make the same network."""
    ratios = sorted({0.25, plan.squeezed[3] / plan.widths[2]}, key=lambda r: r != 0.25)
    for w0, wa, wm in _lines(plan.widths, plan.depths, max(plan.groups)):
        for ratio in ratios:
            spec = RegNetSpec(sum(plan.depths), w0, wa, wm, max(plan.groups), ratio)
            try:
                if Plan.of(spec) == plan:
                    return spec
            except UserError:
                continue
    return None


def _lines(widths: Sequence[int], depths: Sequence[int], group: int) -> Iterator[tuple[int, float, float]]:
    """w0, wa and wm, rounded as papers print them, that may make these widths and depths.

    Block j has the power round(log(1 + wa j / w0) / log wm). For a w0 and a wm the powers follow from the widths, and
    where one ends and the next begins bounds wa from both sides.
    """
    ends = list(itertools.accumulate(depths))
    for w0 in range(8, widths[0] + group + 8, 8):
        if _snapped(w0, group) != widths[0]:
            continue
        for hundredths in range(105, 1001):
            wm = hundredths / 100
            powers = _powers(w0, wm, widths, group)
            if powers is None:
                continue
            low, high = 0.0, math.inf
            for stage, (power, following) in enumerate(zip(powers, powers[1:])):
                # the last block of a stage lies below the next power's beginning, and the next stage's first above it
                last, first = max(ends[stage] - 1, 1), ends[stage]
                high = min(high, w0 * (wm ** (power + 0.5) - 1) / last) if ends[stage] > 1 else high
                low = max(low, w0 * (wm ** (following - 0.5) - 1) / first)
            high = min(high, w0 * (wm ** (powers[3] + 0.5) - 1) / max(ends[3] - 1, 1))
            if low < high:
                middle = (low + high) / 2
                yield w0, next((r for d in range(5) if low < (r := round(middle, d)) < high), middle), wm


def _powers(w0: int, wm: float, widths: Sequence[int], group: int) -> list[int] | None:
    powers = [0]
    for width in widths[1:]:
        power = powers[-1] + 1
        while (found := _snapped(8 * round(w0 * wm**power / 8), group)) < width:
            power += 1
        if found != width:
            return None
        powers.append(power)
    return powers


def _snapped(width: int, group: int) -> int:
    each = min(group, width)
    return each * round(width / each)
