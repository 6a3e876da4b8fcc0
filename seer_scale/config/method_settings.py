"""The sections that methods bring to a recipe, by the name of the method.

This room names no method: those of the package are the folders of `seer_scale/methods` with a settings.py, others
register from outside (`run.plugins`). A settings.py loads without torch, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from seer_scale.config.fields import keys_of
from seer_scale.config.schema import METHOD_SETTINGS, Config, MethodSettings, S, section_classes
from seer_scale.plugins import check_name_free

METHODS = Path(__file__).parents[1] / "methods"
_CLASSES: dict[str, type[MethodSettings]] = {}


def register_settings(name: str) -> Callable[[type[S]], type[S]]:
    """A decorator: this class is the section of the method `name`. Raises ValueError where that is the name of another
    section."""

    def register(cls: type[S]) -> type[S]:
        if name in Config.__dataclass_fields__:
            raise ValueError(f"{name} is a section of every recipe, so no method can be called that")
        if "." in name or not name:
            raise ValueError(f"{name!r} is no name of a method")
        check_name_free(name, "method", cls, _CLASSES.get(name))
        _CLASSES[name] = cls
        return cls

    return register


@cache
def _load_built_in() -> None:
    for path in sorted(METHODS.glob("*/settings.py")):
        import_module(f"seer_scale.methods.{path.parent.name}.settings")


def settings_classes() -> dict[str, type[MethodSettings]]:
    """The section of every method that is known, by the method's name."""
    _load_built_in()
    return dict(_CLASSES)


def keys_of_network(method: str) -> tuple[str, ...]:
    """The keys of its section from which the shape of the network follows."""
    fields = settings_classes()[method].__dataclass_fields__.values()
    return tuple(f"{method}.{f.name}" for f in fields if f.metadata.get("of_network"))


def all_keys(method: str = "") -> list[tuple[str, str, object, str]]:
    """Every key of a recipe as (dotted name, type, default, meaning), in order; of methods' sections all, or only that
    of `method`."""
    rows = []
    for name, cls in section_classes().items():
        if name != METHOD_SETTINGS:
            rows += keys_of(cls, f"{name}.")
            continue
        for known, settings in settings_classes().items():
            if method in ("", known):
                rows += keys_of(settings, f"{known}.")
    return rows
