"""The one process that starts a job's ranks, sees them end, and starts them again: on this machine or in a batch job.

Ranks that all end well end the job. A rank that is killed, crashes or hangs takes the others with it; then all are
started again and go on from the newest checkpoint, a bounded number of times without a new one. What was asked to stop
has saved. This process never loads torch, and a full disk does not end it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from seer_scale import console
from seer_scale.errors import (
    ECHO_S,
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_STOPPED,
    QUEUE_SIGNALS,
    STOP_SIGNALS,
    UserError,
    ends_at_once,
    print_error,
    stop_signals,
)
from seer_scale.launch.job import ATTEMPT, Job, is_alive
from seer_scale.rank_info import LAUNCHER, LOCAL, without_rank_variables

LOST_RANK_GRACE_S = 20.0
"""Seconds that ranks may go on after one of them is gone; they cannot finish a collective without it."""
HUNG_RANK_GRACE_S = 2.0
"""The same where one hung: the others have waited for it already, and written their stacks."""
RANKS_POLL_S = 0.1
STOP_REPEAT_S = 10.0
"""Seconds between two requests to stop: one that comes while ranks start may not reach them."""
OUT_OF_TIME = "out of time"
REASONS: dict[int | None, str] = {
    EXIT_DONE: "done",
    EXIT_STOPPED: "stopped",
    EXIT_FAILED: "failed",
    EXIT_BAD_INPUT: "bad input",
}


class Ranks(Protocol):
    """The processes of one start. code: of the first that ended badly, else 0."""

    code: int

    def poll(self) -> str | None:
        """None while they run; then why they ended, as a sentence, or "" if all of them ended well. None is left
        then."""

    def signal(self, number: int) -> None:
        """Send it to those that did not get it yet; SIGKILL to all."""


class Limits:
    """When a job has to stop, and when to be back in the queue; here: never."""

    def is_cancelled(self) -> bool:
        """Asked to stop for good."""
        return False

    def should_stop(self) -> bool:
        """Cancelled, or its time is nearly over."""
        return False

    def is_over(self) -> bool:
        """Ranks that have not saved by now are given up."""
        return False


class LocalRanks:
    """Ranks on this machine."""

    def __init__(self, job: Job, attempt: str, num_ranks: int):
        env = without_rank_variables(os.environ) | {
            ATTEMPT: attempt,
            LAUNCHER: LOCAL,
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        }
        words = [sys.executable, "-u", "-P", "-m", "seer_scale.launch.rank", job.run_dir]
        self._processes = [
            subprocess.Popen(words, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(num_ranks)
        ]
        self._signalled: dict[int, set[int]] = {}
        self._lost_at: float | None = None
        self._first_end, self.code = "", 0

    def poll(self) -> str | None:
        codes = [process.poll() for process in self._processes]
        failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
        if failed is not None and not self._first_end:
            rank, self.code = failed
            self._first_end, self._lost_at = _describe_end(f"Rank {rank}", self.code), time.monotonic()
        if None not in codes:
            return self._first_end
        grace_s = HUNG_RANK_GRACE_S if EXIT_HUNG in codes else LOST_RANK_GRACE_S
        if self._lost_at and time.monotonic() - self._lost_at > grace_s:
            log(f"{sum(code is not None for code in codes)} of {len(codes)} ranks have ended; ending the others.")
            self.signal(signal.SIGKILL)
        return None

    def signal(self, number: int) -> None:
        signalled = self._signalled.setdefault(number, set())
        for process in self._processes:
            if process.poll() is None and (process.pid not in signalled or number == signal.SIGKILL):
                process.send_signal(number)
                signalled.add(process.pid)


def signal_name(number: int) -> str:
    """Also of those that have none, as most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _describe_end(who: str, code: int) -> str:
    """Why a process that returned `code` ended; negative: minus the signal's number."""
    if code in (-signal.SIGALRM, EXIT_HUNG):
        return f"{who} hung and was ended by its watchdog"
    if code < 0:
        return f"{who} was ended by {signal_name(-code)}, from outside or for want of memory"
    return f"{who} ended with status {code}"


