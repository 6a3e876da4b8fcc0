"""A job for loader processes whose batches say what they are; it knows no torch, as theirs do not."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from seer_scale.errors import DataError

ROWS = 7


class Numbers:
    """Row r of batch k holds 100 k + r; `trouble` maps an item to what its worker does there, the first `times`
    times."""

    def __init__(self, folder: Path, trouble=None, times=1, rows=ROWS):
        self.folder, self.trouble, self.times, self.num_rows = folder, trouble or {}, times, rows

    def buffers(self):
        return [((2, ROWS, 3), np.uint8), ((ROWS,), np.int64)]

    def rows(self, key):
        return self.num_rows

    def fill(self, key, row, out, tracker):
        item = 100 * key + row
        out[1][row] = -1  # half written
        try:
            tracker.begin(item)
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


class Unpicklable:
    def __reduce__(self):
        return unpickle, ()


def unpickle():
    raise ValueError("no such thing here")
