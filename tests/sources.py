"""Sources with a peculiarity, for loader processes: nothing here imports torch, as they do not."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seer_scale.data.sources import Source, base, files, left_out, remote, tar_index, tar_survey, tars
from seer_scale.errors import DataError


class Around(Source):
    """Another source."""

    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

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


class Waiting(Around):
    """Behind a server that answers at the sixth try only."""

    def read(self, i: int) -> bytes:
        for _ in range(6):
            remote.waiting()
            time.sleep(0.2)
        return super().read(i)


class Passing(Around):
    """The same images as a stream, in their order, which goes by slowly until the first that is asked for; `ends` are
    given, if any."""

    is_stream = True

    def __init__(self, source: Source, ends: int = 0):
        super().__init__(source)
        self._ends = ends

    def name(self, i: int) -> str:
        return "passing"

    def iterate(
        self, seed: int, epoch: int, first: int, tick: Callable[[], None]
    ) -> Iterator[tuple[int, bytes | DataError]]:
        for i in range(self._ends or len(self)):
            tick()
            if i < first:
                time.sleep(0.1)
                continue
            try:
                yield i, self._source.read(i)
            except DataError as error:
                yield i, error
        if self._ends:
            raise DataError(f"it ended after {self._ends} images.")


def read_heif(monkeypatch: Any, yes: bool) -> None:
    """Sources take HEIF images for images, or do not, whatever this machine has installed."""
    heif = left_out.SUFFIXES_OF["HEIF images"]
    suffixes = tuple(s for s in base.IMAGE_SUFFIXES if s not in heif) + (heif if yes else ())
    for module in (base, files, tars, tar_index):
        monkeypatch.setattr(module, "IMAGE_SUFFIXES", suffixes)
    for module in (base, tar_index, tar_survey):
        monkeypatch.setattr(module, "HEIF", heif if yes else ())
    monkeypatch.setattr(tar_survey, "COLLECTION_VERSION", 2 + yes)
