"""Which checkpoint a run goes on from, and whether it can."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seer_scale.checkpoint import store
from seer_scale.config import Config, read_section
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, UserError
from seer_scale.formatting import with_full_stop
from seer_scale.methods.base import BufferKind, Method
from seer_scale.methods.registry import build_method
from seer_scale.optim.schedules import LearningRate

BACKBONE = "model/backbone."
OF_THE_BEGINNING = ("run.dir", "checkpoint.resume", "checkpoint.init_from", "checkpoint.init_part")
PLACES = ("data.path", "knn.bank", "knn.queries", "parallel.ds_config")
OF_THE_RATE = ("schedule.", "optim.lr", "train.total_samples", "train.global_batch")
"""What keys begin with that the learning rate follows."""
OF_THE_SHAPE = ("model.", "swav.hidden", "swav.embedding_dim", "swav.batch_norm", "swav.prototypes")
"""What keys begin with that make the network: what a checkpoint must have alike."""


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def find_checkpoint(
    config: Config, run_dir: Path, world: World, *, contents: bool = True, warn: Callable[[str], None] = _to_stderr
) -> Path | None:
    """The checkpoint to go on from; None: none. Without `contents` sizes must do, no file is read. Collective. Raises
    UserError."""
    c = config.checkpoint
    found = store.latest(run_dir / "checkpoints", world, verify=contents, warn=warn)
    if c.resume not in ("auto", "none"):
        path = Path(c.resume)
        # this run dir went on from `path` before: the same command, given again, goes on with what came of it
        if found and _lies_at(path, store.read_meta(found, world)["config"]["checkpoint"]["resume"]):
            return found
        if problem := store.validate(path, world, contents=contents):
            raise CheckpointError(f"checkpoint.resume {path} cannot be used: {with_full_stop(problem)}")
        if found and not _lies_at(path, found):
            raise UserError(
                f"checkpoint.resume is {path}, but {run_dir} already holds {found.name}, and a run.dir holds "
                "one line of checkpoints: give another run.dir to go on from the one named, or resume auto to "
                f"go on from {found.name}."
            )
        return path
    if found and c.resume == "none":
        raise UserError(
            f"{run_dir} already holds {found.name}, and checkpoint.resume is none: choose another run.dir, or "
            "resume auto."
        )
    return found


def _lies_at(path: Path, other: str | Path) -> bool:
    """Path.resolve() would raise for links to themselves."""
    return os.path.realpath(path) == os.path.realpath(other)


def check_resumable(path: Path, config: Config, world: World = World()) -> dict[str, Any]:
    """The meta of the checkpoint `path`, from which `config` can go on. Collective. Raises UserError."""
    meta = store.read_meta(path, world)
    then = meta["config"]
    if then["run"]["seed"] != config.run.seed:
        raise UserError(
            f"run.seed is {config.run.seed}, but {path} was trained with {then['run']['seed']}, which the "
            "order of its images follows; use that seed, or another run.dir with checkpoint.init_from."
        )
    if then["optim"]["name"] != config.optim.name and {then["optim"]["name"], config.optim.name} != {"sgd", "lars"}:
        raise UserError(
            f"optim.name is {config.optim.name}, but {path} holds the state of {then['optim']['name']}; use "
            "that one, or another run.dir with checkpoint.init_from."
        )
    return meta


def find_weights(
    config: Config, world: World, *, contents: bool = True, warn: Callable[[str], None] = _to_stderr
) -> Path:
    """The checkpoint that checkpoint.init_from names: itself, or the newest valid one of a run. Collective. Raises
    CheckpointError."""
    path = Path(config.checkpoint.init_from)
    for folder in (path / "checkpoints", path):
        if found := store.latest(folder, world, verify=contents, warn=warn):
            return found
    if problem := store.validate(path, world, contents=contents):
        raise CheckpointError(f"checkpoint.init_from {path} cannot be used: {with_full_stop(problem)}")
    return path


def check_weights(config: Config, path: Path, state: store.State, world: World = World()) -> str:
    """That what checkpoint.init_part names of `path` fits into `state`; what the names of those tensors begin with.
    Collective. Raises CheckpointError."""
    store.check_compatible(path, state, world, prefixes=BACKBONE)
    if config.checkpoint.init_part == "backbone":
        return BACKBONE
    anew = "give checkpoint.init_part backbone, which draws all else anew, or choose another checkpoint"
    store.check_compatible(path, state, world, prefixes="model/", remedy=anew)
    return "model/"


def brought(config: Config, found: Path | None) -> tuple[str, ...]:
    """What the names of those parameters begin with that a checkpoint brings to a start, which goes on from `found`."""
    c = config.checkpoint
    if found or c.init_from and c.init_part == "all":
        return ("",)
    return (BACKBONE.removeprefix("model/"),) if c.init_from else ()


def rate_change(meta: dict[str, Any], config: Config) -> str:
    """A sentence where `config` goes on from a checkpoint's `meta` with another learning rate than its own recipe
    would."""
    then, seen = read_section(Config, meta["config"], "", []), meta["samples_seen"]
    before, after = LearningRate(then), LearningRate(config)
    for schedule in (before, after):
        schedule.state |= meta["schedule"]
    if math.isclose(before(seen), after(seen), rel_tol=1e-6):
        return ""
    causes = [change.partition(" ")[0] for change in changes(meta["config"], config) if change.startswith(OF_THE_RATE)]
    is_cosine = config.schedule.name == then.schedule.name == "cosine"
    hint = ""
    if is_cosine and "train.total_samples" in causes and not config.schedule.decay_samples:
        hint = (
            f" (schedule.decay_samples {before.total} keeps the cosine as it was, and the rate at its end from "
            "there on)"
        )
    return f"The learning rate goes from {before(seen):.3g} to {after(seen):.3g}, because of {', '.join(causes)}{hint}."


def validate_resume(config: Config, run_dir: Path) -> str:
    """What can be known before any rank is started: that there is a checkpoint where one is named, and that it is of
    this recipe's architecture. What a run that goes on will change, if anything. Reads no tensor. Raises UserError."""
    path = find_checkpoint(config, run_dir, World(), contents=False, warn=lambda _: None)
    if not path and not config.checkpoint.init_from:
        return ""
    state = state_of(build_method(config, World()))
    if not path:
        check_weights(config, find_weights(config, World(), contents=False, warn=lambda _: None), state)
        return ""
    meta = check_resumable(path, config)
    store.check_compatible(path, state, prefixes="model/", remedy=remedy(meta["config"], config))
    changed, rate = changes(meta["config"], config), rate_change(meta, config)
    return f"{run_dir} goes on from {path.name}, with {', '.join(changed)}.{' ' * bool(rate)}{rate}" if changed else ""


