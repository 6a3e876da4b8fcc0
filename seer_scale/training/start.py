"""From a recipe's name to a run: what every rank does, however it was started."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from seer_scale import distributed
from seer_scale.checkpoint.lock import RunLock
from seer_scale.config import (
    ZERO_ENGINES,
    Config,
    Data,
    ImageSize,
    all_keys,
    as_asked,
    checked,
    load_recipe,
    parse_overrides,
    plugins_of,
    resolve,
)
from seer_scale.cores import available_cores
from seer_scale.data.sources import kind_of
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, RankLostError, UserError, nothing_begun
from seer_scale.extras import how_to_install
from seer_scale.formatting import counted
from seer_scale.methods.base import Method
from seer_scale.methods.registry import build_method
from seer_scale.models.layers.stateful import StatefulLayer
from seer_scale.models.registry import build_backbone, check_sizes
from seer_scale.observe.records import read_records
from seer_scale.observe.sinks import check_installed
from seer_scale.parallel import check_device, load
from seer_scale.parallel.activation_checkpoint import find_segments
from seer_scale.parallel.units import sharded_units
from seer_scale.plugins import load_plugins
from seer_scale.rank_info import RankInfo, detect
from seer_scale.timeouts import Timeouts
from seer_scale.training.probe import check_features
from seer_scale.training.run import train
from seer_scale.training.stop import StopRequest
from seer_scale.training.watchdog import Watchdog

THREADS_A_CORE = 4
"""The most that train.threads may ask for: hundreds of them keep a machine from everything, a stop among it."""


Recipe = str | dict[str, Any]
"""A shipped recipe's name, the path of a YAML file, or the mapping in one."""
Overrides = Sequence[str] | dict[str, Any]
"""Words of a command line, `--section.key value`, or a mapping of sections."""


def read_recipe(recipe: Recipe, overrides: Overrides) -> tuple[dict[str, Any], str]:
    """The recipe's mapping, without what goes with its own images, network or method where others are named, and a
    sentence that says so. Loads its plugins. Raises UserError."""
    given = recipe if isinstance(recipe, dict) else load_recipe(recipe)
    load_plugins(plugins_of(given, overrides))
    over = overrides if isinstance(overrides, dict) else parse_overrides(overrides)[0]
    return as_asked(recipe if isinstance(recipe, str) else "", given, over)


def check_recipe(recipe: Recipe, overrides: Overrides, world_size: int) -> tuple[Config, list[Problem]]:
    """The Config of a recipe, and the problems beside it. Raises UserError where a value cannot be read."""
    extra_checks = partial(_beyond_config, world_size=world_size, with_data=True)
    return checked(read_recipe(recipe, overrides)[0], overrides, world_size=world_size, extra_checks=extra_checks)


def resolve_given(given: dict[str, Any], overrides: Overrides, world_size: int, *, with_data: bool = True) -> Config:
    """The checked Config of what `read_recipe` gives, for `world_size` ranks; before any device is taken. Raises
    UserError.

    with_data: whether what lies in data.path and in kNN's folders is checked, too; else `check_data` is called later.
    """
    extra_checks = partial(_beyond_config, world_size=world_size, with_data=with_data)
    return resolve(given, overrides, world_size=world_size, extra_checks=extra_checks)


def check_data(config: Config) -> None:
    """That what lies in data.path and in kNN's folders is what the recipe says. Raises ConfigError."""
    if problems := _problems(_checks_of_data(config)):
        raise ConfigError(problems)


def _beyond_config(config: Config, world_size: int, with_data: bool) -> list[Problem]:
    """Problems that only the rooms of models and data can see. No image is listed: that may take minutes."""
    checks: dict[str, Callable[[], Any]] = {
        "model": partial(_check_model, config, world_size),
        "run.sinks": partial(check_installed, config.run.sinks),
    }
    if config.parallel.engine in ZERO_ENGINES:
        checks["parallel.ds_config"] = partial(load("deepspeed.config").deepspeed_config, config, world_size)
    return _problems(checks | (_checks_of_data(config) if with_data else {}))


