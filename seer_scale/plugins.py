"""Python modules from outside that bring methods and backbones: `run.plugins`, `--plugin`.

A plugin is what the user names on the command line or in a recipe, and code like any other that is imported; one that a
checkpoint names is never loaded by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from seer_scale.errors import Problem, UserError

KEY = "run.plugins"
_loaded: dict[str, str] = {}
"""Module name to where it was found, of plugins from files."""


def load_plugins(plugins: Iterable[str]) -> None:
    """Import each once: what it registers by decorators is known from then on. A name is looked for in the current
    folder first, then among what is installed. Raises UserError, with what a plugin itself has raised."""
    for plugin in plugins:
        try:
            place = plugin_place(plugin)
            if place:
                _load_file(place)
            else:
                import_module(plugin)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            if error.name != plugin.partition(".")[0]:
                raise UserError(Problem(KEY, plugin, f"needs {error.name}, which is not installed")) from error
            fix = "give a module that is installed, or the path of a .py file or of a package's folder"
            raise UserError(Problem(KEY, plugin, "there is no such module", fix)) from error
        except Exception as error:  # whatever foreign code raises as it is imported
            raise UserError(Problem(KEY, plugin, f"cannot be loaded ({type(error).__name__}: {error})")) from error


def plugin_place(plugin: str) -> Path | None:
    """The file of a plugin that is given as a path, or that lies in the current folder; None for an installed module.
    Raises UserError where a path leads to no module."""
    path = Path(os.path.expanduser(plugin))
    is_path = path.suffix == ".py" or os.sep in plugin
    for place in (path,) if is_path else (Path(f"{plugin}.py"), path):
        if place.is_dir() and (place / "__init__.py").is_file():
            return (place / "__init__.py").absolute()
        if place.is_file() and place.suffix == ".py":
            return place.absolute()
    if is_path:
        fix = "give a .py file, or a folder with an __init__.py"
        raise UserError(Problem(KEY, plugin, "no module lies there", fix))
    return None


def check_name_free(name: str, what: str, cls: Any, other: Any) -> None:
    """That `cls` may take a name that `other` (if any) has: it is the same, run again. Raises ValueError, which a user
    is told as what the plugin has raised."""
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{name} is a {what} of {other.__module__} already: give yours another name")


def check_complete(cls: Any, key: str, name: str, where: str) -> None:
    """That a class that was brought can be made. where: the file that says what it needs. Raises UserError."""
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        rule = f"its class {cls.__qualname__} in {cls.__module__} lacks {', '.join(missing)}"
        raise UserError(Problem(key, name, rule, f"{where} says what each is"))


def module_of(place: Path) -> Path:
    """What makes up the plugin of this file: it, or the folder of a package."""
    return place.parent if place.name == "__init__.py" else place


def _load_file(place: Path) -> None:
    is_package = place.name == "__init__.py"
    name = place.parent.name if is_package else place.stem
    if not name.isidentifier():
        raise UserError(Problem(KEY, str(place), f"{name} is no name for a module", "rename it"))
    if name in sys.modules:
        if _loaded.get(name) == str(place):
            return
        raise UserError(Problem(KEY, str(place), f"there is a module {name} already", "rename it"))
    spec = spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)] if is_package else None)
    assert spec and spec.loader, "a .py file has a loader"
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[name] = str(place)
