"""Sources with a peculiarity, for loader processes: nothing here imports torch, as they do not."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from seer_scale.data.sources import Source, remote
from seer_scale.errors import DataError


class Around(Source):
    """Another source."""

    def __init__(self, source: Source):
        self._source, self.labels, self.classes = source, source.labels, source.classes

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> bytes:
        return self._source.read(i)

    def name(self, i: int) -> str:
        return self._source.name(i)


class Fatal(Around):
    """Some of whose images end whatever process reads them, but for the one that made it."""

    def __init__(self, source: Source, fatal: set[int]):
        super().__init__(source)
        self._fatal, self._maker = fatal, os.getpid()

    def read(self, i: int) -> bytes:
        if i in self._fatal and os.getpid() != self._maker:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)


class Endless(Fatal):
    """Some of whose images are never read to their end."""

    def read(self, i: int) -> bytes:
        while i in self._fatal and os.getpid() != self._maker:
            time.sleep(1)
        return Around.read(self, i)


class Counted(Around):
    """Told to be read in runs, that writes down how it is read."""

    locality = 32

    def __init__(self, source: Source, counts: Path):
        super().__init__(source)
        self._counts = counts

    def read(self, i: int) -> bytes:
        with self._counts.open("a") as file:
            file.write("one\n")
        return super().read(i)

    def read_run(self, first: int, num: int) -> list[bytes | DataError]:
        with self._counts.open("a") as file:
            file.write(f"run {num}\n")
        return self._source.read_run(first, num)


class Impatient(Around):
    """That makes short pauses between tries, wherever it is read."""

    def read(self, i: int) -> bytes:
        remote.FIRST_PAUSE_S, remote.LONGEST_PAUSE_S = 0.001, 0.004
        return super().read(i)

    def read_run(self, first: int, num: int) -> Any:
        return self._source.read_run(first, num)
