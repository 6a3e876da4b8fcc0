"""Names as they may be shown; and files and folders, of which a reader sees what was there before or all of the new
one."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".unfinished"
"""What the name of a file that is being written ends with; it begins with a dot."""


def shown(name: str | bytes | os.PathLike, keep: str = "") -> str:
    """A name, or a text with names in it, as it may be printed, logged or stored: one line of valid, printable text.

    A name is any bytes. What is not printable (bytes that are not UTF-8, line ends, terminal escapes, marks that turn
    the direction of writing) is shown as Python escapes it; `keep`: characters that stay as they are. Shown twice is
    shown once.
    """
    text = os.fsdecode(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


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


def safetensors_header(path: Path) -> dict[str, Any]:
    """What a safetensors file begins with; {} where there is none, or one that does not go as far as it says."""
    try:
        with open(path, "rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
            return header if file.tell() + end == path.stat().st_size else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError):
        return {}


def write_whole(path: Path, content: str | bytes) -> None:
    """Raises OSError."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def published(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path beside `path`, at which a file or a folder is to be made; it takes its place by one rename once the body
    has ended well, else it is removed. replace: of what is there. Raises OSError: also FileExistsError."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}{UNFINISHED}")
    old = aside.with_name(f".old{aside.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        if replace and os.path.lexists(path):
            os.rename(path, old)
        elif os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        try:
            os.rename(aside, path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, path)
            raise
        sync_folder(path.parent)
    finally:
        for left in (aside, old):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, as fsync does contents."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: numbers that are not finite become None, tensors and arrays plain numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON of whatever is written or printed for programs: what JSON has no word for becomes null."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def cache_folder() -> Path:
    """Where this user's files of ours may be kept from run to run; a user without home and account has the machine's
    folder for temporary files."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "seer_scale"
    try:
        return Path.home() / ".cache" / "seer_scale"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"seer_scale-{os.getuid()}"
        with suppress(OSError):
            folder.mkdir(mode=0o700)
        is_own = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
        return folder if is_own else Path(tempfile.mkdtemp(prefix="seer_scale-"))
