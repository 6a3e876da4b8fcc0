"""The one process that starts a job's ranks, sees them end, and starts them again: on this machine or in a batch job.

Ranks that all end well end the job. A rank that is killed, crashes or hangs takes the others with it; then all are
started again and go on from the newest checkpoint, a bounded number of times without a new one. What was asked to stop
has saved. This process never loads torch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from seer_scale.errors import EXIT_DONE, EXIT_FAILED, EXIT_HUNG, EXIT_STOPPED
from seer_scale.launch.job import ATTEMPT, Job

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
ECHO_S = 1.0
"""A signal to a process group comes twice, from the group and from whom it was meant for: within so long it is one."""
GRACE_S = 20.0
"""Seconds that ranks may go on after one of them is gone; they cannot finish a collective without it."""
HUNG_GRACE_S = 2.0
"""The same where one hung: the others have waited for it already, and written their stacks."""
POLL_S = 0.1


class Ranks(Protocol):
    """The processes of one start."""

    def poll(self) -> str | None:
        """None while they run; then why they ended, as a sentence, or "" if all of them ended well."""

    def signal(self, number: int) -> None:
        """Send it to those that did not get it yet; SIGKILL to all."""


class LocalRanks:
    """Ranks on this machine."""

    def __init__(self, job: Job, attempt: str, num: int):
        common = {ATTEMPT: attempt, "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
        words = [sys.executable, "-u", "-P", "-m", "seer_scale.launch.rank", job.run_dir]
        self._processes = [
            subprocess.Popen(words, env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(num)
        ]
        self._told: dict[int, set[int]] = {}
        self._lost_at: float | None = None
        self._first = ""

    def poll(self) -> str | None:
        codes = [p.poll() for p in self._processes]
        bad = next((r for r, code in enumerate(codes) if code), None)
        if bad is not None and not self._first:
            self._first, self._lost_at = _ended(f"Rank {bad}", codes[bad]), time.monotonic()
        if all(code is not None for code in codes):
            return self._first
        if self._lost_at and time.monotonic() - self._lost_at > (HUNG_GRACE_S if EXIT_HUNG in codes else GRACE_S):
            print(f"{sum(c is not None for c in codes)} of {len(codes)} ranks have ended; ending the others.", file=sys.stderr, flush=True)
            self.signal(signal.SIGKILL)
        return None

    def signal(self, number: int) -> None:
        told = self._told.setdefault(number, set())
        for p in self._processes:
            if p.poll() is None and (p.pid not in told or number == signal.SIGKILL):
                p.send_signal(number)
                told.add(p.pid)


def _ended(who: str, code: int) -> str:
    """Why a process that returned `code` ended; negative: minus the signal's number."""
    if code in (-signal.SIGALRM, EXIT_HUNG):
        return f"{who} hung and was ended by its watchdog"
    if code < 0:
        return f"{who} was ended by {signal.Signals(-code).name}, from outside or for want of memory"
    return f"{who} ended with status {code}"


