"""The console: what anybody prints goes through one writer. A console that is lost costs lines, never the run or its status.

A terminal may be closed (EIO), the other end of a pipe gone (EPIPE), a disk full (ENOSPC), a stream closed before the start
or never there. `install` puts a `Console` in the place of sys.stdout and sys.stderr, so that print, warnings, tracebacks,
logging, rich and whoever else writes there cannot fail. It writes to the file descriptor itself: nothing is left in a buffer
for the interpreter's exit to fail on (status 120).
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
import threading
from contextlib import suppress
from typing import Any, TextIO

UNSAFE = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
"""What would move a terminal's cursor or worse; colours, tabs and line ends are let through."""
FULL_S = 1.0
"""Seconds that a line may wait where somebody has made the descriptor non-blocking."""


class Console(io.TextIOBase):
    """A text stream that never raises for its destination's sake. Whole lines are written by one call.

    to: what it stands in for; None: a stream that was closed when the process began. label: what each line begins with;
    then what has no line end waits for it. drop: a beginning of lines that goes. raw: for who draws on a terminal itself.
    """

    def __init__(self, to: TextIO | None, label: str = "", *, drop: str = "", raw: bool = False):
        self._to, self._label, self._drop, self._raw, self._line = to, label, drop, raw, ""
        self.problem: OSError | None = None
        """The first reason for which something was lost."""
        self._fd, self._turn = -1, threading.RLock()  # a signal's handler may print in the middle of a print
        with suppress(AttributeError, OSError, ValueError):
            self._fd = to.fileno()
        if self._fd >= 0:
            with suppress(OSError, ValueError):
                to.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._to, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def write(self, text: str) -> int:
        with self._turn:
            self._line += text
            whole, end, self._line = self._line.rpartition("\n")
            if end:
                self._send("".join(f"{self._label}{line.removeprefix(self._drop)}\n" for line in whole.split("\n")))
        return len(text)

    def flush(self) -> None:
        with self._turn:
            if self._line and not self._label:
                text, self._line = self._line, ""
                self._send(text)

    def isatty(self) -> bool:
        try:
            return self._to is not None and self._to.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._fd < 0:
            raise io.UnsupportedOperation("this stream has no file")
        return self._fd

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._to, name)

    def _send(self, text: str) -> None:
        if self._to is None:
            return
        if not self._raw:
            text = UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
        try:
            data = text.encode(self.encoding, self.errors)
            if self._fd < 0:
                self._to.write(data.decode(self.encoding))
                self._to.flush()
                return
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:
                    if not select.select([], [self._fd], [], FULL_S)[1]:
                        raise
        except (OSError, ValueError) as error:
            self.problem = self.problem or (error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))


def install(label: str = "", drop: str = "") -> None:
    """From now on nothing that is printed in this process fails. label, drop: of each line (see Console)."""
    _fill_standard_descriptors()
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Console):
            setattr(sys, name, Console(stream, label, drop=drop))


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 was closed, the next file to be opened would take its place, and get what libraries print."""
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)


def lost(stream: TextIO | None) -> OSError | None:
    """Why something printed to sys.stdout or sys.stderr did not arrive, if that is so."""
    return getattr(stream, "problem", None)


def write_error(text: str) -> None:
    """To stderr's descriptor by one call, without a lock: for who cannot wait for other threads."""
    with suppress(OSError):
        os.write(2, text.encode("utf-8", "backslashreplace"))
