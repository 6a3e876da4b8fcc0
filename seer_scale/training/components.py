"""What a start builds before its first update, and what it takes over from a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from seer_scale.checkpoint import store
from seer_scale.config import Config
from seer_scale.cores import rank_cores
from seer_scale.data.loading.listing import share
from seer_scale.data.sources import Source, Subset
from seer_scale.distributed import World
from seer_scale.evaluate.feature_health import HealthImages, health_images
from seer_scale.evaluate.knn import LabelledImages, labelled_images
from seer_scale.files import shown
from seer_scale.methods.registry import build_method
from seer_scale.models.execution import Execution, choose_execution
from seer_scale.observe.progress import Progress
from seer_scale.optim.schedules import LearningRate
from seer_scale.parallel import build_engine
from seer_scale.parallel.engine import Engine
from seer_scale.training import resume
from seer_scale.training.clock import Clock
from seer_scale.training.data_history import DataHistory, open_data_history
from seer_scale.training.initial_weights import InitialWeights, find_initial_weights
from seer_scale.training.probe import Probe, build_probe
from seer_scale.training.resume import Change
from seer_scale.training.stop import StopRequest


@dataclass(frozen=True)
class Origin:
    """What a start goes on from.

    checkpoint: of the run. weights: what a new run begins with. loaded: seconds (verify_s, load_s) and bytes
    (load_bytes, load_bytes_most of a rank) of reading it. changes, rate_change: what is otherwise than in the
    checkpoint's recipe, and a sentence on the learning rate. meta: of the checkpoint.
    """

    checkpoint: Path | None = None
    weights: InitialWeights | None = None
    loaded: dict[str, float] = field(default_factory=dict)
    changes: Sequence[Change] = ()
    rate_change: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Components:
    """labelled: the images of kNN, health: those whose features are looked at, probe: the one the recipe asks for;
    None: there are none. cores, workers: CPU cores and loader processes of each rank. patch_side: of the method."""

    engine: Engine
    execution: Execution
    schedule: LearningRate
    clock: Clock
    history: DataHistory
    labelled: LabelledImages | None
    health: HealthImages | None
    probe: Probe | None
    origin: Origin
    cores: int
    workers: int
    patch_side: int

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by reference."""
        return state_of(self.engine, self.probe)


def state_of(engine: Engine, probe: Probe | None) -> dict[str, Tensor]:
    return engine.state() | (probe.state() if probe else {})


def build_components(config: Config, world: World, run_dir: Path, stop: StopRequest, progress: Progress) -> Components:
    """All of it, what may be refused first. Collective. Raises UserError."""
    begin = time.perf_counter()
    with progress.doing("looking for a checkpoint and verifying it"):
        found = resume.find_checkpoint(config, run_dir, world)  # before anything is built
        method = build_method(config, world)
        is_given = config.checkpoint.init_from and not found
        weights = find_initial_weights(config, method, world) if is_given else None
    verify_s = time.perf_counter() - begin
    with progress.doing(f"listing the images of {shown(config.data.path)}"):
        saved = store.read_meta(found, world)["data"] if found else None
        history, labelled = list_images(config, run_dir, world, stop, saved)
    patch_side = method.patch_side if config.run.patch_images else 0
    probe = build_probe(config, method.feature_width, history.source, labelled, world)
    cores = rank_cores(world)
    with progress.doing("measuring how the network runs fastest"):
        between = partial(stop.end_start_if_agreed, world)
        execution = choose_execution(method.backbone, config, world, cores, between)
    with progress.doing("building the network"):
        loaded = ("",) if found else weights.loaded if weights else ()
        engine = build_engine(method, config, world, loaded=loaded)
    schedule, origin = LearningRate(config), Origin()
    if found:
        origin = _restore(found, config, engine, probe, schedule, progress, verify_s)
    elif weights:
        origin = Origin(weights=weights, loaded=_load(weights.path, engine, engine.state(), progress, weights.load))
    seen, step = origin.meta.get("samples_seen", 0), origin.meta.get("step", 0)
    clock = Clock(config.train.global_batch, config.end(seen), seen, step)
    workers = config.data.num_workers(cores)
    health = health_images(config, history.source, labelled)
    return Components(
        engine, execution, schedule, clock, history, labelled, health, probe, origin, cores, workers, patch_side
    )


def list_images(
    config: Config, run_dir: Path, world: World, stop: StopRequest, saved: dict[str, Any] | None
) -> tuple[DataHistory, LabelledImages | None]:
    """The images to train on and those of kNN, listed by rank 0. saved: the data's state in the checkpoint. Collective.
    Raises UserError; StartStopped where a stop is asked for meanwhile."""

    def listed() -> tuple[DataHistory, LabelledImages | None]:
        with stop.interrupting("images were listed"):
            history = open_data_history(config, run_dir, saved)
            drawn = history.source
            return history, labelled_images(config, drawn.whole if isinstance(drawn, Subset) else drawn)

    def sources(listed: tuple[DataHistory, LabelledImages | None]) -> list[Source]:
        history, labelled = listed
        return [history.source, *([labelled.bank, labelled.queries] if labelled else [])]

    return share(world, run_dir / "logs", listed, sources)


def _restore(
    path: Path,
    config: Config,
    engine: Engine,
    probe: Probe | None,
    schedule: LearningRate,
    progress: Progress,
    verify_s: float,
) -> Origin:
    """Bring engine, method, probe and schedule to where the checkpoint `path` stands. Collective. Raises UserError."""
    meta = resume.check_resumable(path, config, engine.world)
    then = meta["config"]
    is_kept = engine.method.load_state(meta["method"]["state"], then, meta["samples_seen"])
    prefixes = ("model/", "optim/", "scaler/", *(("memory/",) if is_kept else ()))
    if probe and meta.get("probe") == probe.crc32:  # else it begins anew
        prefixes += ("probe/",)
    reading = partial(store.load, path, prefixes=prefixes, remedy=resume.remedy(then, config))
    loaded = _load(path, engine, state_of(engine, probe), progress, reading)
    schedule.state |= meta["schedule"]
    if then["train"]["precision"] != config.train.precision:
        engine.scaler.restart()
    return Origin(
        checkpoint=path,
        loaded=loaded | {"verify_s": verify_s},
        changes=resume.changes(then, config),
        rate_change=resume.rate_change(meta, config),
        meta=meta,
    )


def _load(
    path: Path,
    engine: Engine,
    state: store.State,
    progress: Progress,
    reading: Callable[[store.State, World], int],
) -> dict[str, float]:
    """Take over into `state` what `reading` brings of `path`; what that took. Collective."""
    begin, world = time.perf_counter(), engine.world
    with progress.doing(f"loading {shown(path)}"):
        nbytes = world.gather_objects(reading(state, world))
    engine.refresh()
    return {"load_s": time.perf_counter() - begin, "load_bytes": sum(nbytes), "load_bytes_most": max(nbytes)}