def _checks_of_data(config: Config) -> dict[str, Callable[[], Any]]:
    checks: dict[str, Callable[[], Any]] = {
        "data.path": partial(_check_data_kind, config.data),
        "run.dir": partial(_check_run_dir, config),
    }
    if config.knn.enabled:
        bank, queries = config.knn.bank, config.knn.queries
        checks |= {"knn.bank": partial(_check_kind, bank), "knn.queries": partial(_check_kind, queries)}
    return checks


def _problems(checks: dict[str, Callable[[], Any]]) -> list[Problem]:
    """What the checks of these keys raise."""
    problems: list[Problem] = []
    known = {key for key, *_ in all_keys()}
    for key, check in checks.items():
        try:
            check()
        except UserError as error:
            problems += Problem.from_check(key, error, known)
    return problems


def _check_model(config: Config, ranks: int) -> None:
    """The model can be built, cut into units and recomputed as the recipe says. Raises UserError."""
    misplaced: dict[str, Any] = dict.fromkeys(
        config.model.misplaced_keys()
    )  # that it takes none of these is the recipe's own rule
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **misplaced))
    with torch.device("meta"):
        backbone = build_backbone(config.model.name, **config.model.explicit_keys())
    sizes: dict[str, ImageSize] = {f"views.crops[{i}].size": crop.size for i, crop in enumerate(config.views.crops)}
    sizes["knn.size"] = config.knn.size  # of evaluations, of pictures, and what a checkpoint says of the images
    if problems := check_sizes(backbone, sizes):
        raise ConfigError(problems)
    method = build_method(config, World())
    if problem := check_features(config, method.feature_width):
        raise ConfigError([problem])
    if problem := _check_statistics(config, ranks, method):
        raise ConfigError([problem])
    unnamed = sorted({name for name, _ in method.named_parameters()} - set(method.initialisers()))
    if unnamed:
        rule = f"its initialisers() do not say how {unnamed[0]} starts ({counted(len(unnamed), 'parameter')} in all)"
        raise UserError(Problem("method.name", config.method.name, rule))
    for chain in method.checkpointed_sequences():
        find_segments(config.parallel.activation_checkpoint, chain.stage_units())
    sharded_units(method, config)


def _check_statistics(config: Config, ranks: int, method: Method[Any, Any]) -> Problem | None:
    """That a BatchNorm has enough to normalise over."""
    if config.train.global_batch % ranks or not any(isinstance(layer, StatefulLayer) for layer in method.modules()):
        return None
    return method.check_statistics(config, config.images_at_once(ranks) * (config.parallel.sync_bn_group or ranks))


def _check_data_kind(data: Data) -> None:
    """The kind of data.path is known, and reads the keys that were given. Raises UserError."""
    kind = kind_of(data.path) if data.kind == "auto" and data.path else data.kind
    if kind in ("hub", "stream") and not find_spec("datasets"):
        rule = "it needs the Python package datasets, which is not installed"
        raise UserError(Problem("data.path", data.path, rule, how_to_install("datasets")))
    if data.exclude and kind != "folder":
        rule = f"has no effect on data.path {data.path}, which is read as {kind}: it serves folders"
        raise UserError(Problem("data.exclude", NOTHING, rule, "remove it"))
    if kind not in ("auto", "hub", "stream"):
        for key, given in (("split", data.split != Data.split), ("image_key", bool(data.image_key))):
            if given:
                rule = f"has no effect on data.path {data.path}, which is read as {kind}"
                raise UserError(Problem(f"data.{key}", NOTHING, rule, "remove it, or give data.kind hub"))


