"""Images behind URLs, against a real server that counts what it is asked, refuses, stalls and cuts short."""

from __future__ import annotations

import asyncio
import builtins
import gzip
import io
import math
import os
import pickle
import sys
import threading
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from PIL import Image

from seer_scale.config import Crop, Data, Views
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.sources import kind_of, lists, open_source, remote, tar_index
from seer_scale.extras import how_to_install
from tests.problems import refused, unreadable
from tests.sources import Impatient
from tests.unit.test_sources import contents, write_tar

LONG = 24 << 20
VIEWS = Views(crops=(Crop(num=1, size=16),))


class Handler(BaseHTTPRequestHandler):
    """GET with ranges, HEAD, folders as links. What the server's `faults` hold for a path's end comes first."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server, path = self.server, self.server.root / unquote(self.path.partition("?")[0]).lstrip("/")
        server.asked.append((self.command, self.path))
        fault = next(
            (faults.pop(0) for end, faults in server.faults.items() if self.path.endswith(end) and faults), None
        )
        if fault == "hang":
            server.over.wait(60)
        if fault == "huge":
            return self.send(200, b"", announced=1 << 40)
        if fault == "zipped":
            return self.send(200, gzip.compress(path.read_bytes()), {"Content-Encoding": "gzip"})
        if fault in ("endless", "drip", "steady", "chunked", "gzip", "long"):
            return self.stream(fault, path)
        if isinstance(fault, int) or not path.exists():
            return self.send(fault or 404, b"")
        data = "".join(f'<a href="{p.name}">' for p in path.iterdir()).encode() if path.is_dir() else path.read_bytes()
        headers = {"ETag": f'"{path.stat().st_mtime_ns}"', "Content-Type": "text/html" if path.is_dir() else "x/y"}
        status = 200
        if (asked := self.headers["Range"]) and fault != "whole":
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self.send(416, b"")
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self.send(status, data, headers, cut=fault == "cut", short=fault == "short" and self.command == "GET")

    def stream(self, how, path):
        """An answer without a length; what is written counts, until nobody listens any more."""
        if self.command == "HEAD":
            return self.send(405, b"")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        if how == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        data = {"endless": bytes(1 << 16), "long": bytes(1 << 16), "drip": b"x", "steady": bytes(4096)}.get(
            how
        ) or path.read_bytes()
        data = gzip.compress(data) if how == "gzip" else data
        try:
            while not self.server.over.wait({"drip": 0.02, "steady": 0.03}.get(how, 0)):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                self.server.written += len(data)
                most = {"long": LONG, "steady": 25 * 4096}.get(how, math.inf)
                if how in ("chunked", "gzip") or self.server.written >= most:
                    self.wfile.write(b"0\r\n\r\n")
                    return
        except OSError:
            self.server.left.set()
        self.close_connection = True

    def send(self, status, data, headers=(), cut=False, short=False, announced=0):
        data = data[: len(data) // 2] if short else data
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": announced or len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.server.over.wait(60 if announced else 0)
        self.close_connection |= cut

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    root = tmp_path / "www"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.daemon_threads, served.block_on_close = True, False
        served.root, served.asked, served.faults, served.over = root, [], {}, threading.Event()
        served.written, served.left = 0, threading.Event()
        served.url = f"http://127.0.0.1:{served.server_port}"
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.over.set()
        served.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.004)


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def publish(server, num: int = 3, images: int = 8) -> None:
    for n in range(num):
        members = {}
        for k in range(images):
            members |= {f"{n}_{k}.jpg": jpeg(n * images + k), f"{n}_{k}.cls": b"%d" % (k % 3), f"{n}_{k}.json": b"{}"}
        write_tar(server.root / f"{n:03d}.tar", members)
    (server.root / "classes.txt").write_text("ant\nbee\ncow\n")


def plain(source, root: str):
    """Contents with names from the root on."""
    return [(name.removeprefix(root), data, label) for name, data, label in contents(source)]


# -------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize(
    "path", ["", "/", "/*.tar", "/0*[0-2].tar", "/{000..002}.tar", "/000.tar, {url}/{{001,002}}.tar"]
)
def test_remote_tars_are_the_local_ones(server, path):
    publish(server)
    path = (server.url + path).replace("{url}", server.url).replace("{{", "{").replace("}}", "}")
    source, local = open_source(path, "tar"), open_source(str(server.root), "tar")
    assert source.name(0).endswith("::0"), "the server is not asked for a name"
    assert plain(source, server.url) == plain(local, str(server.root)) and len(source) == 24
    assert source.classes == local.classes == ["ant", "bee", "cow"] and source.has_labels
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_run_is_one_request(server, monkeypatch):
    publish(server)
    source = open_source(f"{server.url}/{{000..002}}.tar")
    singly = [source.read(i) for i in range(24)]
    server.asked.clear()
    assert source.read_run(0, 24) == singly and len(server.asked) == 3
    server.asked.clear()
    assert source.read_run(6, 4) == singly[6:10] and len(server.asked) == 2


def test_opening_again_costs_one_question_a_tar(server):
    publish(server)
    open_source(f"{server.url}/{{000..002}}.tar")
    server.asked.clear()
    source = open_source(f"{server.url}/{{000..002}}.tar")
    assert Counter(server.asked) == {("HEAD", f"/00{n}.tar"): 1 for n in range(3)}
    source.read(0)
    assert server.asked[3:] == [("HEAD", "/000.tar"), ("GET", "/000.tar")]  # the index is on this machine


def test_an_index_beside_a_tar_is_used_if_it_fits(server, monkeypatch):
    publish(server, 1)
    expected = plain(open_source(str(server.root / "000.tar")), str(server.root))
    index = server.root / "000.tar.index.npz"
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "walk_tar", lambda *_: pytest.fail("walked"))
        assert plain(open_source(f"{server.url}/000.tar"), server.url) == expected
    assert server.asked.count(("GET", "/000.tar.index.npz")) == 1
    with np.load(index) as saved:
        good = dict(saved)
    lies = [
        {"offset": good["offset"] + 10**9},
        {"size": -good["size"]},
        {"cls": good["cls"] + 9},
        {"names": None},
        {"name_ends": good["name_ends"][:-1]},
        {"stamp": good["stamp"] + 1},
        {"offset": np.array(["x"] * 8)},
        {"cls": np.array(0)},
    ]
    for n, lie in enumerate(lies):
        np.savez(index, **{k: v for k, v in (good | lie).items() if v is not None})
        (server.root / f"copy{n}.tar").write_bytes((server.root / "000.tar").read_bytes())
        index.rename(server.root / f"copy{n}.tar.index.npz")
        assert [d for _, d, _ in plain(open_source(f"{server.url}/copy{n}.tar"), "")] == [d for _, d, _ in expected]


def test_a_tar_walked_by_requests_is_not_fetched_whole(server):
    members = {f"{n}.bin": bytes(4 << 20) for n in range(4)} | {"1.jpg": jpeg(1)}
    size = write_tar(server.root / "x.tar", members).stat().st_size
    source = open_source(f"{server.url}/x.tar")
    walking = sum(a == ("GET", "/x.tar") for a in server.asked)
    assert walking * remote.READAHEAD <= size / 2 and source.read(0) == jpeg(1)


def test_a_remote_tar_that_changes_is_told(server):
    publish(server, 2)
    source = open_source(f"{server.url}/*.tar")
    source.read(0)
    write_tar(server.root / "001.tar", {"1.jpg": jpeg(1)})
    with refused(f"{server.url}/001.tar", nearest="start again"):
        source.read(8)
    assert len(open_source(f"{server.url}/*.tar")) == 9


# ------------------------------------------------------------------------------------------------------- lists


def test_lists_of_urls(server, tmp_path, monkeypatch):
    for n in range(5):
        (server.root / f"{n} é.jpg").write_bytes(jpeg(n))
    text = "".join(f"{n} é.jpg\t{n % 2}\n" for n in range(5))
    (server.root / "list.txt").write_text(text)
    local = plain(open_source(str(server.root / "list.txt")), str(server.root))
    monkeypatch.setattr(lists, "LIST_CHUNK_BYTES", 16)
    source = open_source(f"{server.url}/list.txt")  # beside its images
    assert plain(source, server.url) == local
    assert Counter(server.asked)["GET", "/0%20%C3%A9.jpg"] == 2 and len(server.asked) == 2 + 4 + 5
    server.asked.clear()
    open_source(f"{server.url}/list.txt")
    assert len(server.asked) == 2  # whether the list changed, whether the first image is there
    (tmp_path / "local.txt").write_text("".join(f"{server.url}/{line}\n" for line in text.splitlines()))
    assert plain(open_source(str(tmp_path / "local.txt")), server.url) == local


def test_a_list_is_judged_by_lines_from_all_of_it(server, tmp_path):
    (server.root / "there.jpg").write_bytes(jpeg(1))
    (server.root / "list.txt").write_text("gone.jpg\n" * 30 + "there.jpg\n" + "gone.jpg\n" * 9)
    for how in ([], ["chunked"] * 9):  # also where the list's own size is not told
        server.faults["list.txt"] = how
        assert len(open_source(f"{server.url}/list.txt")) == 40
    server.faults["there.jpg"] = [403] * 9
    with refused(f"{server.url}/list.txt") as error:
        open_source(f"{server.url}/list.txt")
    assert "of 32 lines looked at, spread over its 40" in error.value.problems[0].rule
    (tmp_path / "list.txt").write_text("http://no.such.host.invalid/1.jpg\n")
    with refused(tmp_path / "list.txt"):
        open_source(str(tmp_path / "list.txt"))


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("fault", [503, 500, 429, 408, "cut", "short", "hang"])
def test_what_fails_now_and_then_is_tried_again(server, monkeypatch, fault):
    publish(server, 1)
    expected = plain(open_source(str(server.root / "000.tar")), str(server.root))
    (server.root / "000.tar.index.npz").unlink()
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 0.3 if fault == "hang" else 30)
    server.faults["000.tar"] = [fault] * 2
    source = open_source(f"{server.url}/000.tar")
    server.faults["000.tar"] = [fault] * 3
    assert plain(source, server.url) == expected and not server.faults["000.tar"]


@pytest.mark.parametrize(
    "fault, words, tries",
    [
        (503, "HTTP status 503; 5 tries", 5),
        (403, "HTTP status 403", 1),
        ("short", "of 8 bytes came; 5 tries", 5),
        ("whole", "ignores ranges", 1),
    ],
)
def test_in_the_end_there_is_one_sentence(server, fault, words, tries):
    (server.root / "a.bin").write_bytes(bytes(100))
    server.faults["a.bin"] = [fault] * 20
    with unreadable(f"{server.url}/a.bin", words):
        remote.read(f"{server.url}/a.bin", 8, 8)
    assert len(server.asked) == tries


def test_a_server_that_never_answers(server, monkeypatch):
    (server.root / "a.bin").write_bytes(bytes(100))
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 0.05)
    server.faults["a.bin"] = ["hang"] * 20
    with unreadable(f"{server.url}/a.bin", "no answer in 0.05 s; 5 tries"):
        remote.read(f"{server.url}/a.bin", 8, 8)


def test_what_never_ends_is_cut_off_at_the_limit(server, monkeypatch):
    """However many bytes an image may have, they are counted while they come, and nothing goes on behind."""
    (server.root / "a.jpg").touch()
    server.faults["a.jpg"] = ["endless"] * 9
    with unreadable(f"{server.url}/a.jpg", "1,000,000 bytes"):
        remote.read(f"{server.url}/a.jpg", max_bytes=1_000_000)
    assert server.left.wait(20) and server.written < 30_000_000 and len(server.asked) == 1
    monkeypatch.setattr(remote, "MAX_UNDECLARED_BYTES", 500_000)
    with unreadable(f"{server.url}/a.jpg", "500,000 bytes"):
        remote.read(f"{server.url}/a.jpg", max_bytes=1_000_000_000)
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 5)
    server.faults["a.jpg"] = ["huge"] * 9  # of what tells its length, no byte is waited for
    with unreadable(f"{server.url}/a.jpg", "1,000 bytes"):
        remote.read(f"{server.url}/a.jpg", max_bytes=1000)
    (server.root / "a.jpg").write_bytes(bytes(2_000_000))
    server.faults["a.jpg"] = ["zipped"] * 9  # a length that is not the image's own is none
    with unreadable(f"{server.url}/a.jpg", "500,000 bytes"):
        remote.read(f"{server.url}/a.jpg", max_bytes=1_000_000_000)


def test_an_image_is_held_once_while_it_comes(server):
    (server.root / "a.jpg").touch()
    server.faults["a.jpg"] = ["long"]
    tracemalloc.start()
    try:
        assert len(remote.read(f"{server.url}/a.jpg", max_bytes=1 << 30)) == LONG
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.4 * LONG


def test_what_comes_byte_by_byte_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "STALL_S", 0.3)
    monkeypatch.setattr(remote, "NO_TRY_AFTER_S", 0.4)
    (server.root / "a.jpg").touch()
    server.faults["a.jpg"] = ["drip"] * 9
    with unreadable(f"{server.url}/a.jpg", "fewer than 16,384 bytes in 0.3 s; "):
        remote.read(f"{server.url}/a.jpg", max_bytes=1_000_000)
    assert server.left.wait(20), "the transfer was ended, not left behind"


def test_what_comes_steadily_may_take_long(server, monkeypatch):
    """In pieces with pauses between them, several windows long."""
    monkeypatch.setattr(remote, "STALL_S", 0.25)
    monkeypatch.setattr(remote, "STALL_BYTES", 4096)
    (server.root / "a.jpg").touch()
    server.faults["a.jpg"] = ["steady"]
    assert len(remote.read(f"{server.url}/a.jpg", max_bytes=1_000_000)) == 25 * 4096


class Slow:
    """What `_get` asks, as filesystem, session and answer in one: chunks of these sizes, each a second after the one
    before, by a clock of its own; so nothing but the bytes that came ends a transfer."""

    kwargs, headers, status, content_length = {}, {}, 200, None

    def __init__(self, sizes: list[int]):
        self.sizes, self.now, self.content = iter(sizes), 0.0, self
        self.encode_url = str

    async def set_session(self) -> Slow:
        return self

    def get(self, url: str, **options: Any) -> Slow:
        return self

    async def __aenter__(self) -> Slow:
        return self

    async def __aexit__(self, *_: Any) -> None:
        pass

    def _raise_not_found_for_status(self, answer: Slow, url: str) -> None:
        pass

    async def readany(self) -> bytes:
        self.now += 1
        return bytes(next(self.sizes, 0))


@pytest.mark.parametrize(
    "sizes, given_up_at",
    [([1] * 100, 15), ([1 << 14] + [1] * 100, 30), ([1100] * 100, None)],
    ids=["a byte a second", "not any more", "just enough"],
)
def test_bytes_that_came_decide_what_is_given_up(sizes, given_up_at, monkeypatch):
    """Those of each STALL_S alone: not how long it takes, nor how much came before."""
    slow = Slow(sizes)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: slow.now))
    read = remote._get(slow, "http://h/a.jpg", None, 1_000_000, is_probe=False)
    if given_up_at:
        with pytest.raises(TimeoutError, match="fewer than 16,384 bytes in 15 s"):
            asyncio.run(read)
        assert slow.now == given_up_at
    else:
        assert len(asyncio.run(read)) == sum(sizes)


@pytest.mark.parametrize("how", ["chunked", "gzip"])
def test_an_image_need_not_tell_its_size(server, how, tmp_path):
    (server.root / "a.jpg").write_bytes(jpeg(1))
    server.faults["a.jpg"] = [how] * 99
    (tmp_path / "list.txt").write_text(f"{server.url.replace('http', 'HTTP')}/a.jpg\n")
    assert open_source(str(tmp_path / "list.txt")).read(0) == jpeg(1)


def test_of_many_hosts_little_is_kept(server):
    (server.root / "a.bin").write_bytes(b"x")
    assert remote.read(f"{server.url}/a.bin") == b"x"
    for n in range(60):
        remote._filesystem(f"http://h{n}.example/a.bin")
        remote._filesystem(f"memory://bucket{n}/a.bin")
    mine = [key for key in remote._filesystems if key[0] == os.getpid()]
    assert len(mine) <= remote.MAX_FILESYSTEMS and sum(key[1] == "http" for key in mine) <= 1


def test_threads_that_never_end_are_few(monkeypatch):
    """Of a filesystem that cannot be told to stop."""
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 0.01)
    monkeypatch.setattr(remote, "MAX_STUCK", 3)
    monkeypatch.setattr(remote, "_stuck", [])
    over = threading.Event()
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", lambda *_, **__: over.wait(60))
    before = threading.active_count()
    with unreadable("memory://here/a.jpg", "3 transfers before it have never ended"):
        remote.read("memory://here/a.jpg")
    assert threading.active_count() <= before + 3
    over.set()


def test_size_of_what_is_not_there_is_asked_once_and_of_what_fails_again(server):
    for path in ("gone.tar", "{000..001}.tar", "gone/"):
        with refused(ANY):
            open_source(f"{server.url}/{path}")
    (server.root / "a.bin").write_bytes(bytes(100))
    server.faults["a.bin"] = [503] * 4  # HEAD and GET, twice
    assert remote.stat(f"{server.url}/a.bin")[0] == 100
    with unreadable("http://127.0.0.1:1/x.tar", "5 tries"):
        open_source("http://127.0.0.1:1/x.tar")


def test_loader_workers_read_after_the_parent_did_and_replace_what_fails(server, monkeypatch):
    publish(server)
    source = Impatient(open_source(f"{server.url}/*.tar"))
    source.read_run(0, 24)

    def batches():
        sampler = ElasticSampler([DataVersion(0, (("all", len(source)),), 1, 1)], 1, 12)
        part = dict(rank=0, world_size=1, start=0, stop=48)
        return list(train_batches(source, Data(workers=2, prefetch=2), VIEWS, sampler, **part))

    whole = batches()
    assert sum(len(b.indices) for b in whole) == 48 and not any(b.unreadable for b in whole)
    server.faults["001.tar"] = [503] * 10**6
    told = [line for b in batches() for line in b.unreadable]
    assert told and all("/001.tar" in line and "5 tries" in line for line in told)
    assert all(i // 8 != 1 for b in batches() for i in b.indices.tolist())
    source.read(0)  # the parent's own connection is whole


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("s3fs", "gcsfs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for url, package in [("s3://bucket/x.tar", "s3fs"), ("gs://bucket/x.tar", "gcsfs")]:
        with refused(url, nearest=how_to_install(package)):
            open_source(url)
    with refused("s33://bucket/x.tar", nearest="did you mean s3?"):
        open_source("s33://bucket/x.tar")


def test_other_filesystems(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one", "2.jpg": b"two"})
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/here/x.tar", Path(path).read_bytes())
    for url in ("memory://here/x.tar", "memory://here/", f"file://{tmp_path}/*.tar"):
        assert [d for _, d, _ in contents(open_source(url))] == [b"one", b"two"]


@pytest.mark.parametrize(
    "url, kind",
    [
        ("s3://b/x.tar", "tar"),
        ("s3://b/d/", "tar"),
        ("s3://b/{0..9}.tar", "tar"),
        ("s3://b/*", "tar"),
        ("gs://b/a.tar,gs://b/b.tar", "tar"),
        ("https://h/l.txt?signature=a*b", "list"),
        ("https://h/x.TAR?x=1", "tar"),
        ("http://[::1]:80/l.CSV", "list"),
        ("s3://b/l.list", "list"),
    ],
)
def test_kinds_of_urls(url, kind):
    assert kind_of(url) == kind


@pytest.mark.parametrize(
    "url, nearest",
    [
        ("s3://b/d", "say what is meant by data.kind tar or data.kind list"),
        ("s3://b/x.tar.gz", "unpack it to .tar files or a folder"),
        ("s3://b/1.jpg", "give its folder, or a list file"),
    ],
)
def test_urls_that_say_nothing(url, nearest):
    with refused(url, nearest=nearest):
        kind_of(url)
    with refused(url, nearest="give its tars or a list of URLs"):
        open_source(url, "folder")


def test_to_wait_is_a_sign_of_life(server, monkeypatch):
    publish(server, 1)
    source = open_source(f"{server.url}/000.tar")
    expected = source.read(0)
    alive = []
    monkeypatch.setattr(remote, "waiting", lambda: alive.append(1))
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", 2.5)
    server.faults["000.tar"] = ["hang"]
    assert source.read(0) == expected and len(alive) >= 3  # twice in the first try, once before the second
