"""A run on this machine: N processes by submitit's local executor, the same path that submits to SLURM.

The launcher follows the logs of rank 0 and what other ranks complain of, passes Ctrl-C and SIGTERM on, ends what is
left when a rank is lost, and returns the run's exit status. When the launcher itself is killed, the ranks save and stop.
"""

from __future__ import annotations

import os
import pickle
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
from seer_scale.train.stop import ECHO_S, SIGNALS

STOPPING = "Stopping after this update, with a checkpoint; once more to stop at once."
STOPPING_AT_ONCE = "Stopping at once: what was done since the newest checkpoint is lost."

GRACE_S = 20.0
"""Seconds that ranks may go on after one of them is gone; they cannot finish a collective without it."""


def launch(recipe: str, overrides: list[str], ranks: int | None = None) -> int:
    """Start the ranks, follow them, return the exit status. Raises UserError before anything is started."""
    given = load_recipe(recipe)
    # the number of ranks may itself be overridden: find it first, then check all for it
    ranks = ranks or resolve_ranks(given, overrides)
    config = resolve_recipe(recipe, overrides, ranks)
    logs = run_dir_of(config, recipe) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{logs.parent} cannot hold a run ({error.strerror}): choose another run.dir.") from error
    executor = submitit.LocalExecutor(folder=logs)
    executor.update_parameters(tasks_per_node=ranks, timeout_min=60 * 24 * 365)
    # Blocked and inherited: a stop reaches a rank when it can save (StopRequest lets it in), never the controller.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    job = executor.submit(_rank, recipe, overrides, uuid.uuid4().hex[:12], os.getpid(), str(Path.cwd()), visible)
    watch = _Watch(job, ranks)
    with watch:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return watch.until_end()


def resolve_ranks(given: dict, overrides: list[str]) -> int:
    """parallel.ranks of the recipe and the command line; problems are told by `resolve` later."""
    over, _ = parse_overrides(list(overrides))
    for place in (over, given):
        section = place.get("parallel")
        if isinstance(section, dict) and isinstance(section.get("ranks"), int) and section["ranks"] > 0:
            return section["ranks"]
    return 1


def _rank(recipe: str, overrides: list[str], attempt: str, launcher: int, folder: str, visible: str | None) -> int:
    """What each process runs; returns the exit status. visible: CUDA_VISIBLE_DEVICES as the user gave it."""
    os.chdir(folder)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides the GPUs it was not told of
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    threading.Thread(target=_stop_without, args=(launcher,), daemon=True).start()
    try:
        return run_training(recipe, overrides, attempt)
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt:  # a second Ctrl-C, of which the launcher tells
        return EXIT_FAILED


def _stop_without(launcher: int) -> None:
    """Save and stop when the launcher is gone, or the controller that started this rank."""
    controller = os.getppid()
    while _is_alive(launcher) and os.getppid() == controller:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class _Watch:
    """Follows one local job until it ends."""

    def __init__(self, job: submitit.Job, ranks: int):
        self.job, self.ranks = job, ranks
        self._asked_to_stop, self._asked_at, self._signal = 0, 0.0, signal.SIGTERM
        self._told: set[int] = set()
        self._shown: set[str] = set()
        self._read: dict[Path, int] = {}
        self._lost_at: float | None = None

    def __enter__(self) -> _Watch:
        self._before = {s: signal.signal(s, self._ask) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def until_end(self) -> int:
        told = 0
        while self.job.get_info()["jobState"] == "RUNNING":
            self._follow()
            if self._asked_to_stop > told:
                told = self._asked_to_stop
                print(STOPPING if told == 1 else STOPPING_AT_ONCE, file=sys.stderr, flush=True)
            self._pass_on()
            self._end_what_is_left()
            time.sleep(0.2)
        self._follow()
        status = self._status()
        for left in self.job.paths.folder.glob(f"{self.job.job_id}_*.pkl"):
            left.unlink()
        return status

    def _ask(self, number: int, _) -> None:
        if time.monotonic() - self._asked_at > ECHO_S:
            self._asked_to_stop, self._asked_at, self._signal = self._asked_to_stop + 1, time.monotonic(), number

    def _pass_on(self) -> None:
        """Once to each rank, as soon as it is there."""
        if self._asked_to_stop > 1:
            self._signal_ranks(signal.SIGKILL)
        elif self._asked_to_stop:
            new = [pid for pid in self._children() if pid not in self._told]
            self._signal_ranks(self._signal, new)
            self._told |= set(new)

    def _children(self) -> list[int]:
        """Process numbers of the ranks that are alive."""
        controller = self.job._process.pid
        try:
            return [int(p) for p in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]
        except OSError:
            return []

    def _signal_ranks(self, number: int, pids: list[int] | None = None) -> None:
        for pid in self._children() if pids is None else pids:
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
                        if line.startswith("submitit ") or (rank and line in self._shown):
                            continue  # what all ranks complain of is told once
                        if path == paths.stderr:
                            self._shown.add(line)
                        print(f"[rank {rank}] {line}" if rank else line, file=to, flush=True)

    def _status(self) -> int:
        """The worst of the ranks' statuses; a rank that left none has failed. Bad input is the cause of other failures."""
        statuses, killed = [], self._asked_to_stop > 1
        for rank in range(self.ranks):
            try:
                job = self.job.task(rank) if self.ranks > 1 else self.job
                outcome, value = pickle.loads(job.paths.result_pickle.read_bytes())
                statuses.append(value if outcome == "success" else EXIT_FAILED)
            except OSError:
                statuses.append(EXIT_FAILED)
                if not killed:
                    print(f"Rank {rank} was ended from outside (by kill, or for want of memory): the newest checkpoint stands, start the run again.", file=sys.stderr, flush=True)
        order = [EXIT_DONE, EXIT_STOPPED]
        bad = [s for s in statuses if s not in order]
        return max(bad) if bad else max(statuses, key=order.index)