def _check_run_dir(config: Config) -> None:
    """The run's folder is not that of its images, among which pictures would be written. Raises UserError."""
    run_dir, images = config.run.dir, config.data.path
    if run_dir and images and os.path.realpath(run_dir) == os.path.realpath(images):
        raise UserError(
            Problem(
                "run.dir",
                run_dir,
                "that is data.path, too, and a run needs a folder of its own",
                f"{Path(run_dir) / 'runs' / 'first'} would do: folders of runs among the images are left out",
            )
        )


def _check_kind(path: str) -> None:
    if path:
        kind_of(path)


def run_training(recipe: Recipe, overrides: Overrides, attempt: str = "") -> int:
    """Resolve the recipe for the ranks the environment tells of, join them, train; returns the exit status.

    attempt: a word all ranks of this start share (see distributed.init). Raises UserError.
    """
    with nothing_begun():
        info = detect()
        given, note = read_recipe(recipe, overrides)
        config = resolve_given(given, overrides, info.size, with_data=info.size == 1)
        if note and info.rank == 0:
            print(note, flush=True)
        run_dir = run_dir_of(config, recipe if isinstance(recipe, str) else "")
    timeouts = Timeouts.of(config)
    with (
        _no_empty_run(run_dir, info),
        StopRequest() as stop,
        Watchdog(timeouts.update_s, f"[rank {info.rank}] " if info.size > 1 else "") as watchdog,
    ):
        with watchdog.patient(timeouts.start_s):
            world = distributed.init(
                run_dir / "logs",
                attempt,
                device=config.parallel.device,
                timeouts=timeouts,
                asked_to_stop=stop.asked,
                check=partial(_check_here, config, info),
            )
        try:
            status = train(config, world, run_dir, stop, watchdog, attempt)
        except RuntimeError as error:
            if world.size > 1 and distributed.is_peer_failure(error):
                cause = str(error).strip().splitlines()[0]
                raise RankLostError(
                    "Another rank has ended, so this one cannot go on; see what that one said. The newest "
                    f"checkpoint stands: start the run again. ({cause})"
                ) from error
            raise
    distributed.shutdown(world)  # not after an error, when the other ranks may wait in another collective
    return status


def _check_here(config: Config, info: RankInfo) -> None:
    """What one rank sees, and the others may not. Raises ConfigError."""
    problems = [*check_device(config), *_check_threads(config)]
    if problems:
        raise ConfigError(problems)
    if info.rank == 0 and info.size > 1:
        check_data(config)  # a folder of 100,000 tars is listed once, not once a rank


def _check_threads(config: Config) -> list[Problem]:
    threads, cores = config.train.threads, available_cores()
    if threads <= THREADS_A_CORE * cores:
        return []
    return [
        Problem(
            "train.threads",
            threads,
            f"must be at most {THREADS_A_CORE * cores} here, {THREADS_A_CORE} for each core that a rank may use: more "
            "only wait for each other",
            f"give {cores}, or 0, which measures what is fastest",
        )
    ]


@contextmanager
def _no_empty_run(run_dir: Path, info: RankInfo) -> Iterator[None]:
    """A start that is refused before the run has begun, which the first line of its log tells, leaves no folder that
    was not there before. What crashes leaves what it said."""
    made = [place for place in (run_dir, *run_dir.parents) if not os.path.exists(place)] if info.rank == 0 else []
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if made and os.path.exists(run_dir) and not isinstance(error, RankLostError):
            with (
                suppress(UserError),
                RunLock(run_dir) as lock,
            ):  # of a start that is refused because of another it is not
                if not lock.note and not read_records(run_dir):
                    shutil.rmtree(run_dir, ignore_errors=True)
            with suppress(OSError):
                for place in made[1:]:
                    place.rmdir()
        raise


def run_dir_of(config: Config, recipe: str) -> Path:
    return Path(config.run.dir) if config.run.dir else default_run_dir(recipe)


def default_run_dir(recipe: str) -> Path:
    return Path("runs") / Path(recipe).stem
