"""Reading what lies behind a URL, by fsspec: a range of bytes, the size, what a folder holds; with a time limit and tries.

A filesystem belongs to the process that made it, as its sockets and threads do not survive a fork.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from seer_scale.errors import DataError, nearest
from seer_scale.extras import how_to_install

TRIES = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
READ_TIMEOUT_S = 40.0
LIST_TIMEOUT_S = 600.0
READAHEAD = 1 << 20
COMMON = ("s3", "gs", "az", "hf", "http", "https", "file")
STAMPS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "checksum", "generation", "Last-Modified", "LastModified", "last_modified",
    "mtime", "modified", "updated", "created",
)  # fmt: skip
"""What filesystems call the thing that changes with the content, the surest first."""

T = TypeVar("T")


def waiting() -> None:
    """Called every second while a server is waited for; a loader process puts here what tells that it is not stuck."""


_filesystems: dict[tuple[int, str], Any] = {}
_jitter = random.SystemRandom()  # forked workers must not wait alike, nor draw from anybody's seeded numbers


class Refused(DataError):
    """It is not there, or not for us: to ask again is no use."""


def is_url(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def has_magic(url: str) -> bool:
    """Whether a URL is a glob; a question mark begins the query, and a host may be an address in brackets."""
    return re.search(r"[*\[]", url.partition("://")[2].partition("/")[2].partition("?")[0]) is not None


def beside(url: str, suffix: str) -> str:
    """The URL with a longer name."""
    path, mark, query = url.partition("?")
    return f"{path}{suffix}{mark}{query}"


def read(url: str, offset: int = 0, size: int | None = None, most: int | None = None) -> bytes:
    """The bytes offset .. offset + size - 1, or all, of a file that has no more than `most`. Raises DataError."""

    def get(fs: Any, path: str) -> bytes:
        if size is None:
            data = fs.cat_file(path, start=offset or None)
            if most and len(data) > most:
                raise Refused(f"{url} cannot be read (it has more than the {most:,} bytes that an image may have).")
            return data
        data = fs.cat_file(path, start=offset, end=offset + size)
        if len(data) > size:
            raise Refused(f"{url} cannot be read in parts: its server ignores ranges; use another, or fetch the file.")
        if len(data) < size:
            raise EOFError(f"{len(data)} of {size} bytes came")
        return data

    return _retried(url, get, READ_TIMEOUT_S)


def stat(url: str) -> tuple[int, str]:
    """(size in bytes, a text that changes with the content, empty where the server tells none). Raises DataError."""
    info = _retried(url, lambda fs, path: fs.info(path), READ_TIMEOUT_S)
    if info.get("size") is None:
        raise Refused(f"{url} cannot be read in parts: its server tells no size; use another, or fetch the file.")
    return int(info["size"]), next((str(info[k]) for k in STAMPS if info.get(k)), "")


def find_tars(url: str) -> list[str]:
    """The tars that a glob matches or that lie in a folder, sorted. Raises DataError."""

    def names(fs: Any, path: str) -> list[str]:
        found = fs.glob(path) if has_magic(url) else fs.ls(path, detail=False)
        return [fs.unstrip_protocol(name) for name in found]

    found = _retried(url, names, LIST_TIMEOUT_S)
    return sorted({name for name in found if name.partition("?")[0].endswith(".tar")})


def open_buffered(url: str, size: int) -> io.BufferedReader:
    """A file of `size` bytes to seek and read in, READAHEAD bytes a request."""
    return io.BufferedReader(_Ranges(url, size), READAHEAD)


class _Ranges(io.RawIOBase):
    def __init__(self, url: str, size: int):
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError(f"position {self._at} lies before the file")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        buffer[:size] = read(self._url, self._at, size) if size else b""
        self._at += size
        return size


# ------------------------------------------------------------------------------------------------------- tries


def _retried(url: str, call: Callable[[Any, str], T], timeout_s: float) -> T:
    """call(filesystem, path in it), again after growing pauses while it fails or takes longer than `timeout_s`."""
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1))
            waiting()
        try:
            return _within(timeout_s, lambda: call(*_filesystem(url)))
        except DataError:
            raise
        except Exception as error:  # each filesystem has its own
            if url.startswith("http") and isinstance(error, FileNotFoundError) and error.__cause__:
                error = error.__cause__  # fsspec's stat says so whatever went wrong
            reason = _reason(error, timeout_s)
            if _is_final(error):
                raise Refused(f"{url} cannot be read ({reason}).") from error
    raise DataError(f"{url} cannot be read ({reason}; {TRIES} tries).")


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """call() in a thread that is left behind when it takes too long: a filesystem may wait for ever."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return future.result(max(0.0, min(1.0, deadline - time.monotonic())))
        except TimeoutError:
            if future.done() or time.monotonic() >= deadline:  # the call's own, or ours
                raise
        waiting()


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) else None


def _is_final(error: BaseException) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _reason(error: BaseException, timeout_s: float) -> str:
    if status := _status(error):
        return f"HTTP status {status}"
    if isinstance(error, TimeoutError):
        return f"no answer in {timeout_s:g} s"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _filesystem(url: str) -> tuple[Any, str]:
    """This process's filesystem for a host or bucket, and the path in it."""
    key = os.getpid(), "/".join(url.split("/", 3)[:3])
    if key not in _filesystems:
        protocol = url.partition("://")[0].lower()
        try:
            made, _ = url_to_fs(url, skip_instance_cache=True)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or known_implementations[protocol]["err"]
            raise DataError(
                f"{url} needs the Python package {package}, which is not installed: {how_to_install(package)}."
            ) from error
        except ValueError as error:
            known = nearest(protocol, COMMON)
            raise DataError(f"{url} begins with {protocol}://, which is no way to read files; {known}") from error
        if protocol in ("http", "https"):  # compressed on the way, bytes would have other places
            made.kwargs["headers"] = {"Accept-Encoding": "identity", **made.kwargs.get("headers", {})}
        _filesystems.setdefault(key, made)
    return _filesystems[key], _filesystems[key]._strip_protocol(url)
