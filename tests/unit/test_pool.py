"""Loader processes: whatever befalls them, every row is there, once, and right."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from seer_scale.data import pool as module
from seer_scale.data.pool import stream
from seer_scale.errors import DataError

ROWS = 7


class Numbers:
    """Row r of batch k holds 100 k + r; `trouble` maps an item to what its worker does there, the first `times` times."""

    def __init__(self, folder: Path, trouble=None, times=1, rows=ROWS):
        self.folder, self.trouble, self.times, self.num_rows = folder, trouble or {}, times, rows

    def buffers(self):
        return [((2, ROWS, 3), np.uint8), ((ROWS,), np.int64)]

    def rows(self, key):
        return self.num_rows

    def fill(self, key, row, out, guard):
        item = 100 * key + row
        out[1][row] = -1  # half written
        try:
            guard.enter(item)
        except DataError:
            return None
        if what := self.trouble.get(item):
            mark = self.folder / f"{item}-{time.monotonic_ns()}"
            if len(list(self.folder.glob(f"{item}-*"))) < self.times:
                mark.touch()
                what()
        out[0][:, row], out[1][row] = item % 251, item
        return item

    def describe(self, item):
        return f"number {item}"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    signal.signal(signal.SIGALRM, lambda *_: None)
    while True:
        time.sleep(1)


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
    got = list(stream(Numbers(tmp_path), range(12), workers=workers, prefetch=2))
    check(got, 12)
    assert not list(stream(Numbers(tmp_path), range(0), workers=workers))


def test_what_is_given_out_stays_as_it_is(tmp_path):
    batches = stream(Numbers(tmp_path), range(8), workers=2, prefetch=1)
    first = next(batches)
    kept = first[0][1].clone()
    list(batches)
    assert (first[0][1] == kept).all()


@pytest.mark.parametrize("what,options,said", [(die, {}, "was ended by SIGKILL"), (hang, {"timeout_s": 0.5}, "for 0.5 s"), (lambda: os._exit(3), {}, "ended with status 3")])
def test_a_worker_that_dies_or_hangs_is_replaced(tmp_path, capfd, what, options, said):
    trouble = dict.fromkeys([0, 304, 306, 501], what)
    check(list(stream(Numbers(tmp_path, trouble), range(8), workers=2, prefetch=3, **options)), 8)
    told = capfd.readouterr().err
    assert told.count("another takes its place") == 4 and all(f"{said} at number {i};" in told or f"{said} at number {i}" in told for i in trouble)


def test_killed_at_random_by_somebody_else(tmp_path):
    """Any worker, at any moment, several at once: the same batches."""
    draw, job = np.random.default_rng(0), Numbers(tmp_path)
    batches, got = stream(job, range(40), workers=3, prefetch=2), []
    for batch in batches:
        got.append(batch)
        if len(got) % 4 == 0:
            children = [int(c) for c in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
            loaders = [c for c in children if b"pytest" in Path(f"/proc/{c}/cmdline").read_bytes()][-3:]
            for c in draw.permutation(loaders)[: draw.integers(1, 3)]:
                os.kill(int(c), signal.SIGKILL)
    check(got, 40)


def test_an_item_that_ends_its_worker_twice_is_refused(tmp_path, capfd):
    check(list(stream(Numbers(tmp_path, {203: die}, times=99), range(6), workers=2)), 6, missing={203})
    assert capfd.readouterr().err.count("another takes its place") == module.SUSPECT_TWICE


def test_workers_that_cannot_live_end_the_run(tmp_path):
    class Dying(Numbers):
        def fill(self, key, row, out, guard):
            guard.enter(int(time.monotonic_ns()))  # never the same
            die()

    with pytest.raises(DataError, match="so did 5 before it .* lower data.workers or data.prefetch"):
        list(stream(Dying(tmp_path), range(3), workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_in_their_turn(tmp_path, workers):
    def refuse():
        raise DataError("not this one")

    got = []
    with pytest.raises(DataError, match="not this one"):
        for batch in stream(Numbers(tmp_path, {402: refuse}), range(8), workers=workers):
            got.append(batch)
    check(got, 4)

    def bug():
        raise KeyError("a bug")

    with pytest.raises((RuntimeError, KeyError), match="a bug"):
        list(stream(Numbers(tmp_path, {406: bug}), range(8), workers=workers))


def test_no_process_outlives_the_iterator(tmp_path):
    def children():
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before, batches = children(), stream(Numbers(tmp_path), range(100), workers=3)
    next(batches)
    assert len(children() - before) == 3
    batches.close()
    assert not children() - before
