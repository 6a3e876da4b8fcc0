"""A run on this machine, by submitit's local executor: the same path that submits to SLURM.

The launcher follows the job's log, passes Ctrl-C and SIGTERM on, and returns the run's exit status. When the launcher
itself is killed, the ranks save and stop.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import submitit

from seer_scale.errors import ECHO_S, EXIT_FAILED, QUEUE_SIGNALS, STOP_SIGNALS, ends_at_once, stop_signals
from seer_scale.launch.control import control_local
from seer_scale.launch.job import Job, process_mark

LABEL = re.compile(r"^\[rank \d+\] ")
"""What begins the lines of other ranks than the first (launch/rank.py)."""
STOPPING = "Stopping after this update, with a checkpoint; once more to stop at once."
STOPPING_AT_ONCE = "Stopping at once: what was done since the newest checkpoint is lost."


def run_here(job: Job) -> int:
    """Start the ranks, follow them, return the exit status."""
    job = dataclasses.replace(job, launcher=process_mark(os.getpid()))
    job.write()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (job.code, os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONSAFEPATH"] = "1"  # the copy of the code, and not what lies where the command was given
    executor = submitit.LocalExecutor(folder=job.logs)
    executor.update_parameters(timeout_min=60 * 24 * 365)
    # Blocked and inherited: a stop reaches those who can pass it on, never submitit's controller.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    submitted = executor.submit(control_local, job.run_dir, os.environ.get("CUDA_VISIBLE_DEVICES"))
    with _LogFollower(cast("submitit.LocalJob[int]", submitted)) as follower:  # submit is declared for any executor
        dataclasses.replace(job, job_id=submitted.job_id).write()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return follower.until_end()


class _LogFollower:
    """Follows one local job, its log and the stop signals sent to the launcher, until it ends."""

    def __init__(self, job: submitit.LocalJob[int]):
        self.job = job
        self._requests, self._requested_at, self._passed_on = 0, 0.0, 0
        self._number: int = signal.SIGTERM
        self._shown: set[str] = set()
        self._read: dict[Path, int] = {}

    def __enter__(self) -> _LogFollower:
        self._before = {number: signal.signal(number, self._on_stop_signal) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def until_end(self) -> int:
        announced = 0
        while self.job.get_info()["jobState"] == "RUNNING":
            self._follow()
            if self._requests > announced:
                announced = self._requests
                print(STOPPING if announced == 1 else STOPPING_AT_ONCE, file=sys.stderr, flush=True)
            self._pass_on()
            time.sleep(0.2)
        self._follow()
        status = self._status()
        for left in self.job.paths.folder.glob(f"{self.job.job_id}_*.pkl"):
            left.unlink()
        return status

    def _on_stop_signal(self, number: int, _: object) -> None:
        if not self._requests or ends_at_once(number) and time.monotonic() - self._requested_at > ECHO_S:
            self._requests, self._requested_at, self._number = self._requests + 1, time.monotonic(), number

    def _pass_on(self) -> None:
        """Each request once, to the process that starts the ranks, as soon as it is there."""
        process = self.job._process
        if self._requests == self._passed_on or process is None:  # None: of a job that another process has submitted
            return
        controller = process.pid
        try:
            children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        except OSError:  # no Linux, or it has just ended
            children = subprocess.run(["pgrep", "-P", str(controller)], capture_output=True, text=True).stdout.split()
        # USR2 is submitit's own once our ranks have ended, and would start them again
        number = signal.SIGTERM if self._number in QUEUE_SIGNALS else self._number
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)
                self._passed_on = self._requests

    def _follow(self) -> None:
        """Print what the log has grown by; an error that all ranks print is printed once."""
        for path, stream in ((self.job.paths.stdout, sys.stdout), (self.job.paths.stderr, sys.stderr)):
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                text = LABEL.sub("", line)
                if line.startswith("submitit ") or (text != line and text in self._shown):
                    continue
                if stream is sys.stderr:
                    self._shown.add(text)
                print(line, file=stream, flush=True)

    def _status(self) -> int:
        try:
            outcome, value = pickle.loads(self.job.paths.result_pickle.read_bytes())
            return value if outcome == "success" else EXIT_FAILED
        except OSError:
            print(
                (
                    "The process that starts the ranks was ended from outside (by kill, or for want of memory): "
                    "the newest checkpoint stands, start the run again."
                ),
                file=sys.stderr,
                flush=True,
            )
            return EXIT_FAILED