class Control:
    """Runs `job` until it is done, stopped, or has failed too often. start: starts the ranks of one attempt.

    ident: of this start of the job; attempts are numbered after it. requeue: where there is a queue, what puts the job
    back into it; returns whether that was done.
    """

    def __init__(
        self, job: Job, start: Callable[[str], Ranks], *, ident: str, ranks: int, nodes: list[str],
        requeue: Callable[[], bool] | None = None, limits: Limits = Limits(),
    ):  # fmt: skip
        self.job, self._start, self._ident = job, start, ident
        self._num_ranks, self._nodes, self._requeue = ranks, nodes, requeue
        self._limits, self._stop_sent_at, self._is_requeued = limits, float("-inf"), False
        self._requests, self._requested_at = 0, 0.0
        self._number: int = signal.SIGTERM

    def run(self) -> int:
        before = {number: signal.signal(number, self._on_stop_signal) for number in stop_signals()}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        job, without_checkpoint = self.job, 0
        if self._requeue and (returns := len(self._starts_without_checkpoint())) > job.requeues:
            log(
                f"{returns} starts of this job brought no new checkpoint, so the run ends here (requeues "
                f"{job.requeues})."
            )
            return EXIT_FAILED
        for number in range(1, sys.maxsize):
            if self._limits.is_cancelled():
                return EXIT_STOPPED
            attempt, samples = f"{self._ident}.{number}", job.newest_checkpoint()
            job.log_event(event="begin", attempt=attempt, ranks=self._num_ranks, nodes=self._nodes, samples=samples)
            problem, code = self._run_attempt(attempt)
            status, now = self._outcome(attempt, code), job.newest_checkpoint()
            if self._is_requeued:
                return EXIT_DONE
            for_good = self._requests or self._limits.is_cancelled()
            cause = self._cause_of_stop(problem, samples, now) if for_good else problem or "ended"
            if problem != OUT_OF_TIME:  # which has been logged
                reason = REASONS.get(status) or cause
                job.log_event(event="end", attempt=attempt, status=status, cause=reason, samples=now)
            if status not in (None, EXIT_STOPPED):
                return status
            if status == EXIT_STOPPED:
                return EXIT_DONE if not for_good and self._try_requeue() else EXIT_STOPPED
            if for_good:
                return EXIT_FAILED
            without_checkpoint = 0 if now > samples else without_checkpoint + 1
            if without_checkpoint > job.restarts or self._limits.should_stop():
                if self._try_requeue():
                    return EXIT_DONE
                tries = f"{without_checkpoint} starts in a row" if without_checkpoint > 1 else "the last start"
                log(
                    f"{problem}. As {tries} brought no new checkpoint, the run ends "
                    f"here{'' if now < 0 else '; the newest checkpoint stands'}."
                )
                return EXIT_FAILED
            where = f"from the checkpoint at {now:,} samples" if now >= 0 else "from the beginning"
            bound = (
                f" (start {without_checkpoint} of {job.restarts} without a new checkpoint)"
                if without_checkpoint
                else ""
            )
            log(f"{problem}. Starting the ranks again, {where}{bound}.")
        raise AssertionError

    def _cause_of_stop(self, problem: str, before: int, now: int) -> str:
        """The cause of an end that was asked for and of which the ranks said nothing. before, now: the newest
        checkpoints of its begin and of its end."""
        stands = f"the checkpoint at {now:,} samples stands" if now >= 0 else "there is no checkpoint"
        if self._requests > 1:
            return f"ended at once when asked again; {stands}"
        why = problem or "its ranks ended"
        return f"asked to stop: {why}; {stands}" if now > before else f"asked to stop, but not saved: {why}"

    def _run_attempt(self, attempt: str) -> tuple[str, int]:
        """Start the ranks once and see them end: why, and the status of the first that ended badly."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a rank here inherits that, until it can save
        ranks = self._start(attempt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        given_up = False
        while (problem := ranks.poll()) is None:
            if self._requests:
                ranks.signal(signal.SIGKILL if self._requests > 1 else self._number)
            if self.job.launcher and not is_alive(self.job.launcher):
                ranks.signal(signal.SIGTERM)
                self._requests = max(1, self._requests)
            if time.monotonic() - self._stop_sent_at > STOP_REPEAT_S and self._limits.should_stop():
                self._stop_sent_at = time.monotonic()
                ranks.signal(signal.SIGUSR2)
            if not given_up and self._limits.is_over():
                given_up = True
                log(
                    "The time limit has nearly come and the ranks have not saved: what was done since the "
                    "newest checkpoint is lost."
                )
                self.job.log_event(
                    event="end", attempt=attempt, status=None, cause=OUT_OF_TIME, samples=self.job.newest_checkpoint()
                )
                self._is_requeued = self._try_requeue()
                ranks.signal(signal.SIGKILL)
            time.sleep(RANKS_POLL_S)
        with suppress(OSError):
            (self.job.logs / f"rendezvous-{attempt}").unlink(missing_ok=True)  # of ranks that never met
        return OUT_OF_TIME if given_up else problem, ranks.code

    def _try_requeue(self) -> bool:
        """Back to the queue, unless the job has been there too often since its newest checkpoint."""
        if not self._requeue or self._limits.is_cancelled():
            return False
        if (starts := len(self._starts_without_checkpoint())) > self.job.requeues:
            log(
                f"{starts} starts of this job brought no new checkpoint: it does not go back to the queue "
                f"(requeues {self.job.requeues})."
            )
            return False
        return self._requeue()

    def _starts_without_checkpoint(self) -> set[str]:
        """Starts of this job, by SLURM or by us, with the newest checkpoint that there is now; of this submission."""
        now, newest_restart = self.job.newest_checkpoint(), -1
        starts: set[str] = set()
        name, _, number = self._ident.rpartition(".")
        for line in self.job.attempts():
            if line["event"] == "begin" and line["time"] >= self.job.submitted:
                start = line["attempt"].rpartition(".")[0]
                starts = starts | {start} if line["samples"] == now else set()
                restart = start.removeprefix(f"{name}.") if start.startswith(f"{name}.") else ""
                newest_restart = max(newest_restart, int(restart)) if restart.isdecimal() else newest_restart
        if not (self._requeue and name):
            return starts
        # those after the newest one that could be logged: a full disk kept them from it
        return starts | {f"{name}.{n}" for n in range(newest_restart + 1, int(number))}

    def _outcome(self, attempt: str, code: int) -> int | None:
        """The exit status that the ranks wrote down; None if they could not. Where a full disk kept them from it, their
        own."""
        try:
            outcome = json.loads((self.job.launch_dir / "outcome.json").read_text())
        except (OSError, ValueError):
            outcome = None
        if isinstance(outcome, dict) and outcome.get("attempt") == attempt and isinstance(outcome.get("status"), int):
            return int(outcome["status"])
        return EXIT_STOPPED if code == EXIT_STOPPED else None

    def _on_stop_signal(self, number: int, _: object) -> None:
        if self._requeue and number in QUEUE_SIGNALS:  # the ranks have it as well; they stop, and the job goes on
            return
        if not self._requests or ends_at_once(number) and time.monotonic() - self._requested_at > ECHO_S:
            self._requests, self._requested_at, self._number = self._requests + 1, time.monotonic(), number


def log(sentence: str) -> None:
    """To the job's log."""
    print(sentence, file=sys.stderr, flush=True)


def control_local(run_dir: str, visible: str | None) -> int:
    """What submitit's local executor runs: the ranks of a run on this machine. Returns the exit status.

    visible: CUDA_VISIBLE_DEVICES as the user gave it; submitit hides the GPUs it was not told of.
    """
    console.install()
    try:
        job = Job.of(run_dir)
    except UserError as error:
        return print_error(error)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (job.code, os.environ.get("PYTHONPATH"))))
    num_ranks = job.ranks_per_node
    ident = f"{os.environ['SUBMITIT_LOCAL_JOB_ID']}.{time.time():.0f}"  # process numbers come again
    return Control(
        job,
        lambda attempt: LocalRanks(job, attempt, num_ranks),
        ident=ident,
        ranks=num_ranks,
        nodes=[os.uname().nodename],
    ).run()
