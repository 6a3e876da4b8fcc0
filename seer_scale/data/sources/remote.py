"""Reading what lies behind a URL, by fsspec: a range of bytes, the size, what a folder holds; with tries, and limits of
bytes and time that end a transfer for real.

A filesystem belongs to the process that made it, as its sockets and threads do not survive a fork.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from seer_scale.errors import NOTHING, DataError, Problem, Unreadable, UserError, nearest
from seer_scale.extras import how_to_install

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TRIES = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
READ_TIMEOUT_S = 40.0
LIST_TIMEOUT_S = 600.0
PROBE_TIMEOUT_S = 10.0
NO_TRY_AFTER_S = 60.0
"""Seconds after which what has failed is not tried again."""
STALL_S, STALL_BYTES = 15.0, 1 << 14
"""Seconds in which at least so many bytes must come, or a transfer is ended."""
MAX_UNDECLARED_BYTES = 1 << 28
"""Bytes that are taken of what does not declare its size."""
MAX_FILESYSTEMS, MAX_CONNECTIONS, IDLE_S = 16, 64, 4.0
"""What a process keeps: filesystems (one for all of http, one a bucket), connections of http, and for how long idle."""
MAX_STUCK = 8
"""Threads of filesystems without a way to cancel that may hang, before such are not asked any more."""
READAHEAD = 1 << 20
COMMON = ("s3", "gs", "az", "hf", "http", "https", "file")
STAMPS = (
    "ETag",
    "etag",
    "Content-MD5",
    "md5Hash",
    "checksum",
    "generation",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
)
"""What filesystems call the thing that changes with the content, the surest first."""

T = TypeVar("T")


def waiting() -> None:
    """Called every second while a server is waited for; a loader process puts here its heartbeat, a
    start what ends the wait (by a UserError)."""


_filesystems: OrderedDict[tuple[int, str], Any] = OrderedDict()  # the least recently used first
_lock = threading.Lock()
_stuck: list[Future] = []
_jitter = random.SystemRandom()  # forked workers must not wait alike, nor draw from anybody's seeded numbers


class Refused(Unreadable):
    """It is not there, or not for us: to ask again is no use."""


class _TooMuchError(Exception):
    """More bytes came, or were announced, than are taken."""

    def __init__(self, max_bytes: int):
        super().__init__(max_bytes)
        self.max_bytes = max_bytes


class NoSize(Refused):
    """It is there, but nobody says how long it is."""


def is_url(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def has_magic(url: str) -> bool:
    """Whether a URL is a glob; a question mark begins the query, and a host may be an address in brackets."""
    return re.search(r"[*\[]", url.partition("://")[2].partition("/")[2].partition("?")[0]) is not None


def beside(url: str, suffix: str) -> str:
    """The URL with a longer name."""
    path, mark, query = url.partition("?")
    return f"{path}{suffix}{mark}{query}"


def read(url: str, offset: int = 0, size: int | None = None, max_bytes: int | None = None) -> bytes:
    """The bytes offset .. offset + size - 1, or all, of a file that has no more than `max_bytes`. Raises DataError."""

    def attempt() -> bytes:
        if size is None:
            limit, end = max_bytes, None if max_bytes is None else offset + max_bytes + 1
            try:
                data = _call(url, READ_TIMEOUT_S, "cat_file", start=offset or None, end=end)
                if max_bytes is None or len(data) <= max_bytes:
                    return data
            except _TooMuchError as error:
                limit = min(max_bytes or error.max_bytes, error.max_bytes)
            raise Refused(f"it has more than the {limit:,} bytes that are taken", url)
        try:
            data = _call(url, READ_TIMEOUT_S, "cat_file", start=offset, end=offset + size)
        except _TooMuchError:
            raise Refused("its server ignores ranges: use another, or fetch the file", url) from None
        if len(data) > size:
            raise Refused("its filesystem ignores ranges: fetch the file", url)
        if len(data) < size:
            raise EOFError(f"{len(data)} of {size} bytes came")
        return data

    return _retried(url, attempt, READ_TIMEOUT_S)


def stat(url: str) -> tuple[int, str]:
    """(size in bytes, a text that changes with the content, empty where the server has none). Raises DataError, and
    NoSize where it is there and its server declares no size."""
    info = _retried(url, lambda: _call(url, READ_TIMEOUT_S, "info"), READ_TIMEOUT_S)
    if info.get("size") is None:
        raise NoSize("its server declares no size: use another, or fetch the file", url)
    return int(info["size"]), next((str(info[k]) for k in STAMPS if info.get(k)), "")


def problem_of(url: str) -> str | None:
    """Why the beginning of a file cannot be read, asked once; None where it can."""
    try:
        _call(url, PROBE_TIMEOUT_S, "cat_file", start=0, end=1, is_probe=True)
    except Unreadable as error:
        return error.reason
    except DataError as error:
        return str(error)
    except UserError:
        raise
    except Exception as error:  # each filesystem has its own
        return _reason(error, PROBE_TIMEOUT_S)
    return None


def find_tars(url: str) -> list[str]:
    """The tars that a glob matches or that lie in a folder, sorted. Raises DataError."""

    def attempt() -> list[str]:
        if has_magic(url):
            found = _call(url, LIST_TIMEOUT_S, "glob")
        else:
            found = _call(url, LIST_TIMEOUT_S, "ls", detail=False)
        return [_filesystem(url)[0].unstrip_protocol(name) for name in found]

    found = _retried(url, attempt, LIST_TIMEOUT_S)
    return sorted({name for name in found if name.partition("?")[0].lower().endswith(".tar")})


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

    def readinto(self, buffer: WriteableBuffer) -> int:
        into = memoryview(buffer)
        size = max(0, min(len(into), self._size - self._at))
        into[:size] = read(self._url, self._at, size) if size else b""
        self._at += size
        return size


# ------------------------------------------------------------------------------------------------------- tries


def _retried(url: str, attempt: Callable[[], T], timeout_s: float) -> T:
    """attempt(), again after growing pauses while it fails; it gives up after `timeout_s` each time."""
    reason, begin, tries = "", time.monotonic(), 0
    while tries < TRIES and (not tries or time.monotonic() - begin < NO_TRY_AFTER_S):
        if tries:
            time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1)) * _jitter.uniform(0.5, 1))
            waiting()
        tries += 1
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # each filesystem has its own
            cause: BaseException = error
            if url.lower().startswith("http") and isinstance(error, FileNotFoundError) and error.__cause__:
                cause = error.__cause__  # fsspec's stat says so whatever went wrong
            reason = _reason(cause, timeout_s)
            if _is_final(cause):
                raise Refused(reason, url) from cause
    raise Unreadable(f"{reason}; {tries} tries", url)


def _call(url: str, timeout_s: float, name: str, **options: Any) -> Any:
    """A method of the URL's filesystem; one that takes longer is cancelled."""
    fs, path = _filesystem(url)
    is_probe, is_http = options.pop("is_probe", False), path.startswith(("http://", "https://"))
    if is_http and name == "cat_file":
        future = asyncio.run_coroutine_threadsafe(_get(fs, path, **options, is_probe=is_probe), fs.loop)
    elif fs.async_impl:
        future = asyncio.run_coroutine_threadsafe(getattr(fs, f"_{name}")(path, **options), fs.loop)
    else:
        method = partial(_bounded_read, fs) if name == "cat_file" else getattr(fs, name)
        future = _in_thread(partial(method, path, **options))
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return future.result(max(0.0, min(1.0, deadline - time.monotonic())))
        except TimeoutError:
            if future.done():  # the call's own
                raise
            if time.monotonic() >= deadline:
                if not future.cancel() and not future.done():
                    _stuck.append(future)
                raise
        waiting()


