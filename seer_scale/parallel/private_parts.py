"""Parts of other libraries that are used here and that they promise to nobody: said as data, so that a version in which
one moved is named before anything runs."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from seer_scale.errors import NOTHING, Problem
from seer_scale.extras import how_to_install


@dataclass(frozen=True)
class PrivatePart:
    """module: where it is defined. name: "function", "Class.method", "function.inner", or of a value, which something
    there assigns or declares, "VALUE" or "Class.attribute". used_for: a noun. takes: the first parameters of a
    function, but for self; those after them have defaults. None for a value."""

    module: str
    name: str
    used_for: str
    takes: tuple[str, ...] | None = None


def moved_parts(parts: Iterable[PrivatePart]) -> list[Problem]:
    """A Problem for each part that the installed library no longer has, or has with other parameters. Reads sources
    and imports nothing."""
    return [problem for part in parts if (problem := _problem_of(part))]


def _problem_of(part: PrivatePart) -> Problem | None:
    library = part.module.partition(".")[0]
    if not (rule := _how_it_moved(part)):
        return None
    key = f"{library} {metadata.version(library)}: {part.name}"
    return Problem(key, NOTHING, f"{rule} (used for {part.used_for})", how_to_install(library))


def _how_it_moved(part: PrivatePart) -> str:
    """A clause; empty where it did not."""
    scope, _, own = part.name.rpartition(".")
    if part.takes is None:
        return "" if own in _values(part.module, scope) else "is gone"
    function = _definitions(part.module).get(part.name)
    if not isinstance(function, ast.FunctionDef):
        return "is gone"
    arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    required = arguments[: len(arguments) - len(function.args.defaults)]
    takes, needs = (tuple(a for a in names if a != "self") for names in (arguments, required))
    if takes[: len(part.takes)] == part.takes and needs == part.takes[: len(needs)]:
        return ""
    return f"takes ({', '.join(takes)}) instead of ({', '.join(part.takes)})"


@cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """Classes and functions of a module by their dotted names, and the module itself as ""."""
    library, *below = module.split(".")
    spec = importlib.util.find_spec(library)
    paths = [Path(folder, *below) for folder in (spec.submodule_search_locations or () if spec else ())]
    files = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    found: dict[str, ast.AST] = {}

    def note(node: ast.AST, name: str) -> None:
        found.setdefault(name, node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                note(child, f"{name}.{child.name}".removeprefix("."))
            elif not isinstance(child, ast.expr):
                note(child, name)  # a definition below an `if`, say

    for file in files[:1]:
        note(ast.parse(file.read_text()), "")
    return found


@cache
def _values(module: str, scope: str) -> frozenset[str]:
    """Names and attributes that are assigned or declared within a class or function, and its properties."""
    names: set[str] = set()
    for node in ast.walk(_definitions(module).get(scope, ast.Pass())):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            names.add(node.name)
        for target in node.targets if isinstance(node, ast.Assign) else (getattr(node, "target", None),):
            if isinstance(target, ast.Name):
                names.add(target.id)
            elif isinstance(target, ast.Attribute):
                names.add(target.attr)
    return frozenset(names)
