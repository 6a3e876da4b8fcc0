"""The console: what anybody prints goes through one writer. A console that is lost costs lines, never the run or its
status.

A terminal may be closed (EIO), the other end of a pipe gone (EPIPE), a disk full (ENOSPC), a stream closed before the
start or never there; and whoever reads may take nothing (Ctrl-S, a suspended tee, a dead connection). `install` puts a
`Console` in the place of sys.stdout and sys.stderr, so that print, warnings, tracebacks, logging, rich and whoever else
writes there cannot fail, nor wait for long. It writes to the file descriptor itself: nothing is left in a buffer for
the interpreter's exit to fail on (status 120). What was said can be kept in a file, too, for those whose console is
lost (`record`)."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
import stat
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

UNSAFE = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
"""What would move a terminal's cursor or worse; colours, tabs and line ends are let through."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FULL_S = 1.0
"""Seconds that lines wait for a reader; after that they are lost until some are taken again."""
AGAIN_S = 0.02
"""Seconds until the next try where a descriptor says that it takes something, but does not."""


EARLY_LINES = 200
"""What was said last before there was a file to keep it in."""


class Record:
    """What this process has said, by the clock. Whoever adds to it waits for nothing and gets no error: a full disk
    costs lines. Until a file is named, the last EARLY_LINES of it are held."""

    def __init__(self) -> None:
        self._early: deque[str] = deque(maxlen=EARLY_LINES)
        self._path: Path | None = None
        self._fd = -1

    def keep(self, path: Path) -> None:
        """In the file `path` from now on, which appears with the first line."""
        if self._fd >= 0:
            os.close(self._fd)
        self._path, self._fd = path, -1
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, "".join(self._early))

    def add(self, text: str) -> None:
        """Of whole lines."""
        now = time.strftime("%F %T")
        text = "".join(f"{now} {line}\n" for line in _safe(COLOUR.sub("", text)).removesuffix("\n").split("\n"))
        if self._path is None:
            self._early.append(text)
        else:
            self._write(self._path, text)

    def _write(self, path: Path, text: str) -> None:
        with suppress(OSError):
            if self._fd < 0 and text:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if text:
                os.write(self._fd, text.encode("utf-8", "backslashreplace"))


class Console(io.TextIOBase):
    """A text stream that never raises for its destination's sake. Whole lines are written by one call.

    to: what it stands in for; None: a stream that was closed when the process began. label: what each line begins with;
    then what has no line end waits for it. drop: a beginning of lines that goes. raw: for who draws on a terminal
    itself."""

    def __init__(self, to: TextIO | None, label: str = "", *, drop: str = "", raw: bool = False):
        self._to, self._label, self._drop, self._raw, self._line, self._begun = to, label, drop, raw, "", ""
        self.problem: OSError | None = None
        """The first reason for which something was lost."""
        self.wait_s: float | None = FULL_S
        """None: waits for ever."""
        self._num_lost, self._is_cut = 0, False
        self._fd, self._turn = -1, threading.RLock()  # a signal's handler may print in the middle of a print
        if to is None:
            return
        with suppress(AttributeError, OSError, ValueError):
            self._fd = to.fileno()
        if self._fd >= 0:
            with suppress(OSError, ValueError):
                to.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed lets it be set
        return getattr(self._to, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]  # here, too
        return "backslashreplace"

    def write(self, text: str) -> int:
        with self._turn:
            self._line += text
            whole, end, self._line = self._line.rpartition("\n")
            if end:
                self._send("".join(f"{self._label}{line.removeprefix(self._drop)}\n" for line in whole.split("\n")))
                if not self._raw:
                    record.add(self._begun + whole)
                self._begun = ""
        return len(text)

    def flush(self) -> None:
        with self._turn:
            if self._line and not self._label:
                text, self._line = self._line, ""
                self._begun += text
                self._send(text)

    @property
    def buffer(self) -> io.BufferedIOBase:
        """For who writes bytes: they go the same way."""
        return _Bytes(self)

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
            text = _safe(text)
        try:
            data = text.encode(self.encoding, self.errors)
            if self._fd < 0:
                self._to.write(data.decode(self.encoding))
                self._to.flush()
                return
            if self._num_lost:
                many = "Some" if self._raw else self._num_lost  # a bar is drawn again and again
                note = f"{chr(10) * self._is_cut}{self._label}[{many} lines were not printed: nobody read them.]\n"
                if _put(self._fd, note.encode(self.encoding, self.errors), 0.0):
                    self._num_lost += max(1, data.count(b"\n"))
                    return
                self._num_lost, self._is_cut = 0, False
            left = _put(self._fd, data, self.wait_s)
            if left:
                self._num_lost = max(1, left.count(b"\n"))
                self._is_cut = data[-len(left) - 1 : -len(left)] not in (b"", b"\n")
                raise BlockingIOError(errno.EAGAIN, "nobody reads it")
        except (OSError, ValueError) as error:
            self.problem = self.problem or (error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))


class _Bytes(io.BufferedIOBase):
    """What a console is to those who write bytes."""

    def __init__(self, console: Console):
        self._console, self._decoder = console, codecs.getincrementaldecoder(console.encoding)("backslashreplace")

    def write(self, data: Any) -> int:
        self._console.write(self._decoder.decode(bytes(data)))
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        self._console.flush()

    def fileno(self) -> int:
        return self._console.fileno()

    def isatty(self) -> bool:
        return self._console.isatty()

    def writable(self) -> bool:
        return True


def _safe(text: str) -> str:
    return UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


record = Record()
"""Of this process."""


def file_of(run_dir: Path, rank: int) -> Path:
    """Where a rank that no launcher of ours has started keeps what it says."""
    return run_dir / "logs" / f"console-{rank}.txt"


def install(label: str = "", drop: str = "") -> None:
    """From now on nothing that is printed in this process fails. label, drop: of each line (see Console)."""
    global record
    _fill_standard_descriptors()
    record = Record()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Console):
            setattr(sys, name, Console(stream, label, drop=drop))
            if getattr(sys, f"__{name}__") is stream:
                setattr(sys, f"__{name}__", getattr(sys, name))


def wait_for_readers() -> None:
    """From now on printing waits for ever, as of commands whose output is their product, and may be read in a pager."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Console):
            stream.wait_s = None


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


def write_error(text: str, wait_s: float = FULL_S) -> None:
    """To stderr's descriptor, by one call where it takes that, without a lock: for who cannot wait for other
    threads."""
    record.add(text)
    with suppress(OSError):
        _put(2, text.encode("utf-8", "backslashreplace"), wait_s)


def _put(fd: int, data: bytes, wait_s: float | None) -> bytes:
    """Write `data`; returns what was not taken within `wait_s` seconds.

    A pipe or a terminal is opened anew for that: O_NONBLOCK on `fd` itself would be set for all who share it. Where
    that cannot be, writes are of no more than what a pipe takes at once when it takes anything.
    """
    mode, own = os.fstat(fd).st_mode, fd
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        with suppress(OSError):  # a terminal may be somebody else's
            own = os.open(f"/dev/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        most = select.PIPE_BUF if os.get_blocking(own) and not stat.S_ISREG(mode) else len(data)
        until, ready = time.monotonic() + (wait_s or 0.0), select.poll()
        ready.register(own, select.POLLOUT)
        while data and ready.poll(None if wait_s is None else 1000 * max(0.0, until - time.monotonic())):
            try:
                data = data[os.write(own, data[:most]) :]
            except BlockingIOError:
                if wait_s is not None and time.monotonic() > until:
                    break
                time.sleep(AGAIN_S)
        return data
    finally:
        if own != fd:
            os.close(own)
