"""The typed reader: dataclasses from mappings, with every problem found in one pass."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from seer_scale.errors import NOTHING, Problem, closest, nearest

T = TypeVar("T")
NOWHERE_ELSE: typing.Mapping[str, str] = MappingProxyType({})


def opt(
    default: Any,
    help: str,  # noqa: A002 - the field's help
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    rising: bool = False,
    of_network: bool = False,
) -> Any:
    """A field with its meaning and range; tuples are checked item by item. rising: a pair, from small to large.
    of_network: the network's shape follows from it, so that weights made with another value do not fit."""
    limits = {k: v for k, v in dict(ge=ge, gt=gt, le=le, lt=lt).items() if v is not None}
    metadata = {"help": help, "limits": limits, "rising": rising, "of_network": of_network}
    return dataclasses.field(default=default, metadata=metadata)


class _BadValue(Exception):
    """A value that does not fit its type: the rule it breaks, and the nearest that would do."""

    def __init__(self, rule: str, nearest: Any = ""):
        super().__init__(rule, nearest)
        self.rule, self.nearest = rule, nearest


def _coerce(tp: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    """`value` as type `tp`. Raises _BadValue for a value of another kind; nested problems go to `problems`."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (types.UnionType, typing.Union):
        if type(None) in args and (value is None or value == "none"):  # as --help calls it
            return None
        kinds = [
            a
            for a in args
            if a is not type(None) and isinstance(value, list | tuple) == (typing.get_origin(a) is tuple)
        ]
        broken = []
        for kind in kinds or args[:1]:
            try:
                return _coerce(kind, value, key, problems)
            except _BadValue as bad:
                broken.append(bad)
        first, *others = broken
        rules = [first.rule, *(bad.rule.removeprefix("must be ") for bad in others)]
        raise _BadValue(", or ".join(rules), broken[-1].nearest)
    if origin is Literal:
        if value not in args:
            near = closest(str(value), map(str, args))
            raise _BadValue(f"must be one of {', '.join(map(str, args))}", f"did you mean {near}?" if near else "")
        return value
    if origin is tuple:
        if isinstance(value, str) and "," in value and args[0] is not str:
            raise _BadValue(f"must be a list, as in [{value}]")
        items = value if isinstance(value, list | tuple) else [value]
        item_types = [args[0]] * len(items) if args[1:] == (Ellipsis,) else list(args)
        if len(items) != len(item_types):
            each = str(items[0]) if len(items) == 1 else "1"
            raise _BadValue(f"needs {len(item_types)} values, as in [{', '.join([each] * len(item_types))}]")
        return tuple(_coerce(t, v, f"{key}[{i}]", problems) for i, (t, v) in enumerate(zip(item_types, items)))
    if isinstance(tp, type) and dataclasses.is_dataclass(tp):
        return read_section(tp, value, key, problems)
    if tp is bool and isinstance(value, bool):
        return value
    if tp is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if tp in (int, float) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-6 as text: a number is what float() takes
            number = float(value) if not isinstance(value, int) else value
            if tp is float:
                return float(number)
            if isinstance(number, int) or number.is_integer():
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise _BadValue(f"must be {names.get(tp, tp)}")


def _check_limits(metadata: typing.Mapping[str, Any], value: Any) -> None:
    for v in value if isinstance(value, tuple) else (value,):
        if not isinstance(v, int | float) or isinstance(v, bool):
            continue
        if not math.isfinite(v):
            raise _BadValue("must be finite")
        for rule, bound in metadata.get("limits", {}).items():
            ok, words = {
                "ge": (v >= bound, "at least"), "gt": (v > bound, "greater than"),
                "le": (v <= bound, "at most"), "lt": (v < bound, "less than"),
            }[rule]  # fmt: skip
            if not ok:
                raise _BadValue(f"must be {words} {bound}")
    if metadata.get("rising") and value is not None and value[0] > value[1]:
        raise _BadValue("must go from small to large", [value[1], value[0]])


def as_mapping(given: Any, key: str, problems: list[Problem]) -> dict[str, Any]:
    """A section's mapping; an empty one where it is none, which is a problem."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        problems.append(Problem(key, given, "must be a section of keys"))
        return {}
    return given


def read_section(
    cls: type[T], given: Any, prefix: str, problems: list[Problem], elsewhere: typing.Mapping[str, str] = NOWHERE_ELSE
) -> T:
    """Dataclass `cls` from a mapping; problems are collected, and a broken field keeps its default. elsewhere: keys of
    other sections by their last word, one of which may have been meant."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass, as is said
    hints, values, below = _type_hints(cls), {}, f"{prefix}." * bool(prefix)
    for name, value in as_mapping(given, prefix, problems).items():
        key = f"{below}{name}"
        if name not in fields:
            meant = [elsewhere[name]] if name in elsewhere else [f"{below}{k}" for k in fields]
            problems.append(unknown_key(key, meant))
            continue
        try:
            read = _coerce(hints[name], value, key, problems)
            _check_limits(fields[name].metadata, read)
            values[name] = read
        except _BadValue as bad:
            problems.append(Problem(key, value, bad.rule, bad.nearest))
    return cls(**values)


def unknown_key(key: str, known: typing.Iterable[str]) -> Problem:
    return Problem(key, NOTHING, "is not a key", nearest(key, known))


_type_hints: Callable[[Any], dict[str, Any]] = cache(typing.get_type_hints)
"""Of a class, which never change: they take longer than all else that reading a recipe does."""


def keys_of(cls: type, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """Every key of a section as (dotted name, type, default, meaning), in order."""
    hints = _type_hints(cls)
    return [
        (f"{prefix}{f.name}", type_name(hints[f.name]), f.default, f.metadata["help"]) for f in dataclasses.fields(cls)
    ]


def type_name(tp: Any) -> str:
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"[{type_name(args[0])}, ...]" if args[1:] == (Ellipsis,) else f"[{', '.join(map(type_name, args))}]"
    if origin in (types.UnionType, typing.Union):
        return " | ".join(type_name(a) for a in args if a is not type(None))
    if dataclasses.is_dataclass(tp):
        return f"{{{', '.join(f.name for f in dataclasses.fields(tp))}}}"
    return str(tp.__name__)
