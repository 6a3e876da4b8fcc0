"""seer_scale: self-supervised pretraining of vision backbones, from a laptop to 512 GPUs, with one recipe and one
checkpoint format."""

import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from seer_scale.api import (
        Embedded,
        Run,
        Transform,
        ViewSheet,
        compare,
        embed,
        export,
        import_weights,
        load,
        load_classifier,
        train,
        views,
    )
    from seer_scale.errors import ConfigError, DataError, Problem, TrainingError, UserError
    from seer_scale.methods.registry import register_method
    from seer_scale.models.registry import register_backbone

_HOMES = {
    "api": (
        "Embedded",
        "Run",
        "Transform",
        "ViewSheet",
        "compare",
        "embed",
        "export",
        "import_weights",
        "load",
        "load_classifier",
        "train",
        "views",
    ),
    "errors": ("ConfigError", "DataError", "Problem", "TrainingError", "UserError"),
    "methods.registry": ("register_method",),
    "models.registry": ("register_backbone",),
}
"""Where the names of the Python face live: each is loaded where it is asked for, as torch takes seconds."""

__all__ = [
    "ConfigError", "DataError", "Embedded", "Problem", "Run", "TrainingError", "Transform", "UserError", "ViewSheet",
    "compare", "embed", "export", "import_weights", "load", "load_classifier", "register_backbone", "register_method",
    "train", "views",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and any(w.partition(".")[0] == __name__ for w in sys.orig_argv):
    # python -m seer_scale: the current folder, which Python puts first, goes last, as a random.py in it is not the one
    # meant
    sys.path.append(sys.path.pop(0))
