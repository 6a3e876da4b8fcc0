"""A process without progress tells where it is and ends, whoever holds Python's lock; one with progress is left
alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from seer_scale.errors import EXIT_HUNG

SCRIPT = """
import ctypes, threading, time
from seer_scale.training import watchdog
watchdog.DUMP_GRACE_S = 0.3
def hangs_here(): {body}
with watchdog.Watchdog({limit}, "[rank 3] ") as w:
    for _ in range(12):
        time.sleep(0.1)
        w.beat()
    {run}
print("went on")
"""


def outcome(body: str, limit: float = 0.6, run: str = "hangs_here()") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body, limit=limit, run=run)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("body", ["time.sleep(60)", "threading.Event().wait()"])
def test_stacks_are_written_and_the_process_ends(body):
    done = outcome(body)
    assert done.returncode == EXIT_HUNG, done.stderr
    first, *others = done.stderr.splitlines()
    assert first.startswith("[rank 3] no progress for ") and "(run.hang_timeout_s 0.6) in process " in first
    assert any("hangs_here" in line for line in others) and all(line.startswith("[rank 3] ") for line in others)


def test_also_where_nobody_reads():
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    os.write(theirs, b"x" * 2**20)
    os.set_blocking(theirs, True)
    script = SCRIPT.format(body="time.sleep(60)", limit=0.6, run="hangs_here()")
    assert subprocess.run([sys.executable, "-c", script], stderr=theirs, timeout=60).returncode == EXIT_HUNG
    os.close(ours)
    os.close(theirs)


def test_also_where_a_thread_holds_pythons_lock():
    twice = (
        "lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); lock(mutex); lock(mutex)"
    )
    assert outcome(twice).returncode == -signal.SIGALRM


def test_time_in_which_the_process_was_stopped_does_not_count():
    """For longer than the kernel waits, while no beat comes."""
    body = "[time.sleep(0.1) for _ in range(8)]"  # long enough, after it was stopped, for the thread to have its turn
    script = SCRIPT.format(body=body, limit=1.0, run="print('ready', flush=True)\n    hangs_here()").replace(
        "DUMP_GRACE_S = 0.3", "DUMP_GRACE_S = 1.0"
    )
    stopped = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert stopped.stdout.readline() == "ready\n"
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(4.5)  # longer than the limit and three times the grace
    stopped.send_signal(signal.SIGCONT)
    out, err = stopped.communicate(timeout=60)
    assert (stopped.returncode, out) == (0, "went on\n") and "it was stopped, and goes on." in err, err


@pytest.mark.parametrize(
    "limit, run", [(0.6, "pass"), (0.0, "time.sleep(2)"), (0.6, "\n    with w.patient(30): time.sleep(2)")]
)
def test_progress_patience_and_none(limit, run):
    done = outcome("pass", limit, run)
    assert (done.returncode, done.stdout.strip()) == (0, "went on") and not done.stderr
