"""Tars as they come: which of their members are images, under which names and labels, and what is left out and told."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from seer_scale.data.sources import kind_of, left_out, open_source
from seer_scale.data.sources.hub import looks_like_hub
from tests.problems import refused
from tests.sources import read_heif

CASES = Path(__file__).parents[2].parent / "shared" / "data" / "cases"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def opened(folder: Path, *members: str | tuple[str, bytes] | tarfile.TarInfo):
    """A source of a tar with these members, in this order, also twice; a file holds its own name if nothing is
    given."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = (member, member.encode()) if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return open_source(str(folder / "x.tar"))


def read(source) -> list[tuple[str, str | None]]:
    labels = [source.label(i) for i in range(len(source))]
    return [(source.read(i).decode(), None if n is None else source.classes[n]) for i, n in enumerate(labels)]


def test_of_a_key_s_images_one_is_read_as_webdataset_does(tmp_path):
    source = opened(
        tmp_path, "0.mask.png", "0.jpg", "0.depth.png", ("0.json", b"{}"), "1.PNG", "1.jpg", "a/0.webp", "a/0.seg.webp",
        "p.1.jpg", "p.2.jpg", "q.2019.jpg", "q.mask.jpg",
    )  # fmt: skip
    assert [name for name, _ in read(source)] == [
        "0.jpg",
        "1.jpg",
        "a/0.webp",
        "p.1.jpg",
        "p.2.jpg",
        "q.2019.jpg",
        "q.mask.jpg",
    ]
    assert source.left_out == {left_out.SECOND: 4, left_out.OTHER: 1}
    assert "4 further images of a key" in left_out.warning(source.left_out)


def test_a_key_that_comes_again_is_another_sample_with_its_own_label(tmp_path):
    source = opened(
        tmp_path, ("0.jpg", b"a"), ("0.cls", b"x"), ("1.cls", b"y"), ("1.jpg", b"b"), ("0.jpg", b"c"), ("0.cls", b"z"),
        ("1.jpg", b"d"), ("2.jpg", b"e"), ("3.jpg", b"f"), ("2.cls", b"late"), ("3.cls", b" \n"),
    )  # fmt: skip
    assert read(source) == [("a", "x"), ("b", "y"), ("c", "z"), ("d", None), ("e", "late"), ("f", None)]
    assert source.classes == ["late", "x", "y", "z"] and not source.has_labels


def test_what_means_nothing_in_a_path_is_no_class(tmp_path):
    source = opened(
        tmp_path, "./cat/1.jpg", ".//dog/2.jpg", "/dog/3.jpg", "../cat/4.jpg", "cat//./5.jpg", "cat/./../6.jpg"
    )
    assert [label for _, label in read(source)] == ["cat", "dog", "dog", "cat", "cat", "cat"]
    assert [source.name(i).rpartition("::")[2] for i in range(2)] == ["cat/1.jpg", "dog/2.jpg"]


def test_what_is_no_file_or_not_meant_to_be_seen_is_told(tmp_path, monkeypatch):
    read_heif(monkeypatch, False)
    links = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
        info.type, info.linkname = kind, "1.jpg"
        links.append(info)
    source = opened(
        tmp_path,
        "1.jpg",
        *links,
        "__MACOSX/._1.jpg",
        "._1.jpg",
        ".git/2.jpg",
        "a/.thumbnails/3.jpg",
        "4.heic",
        "5",
        "6.zip",
        "7.txt",
    )
    assert read(source) == [("1.jpg", None)]
    assert source.left_out == {
        left_out.LINKS: 2,
        left_out.HIDDEN_MEMBERS: 4,
        "HEIF images": 1,
        left_out.NO_SUFFIX_MEMBERS: 1,
        "archives": 1,
        left_out.OTHER: 1,
    }
    assert "data.kind list" not in left_out.described(source.left_out)  # which can name no member


def test_what_is_no_regular_file_is_told_by_its_type(tmp_path):
    members, fifo, device, folder = [], tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE
    for name, kind in (("pipe.jpg", fifo), ("tty", device), ("odd.jpg", b"Z"), ("label", b"V"), ("a", folder)):
        members.append(tarfile.TarInfo(name))
        members[-1].type = kind
    source = opened(tmp_path, *members, "1.jpg")
    assert read(source) == [("1.jpg", None)] and source.left_out == {left_out.SPECIAL: 2, left_out.UNKNOWN_MEMBERS: 1}


@pytest.mark.parametrize("zeros", [0, 3 << 20])
def test_a_tar_behind_another_is_not_lost(tmp_path, zeros):
    """However much the first one was padded (tar -b 4096), and wherever it ends in what is read at once."""
    opened(tmp_path, "1.jpg")
    one = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(one + bytes(zeros))
    assert len(open_source(str(tmp_path / "x.tar"))) == 1
    (tmp_path / "x.tar").write_bytes(one + bytes(zeros) + one)
    with refused(tmp_path / "x.tar", nearest="use those"):
        open_source(str(tmp_path / "x.tar"))


def test_tars_may_be_called_in_capitals(tmp_path):
    opened(tmp_path, "1.jpg")
    (tmp_path / "x.tar").rename(tmp_path / "A.TAR")
    assert not looks_like_hub(str(tmp_path)) and kind_of(str(tmp_path)) == "tar"
    for path in (tmp_path, tmp_path / "A.TAR", f"file://{tmp_path}/"):
        assert len(open_source(str(path))) == 1
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")  # which is no image
    assert kind_of(str(tmp_path)) == "tar"
    (tmp_path / "2.jpg").touch()
    with refused(tmp_path, nearest="say what is meant by data.kind tar or data.kind folder"):
        open_source(str(tmp_path))


def test_an_index_without_heif_images_is_made_anew_where_they_can_be_read(tmp_path, monkeypatch):
    read_heif(monkeypatch, False)
    assert len(opened(tmp_path, "1.jpg", "2.heic")) == 1
    read_heif(monkeypatch, True)
    assert [name for name, _ in read(open_source(str(tmp_path / "x.tar")))] == ["1.jpg", "2.heic"]


@pytest.mark.skipif(not CASES.exists(), reason="no shared data")
@pytest.mark.parametrize(
    "name, images, classes, told",
    [
        ("dot", 5, ["cat", "dog"], {}),
        ("mask", 2, [], {left_out.SECOND: 3, left_out.OTHER: 1}),
        ("noeof", 2, [], {left_out.NO_END: 1}),
        ("sparse", 1, [], {left_out.SPARSE: 2}),
    ],
)
def test_cases(name, images, classes, told):
    source = open_source(str(CASES / f"{name}.tar"))
    assert len(source) == images and list(source.classes) == classes and source.left_out == told
