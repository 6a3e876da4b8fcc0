"""Which checkpoint a run goes on from, and whether it can."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from seer_scale.checkpoint import store
from seer_scale.config import KEYS_OF_TRAINING, Config, keys_of_network, read_config
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, Problem, UserError
from seer_scale.methods.registry import build_method
from seer_scale.optim.schedules import LearningRate, weight_decay
from seer_scale.training.initial_weights import MODEL, find_initial_weights, print_warning, state_of

START_KEYS = ("run.dir", "checkpoint.resume", "checkpoint.init_from", "checkpoint.init_part", "run.plugins")
"""Keys of where a run lies and how it began, which a resume may give otherwise."""
PATH_KEYS = ("data.path", "knn.bank", "knn.queries", "parallel.ds_config")
LEARNING_RATE_PREFIXES = ("schedule.", "optim.lr", "train.total_samples", "train.global_batch")
"""What keys begin with that the learning rate follows."""
WEIGHT_DECAY_PREFIXES = ("schedule.decay_samples", "optim.weight_decay", "train.total_samples")


class Change(NamedTuple):
    """A key that has another value than in the recipe of the checkpoint."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {json.dumps(self.before)} -> {json.dumps(self.after)}"


def find_checkpoint(
    config: Config, run_dir: Path, world: World, *, contents: bool = True, warn: Callable[[str], None] = print_warning
) -> Path | None:
    """The checkpoint to go on from; None: none. Without `contents` sizes must do, no file is read. Collective. Raises
    UserError."""
    asked = config.checkpoint.resume
    found = store.latest(run_dir / "checkpoints", world, verify=contents, warn=warn)
    if asked not in ("auto", "none"):
        path = Path(asked)
        # this run dir went on from `path` before: the same command, given again, goes on with what came of it
        if found and _lies_at(path, store.read_meta(found, world)["config"]["checkpoint"]["resume"]):
            return found
        if problem := store.validate(path, world, contents=contents):
            raise CheckpointError(Problem("checkpoint.resume", path, f"it {problem.rule}", problem.nearest))
        if found and not _lies_at(path, found):
            raise UserError(
                Problem(
                    "checkpoint.resume",
                    path,
                    f"{run_dir} already holds {found.name}, and a run.dir holds one line of checkpoints",
                    "give another run.dir to go on from the one named, or checkpoint.resume auto to go on from "
                    f"{found.name}",
                )
            )
        return path
    if found and asked == "none":
        raise UserError(
            Problem(
                "checkpoint.resume",
                "none",
                f"{run_dir} already holds {found.name}",
                "give another run.dir, or checkpoint.resume auto",
            )
        )
    return found


def _lies_at(path: Path, other: str | Path) -> bool:
    """Path.resolve() would raise for links to themselves."""
    return os.path.realpath(path) == os.path.realpath(other)


def check_resumable(path: Path, config: Config, world: World = World()) -> dict[str, Any]:
    """The meta of the checkpoint `path`, from which `config` can go on. Collective. Raises UserError."""
    meta = store.read_meta(path, world)
    then, method = meta["config"], meta["method"]["name"]
    if method != config.method.name:
        raise UserError(
            Problem(
                "method.name",
                config.method.name,
                f"{path} was trained by {method}",
                f"give {method} (--plugin, if it is one's), or another run.dir with checkpoint.init_from",
            )
        )
    if then["run"]["seed"] != config.run.seed:
        seed = then["run"]["seed"]
        raise UserError(
            Problem(
                "run.seed",
                config.run.seed,
                f"{path} was trained with {seed}, which the order of its images follows",
                f"give {seed}, or another run.dir with checkpoint.init_from",
            )
        )
    optimizer = then["optim"]["name"]
    if optimizer != config.optim.name and {optimizer, config.optim.name} != {"sgd", "lars"}:
        raise UserError(
            Problem(
                "optim.name",
                config.optim.name,
                f"{path} holds the state of {optimizer}",
                f"give {optimizer}, or another run.dir with checkpoint.init_from",
            )
        )
    return meta


