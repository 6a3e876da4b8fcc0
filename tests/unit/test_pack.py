"""A pack holds what its source holds, each image once; it depends on source and arguments alone, whatever stops it."""

import argparse
import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image

from seer_scale.corpus import describe as inspect
from seer_scale.corpus import pack as module
from seer_scale.data.sampling.order import permute
from seer_scale.data.sources import open_source, tar_index
from seer_scale.data.sources.base import Source
from seer_scale.data.transforms.decode import decode
from seer_scale.errors import NOTHING, DataError
from tests.pictures import apart, encode, photo
from tests.problems import refused
from tests.sources import Fatal

N = 41


def pack(src, dst, *words, workers=0):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(src), str(dst), "--workers", str(workers), *map(str, words)]))


def files(dst):
    """Everything in a pack that has to be the same; an index names the date of its tar."""
    return {
        p.name: p.read_bytes()
        for p in Path(dst).iterdir()
        if p.is_file() and not p.name.startswith(".") and not p.name.endswith(".npz")
    }


def images(source):
    return [source.read(i) for i in range(len(source))]


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    """41 images of 3 classes in three formats, some with a wrong suffix."""
    root = tmp_path_factory.mktemp("src")
    for n in range(N):
        place = root / ("10", "9", "a b")[n % 3] / f"{n:02d}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encode(Image.fromarray(photo(40, 50, n)), ("JPEG", "PNG", "WEBP")[n % 7 % 3]))
    return root


@pytest.fixture()
def broken(tmp_path, src):
    """A list of the same images in which every tenth is gone, and one is no image."""
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    paths = sorted(map(str, src.rglob("*.jpg")))
    lines = [f"{path}.gone" if n % 10 == 5 else path for n, path in enumerate(paths)]
    lines[7] = str(tmp_path / "page.jpg")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return tmp_path / "list.txt"


@pytest.mark.parametrize("shuffle", ("0", "7", "no"))
def test_round_trip(src, tmp_path, shuffle):
    told = pack(src, tmp_path / "dst", "--size", "30kB", "--shuffle", shuffle)
    source, packed = open_source(str(src)), open_source(str(tmp_path / "dst"))
    order = np.arange(N) if shuffle == "no" else permute(np.arange(N), N, int(shuffle), 0)
    assert images(packed) == [source.read(i) for i in order.tolist()]
    assert packed.has_labels and packed.labels.tolist() == source.labels[order].tolist()
    assert list(packed.classes) == list(source.classes) == ["10", "9", "a b"]
    tars = sorted((tmp_path / "dst").glob("*.tar"))
    counts = [len(open_source(str(tar))) for tar in tars]
    assert len(tars) > 3 and max(counts) - min(counts) <= 1
    assert f"{len(tars)} tars, 41 images" in told and "left out" not in told
    assert 0.7 * 30e3 < np.mean([t.stat().st_size for t in tars[:-1]]) < 1.7 * 30e3


