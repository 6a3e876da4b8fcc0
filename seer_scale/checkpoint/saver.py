"""Checkpoints written in the background: training waits for a copy of the state in memory, never for a disk."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.checkpoint import store
from seer_scale.checkpoint.staging import Staging
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, CheckpointError, Problem

SAVER_CLOSE_S = 60.0
"""Seconds a run that has failed waits for its last checkpoint."""


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on all ranks. path: None where it failed, and why; kept_old: why none was deleted."""

    samples_seen: int
    path: Path | None
    problem: Problem | None = None
    kept_old: Problem | None = None
    seconds: float = 0.0


class Saver:
    """Saves a run's state, at most one checkpoint at a time, by a thread that has a process group of its own.

    state: as at every `begin`; its copies and the layout of its files are made here, once (Staging). Collective, as are
    `begin` and `wait`, which all ranks call alike; `ended` looks only at this rank's thread.
    """

    def __init__(
        self, folder: Path, state: Mapping[str, Tensor], world: World, *, keep_last: int, keep_every_samples: int
    ):
        self._folder, self._keep = folder, (keep_last, keep_every_samples)
        self._staging = Staging(state, world)
        self._staging.layout.prepare(world)
        own = dist.new_group(backend="gloo", timeout=world.timeout) if world.size > 1 else None
        assert not isinstance(own, int), "every rank is in it"
        self._world = dataclasses.replace(world, control=own)
        self._thread: threading.Thread | None = None
        self._outcome = Future[Saved]()

    @property
    def nbytes(self) -> int:
        """Memory of the copies, on this rank's host."""
        return self._staging.nbytes

    def begin(self, state: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy `state` and `meta` and write them, rank 0's `meta`, beside what comes next; nothing may be in flight."""
        assert self._thread is None, "one save at a time: wait for the one before"
        copies, self._outcome = self._staging.fill(state), Future()
        then = copy.deepcopy(meta)  # what a run's state is kept in moves with the next update
        self._thread = threading.Thread(target=self._write, args=(copies, then), name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self) -> Saved | None:
        """How the save in flight ended, once, or None while it goes on or there is none. Raises what broke the
        thread."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """How the save in flight ends; None if there is none. Raises what broke the thread, such as a lost rank."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._outcome.result()

    def prune(self) -> None:
        """Delete what need not be kept, as a save does at its end; nothing may be in flight. Collective."""
        assert self._thread is None, "a save in flight retains by itself"
        with suppress(CheckpointError):
            store.prune(self._folder, *self._keep, self._world)

    def close(self, seconds: float = SAVER_CLOSE_S) -> None:
        """Let what is in flight end, where it still can; on its own, for other ranks may be gone."""
        if self._thread:
            self._thread.join(seconds)

    def _write(self, copies: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        begin, path = time.perf_counter(), None
        problem: Problem | None = None
        kept: Problem | None = None
        try:
            if self._world.device.type == "cuda":  # a thread begins on the machine's first GPU, whose rank is another
                torch.cuda.set_device(self._world.device)
            try:
                path = store.save(self._folder, copies, meta, self._world, self._staging.layout)
            except CheckpointError as error:
                problem = error.problems[0]
            if path:
                try:
                    store.prune(self._folder, *self._keep, self._world)
                except CheckpointError as error:
                    rule = f"cannot be deleted: {error.problems[0].clause}"
                    kept = Problem(f"Old checkpoints in {self._folder}", NOTHING, rule)
            self._outcome.set_result(Saved(meta["samples_seen"], path, problem, kept, time.perf_counter() - begin))
        except BaseException as error:
            self._outcome.set_exception(error)