def _bounded_read(fs: Any, path: str, start: int | None, end: int | None) -> bytes:
    """Bytes start .. end - 1, or to the end of the file. To ask for more than there is would take memory for it."""
    start, size = start or 0, fs.info(path)["size"]
    return fs.cat_file(path, start=start, end=end if size is None or end is None else max(start, min(end, size)))


async def _get(fs: Any, url: str, start: int | None, end: int | None, is_probe: bool) -> bytes:
    """Bytes start .. end - 1 by HTTP, or one more chunk where there are more; of a probe only the first chunk."""
    start, session, options = start or 0, await fs.set_session(), dict(fs.kwargs)
    if start or end is not None and end < MAX_UNDECLARED_BYTES or is_probe:  # an image is asked for whole
        options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{'' if end is None else end - 1}"}
    max_bytes = None if end is None else end - start
    async with session.get(fs.encode_url(url), **options) as answer:
        if is_probe and answer.status == 416:  # an empty file
            return b""
        fs._raise_not_found_for_status(answer, url)
        is_plain = answer.headers.get("Content-Encoding", "identity").lower() in ("identity", "")
        declared = answer.content_length if is_plain else None  # of compressed ones it is another
        if declared is None:
            max_bytes = min(MAX_UNDECLARED_BYTES, max_bytes or MAX_UNDECLARED_BYTES)
        if is_probe:
            return await answer.content.readany()
        if declared and max_bytes is not None and declared > max_bytes:
            raise _TooMuchError(max_bytes)
        data, window, came = io.BytesIO(), time.monotonic() + STALL_S, 0  # gives its bytes without a copy
        while (chunk := await _next_chunk(answer, window - time.monotonic())) != b"":
            came += data.write(chunk or b"")
            if max_bytes is not None and data.tell() > max_bytes:
                raise _TooMuchError(max_bytes)
            if time.monotonic() >= window:
                if came < STALL_BYTES:
                    raise _StalledError
                window, came = time.monotonic() + STALL_S, 0
        return data.getvalue()


