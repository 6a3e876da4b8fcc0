"""Loader processes: whatever befalls them, every row is there, once, and right."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seer_scale.data.loading import pool as module
from seer_scale.data.loading.pool import iterate_batches
from seer_scale.errors import DataError
from tests.counting_task import ROWS, Numbers, Unpicklable, die, hang
from tests.problems import refused
from tests.processes import descendants, families, workers


def copied(batch):
    return [a.copy() for a in batch[0]], batch[1]


def taken(batches):
    return list(map(copied, batches))


def check(got, num, missing=()):
    assert len(got) == num
    for key, ((pixels, items), told) in enumerate(got):
        expected = [None if 100 * key + r in missing else 100 * key + r for r in range(ROWS)]
        assert told == expected
        for r, item in enumerate(expected):
            if item is not None:
                assert items[r] == item and (pixels[:, r] == item % 251).all()


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_all_rows_in_order(tmp_path, workers):
    got = taken(iterate_batches(Numbers(tmp_path), range(12), workers=workers, prefetch=2))
    check(got, 12)
    assert not taken(iterate_batches(Numbers(tmp_path), range(0), workers=workers))


@pytest.mark.parametrize(
    "what,options,said",
    [
        (die, {}, "was ended by SIGKILL"),
        (hang, {"timeout_s": 0.5}, "for 0.5 s"),
        (lambda: os._exit(3), {}, "ended with status 3"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_replaced(tmp_path, capfd, what, options, said):
    trouble = dict.fromkeys([0, 304, 306, 501], what)
    check(taken(iterate_batches(Numbers(tmp_path, trouble), range(8), workers=2, prefetch=3, **options)), 8)
    told = capfd.readouterr().err
    assert told.count("another takes its place") == 4 and all(
        f"{said} at number {i};" in told or f"{said} at number {i}" in told for i in trouble
    )


def test_killed_at_random_by_somebody_else(tmp_path):
    """Any worker, at any moment, several at once: the same batches."""
    draw, job = np.random.default_rng(0), Numbers(tmp_path)
    batches, got = iterate_batches(job, range(40), workers=3, prefetch=2), []
    for batch in batches:
        got.append(copied(batch))
        if len(got) % 4 == 0:
            for c in draw.permutation(workers(os.getpid()))[: draw.integers(1, 3)]:
                os.kill(int(c), signal.SIGKILL)
    check(got, 40)


def test_an_item_that_ends_its_worker_twice_is_refused(tmp_path, capfd):
    check(taken(iterate_batches(Numbers(tmp_path, {203: die}, times=99), range(6), workers=2)), 6, missing={203})
    assert capfd.readouterr().err.count("another takes its place") == module.SUSPECT_TWICE


def test_any_number_of_such_items_in_one_batch(tmp_path):
    fatal = {200, 201, 202, 203, 204, 205, 303}
    check(
        taken(iterate_batches(Numbers(tmp_path, dict.fromkeys(fatal, die), times=99), range(5), workers=1)),
        5,
        missing=fatal,
    )


def test_a_fork_of_ours_keeps_no_host_alive(tmp_path):
    batches = iterate_batches(Numbers(tmp_path), range(100), workers=1)
    next(batches)
    [host] = {host for _, host, _ in families(os.getpid())}
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True)
    fork.start()
    batches.close()
    until = time.monotonic() + 5
    while host in descendants(os.getpid()):
        assert time.monotonic() < until
        time.sleep(0.01)
    fork.kill()


def test_workers_that_cannot_live_end_the_run(tmp_path):
    class Dying(Numbers):
        def fill(self, key, row, out, tracker):
            tracker.begin(int(time.monotonic_ns()))  # never the same
            die()

    with refused("Loader process 0") as error:
        taken(iterate_batches(Dying(tmp_path), range(3), workers=1))
    assert "lower data.workers or data.prefetch" in error.value.problems[0].nearest


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_in_their_turn(tmp_path, workers):
    def refuse():
        raise DataError("not this one")

    got = []
    with pytest.raises(DataError, match="not this one"):
        for batch in iterate_batches(Numbers(tmp_path, {402: refuse}), range(8), workers=workers):
            got.append(copied(batch))
    check(got, 4)

    def bug():
        raise KeyError("a bug")

    with pytest.raises((RuntimeError, KeyError), match="a bug"):
        taken(iterate_batches(Numbers(tmp_path, {406: bug}), range(8), workers=workers))


@pytest.mark.parametrize("which", ["the host", "the server", "both"])
def test_what_holds_the_workers_may_be_killed_too(tmp_path, capfd, which):
    batches, got = iterate_batches(Numbers(tmp_path), range(30), workers=2, prefetch=2), []
    for batch in batches:
        got.append(copied(batch))
        if len(got) in (7, 19) and (loaders := families(os.getpid())):  # none are below us once their server is dead
            _, host, server = loaders[-1]  # the newest: those of another test may be on their way out
            if which != "the host":
                os.kill(server, signal.SIGKILL)
            if which != "the server":
                os.kill(host, signal.SIGKILL)
    check(got, 30)
    check(taken(iterate_batches(Numbers(tmp_path), range(3), workers=2)), 3)


def test_no_process_outlives_the_iterator(tmp_path):
    batches = iterate_batches(Numbers(tmp_path), range(100), workers=3)
    next(batches)
    assert len(workers(os.getpid())) == 3
    batches.close()
    until = time.monotonic() + 5
    while workers(os.getpid()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_workers_are_small(tmp_path):
    """They have not what this process has grown to, torch least of all."""
    ballast = np.ones(1 << 26)
    batches = iterate_batches(Numbers(tmp_path), range(100), workers=2)
    next(batches)
    for pid in workers(os.getpid()):
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 150_000
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    batches.close()
    del ballast


def test_a_job_that_cannot_be_had_is_told(tmp_path):
    job = Numbers(tmp_path)
    job.odd = Unpicklable()
    with pytest.raises(RuntimeError, match="(?s)cannot be started.*no such thing here"):
        taken(iterate_batches(job, range(3), workers=1))


def test_what_lies_in_the_current_folder_stands_in_for_nothing(tmp_path, monkeypatch):
    """A random.py there, as homework has; and one that really comes first is named, not the memory."""
    (tmp_path / "random.py").write_text("raise ImportError('homework')")
    monkeypatch.chdir(tmp_path)
    for first in ("", str(tmp_path)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_server", module._Server())
            patch.syspath_prepend(first) if first else patch.setattr("sys.path", ["", *sys.path])
            check(taken(iterate_batches(Numbers(tmp_path), range(4), workers=2)), 4)
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (tmp_path / "random.py").rename(shadow / "random.py")
    monkeypatch.setattr(module, "_server", module._Server())
    monkeypatch.setattr("sys.path", [str(shadow), *sys.path])
    for _ in range(2):
        with refused("The server of the loader processes") as error:
            taken(iterate_batches(Numbers(tmp_path), range(4), workers=2))
        assert f"ImportError: homework ({shadow}/random.py, line 1)" in error.value.problems[0].rule


def test_a_server_whose_process_has_gone_says_nothing():
    """As after kill -9 in the first seconds: there is nobody left whom a traceback would help."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for program in (
        module.SERVER,
        "import sys; sys.modules['seer_scale.data.loading.worker'] = None\n" + module.SERVER,
    ):
        ours, theirs = socket.socketpair()
        ours.close()
        words = [sys.executable, "-P", "-c", program.format(path=sys.path, fd=theirs.fileno(), parent=gone.pid)]
        with theirs:
            said = subprocess.run(words, pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=60)
        assert not said.stdout and not said.stderr