def test_members(src, tmp_path):
    pack(src, tmp_path / "dst", "--shuffle", "no")
    with tarfile.open(tmp_path / "dst" / "000000.tar") as tar:
        members = tar.getmembers()
    source = open_source(str(src))
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    forms = [suffix[Image.open(io.BytesIO(data)).format] for data in images(source)]
    assert [m.name for m in members] == [f"{n:09d}.{end}" for n, form in enumerate(forms) for end in (form, "cls")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_opening_walks_no_tar(src, tmp_path, monkeypatch):
    pack(src, tmp_path / "dst", "--size", "50kB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "walk_tar", lambda *_: pytest.fail("walked"))
    assert len(open_source(str(tmp_path / "dst"))) == N


def test_any_number_of_workers_gives_the_same(broken, tmp_path):
    for workers in (0, 1, 3):
        pack(broken, tmp_path / f"dst{workers}", "--size", "20kB", workers=workers)
    assert files(tmp_path / "dst0") == files(tmp_path / "dst1") == files(tmp_path / "dst3")


def test_a_pack_of_a_pack_and_unlabelled(broken, tmp_path):
    pack(broken, tmp_path / "one", "--size", "20kB", "--shuffle", "1")
    pack(tmp_path / "one", tmp_path / "two", "--size", "30kB", "--shuffle", "no")
    one, two = open_source(str(tmp_path / "one")), open_source(str(tmp_path / "two"))
    assert images(one) == images(two) and one.labels is two.labels is None
    assert not (tmp_path / "two" / "classes.txt").exists() and not (tmp_path / "two" / "unreadable.txt").exists()


def test_some_labels(tmp_path):
    class Some(Source):
        labels, classes = np.array([1, -1, 0], np.int32), (" odd\nname ", "b", "of none")

        def __len__(self):
            return 3

        def read(self, i):
            return encode(Image.fromarray(photo(seed=i)))

        def name(self, i):
            return str(i)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "open_source", lambda path, kind: Some())
        pack("hf:some", tmp_path / "dst", "--kind", "hub", "--shuffle", "no")
    packed = open_source(str(tmp_path / "dst"))
    assert packed.labels.tolist() == [1, -1, 0] and list(packed.classes) == ["odd name", "b", "of none"]


# ----------------------------------------------------------------------------------------------- what is left out


def test_unreadable_are_listed(broken, tmp_path):
    told = pack(broken, tmp_path / "dst", "--size", "20kB")
    listed = (tmp_path / "dst" / "unreadable.txt").read_text().splitlines()
    gone = [line for line in broken.read_text().splitlines() if line.endswith("gone")]
    assert sorted(line.partition(": ")[0] for line in listed) == sorted(gone)
    assert "37 images" in told and "4 that cannot be read left out, listed in" in told
    assert len(open_source(str(tmp_path / "dst"))) == N - 4
    assert (tmp_path / "page.jpg").read_bytes() in images(open_source(str(tmp_path / "dst")))
    (tmp_path / "empty").mkdir()
    for name, data in (("a.jpg", b""), ("b.jpg", (tmp_path / "page.jpg").read_bytes())):
        (tmp_path / "empty" / name).write_bytes(data)
    pack(tmp_path / "empty", tmp_path / "dst2")
    assert len(open_source(str(tmp_path / "dst2"))) == 1
    assert (tmp_path / "dst2" / "unreadable.txt").read_text() == f"{tmp_path}/empty/a.jpg: the file is empty\n"


def test_check_leaves_out_what_does_not_decode(broken, tmp_path):
    pack(broken, tmp_path / "dst", "--check")
    packed = open_source(str(tmp_path / "dst"))
    assert len(packed) == N - 5 and all(decode(data).shape == (40, 50, 3) for data in images(packed))
    assert (
        "page.jpg: its first bytes are those of no image format that is read here"
        in (tmp_path / "dst" / "unreadable.txt").read_text()
    )


def test_nothing_readable(tmp_path):
    (tmp_path / "src").mkdir()
    for n in range(5):
        (tmp_path / "src" / f"{n}.jpg").write_bytes(b"")
    with refused(tmp_path / "dst", NOTHING):
        pack(tmp_path / "src", tmp_path / "dst", "--check", "--size", "1")


def test_an_image_that_ends_its_process(src, tmp_path, monkeypatch):
    source = open_source(str(src))
    monkeypatch.setattr(inspect, "open_source", lambda path, kind: Fatal(source, {20}))
    assert "1 that cannot be read left out" in pack(src, tmp_path / "dst", "--check", "--size", "40kB", workers=2)
    assert (
        tmp_path / "dst" / "unreadable.txt"
    ).read_text() == f"{source.name(20)}: it ended or stopped its loader twice\n"


# ----------------------------------------------------------------------------------------------- stops


def tars_of(dst):
    return sorted(dst.glob("*.tar")) if dst.is_dir() else []


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_it_goes_on(broken, tmp_path, monkeypatch, seed):
    pack(broken, tmp_path / "whole", "--size", "10kB")
    expected, draw = files(tmp_path / "whole"), random.Random(seed)

    def slow(path, kind):
        source = open_source(path, kind)
        source.read_run = lambda first, num: time.sleep(0.01) or type(source).read_run(source, first, num)
        return source

    def work():
        os.setsid()
        pack(broken, tmp_path / "dst", "--size", "10kB", workers=2)

    monkeypatch.setattr(inspect, "open_source", slow)
    for _ in range(5):
        done = len(tars_of(tmp_path / "dst"))
        victim = multiprocessing.get_context("fork").Process(target=work)
        victim.start()
        until = time.monotonic() + 60
        while victim.is_alive() and len(tars_of(tmp_path / "dst")) <= done and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)
        victim.join()
        for tar in tars_of(tmp_path / "dst"):
            assert tar.read_bytes() == expected[tar.name]
    pack(broken, tmp_path / "dst", "--size", "10kB", workers=2)
    assert files(tmp_path / "dst") == expected
    assert not list((tmp_path / "dst").rglob("*.unfinished"))


