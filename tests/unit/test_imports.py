"""The house's order: a room imports from rooms below it and from itself, and from nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import seer_scale
from seer_scale.interop.formats import FORMATS

HOUSE = Path(seer_scale.__file__).parent
ROOMS = [
    "api",
    "cli",
    "bench",
    "sweep",
    "launch",
    "training",
    "evaluate",
    "interop",
    "plan",
    "checkpoint",
    "corpus",
    "parallel",
    "methods",
    "models",
    "data",
    "optim",
    "observe",
    "core",
]
CORE = {
    "config",
    "console",
    "cores",
    "errors",
    "extras",
    "files",
    "formatting",
    "plugins",
    "distributed",
    "rng",
    "rank_info",
    "rendezvous",
    "timeouts",
}
ONLY = {
    "submitit": {"launch"},
    "deepspeed": {"parallel"},
    "fairscale": {"parallel"},
    "torch.distributed.fsdp": {"parallel"},
}
MODULES = sorted(HOUSE.rglob("*.py"))
METHODS = [p.parent.name for p in HOUSE.glob("methods/*/settings.py")]


def room(parts: tuple[str, ...]) -> str:
    return "core" if not parts or parts[0] in CORE else parts[0].replace("__main__", "cli")


def imported(path: Path) -> list[str]:
    """Every name a module imports, in full, wherever in the module it does."""
    names = []
    package = ("seer_scale", *path.relative_to(HOUSE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            names += [f"{base if node.level else node.module}.{a.name}" for a in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(HOUSE)) for p in MODULES])
def test_imports_point_down(path):
    where = path.relative_to(HOUSE)
    here = "api" if where == Path("__init__.py") else room(where.with_suffix("").parts)  # the package is the face
    assert here in ROOMS, f"{here} is no room of the house"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "seer_scale" and name != "seer_scale.__version__":
            there = room(tuple(parts[1:]))
            assert there in ROOMS and ROOMS.index(there) >= ROOMS.index(here), (
                f"{here} imports {name}, of {there} above it"
            )
        for kept, rooms in ONLY.items():
            assert not f"{name}.".startswith(f"{kept}.") or here in rooms, f"{here} imports {name}: only {rooms} may"


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(HOUSE)) for p in MODULES])
def test_what_writes_json_says_that_it_is_strict(path):
    """files.to_json does, for values of any kind; JSON that other programs read has no NaN."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
            shows = path.parts[-2:] in (("deepspeed", "config.py"), ("training", "resume.py"))  # a value in a sentence
            assert shows or "allow_nan" in [k.arg for k in node.keywords], (
                f"line {node.lineno} may write NaN or Infinity"
            )


def constants(path: Path) -> Iterator[tuple[str, str]]:
    """Names in capitals that a module assigns at its top, and what: of a tuple, each name's own element."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple):
                    is_each = isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(target.elts)
                    values = node.value.elts if is_each else [ast.Tuple([node.value, e]) for e in target.elts]
                    pairs = list(zip(target.elts, values))
                for name, value in pairs:
                    if isinstance(name, ast.Name) and name.id.isupper():
                        yield name.id, ast.dump(value)


def test_a_constant_has_a_name_of_its_own():
    """One name, one value, wherever in the house it is read."""
    found: dict[str, dict[str, str]] = {}
    for path in MODULES:
        for name, value in constants(path):
            found.setdefault(name, {}).setdefault(value, str(path.relative_to(HOUSE)))
    assert {name: sorted(by.values()) for name, by in found.items() if len(by) > 1} == {}


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(HOUSE)) for p in MODULES])
def test_no_method_is_named_outside_of_their_room(path):
    """In code: prose may say where an idea is from. Benches compare one with its reference; the default has a name."""
    where = path.relative_to(HOUSE)
    if where.parts[0] in ("methods", "bench"):
        return
    tree = ast.parse(path.read_text())
    holders = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    prose = {id(line.value) for h in holders for line in h.body if isinstance(line, ast.Expr)}
    said = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.ImportFrom):
            said.append(getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "module", None) or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            said.append(node.value)
    named = [s for s in said for method in METHODS if s.lower() == method or s.lower().startswith(f"{method}.")]
    named += [s for s in said if s.startswith("seer_scale.methods.") and s.split(".")[2] in METHODS]
    if where.parts[0] in ("interop", "cli"):  # a layout of files that others made bears the name of their project
        named = [s for s in named if s not in FORMATS]
    assert named == (["swav"] if where == Path("config/schema.py") else []), named