class Control:
    """Runs `job` until it is done, stopped, or has failed too often. start: starts the ranks of one attempt.

    requeue: where there is a queue, what puts the job back into it; returns whether that was done. ends: the unix time at
    which ranks that have not saved by then are given up and the job goes back; asked again when it has come.
    """

    def __init__(
        self, job: Job, start: Callable[[str], Ranks], *, ident: str, ranks: int, nodes: list[str],
        requeue: Callable[[], bool] | None = None, ends: Callable[[], float] = lambda: math.inf,
    ):  # fmt: skip
        self.job, self._start, self._ident, self._num, self._nodes, self._requeue = job, start, ident, ranks, nodes, requeue
        self._asked, self._asked_at, self._number = 0, 0.0, signal.SIGTERM
        self._ends, self._gives_up_at, self._is_back = ends, ends(), False

    def run(self) -> int:
        before = {s: signal.signal(s, self._ask) for s in SIGNALS}
        try:
            return self._run()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _run(self) -> int:
        job, in_vain = self.job, 0
        for number in range(1, sys.maxsize):
            attempt, samples = f"{self._ident}.{number}", job.newest_checkpoint()
            job.tell(event="begin", attempt=attempt, ranks=self._num, nodes=self._nodes, samples=samples)
            problem = self._one(attempt)
            if self._is_back:
                return EXIT_DONE
            status, now = self._outcome(attempt), job.newest_checkpoint()
            job.tell(event="end", attempt=attempt, status=status, cause=problem or self._reason(status), samples=now)
            if status not in (None, EXIT_STOPPED):
                return status
            if status == EXIT_STOPPED:
                return EXIT_DONE if not self._asked and self._goes_on() else EXIT_STOPPED
            if self._asked:
                return EXIT_FAILED
            in_vain = 0 if now > samples else in_vain + 1
            if in_vain > job.restarts:
                if self._goes_on():
                    return EXIT_DONE
                tries = f"{in_vain} starts in a row" if in_vain > 1 else "the last start"
                print(f"{problem}. As {tries} brought no new checkpoint, the run ends here{'' if now < 0 else '; the newest checkpoint stands'}.", file=sys.stderr, flush=True)
                return EXIT_FAILED
            where = f"from the checkpoint at {now:,} samples" if now >= 0 else "from the beginning"
            bound = f" (start {in_vain} of {job.restarts} without a new checkpoint)" if in_vain else ""
            print(f"{problem}. Starting the ranks again, {where}{bound}.", file=sys.stderr, flush=True)
        raise AssertionError

    def _one(self, attempt: str) -> str:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a rank inherits that, until it can save
        ranks = self._start(attempt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while (problem := ranks.poll()) is None:
            if self._asked:
                ranks.signal(signal.SIGKILL if self._asked > 1 else self._number)
            if self.job.launcher and not is_alive(self.job.launcher):
                ranks.signal(signal.SIGTERM)
                self._asked = max(1, self._asked)
            if time.time() > self._gives_up_at:
                self._give_up(ranks, attempt)
            time.sleep(POLL_S)
        (self.job.logs / f"rendezvous-{attempt}").unlink(missing_ok=True)  # of ranks that never met
        return problem

    def _give_up(self, ranks: Ranks, attempt: str) -> None:
        """The job's time is nearly over: a job that SLURM has ended for that does not go back by itself."""
        self._gives_up_at = self._ends()
        if time.time() <= self._gives_up_at:  # it was given more
            return
        self._gives_up_at = math.inf
        print("The time limit has nearly come and the ranks have not saved: what was done since the newest checkpoint is lost.", file=sys.stderr, flush=True)
        self.job.tell(event="end", attempt=attempt, status=None, cause="out of time", samples=self.job.newest_checkpoint())
        self._is_back = self._goes_on()
        if self._is_back:
            ranks.signal(signal.SIGKILL)

    def _goes_on(self) -> bool:
        """Back to the queue, unless the job has been started too often, there or here, since its newest checkpoint."""
        if not self._requeue:
            return False
        now, starts, bound = self.job.newest_checkpoint(), 0, (self.job.restarts + 1) * (self.job.requeues + 1)
        for line in self.job.attempts():
            starts = 0 if line["event"] == "begin" and line["samples"] != now else starts + (line["event"] == "begin")
        if starts >= bound:
            print(f"{starts} starts, here and in jobs before, brought no new checkpoint: the job does not go back to the queue.", file=sys.stderr, flush=True)
            return False
        return self._requeue()

    def _reason(self, status: int | None) -> str:
        return {EXIT_DONE: "done", EXIT_STOPPED: "stopped", EXIT_FAILED: "failed", None: "ended"}.get(status, "bad input")

    def _outcome(self, attempt: str) -> int | None:
        """What the ranks said of their end; None if they could not."""
        try:
            said = json.loads((self.job.place / "outcome.json").read_text())
        except (OSError, ValueError):
            return None
        return said["status"] if said.get("attempt") == attempt else None

    def _ask(self, number: int, _) -> None:
        if time.monotonic() - self._asked_at > ECHO_S:
            self._asked, self._asked_at, self._number = self._asked + 1, time.monotonic(), number


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def control_local(run_dir: str, visible: str | None) -> int:
    """What submitit's local executor runs: the ranks of a run on this machine. Returns the exit status.

    visible: CUDA_VISIBLE_DEVICES as the user gave it; submitit hides the GPUs it was not told of.
    """
    job = Job.read(run_dir)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (job.code, os.environ.get("PYTHONPATH"))))
    num, ident = job.ranks_per_node, f"{os.environ['SUBMITIT_LOCAL_JOB_ID']}.{time.time():.0f}"  # process numbers come again
    return Control(job, lambda attempt: LocalRanks(job, attempt, num), ident=ident, ranks=num, nodes=[os.uname().nodename]).run()