class _StalledError(TimeoutError):
    def __init__(self) -> None:
        super().__init__(f"fewer than {STALL_BYTES:,} bytes in {STALL_S:g} s")


async def _next_chunk(answer: Any, timeout_s: float) -> bytes | None:
    """Empty at the end; None where none has come within timeout_s."""
    try:
        return await asyncio.wait_for(answer.content.readany(), max(0.001, timeout_s))
    except TimeoutError:
        return None


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """call() in a thread that is left behind when it takes too long, for a filesystem that cannot be stopped."""
    _stuck[:] = [future for future in _stuck if not future.done()]
    if len(_stuck) >= MAX_STUCK:
        raise OSError(f"{len(_stuck)} transfers before it have never ended")
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


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
    if isinstance(error, TimeoutError) and not isinstance(error, _StalledError):
        return f"no answer in {timeout_s:g} s"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, _StalledError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _filesystem(url: str) -> tuple[Any, str]:
    """This process's filesystem for a URL, one for all of http and one a bucket otherwise, and the path in it."""
    scheme, mark, rest = url.partition("://")
    protocol = scheme.lower()
    # bytes that are no text stand in a URL as browsers send them
    url = f"{protocol}{mark}{''.join(c if not 0xDC80 <= ord(c) <= 0xDCFF else f'%{ord(c) - 0xDC00:02X}' for c in rest)}"
    is_http = protocol in ("http", "https")
    key = os.getpid(), "http" if is_http else url[: len(protocol) + 3] + rest.partition("/")[0]
    with _lock:
        if key in _filesystems:
            _filesystems.move_to_end(key)
            return _filesystems[key], _filesystems[key]._strip_protocol(url)
        try:
            made, _ = url_to_fs(url, skip_instance_cache=True, **({"get_client": _client} if is_http else {}))
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or known_implementations[protocol]["err"]
            rule = f"needs the Python package {package}, which is not installed"
            raise DataError(Problem(url, NOTHING, rule, how_to_install(package))) from error
        except ValueError as error:
            rule = f"begins with {protocol}://, which is no way to read files"
            raise DataError(Problem(url, NOTHING, rule, nearest(protocol, COMMON))) from error
        if is_http:  # compressed on the way, bytes would have other places
            made.kwargs["headers"] = {"Accept-Encoding": "identity", **made.kwargs.get("headers", {})}
        _filesystems[key] = made
        while len(_filesystems) > MAX_FILESYSTEMS:
            _filesystems.popitem(last=False)
    return made, made._strip_protocol(url)


async def _client(**options: Any) -> Any:
    """A session of http for however many hosts: it keeps no cookies, and idle connections not for long."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=IDLE_S)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), **options)
