"""One writer for everything that is printed: it does not fail, and what it writes is safe for a terminal."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from seer_scale import console
from seer_scale.console import Console, Record, install

PIPE, TERMINAL, FULL = errno.EPIPE, errno.EIO, errno.ENOSPC


def broken(problem: int) -> int:
    """A descriptor on which every write fails so."""
    if problem == FULL:
        return os.open("/dev/full", os.O_WRONLY)
    ours, theirs = os.pipe() if problem == PIPE else os.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("problem", [PIPE, TERMINAL, FULL])
def test_what_cannot_be_written_is_lost_and_no_more(problem):
    with open(broken(problem), "w") as file:
        stream = Console(file)
        print("a line", file=stream, flush=True)
        print("part of a line", end="", file=stream, flush=True)
        assert stream.problem.errno == problem and stream.writable() and stream.fileno() == file.fileno()


@pytest.mark.parametrize("make, opens", [(os.pipe, True), (os.pipe, False), (os.openpty, True)])
def test_lines_that_nobody_reads_are_lost_and_counted(make, opens, monkeypatch):
    """They wait once; who shares the descriptor finds it as it was. opens: whether it can be opened anew."""
    ours, theirs = make()
    if not opens:
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with open(theirs, "w") as file:
        stream, line = Console(file), "x" * 1000
        stream.wait_s = 0.1
        for _ in range(200):
            stream.write(f"{line}\n")
        assert stream.problem.errno == errno.EAGAIN and os.get_blocking(theirs)
        begun = time.monotonic()
        for _ in range(10):
            stream.write("more\n")
        assert time.monotonic() - begun < 0.1
        os.set_blocking(ours, False)
        taken = read_all(ours)
        stream.write("end\n")
        taken = (taken + read_all(ours)).replace("\r", "")
    whole = taken.count(f"{line}\n")
    found = re.search(r"\n\[(\d+) lines were not printed: nobody read them\.\]\nend\n$", taken)
    assert 0 < whole < 200 and whole + int(found[1]) in (210, 211), taken[
        -200:
    ]  # its end alone may be what was cut off


def read_all(fd: int) -> str:
    found = b""
    with suppress(BlockingIOError):
        while True:
            found += os.read(fd, 65536)
    return found.decode()


def test_what_is_asked_for_waits_for_its_reader():
    """As in a pager that is scrolled now and then."""
    ours, theirs = os.pipe()
    with open(theirs, "w") as file, open(ours) as reader:
        stream = Console(file)
        stream.wait_s = None
        thread = threading.Thread(target=lambda: (stream.write("line\n" * 40_000), file.close()), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and reader.read() == "line\n" * 40_000


def test_bytes_go_the_same_way(tmp_path, monkeypatch):
    with open(broken(PIPE), "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "__stdout__", file)
        install()
        assert sys.stdout.buffer.write(b"a line\n") == 7
        print("a line", file=sys.__stdout__, flush=True)
        assert sys.stdout.problem.errno == PIPE
    with open(tmp_path / "log", "w") as file:
        out = Console(file, "[rank 3] ").buffer
        out.write("f\xfc".encode()[:2])
        out.write("\xfc\x1b[2J\n".encode()[1:])
        out.flush()
    assert (tmp_path / "log").read_text() == "[rank 3] f\xfc\\x1b[2J\n"


def test_no_stream_at_all():
    stream = Console(None)
    print("a line", file=stream, flush=True)
    assert not stream.isatty() and stream.encoding and stream.problem is None
    closed = io.StringIO()
    closed.close()
    print("a line", file=Console(closed), flush=True)
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()


@pytest.mark.parametrize(
    "text, ascii, utf8",
    [
        ("f\xfc\u0394", b"f\\xfc\\u0394", "f\xfc\u0394".encode()),
        ("a\udce9.jpg", b"a\\udce9.jpg", b"a\\udce9.jpg"),
        ("\x1b[2J\x1b]0;title\x07\x9b1m", b"\\x1b[2J\\x1b]0;title\\x07\\x9b1m", b"\\x1b[2J\\x1b]0;title\\x07\\x9b1m"),
        ("\x1b[1;31mred\x1b[0m\ttab\rback", b"\x1b[1;31mred\x1b[0m\ttab\rback", b"\x1b[1;31mred\x1b[0m\ttab\rback"),
    ],
)
def test_letters_and_escapes(tmp_path, text, ascii, utf8):  # noqa: A002
    for encoding, expected in (("ascii", ascii), ("utf-8", utf8)):
        with open(tmp_path / encoding, "w", encoding=encoding) as file:
            print(text, file=Console(file))
        assert (tmp_path / encoding).read_bytes() == expected + b"\n"
    with open(tmp_path / "raw", "w", encoding="utf-8") as file:
        print("\x1b[2K", end="", file=Console(file, raw=True), flush=True)
    assert (tmp_path / "raw").read_bytes() == b"\x1b[2K"


def test_lines_are_labelled_and_whole(tmp_path):
    with open(tmp_path / "log", "w") as file:
        stream = Console(file, "[rank 3] ", drop="[rank3]: ")
        print("one", "two", file=stream)
        stream.write("[rank3]: Traceback\n[rank3]:   x\nnot yet")
        stream.flush()
        assert (tmp_path / "log").read_text() == "[rank 3] one two\n[rank 3] Traceback\n[rank 3]   x\n"


PROGRAM = """
import os, sys, warnings
from seer_scale import console
console.install()
opened = os.open({record!r}, os.O_RDWR | os.O_CREAT)
print("to stdout", flush=True)
warnings.warn("a warning")
print("half a line", end="")
os.write(opened, f"{{opened}}".encode())
if {fails}:
    raise ArithmeticError
