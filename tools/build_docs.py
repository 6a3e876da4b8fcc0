"""Writes the API reference, from docstrings, into build/docs: python tools/build_docs.py [MODULE ...]

Without a module: all public ones. Nothing is fetched. It fails where a module cannot be imported, and where a docstring
refers to what is not there: a name in backticks, such as `seer_scale.rng.draw` or `Shard.of`, or a file.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pdoc import render
from pdoc.doc import Doc, Module, Namespace

ROOT = Path(__file__).parents[1]
REFERENCE = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`")
FILE = re.compile(r"\b((?:[\w-]+/)+[\w-]+\.(?:py|md|c|json|yaml))\b")


def public_modules(package: ModuleType) -> list[str]:
    """The package and all modules in it, by name, but those that begin with an underscore."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=_raise)
    names = [package.__name__, *(info.name for info in found)]
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def _raise(name: str) -> None:
    raise ImportError(f"{name} cannot be imported") from sys.exception()


def broken_references(module: ModuleType) -> list[str]:
    """A line for each name or file that a docstring of the module refers to and that is not there."""
    found = []
    for member in _documented(Module(module)):
        scope = dict(vars(member.obj)) if isinstance(member.obj, type) else {}
        for name in REFERENCE.findall(member.docstring):
            head, *rest = name.split(".")
            owner = importlib.import_module(head) if head == "seer_scale" else (scope | vars(module)).get(head)
            if isinstance(owner, type | ModuleType) and not _has(owner, rest):
                found.append(f"{member.fullname}: there is no {name}")
        for path in FILE.findall(member.docstring):
            if path.split("/")[0] in ours() and not any((base / path).exists() for base in (ROOT, ROOT / "seer_scale")):
                found.append(f"{member.fullname}: there is no file {path}")
    return found


def ours() -> set[str]:
    """Names of folders in which a path of ours may begin."""
    return {p.name for base in (ROOT, ROOT / "seer_scale") for p in base.iterdir() if p.is_dir()}


def _documented(namespace: Namespace[Any]) -> Iterator[Doc[Any]]:
    yield namespace
    for member in namespace.own_members:
        if isinstance(member, Namespace):
            yield from _documented(member) if member.modulename == namespace.modulename else ()
        else:
            yield member


def _has(owner: Any, names: Sequence[str]) -> bool:
    for name in names:
        fields = {**getattr(owner, "__annotations__", {}), **getattr(owner, "__dataclass_fields__", {})}
        if name in fields:
            return True  # of which no more is known
        if isinstance(owner, ModuleType) and not hasattr(owner, name):
            try:
                importlib.import_module(f"{owner.__name__}.{name}")
            except ModuleNotFoundError:
                return False
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def build(names: Sequence[str], folder: Path) -> list[str]:
    """Write the pages of these modules; the broken references in them. Raises ImportError."""
    modules = {name: importlib.import_module(name) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of private members: torch makes some, and kernels are modules
        broken = [line for module in modules.values() for line in broken_references(module)]
        pages = {name: Module(module) for name, module in modules.items()}
        for name, page in pages.items():
            path = folder / f"{name.replace('.', '/')}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render.html_module(page, pages), encoding="utf-8")
        (folder / "index.html").write_text(render.html_index(pages), encoding="utf-8")
        (folder / "search.js").write_text(render.search_index(pages), encoding="utf-8")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as seer_scale.rng")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "docs", help="(default: build/docs)")
    args = parser.parse_args()
    broken = build(args.modules or public_modules(importlib.import_module("seer_scale")), args.folder)
    print("\n".join([*broken, f"The reference is in {args.folder / 'index.html'}."]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