def remedy(then: dict[str, Any], config: Config) -> str:
    """What to do where the network of a checkpoint with the recipe `then` is another than this recipe's: a clause."""
    shapes = [change for change in changes(then, config) if change.startswith(OF_THE_SHAPE)]
    if not shapes:
        return store.DEFAULT_REMEDY
    return (
        f"give back what the checkpoint has ({', '.join(shapes)}), or begin in another run.dir with "
        "checkpoint.init_from and, where only the backbone is the same, checkpoint.init_part backbone"
    )


def state_of(method: Method[Any, Any]) -> store.State:
    """The names and shapes that a checkpoint has of a network, from the network itself (on meta, say)."""
    statistics = {n: b for n, b in method.named_buffers() if method.buffer_kind(n) == BufferKind.STATISTICS}
    return {f"model/{n}": t for n, t in (dict(method.named_parameters()) | statistics).items()}


def changes(then: dict[str, Any], config: Config) -> list[str]:
    """What a run does otherwise than with the recipe `then` of its checkpoint, as "key old -> new".

    Not where the run lies and how it began; nor another way to write the same folder, nor a key that is newer than the
    checkpoint and has its default.
    """
    before, now = _by_key(read_section(Config, then, "", []).to_dict()), _by_key(config.to_dict())
    changed = [key for key in now if key not in OF_THE_BEGINNING and not _is_same(key, before[key], now[key])]
    return [f"{key} {json.dumps(before[key])} -> {json.dumps(now[key])}" for key in changed]


def _by_key(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _is_same(key: str, a: Any, b: Any) -> bool:
    if a == b or key not in PLACES or not a or not b:
        return a == b
    return os.path.realpath(os.path.expanduser(a)) == os.path.realpath(os.path.expanduser(b))