def test_whole_tars_are_not_made_again(src, tmp_path):
    pack(src, tmp_path / "dst", "--size", "20kB")
    before = {p: p.stat().st_mtime_ns for p in tars_of(tmp_path / "dst")}
    lost = sorted(before)[1]
    expected = lost.read_bytes()
    lost.unlink()
    pack(src, tmp_path / "dst", "--size", "20kB")
    after = {p: p.stat().st_mtime_ns for p in tars_of(tmp_path / "dst")}
    assert [p for p in after if after[p] != before[p]] == [lost] and lost.read_bytes() == expected


def test_a_full_disk_leaves_whole_tars(src, tmp_path, monkeypatch):
    pack(src, tmp_path / "whole", "--size", "20kB")
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with refused(ANY, nearest="mend that and give the same command again") as error:
        pack(src, tmp_path / "dst", "--size", "20kB")
    assert error.value.problems[0].key.endswith(".tar") and "No space left" in error.value.problems[0].rule
    monkeypatch.undo()
    made = tars_of(tmp_path / "dst")
    assert made and all(tar.read_bytes() == (tmp_path / "whole" / tar.name).read_bytes() for tar in made)
    pack(src, tmp_path / "dst", "--size", "20kB")
    assert files(tmp_path / "dst") == files(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- refusals


def test_another_plan_is_refused(src, broken, tmp_path):
    pack(src, tmp_path / "dst")
    for words, key, value in (
        (("--shuffle", "1"), "the shuffle seed", 1),
        (("--shuffle", "no"), "the shuffle seed", None),
        (("--size", "2GiB"), "the size of a tar", 2147483648),
        (("--max-side", "9"), "the max side", 9),
        (("--check",), "the check", True),
    ):
        with refused(key, value):
            pack(src, tmp_path / "dst", *words)
    with refused("the source", str(broken)):
        pack(broken, tmp_path / "dst")
    pack(broken, tmp_path / "listed")
    broken.write_text(broken.read_text().replace("page", "side"))
    with refused("the names or labels of the images", NOTHING):
        pack(broken, tmp_path / "listed")


def test_places_that_do_not_serve(src, tmp_path):
    for dst in (src, src / "dst", src.parent):
        with refused(dst, nearest="give one beside it"):
            pack(src, dst)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with refused(tmp_path / "full", nearest="give a new folder"):
        pack(src, tmp_path / "full")
    (tmp_path / "full" / "pack.json").write_text("{}")
    with refused(tmp_path / "full" / "pack.json", nearest="give a new folder"):
        pack(src, tmp_path / "full")
    with refused(tmp_path / "full" / "thesis.tex" / "dst", nearest="give another folder"):
        pack(src, tmp_path / "full" / "thesis.tex" / "dst")


def test_two_at_once_are_refused(src, tmp_path):
    def work(ready, end):
        with module._alone_in(tmp_path / "dst"):
            ready.set()
            end.wait(60)

    fork = multiprocessing.get_context("fork")
    ready, end = fork.Event(), fork.Event()
    other = fork.Process(target=work, args=(ready, end))
    other.start()
    assert ready.wait(60)
    with refused(tmp_path / "dst", nearest="wait for it, or give another folder"):
        pack(src, tmp_path / "dst")
    end.set()
    other.join()
    pack(src, tmp_path / "dst")


@pytest.mark.parametrize(
    "words",
    (
        ("--size", "0"),
        ("--size", "big"),
        ("--shuffle", "yes"),
        ("--max-side", "0"),
        ("--workers", "-1"),
        ("--split", "test"),
        ("--buffer", "9"),
    ),
)
def test_bad_arguments(src, tmp_path, words):
    with refused(words[0]):
        pack(src, tmp_path / "dst", *words)


@pytest.mark.parametrize(
    "word, size", (("1GiB", 1 << 30), ("500MB", 500_000_000), ("1.5k", 1500), ("2KiB", 2048), ("7", 7), ("1TB", 10**12))
)
def test_sizes(word, size):
    assert module._size(word) == size


# ----------------------------------------------------------------------------------------------- max side, streams


def test_max_side(tmp_path):
    (tmp_path / "src").mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    large, small = photo(300, 450), photo(64, 200)
    data = {
        "large.jpg": encode(Image.fromarray(large), quality=97),
        "large.png": encode(Image.fromarray(large), "PNG"),
        "rotated.jpg": encode(Image.fromarray(large), quality=97, exif=rotated),
        "short.jpg": encode(Image.fromarray(large))[:2000],
        "small.jpg": encode(Image.fromarray(small)),
        "web.jpg": b"<html>",
    }
    for name, content in data.items():
        (tmp_path / "src" / name).write_bytes(content)
    pack(tmp_path / "src", tmp_path / "dst", "--max-side", 64, "--shuffle", "no")
    got = images(open_source(str(tmp_path / "dst")))
    assert got[3:] == [data["small.jpg"], data["web.jpg"]]
    assert "short.jpg: it is no whole image" in (tmp_path / "dst" / "unreadable.txt").read_text()
    assert [decode(d).shape for d in got[:3]] == [(64, 96, 3), (64, 96, 3), (96, 64, 3)]
    wanted = np.asarray(Image.fromarray(large).resize((96, 64), Image.Resampling.LANCZOS))
    assert np.abs(decode(got[0]).astype(int) - wanted).mean() < 3 and apart(decode(got[1]), wanted) < 40
    assert np.abs(decode(got[2]).astype(int) - np.rot90(wanted, -1)).mean() < 3


class Stream:
    """30 images of which some, also the first and the last, cannot be read; may break off."""

    ends = 30

    def __len__(self):
        return 30

    def iterate(self, seed, epoch, first):
        for position in range(first, self.ends):
            is_bad = position in (0, 11, 12, 29)
            yield position, DataError("it is gone") if is_bad else encode(Image.fromarray(photo(40, 50, position)))
        if self.ends < 30:
            raise DataError("the stream broke off")


@pytest.fixture()
def streamed(monkeypatch):
    monkeypatch.setattr(inspect, "open_source", lambda path, kind: Stream())
    return ("hf:any", "--kind", "stream", "--size", "20kB")


def test_stream(streamed, tmp_path, capsys):
    src, *words = streamed
    told = pack(src, tmp_path / "dst", *words)
    packed = open_source(str(tmp_path / "dst"))
    assert images(packed) == [data for _, data in Stream().iterate(0, 0, 0) if isinstance(data, bytes)]
    assert len(tars_of(tmp_path / "dst")) > 2 and "--shuffle" in capsys.readouterr().err
    assert "26 images" in told and "4 that cannot be read left out" in told
    assert (tmp_path / "dst" / "unreadable.txt").read_text() == "".join(
        f"image {n}: it is gone\n" for n in (0, 11, 12, 29)
    )


@pytest.mark.parametrize("ends", range(0, 30, 3))
def test_a_stream_that_broke_off_goes_on(streamed, tmp_path, monkeypatch, ends):
    src, *words = streamed
    pack(src, tmp_path / "whole", *words)
    monkeypatch.setattr(Stream, "ends", ends)
    with pytest.raises(DataError, match="broke off"):
        pack(src, tmp_path / "dst", *words)
    monkeypatch.setattr(Stream, "ends", 30)
    for _ in range(2):
        pack(src, tmp_path / "dst", *words)
        assert files(tmp_path / "dst") == files(tmp_path / "whole")
    assert json.loads((tmp_path / "dst" / "pack.json").read_text())["shuffle"] is None


def test_data_sets_of_the_hub(src, tmp_path):
    """At random and as a stream; the library's own order of a stream is a function of its arguments, so it goes on."""
    datasets = pytest.importorskip("datasets")
    source = open_source(str(src))
    columns = {"image": [{"bytes": data, "path": None} for data in images(source)], "label": source.labels.tolist()}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(source.classes)))
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "all.parquet")
    pack(tmp_path / "saved", tmp_path / "dst", "--shuffle", "no", "--size", "40kB", workers=2)
    packed = open_source(str(tmp_path / "dst"))
    assert (
        images(packed) == images(source)
        and packed.labels.tolist() == source.labels.tolist()
        and packed.classes == source.classes
    )
    words = ("--kind", "stream", "--length", N, "--buffer", 10, "--size", "40kB")
    pack(tmp_path / "all.parquet", tmp_path / "streamed", *words)
    assert sorted(images(open_source(str(tmp_path / "streamed")))) == sorted(images(source))
    whole = files(tmp_path / "streamed")
    tars_of(tmp_path / "streamed")[-1].unlink()
    pack(tmp_path / "all.parquet", tmp_path / "streamed", *words)
    assert files(tmp_path / "streamed") == whole
    with refused("the way to read it", {"length": N, "buffer": 11}):
        pack(tmp_path / "all.parquet", tmp_path / "streamed", *words, "--buffer", 11)
