"""A run on this machine: N processes by submitit's local executor, the same path that submits to SLURM.

The launcher follows the logs of rank 0 and what other ranks complain of, passes Ctrl-C and SIGTERM on, ends what is
left when a rank is lost, and returns the run's exit status. When the launcher itself is killed, the ranks save and stop.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import submitit

from seer_scale.config import load_recipe, parse_overrides
from seer_scale.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError, complain
from seer_scale.train.start import resolve_recipe, run_dir_of, run_training

GRACE_S = 20.0
"""Seconds that ranks may go on after one of them is gone; they cannot finish a collective without it."""


def launch(recipe: str, overrides: list[str], ranks: int | None = None) -> int:
    """Start the ranks, follow them, return the exit status. Raises UserError before anything is started."""
    given = load_recipe(recipe)
    # the number of ranks may itself be overridden: find it first, then check all for it
    ranks = ranks or resolve_ranks(given, overrides)
    config = resolve_recipe(recipe, overrides, ranks)
    logs = run_dir_of(config, recipe) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.LocalExecutor(folder=logs)
    executor.update_parameters(tasks_per_node=ranks, timeout_min=60 * 24 * 365, **_devices())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: the terminal's Ctrl-C must not reach the controller
    try:
        job = executor.submit(_rank, recipe, overrides, uuid.uuid4().hex[:12], os.getpid(), str(Path.cwd()))
        return _Watch(job, ranks).until_end()
    finally:
        signal.signal(signal.SIGINT, before)


def resolve_ranks(given: dict, overrides: list[str]) -> int:
    """parallel.ranks of the recipe and the command line; problems are told by `resolve` later."""
    over, _ = parse_overrides(list(overrides))
    for place in (over, given):
        section = place.get("parallel")
        if isinstance(section, dict) and isinstance(section.get("ranks"), int) and section["ranks"] > 0:
            return section["ranks"]
    return 1


def _devices() -> dict:
    import torch

    count = torch.cuda.device_count()
    return {"visible_gpus": tuple(range(count))} if count else {}


def _rank(recipe: str, overrides: list[str], attempt: str, launcher: int, folder: str) -> int:
    """What each process runs; returns the exit status."""
    os.chdir(folder)
    threading.Thread(target=_stop_without, args=(launcher,), daemon=True).start()
    try:
        return run_training(recipe, overrides, attempt)
    except UserError as error:
        return complain(error)


def _stop_without(launcher: int) -> None:
    """Save and stop when the launcher is gone."""
    while Path(f"/proc/{launcher}").exists():
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


class _Watch:
    """Follows one local job until it ends."""

    def __init__(self, job: submitit.Job, ranks: int):
        self.job, self.ranks = job, ranks
        self._asked_to_stop = 0
        self._read: dict[Path, int] = {}
        self._lost_at: float | None = None

    def until_end(self) -> int:
        before = {s: signal.signal(s, self._pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        try:
            while not self.job.get_info()["jobState"] in ("FINISHED", "INTERRUPTED"):
                self._follow()
                self._end_what_is_left()
                time.sleep(0.2)
            self._follow()
            return self._status()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _pass_on(self, number: int, _) -> None:
        self._asked_to_stop += 1
        if self._asked_to_stop > 1:
            print("Stopping at once: what was done since the newest checkpoint is lost.", file=sys.stderr, flush=True)
            self._signal_ranks(signal.SIGKILL)
            return
        print("Stopping after this update, with a checkpoint; once more to stop at once.", file=sys.stderr, flush=True)
        self._signal_ranks(signal.SIGTERM)

    def _children(self) -> list[int]:
        """Process numbers of the ranks that are alive."""
        controller = self.job._process.pid
        try:
            return [int(p) for p in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]
        except OSError:
            return []

    def _signal_ranks(self, number: int) -> None:
        for pid in self._children():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def _end_what_is_left(self) -> None:
        alive = len(self._children())
        if not 0 < alive < self.ranks:
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = time.monotonic()
        elif time.monotonic() - self._lost_at > GRACE_S:
            print(f"{self.ranks - alive} of {self.ranks} ranks have ended; ending the others.", file=sys.stderr, flush=True)
            self._signal_ranks(signal.SIGKILL)

    def _follow(self) -> None:
        """Print what the logs have grown by: all of rank 0, and what other ranks write to stderr."""
        for rank in range(self.ranks):
            paths = self.job.task(rank).paths if self.ranks > 1 else self.job.paths
            for path in (paths.stdout, paths.stderr) if rank == 0 else (paths.stderr,):
                if path.exists():
                    with path.open("rb") as file:
                        file.seek(self._read.get(path, 0))
                        new = file.read()
                    whole = new[: new.rfind(b"\n") + 1]
                    self._read[path] = self._read.get(path, 0) + len(whole)
                    to = sys.stderr if path == paths.stderr else sys.stdout
                    for line in whole.decode(errors="replace").splitlines():
                        if not line.startswith("submitit "):
                            print(f"[rank {rank}] {line}" if rank else line, file=to, flush=True)

    def _status(self) -> int:
        """The worst of the ranks' statuses; a rank that left none has failed."""
        statuses = []
        for rank in range(self.ranks):
            try:
                statuses.append(self.job.task(rank).result() if self.ranks > 1 else self.job.result())
            except Exception:
                statuses.append(EXIT_FAILED)
        order = [EXIT_DONE, EXIT_STOPPED]
        bad = [s for s in statuses if s not in order]
        return bad[0] if bad else max(statuses, key=order.index)