sys.exit(75)
"""


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", ">/dev/full 2>&1", "2>&1 | true"])
def test_the_status_of_a_process_is_its_own(tmp_path, redirect):
    """Not 120, Python's own for what it cannot flush; and no file takes the place of a closed stream."""
    record = tmp_path / "record"
    for fails, status in ((False, 75), (True, 1)):
        program = PROGRAM.format(record=str(record), fails=fails)
        command = f'"$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(
            ["bash", "-c", command, sys.executable, program], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done
        assert int(record.read_text()) > 2
        record.unlink()


def test_what_is_asked_for_and_cannot_be_printed_is_told():
    command = (
        '"$0" -m seer_scale recipes >/dev/full; a=$?; "$0" -m seer_scale recipes | head -c 1; exit $((a * 10 + '
        "${PIPESTATUS[0]}))"
    )
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 10
        and done.stderr == "What this command prints could not be written (No space left on device).\n"
    )


def test_what_is_said_is_kept(tmp_path, monkeypatch):
    """In whole lines, without colours, whoever says it, from before the file was named; whatever becomes of the
    disk."""
    monkeypatch.setattr(console, "record", Record())
    out, bar = Console(io.StringIO()), Console(io.StringIO(), raw=True)
    print("early", file=out)
    print("a bar", file=bar)
    place = tmp_path / "logs" / "console-0.txt"
    console.record.keep(place)
    print("in ", end="", file=out, flush=True)
    print("\x1b[1mtwo\x1b[0m\x07\nlines \udce9", file=out)
    console.write_error("stacks\n")
    kept = place.read_text().splitlines()
    assert [line[20:] for line in kept] == ["early", "in two\\x07", "lines \\udce9", "stacks"]
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in kept)
    for lost in (Path("/dev/full"), tmp_path / "no" / "folder"):
        console.record.keep(lost)
        (tmp_path / "no").exists() and shutil.rmtree(tmp_path / "no")
        print("lost", file=out)
    assert out._to.getvalue().endswith("lost\nlost\n") and not (tmp_path / "no").exists()


def test_what_is_said_before_there_is_a_file_is_bounded(tmp_path):
    """A command without a run, or a wait for ranks that goes on for days, keeps no more than the last of it."""
    kept = Record()
    for n in range(console.EARLY_LINES + 5):
        kept.add(f"{n}\n")
    kept.keep(tmp_path / "console-0.txt")
    kept.add("last\n")
    lines = [line[20:] for line in (tmp_path / "console-0.txt").read_text().splitlines()]
    assert lines == [*map(str, range(5, console.EARLY_LINES + 5)), "last"]
