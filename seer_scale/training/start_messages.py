"""What a run says as it starts: one event of what it goes on from, and notes on what a user may want to change."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seer_scale import __version__
from seer_scale.config import Config, unused_keys
from seer_scale.data.sources import Source
from seer_scale.data.sources.left_out import warning
from seer_scale.distributed import World
from seer_scale.evaluate.knn import LabelledImages, why_unlabelled
from seer_scale.formatting import counted, dtype_name, memory_size
from seer_scale.models.execution import Execution
from seer_scale.observe.records import read_metrics
from seer_scale.training.clock import Clock
from seer_scale.training.components import Components, Origin
from seer_scale.training.data_history import manifest_of
from seer_scale.training.probe import Probe


class Note(NamedTuple):
    """An event: its kind and its sentence."""

    kind: str
    text: str


LOADED = time.time()
FEWER_THREADS = "; train.threads or OMP_NUM_THREADS sets another number of threads."


def start_event(
    config: Config, world: World, run_dir: Path, made: Components, *, staging_bytes: int, attempt: str
) -> tuple[str, str, dict[str, Any]]:
    """(kind, text, fields) of the event with which a start begins. staging_bytes: memory of a rank for copies of the
    state. attempt: which start this is, where a launcher counts them."""
    engine, origin = made.engine, made.origin
    fields: dict[str, Any] = {
        "began": _process_began(),
        "versions": _versions(world),
        "attempt": attempt,
        "step": made.clock.step,
        "ranks": world.size,
        "engine": engine.name,
        "device": world.device.type,
        "samples_seen": made.clock.samples_seen,
        "end": made.clock.end,
        "labelled": made.labelled is not None,
        "baseline": engine.method.baseline,
        "anchors": engine.method.anchors,
        "sections": [dataclasses.asdict(section) for section in engine.method.report_sections],
        "plots": [dataclasses.asdict(plot) for plot in engine.method.plots],
        "threads": made.execution.threads,
        "cores": made.cores,
        "workers": made.workers,
        "memory_format": dtype_name(made.execution.memory_format),
        "accumulation": config.num_micro_batches(world.size),
        "parameters": sum(s.numel() for n, s in engine.shapes.items() if n not in engine.averages),
        "staging_bytes": staging_bytes,
    }
    if origin.checkpoint and made.clock.at_end:
        return "resume", _complete(config, made.clock, origin.checkpoint), fields
    threads = counted(made.execution.threads, "thread") + " each" * (world.size > 1)
    where = f"{counted(world.size, 'rank')} ({engine.name}, {world.device.type}), {threads}"
    images, knn = counted(len(made.history.source), "image"), _about_knn(config, world, made)
    copies = f" Checkpoints are copied to {memory_size(staging_bytes)} of memory a rank first."
    if origin.checkpoint:
        refreshes = made.history.refreshes
        manifest = f" Its images are those of {manifest_of(run_dir, refreshes)}, not of data.path." * bool(refreshes)
        text = (
            f"Going on from {origin.checkpoint} with {images} on {where}.{_changed(origin)}{manifest}{knn} "
            f"Verified in {origin.loaded['verify_s']:.1f} s, then {_read(origin)}.{copies}"
        )
        return "resume", text, fields | origin.loaded
    text = f"Training {config.model.name} ({fields['parameters'] / 1e6:,.1f}M parameters) on {images}, {where}.{knn}"
    if world.is_main and read_metrics(run_dir)[0]:
        text = f"An earlier start left no checkpoint in {run_dir / 'checkpoints'}, so training begins anew. {text}"
    if origin.weights:
        text += f" {origin.weights}: {_read(origin)}."
    compiles = " The first update compiles, which takes minutes." * config.train.compile
    return "start", text + copies + compiles, fields | origin.loaded


def _complete(config: Config, clock: Clock, path: Path) -> str:
    asked, seen = config.train.total_samples, clock.samples_seen
    fewer = f" train.total_samples asks for {asked:,}, fewer than this run has seen: nothing is undone."
    fewer *= seen - asked >= config.train.global_batch  # batches are whole
    return (
        f"{path} is complete: all {seen:,} samples were seen, so there is nothing to train.{fewer} More "
        "train.total_samples would go on."
    )


def _changed(origin: Origin) -> str:
    changed = f" Changed since: {', '.join(map(str, origin.changes))}." if origin.changes else ""
    return f"{changed} {origin.rate_change}" if origin.rate_change else changed


def _read(origin: Origin) -> str:
    read = origin.loaded
    return (
        f"read {memory_size(read['load_bytes'])} in {read['load_s']:.1f} s, "
        f"{memory_size(read['load_bytes_most'])} at most a rank"
    )


def _about_knn(config: Config, world: World, made: Components) -> str:
    if made.labelled:
        return f" kNN: {made.labelled.protocol}"
    if world.is_main and config.knn.enabled:  # it asks the file system
        problem = why_unlabelled(config, made.history.source)
        return f" {problem.key} {problem.rule}, so there is no kNN." if problem else ""
    return ""


def _about_probe(probe: Probe, origin: Origin) -> str:
    anew = " It begins anew: the checkpoint has none like it."
    is_new = origin.checkpoint is not None and origin.meta.get("probe") != probe.crc32
    return (
        f"A linear probe of {counted(len(probe.classes), 'class')} learns beside the network (probe.enabled), from all "
        f"images but kNN's queries.{anew * is_new}"
    )


def notes(config: Config, world: World, made: Components) -> Iterator[Note]:
    """The events that follow it."""
    yield from (Note("note", text) for text in _notes_on_engine(config, made.engine.name))
    clock, train = made.clock, config.train
    if clock.end != train.total_samples and not clock.at_end:
        yield Note(
            "note",
            f"train.total_samples is {train.total_samples:,}, and updates take {train.global_batch:,} images each: the "
            f"run ends at {clock.end:,}.",
        )
    if config.warmup_samples < config.schedule.warmup_samples and not clock.at_end:
        yield Note(
            "note",
            f"The warm-up takes {config.warmup_samples:,} samples, {config.schedule.warmup_share:.3g} of the run "
            f"(schedule.warmup_share), not the {config.schedule.warmup_samples:,} of schedule.warmup_samples.",
        )
    yield from _notes_on_images(config, made.history.source, made.labelled)
    if made.probe:
        yield Note("note", _about_probe(made.probe, made.origin))
    yield from _notes_on_cores(made.execution, made.workers, made.cores)
    if world.device.type == "cpu" and train.precision != "fp32":
        yield Note(
            "note",
            "On this CPU, convolutions over maps of which part of their kernel sees padding alone are computed in "
            f"fp32, not {train.precision}: oneDNN leaves gradients of that part unset in half precision.",
        )


def _notes_on_engine(config: Config, name: Any) -> Iterator[str]:
    """name: of the engine that was built."""
    given = config.parallel.engine
    if given not in ("auto", name):
        yield f"There is one rank, so nothing is shared out: parallel.engine {given} computes as {name} here."
    chosen = dataclasses.replace(config.parallel, engine=name)
    if chosen != config.parallel:  # auto's choice, or one rank's
        yield from map(str, unused_keys(dataclasses.replace(config, parallel=chosen)))


def _notes_on_images(config: Config, source: Source, labelled: LabelledImages | None) -> Iterator[Note]:
    batch = config.train.global_batch
    if not source.is_stream and len(source) < batch:
        yield Note(
            "few_images",
            f"There are {len(source):,} images, fewer than train.global_batch ({batch:,}): each update sees an image "
            f"{batch / len(source):.1f} times, which teaches little; lower train.global_batch, or give more images.",
        )
    if labelled and config.knn.k > (voters := len(labelled.bank_indices)):
        yield Note(
            "note",
            f"knn.k is {config.knn.k:,}, but {counted(voters, 'image')} can vote in kNN: all of them do, each time.",
        )
    if left_out := warning(source.left_out):
        yield Note("note", left_out)


def _notes_on_cores(execution: Execution, workers: int, cores: int) -> Iterator[Note]:
    if workers > cores:
        yield Note(
            "note",
            f"data.workers is {workers}, but a rank may use {counted(cores, 'core')}: more loader processes than that "
            "help only where images come from URLs.",
        )
    if execution.threads > cores:
        yield Note(
            "note",
            f"There are {execution.threads} CPU threads a rank (train.threads or OMP_NUM_THREADS), but a rank may use "
            f"{counted(cores, 'core')}: they stand in each other's way, and fewer are faster.",
        )
    if execution.contended:
        yield Note(
            "contended",
            f"The cores are contended: {execution.contended}. Updates are slower than they could be"
            f"{FEWER_THREADS if execution.threads > 1 else '.'}",
        )


def _versions(world: World) -> dict[str, str]:
    """What a run was made with, for those who want to make it again."""
    device = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "seer_scale": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def _process_began() -> float:
    """Unix time (proc(5): field 22 of stat, in ticks since the machine began); without Linux, when this module was
    loaded."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return LOADED
