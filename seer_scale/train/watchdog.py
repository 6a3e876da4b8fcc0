"""A process that makes no progress writes where its threads are, and ends, so that the job can start again."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from seer_scale import console
from seer_scale.errors import EXIT_HUNG

GRACE_S = 15.0
"""Seconds, at most, between the stacks and the end, in which the other ranks, who wait for this one, write theirs."""


class Watchdog:
    """Wants a `beat` within every `limit_s` seconds; 0 = never barks. A context; one a process.

    A thread writes the stacks of all threads to stderr, then ends the process. Where no thread gets its turn any more
    (one holds Python's lock for ever), faulthandler writes them and the kernel ends the process, a little later: SIGALRM,
    which nothing else here uses.
    """

    def __init__(self, limit_s: float, what: str = ""):
        self._limit_s, self._what, self._patience_s, self._grace_s = limit_s, what, limit_s, min(GRACE_S, limit_s)
        self._last, self._over = time.monotonic(), threading.Event()
        self._armed, self._armed_for = float("-inf"), 0.0

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Progress was made."""
        self._last = time.monotonic()
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, self._patience_s + 2 * self._grace_s)
            if time.monotonic() - self._armed > min(1.0, self._limit_s / 4) or self._patience_s != self._armed_for:  # it starts a thread
                self._armed, self._armed_for = time.monotonic(), self._patience_s
                faulthandler.dump_traceback_later(self._patience_s + 1.5 * self._grace_s, file=2)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """For what takes longer than an update: a compilation, a disk."""
        before, self._patience_s = self._patience_s, max(self._patience_s, seconds)
        self.beat()
        try:
            yield
        finally:
            self._patience_s = before
            self.beat()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            if time.monotonic() - self._last > self._patience_s:
                self._bark()
                if not self._over.wait(self._grace_s):
                    os._exit(EXIT_HUNG)

    def _bark(self) -> None:
        """One write, so that the ranks' texts stay apart."""
        faulthandler.cancel_dump_traceback_later()
        names = {t.ident: t.name for t in threading.enumerate()}
        lines = [f"{self._what}no progress for {time.monotonic() - self._last:.0f} s (run.hang_s {self._limit_s:g}) in process {os.getpid()} on {socket.gethostname()}:"]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines += [f"thread {names.get(ident, ident)}:", *"".join(traceback.format_stack(frame)).splitlines()]
        console.write_error("".join(f"{self._what}{line}\n" if i else f"{line}\n" for i, line in enumerate(lines)))
