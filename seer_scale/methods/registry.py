"""Methods by name: the one place that knows them.

A method of the package is a folder beside this file: settings.py (its section of a recipe, without torch) and
method.py. One from outside is a class with the same decorator in a module that the recipe's run.plugins name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch

from seer_scale.config import Config, MethodSettings, register_settings, settings_classes
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError, nearest
from seer_scale.methods.base import Method
from seer_scale.plugins import check_complete, check_name_free

M = TypeVar("M", bound=type[Method[Any, Any]])
_CLASSES: dict[str, type[Method[Any, Any]]] = {}


def register_method(name: str, settings: type[MethodSettings] | None = None) -> Callable[[M], M]:
    """A decorator: this class is the method `name` (`method.name`), made by `cls(config, world)` on the meta device.
    settings: its section of a recipe, read by `config.settings_as(settings)`; none: that of a settings.py beside
    it, or a section without keys. Raises ValueError where another module has a method of this name."""

    def register(cls: M) -> M:
        known = settings_classes().get(name)
        check_name_free(name, "method", cls, _CLASSES.get(name))
        if settings or known is None:
            register_settings(name)(settings or MethodSettings)
        elif known is not MethodSettings and cls.__module__.rpartition(".")[0] != known.__module__.rpartition(".")[0]:
            raise ValueError(f"{name} is a method of {known.__module__} already: give yours another name")
        cls.name = name
        _CLASSES[name] = cls
        return cls

    return register


def method_class(name: str) -> type[Method[Any, Any]]:
    """Raises UserError where there is none of this name."""
    if name not in _CLASSES:
        if name not in settings_classes():
            raise UserError(Problem("method.name", name, "there is no such method", nearest(name, settings_classes())))
        import_module(f"seer_scale.methods.{name}.method")
    return _CLASSES[name]


def build_method(config: Config, world: World) -> Method[Any, Any]:
    """The recipe's method, on the meta device; an engine materialises and fills it."""
    cls = method_class(config.method.name)
    check_complete(cls, "method.name", config.method.name, "methods/base.py")
    with torch.device("meta"):
        return cls(config, world)
