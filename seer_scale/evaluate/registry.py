"""Tasks by name: those of the package are the files of `evaluate/tasks`, others register from a plugin."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from seer_scale.errors import Problem, UserError, nearest
from seer_scale.evaluate.task import Task, TaskSettings
from seer_scale.plugins import check_complete, check_name_free

TASKS = Path(__file__).parent / "tasks"
_CLASSES: dict[str, type[Task[Any]]] = {}
C = TypeVar("C", bound=type[Task[Any]])


def register_task(name: str, settings: type[TaskSettings], **variants: type[TaskSettings]) -> Callable[[C], C]:
    """A decorator: this class is the task `name`, made by `cls(settings)`. variants: `Task.variants`. Raises ValueError
    where another has the name."""

    def register(cls: C) -> C:
        check_name_free(name, "task", cls, _CLASSES.get(name))
        cls.name, cls.settings, cls.variants = name, settings, variants
        _CLASSES[name] = cls
        return cls

    return register


def task_names() -> dict[str, str]:
    """Name to what it measures (the first line of its module), without loading any."""
    found = {}
    for path in sorted(TASKS.glob("[a-z]*.py")):
        found[path.stem] = first_line(ast.get_docstring(ast.parse(path.read_bytes())))
    return found | {name: first_line(cls.__doc__) for name, cls in _CLASSES.items() if name not in found}


def first_line(doc: str | None) -> str:
    """Of a docstring: up to its first empty line, as a clause."""
    return " ".join((doc or "").partition("\n\n")[0].split()).rstrip(".")


def task_class(name: str) -> type[Task[Any]]:
    """Raises UserError where there is none of this name."""
    if name not in _CLASSES and (TASKS / f"{name}.py").is_file():
        import_module(f"seer_scale.evaluate.tasks.{name}")
    if name not in _CLASSES:
        raise UserError(Problem("TASK", name, "there is no such task", nearest(name, task_names())))
    check_complete(_CLASSES[name], "TASK", name, "evaluate/task.py")
    return _CLASSES[name]
