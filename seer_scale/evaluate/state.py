"""What a task has trained so far: tensors and JSON in one safetensors file; a reader sees the last whole one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from seer_scale.files import UNFINISHED, safetensors_header, to_json
from seer_scale.interop.artefact import TensorInfo, write_file

STATE_KEY = "state"


def save_state(path: Path, tensors: Mapping[str, Tensor], more: Mapping[str, Any]) -> None:
    """more: as JSON holds it. One tensor at a time is copied to the host. Raises OSError."""
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    write_file(aside, infos, lambda name: tensors[name].detach().cpu(), {STATE_KEY: to_json(dict(more))})
    os.replace(aside, path)


def read_more(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors; {} where nothing was, or no whole file."""
    metadata = safetensors_header(path).get("__metadata__") or {}
    return json.loads(metadata.get(STATE_KEY, "{}"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """From bytes, since safetensors takes no names that are not UTF-8. Raises OSError, SafetensorError."""
    return safetensors.torch.load(path.read_bytes())
