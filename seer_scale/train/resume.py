"""Which checkpoint a run goes on from, and whether it can."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seer_scale.checkpoint import store
from seer_scale.config import Config
from seer_scale.errors import CheckpointError, UserError
from seer_scale.methods.swav import SwAV
from seer_scale.world import World


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def find(config: Config, run_dir: Path, world: World, *, contents: bool = True, warn: Callable[[str], None] = _to_stderr) -> Path | None:
    """The checkpoint to go on from; None: none. Without `contents` sizes must do, no file is read. Collective. Raises UserError."""
    c = config.checkpoint
    found = store.newest(run_dir / "checkpoints", world, verify=contents, warn=warn)
    if c.resume not in ("auto", "none"):
        path = Path(c.resume)
        # this run dir went on from `path` before: the same command, given again, goes on with what came of it
        if found and Path(store.read_meta(found)["config"]["checkpoint"]["resume"]).resolve() == path.resolve():
            return found
        if problem := store.flaw(path, world, contents=contents):
            raise CheckpointError(f"checkpoint.resume {path} cannot be used: {problem}.")
        if found and found.resolve() != path.resolve():
            raise UserError(f"checkpoint.resume is {path}, but {run_dir} already holds {found.name}, and a run.dir holds one line of checkpoints: give another run.dir to go on from the one named, or resume auto to go on from {found.name}.")
        return path
    if found and c.resume == "none":
        raise UserError(f"{run_dir} already holds {found.name}, and checkpoint.resume is none: choose another run.dir, or resume auto.")
    return found


def must_go_on(path: Path, config: Config) -> dict[str, Any]:
    """The meta of the checkpoint `path`, from which `config` can go on. Raises UserError."""
    meta = store.read_meta(path)
    then = meta["config"]
    if then["run"]["seed"] != config.run.seed:
        raise UserError(f"run.seed is {config.run.seed}, but {path} was trained with {then['run']['seed']}, which the order of its images follows; use that seed, or another run.dir with checkpoint.init_from.")
    if then["optim"]["name"] != config.optim.name and {then["optim"]["name"], config.optim.name} != {"sgd", "lars"}:
        raise UserError(f"optim.name is {config.optim.name}, but {path} holds the state of {then['optim']['name']}; use that one, or another run.dir with checkpoint.init_from.")
    return meta


def foresee(config: Config, run_dir: Path) -> str:
    """What can be known before any rank is started: that there is a checkpoint where one is named, and that it is of this
    recipe's architecture. A sentence on what a run that goes on will change, if anything. Reads no tensor. Raises UserError."""
    changed: list[str] = []
    path = find(config, run_dir, World(), contents=False, warn=lambda _: None)
    if path:
        changed = differences(must_go_on(path, config)["config"], config.to_dict())
    elif config.checkpoint.init_from:
        path = Path(config.checkpoint.init_from)
        if problem := store.flaw(path, World(), contents=False):
            raise CheckpointError(f"checkpoint.init_from {path} cannot be used: {problem}.")
    if path:
        with torch.device("meta"):
            method = SwAV(config, World())
        own = dict(method.named_buffers(recurse=False))
        state = {**dict(method.named_parameters()), **{n: b for n, b in method.named_buffers() if n not in own}}
        store.must_fit(path, {f"model/{n}": t for n, t in state.items()}, only="model/")
    return f"{run_dir} goes on from {path.name}, with {', '.join(changed)}." if changed else ""


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ, as "key old -> new"."""
    out = []
    for key in {**then, **now}:
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} {json.dumps(a)} -> {json.dumps(b)}")
    return out