def rate_change(meta: dict[str, Any], config: Config) -> str:
    """What is said where `config` goes on from a checkpoint's `meta` with another learning rate or weight decay than
    its own recipe would."""
    then, seen = read_config(meta["config"], []), meta["samples_seen"]
    before, after = LearningRate(then), LearningRate(config)
    for schedule in (before, after):
        schedule.state |= meta["schedule"]
    changed = [c.key for c in changes(meta["config"], config)]
    told = []
    for what, old, new, prefixes in (
        ("learning rate", before(seen), after(seen), LEARNING_RATE_PREFIXES),
        ("weight decay", weight_decay(then, seen), weight_decay(config, seen), WEIGHT_DECAY_PREFIXES),
    ):
        causes = [key for key in changed if key.startswith(prefixes)]
        if not math.isclose(old, new, rel_tol=1e-6):
            told.append(f"The {what} goes from {old:.3g} to {new:.3g}, because of {', '.join(causes)}")
    is_cosine = config.schedule.name == then.schedule.name == "cosine"
    if told and is_cosine and "train.total_samples" in changed and not config.schedule.decay_samples:
        told[0] += (
            f" (schedule.decay_samples {before.total} keeps the cosine as it was, and the rate at its end from "
            "there on)"
        )
    return " ".join(f"{sentence}." for sentence in told)


def validate_resume(config: Config, run_dir: Path) -> str:
    """What can be known before any rank is started: that there is a checkpoint where one is named, and that it is of
    this recipe's architecture. What a run that goes on will change, if anything. Reads no tensor. Raises UserError."""
    path = find_checkpoint(config, run_dir, World(), contents=False, warn=lambda _: None)
    if not path and not config.checkpoint.init_from:
        return ""
    method = build_method(config, World())
    if not path:
        find_initial_weights(config, method, World(), contents=False, warn=lambda _: None)
        return ""
    meta = check_resumable(path, config)
    store.check_compatible(path, state_of(method), prefixes=MODEL, remedy=remedy(meta["config"], config))
    changed, rate = changes(meta["config"], config), rate_change(meta, config)
    if not changed:
        return ""
    return f"{run_dir} goes on from {path.name}, with {', '.join(map(str, changed))}.{' ' * bool(rate)}{rate}"


def remedy(then: dict[str, Any], config: Config) -> str:
    """What to do where the network of a checkpoint with the recipe `then` is another than this recipe's: a clause."""
    of_network = ("model.", *keys_of_network(config.method.name))
    of_training = {f"model.{key}" for key in KEYS_OF_TRAINING}
    found = [change for change in changes(then, config) if change.key not in of_training]
    changed = [str(change) for change in found if change.key.startswith(of_network)]
    if not changed:
        return store.DEFAULT_REMEDY
    return (
        f"give back what the checkpoint has ({', '.join(changed)}), or begin in another run.dir with "
        "checkpoint.init_from and, where only the backbone is the same, checkpoint.init_part backbone"
    )


def changes(then: dict[str, Any], config: Config) -> list[Change]:
    """What a run does otherwise than with the recipe `then` of its checkpoint.

    Not where the run lies and how it began; nor another way to write the same folder, nor a key that is newer than the
    checkpoint and has its default.
    """
    before, now = _by_key(read_config(then, []).to_dict()), _by_key(config.to_dict())
    changed = [key for key in now if key not in START_KEYS and not _is_same(key, before.get(key), now[key])]
    return [Change(key, before.get(key), now[key]) for key in changed]


def _by_key(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _is_same(key: str, a: Any, b: Any) -> bool:
    if a == b or key not in PATH_KEYS or not a or not b:
        return a == b
    return os.path.realpath(os.path.expanduser(a)) == os.path.realpath(os.path.expanduser(b))
