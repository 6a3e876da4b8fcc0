"""Small files, of which a reader sees what was there before or all of the new one, and never a part."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"
"""What the name of a file that is being written ends with; it begins with a dot."""


@contextmanager
def written_whole(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which appears at `path` once it is whole (durable: and on the disk). Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}{UNFINISHED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Raises OSError."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, as fsync does contents."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
