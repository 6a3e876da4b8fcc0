"""A process that makes no progress writes where its threads are, and ends, so that the job can start again."""

from __future__ import annotations

import ctypes
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

DUMP_GRACE_S = 15.0
"""Seconds, at most, between the stacks and the end, in which the other ranks, who wait for this one, write theirs."""


class Watchdog:
    """Wants a `beat` within every `limit_s` seconds; 0 = never barks. A context; one a process.

    A thread writes the stacks of all threads to stderr, then ends the process. Where no thread gets its turn any more
    (one holds Python's lock for ever), faulthandler writes them and the kernel ends the process, a little later:
    SIGALRM, which nothing else here uses. Time in which the whole process was stopped (SIGSTOP, Ctrl-Z, a suspended
    job) does not count: the thread sees that its own clock stood still, and the first SIGALRM is passed over so that it
    may."""

    def __init__(self, limit_s: float, what: str = ""):
        self._limit_s, self._what, self._patience_s, self._grace_s = limit_s, what, limit_s, min(DUMP_GRACE_S, limit_s)
        self._last, self._over = time.monotonic(), threading.Event()
        self._armed, self._armed_for = float("-inf"), 0.0

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            _pass_over_one(signal.SIGALRM)
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handler
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Progress was made."""
        self._last = time.monotonic()
        self._arm()

    def _arm(self) -> None:
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, self._patience_s + 2 * self._grace_s, self._grace_s)
            if (
                time.monotonic() - self._armed > min(1.0, self._limit_s / 4) or self._patience_s != self._armed_for
            ):  # it starts a thread
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
        tick_s, looked_at = min(1.0, self._limit_s / 4), time.monotonic()
        while not self._over.wait(tick_s):
            late_s, looked_at = time.monotonic() - looked_at - tick_s, time.monotonic()
            if late_s > max(tick_s, self._grace_s / 2):
                if late_s > self._limit_s:
                    console.write_error(
                        f"{self._what}no thread of this process had its turn for {late_s:.0f} s: it was "
                        "stopped, and goes on.\n"
                    )
                self._last = min(looked_at, self._last + late_s)
                _pass_over_one(signal.SIGALRM)
                self._arm()
            if time.monotonic() - self._last > self._patience_s:
                until = time.monotonic() + self._grace_s
                self._dump_and_exit()
                if not self._over.wait(max(0.0, until - time.monotonic())):
                    os._exit(EXIT_HUNG)

    def _dump_and_exit(self) -> None:
        """One write, so that the ranks' texts stay apart."""
        faulthandler.cancel_dump_traceback_later()
        names = {t.ident: t.name for t in threading.enumerate()}
        lines = [
            (
                f"{self._what}no progress for {time.monotonic() - self._last:.0f} s "
                f"(run.hang_timeout_s {self._limit_s:g}) in process {os.getpid()} on {socket.gethostname()}:"
            )
        ]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines += [f"thread {names.get(ident, ident)}:", *"".join(traceback.format_stack(frame)).splitlines()]
        text = "".join(f"{self._what}{line}\n" if i else f"{line}\n" for i, line in enumerate(lines))
        console.write_error(text, min(console.FULL_S, self._grace_s / 2))


def _pass_over_one(number: int) -> None:
    """The next signal of this number does nothing, even where no thread can run Python; the one after it ends the
    process.

    System V's signal() resets the handler to the default as it is called, and abs() is one that does nothing. Where
    libc has no such function the first one ends the process.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sysv_signal"):
        libc.sysv_signal(ctypes.c_int(number), ctypes.cast(libc.abs, ctypes.c_void_p))
