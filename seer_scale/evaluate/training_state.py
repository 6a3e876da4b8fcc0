"""What a training holds so that it goes on after a kill: tensors and a record, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seer_scale.files import to_json


def save_state(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Written aside, then renamed. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, aside, {"record": to_json(record)})
    os.replace(aside, path)


def read_record(path: Path) -> dict[str, Any] | None:
    """None where there is no state, or none that is whole."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["record"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """On the host."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
