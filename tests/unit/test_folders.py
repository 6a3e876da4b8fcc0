"""Folders as they are found in the world: deep, linked to themselves, unlistable, with hidden and foreign things in
them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from seer_scale.data.sources import files, kind_of, left_out, open_source
from seer_scale.data.sources.files import folder, folders_in
from seer_scale.errors import DataError, Unreadable
from seer_scale.evaluate.knn import split_folders
from seer_scale.extras import how_to_install
from tests.problems import refused
from tests.sources import read_heif
from tests.unit.test_sources import touch, write_tar

ODD = [b"caf\xe9", b"two\nlines", b"\x1b[31mred", "gpj.\u202eexe".encode(), b"\xff\xfe"]


@pytest.mark.parametrize("odd", ODD)
def test_names_are_bytes_until_they_are_shown(tmp_path, odd):
    """As a file, a class, a line of a list, a member of a tar, and one of them unreadable."""
    odd = os.fsdecode(odd)
    for name in ("a", odd):
        touch(tmp_path / "folder" / name / f"{odd}.jpg", os.fsencode(name))
    has_line = "\n" not in odd
    line = f"folder/{odd}/{odd}.jpg\t{odd}\nfolder/a/{odd}.jpg\ta\n" if has_line else "folder/a\ta\n"
    (tmp_path / "list.txt").write_bytes(os.fsencode(line))
    write_tar(tmp_path / "x.tar", {f"{n}/{odd}.jpg": os.fsencode(n) for n in ("a", odd)})
    for path in ("folder", "x.tar", *(["list.txt"] if has_line else [])):
        source = open_source(str(tmp_path / path))
        assert sorted(source.read(i) for i in range(2)) == sorted([b"a", os.fsencode(odd)])
        shown = [*(source.name(i) for i in range(2)), *source.classes]
        assert len(source.classes) == 2 and all(text.isprintable() for text in shown)
    (tmp_path / "folder" / "a" / f"{odd}.jpg").unlink()
    source = open_source(str(tmp_path / "list.txt")) if has_line else open_source(str(tmp_path / "folder"))
    for i in range(len(source)):
        if isinstance(error := source.read_run(i, 1)[0], DataError):
            assert isinstance(error, Unreadable) and error.name == source.name(i) and str(error).isprintable()


@pytest.fixture
def deep(tmp_path):
    yield tmp_path / "d"
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python 3.12 cannot


def test_folders_that_link_to_themselves_and_nest_without_end(deep, tmp_path, monkeypatch):
    touch(tmp_path / "d" / "1.jpg")
    (tmp_path / "d" / "self").symlink_to("self")
    (tmp_path / "d" / "up").symlink_to("..")
    monkeypatch.chdir(tmp_path / "d")
    for _ in range(1100):
        os.mkdir("n")
        os.chdir("n")
    Path("deep.jpg").touch()
    source = open_source(str(tmp_path / "d"))
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == ["1.jpg", "deep.jpg"]
    assert source.left_out == {left_out.DANGLING_LINKS: 1}
    with refused(tmp_path / "d" / "self") as error:
        open_source(str(tmp_path / "d" / "self"))
    assert "Too many levels of symbolic links" in error.value.problems[0].rule


def test_what_cannot_be_listed_is_left_out_unless_it_is_all(tmp_path, monkeypatch):
    touch(tmp_path / "d" / "1.jpg")
    (tmp_path / "d" / "locked").mkdir()
    scandir = os.scandir

    def denied(path):
        if Path(path).name in ("locked", "root"):
            raise PermissionError(13, "Permission denied")  # root may list all
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    source = open_source(str(tmp_path / "d"))
    assert len(source) == 1 and source.left_out == {left_out.UNLISTABLE: 1}
    (tmp_path / "root").mkdir()
    for kind in ("auto", "folder"):
        with refused(tmp_path / "root", nearest="make it readable, or give another folder"):
            open_source(str(tmp_path / "root"), kind)


def test_hidden_means_hidden_and_what_is_left_out_is_counted(tmp_path, monkeypatch):
    read_heif(monkeypatch, False)
    hidden = [
        ".git/1.jpg",
        ".thumbnails/1.jpg",
        ".Trash-1000/1.jpg",
        "@eaDir/1.jpg",
        "a/.ipynb_checkpoints/1.jpg",
        "lost+found/1.jpg",
        "a/.1.jpg",
    ]
    others = ["1.heic", "1.CR2", "none", "a.zip", "a.tar.gz", "x.parquet", "x.TXT", ".hidden.tar"]
    for name in ("a/1.jpg", "a/2.mpo", "b/1.pgm", *hidden, *others):
        touch(tmp_path / "d" / name)
    source = open_source(str(tmp_path / "d"), "folder")
    assert len(source) == 3 and source.classes == ["a", "b"]
    counts = dict(source.left_out)
    assert counts.pop(left_out.HIDDEN) == len(hidden) + 1 and counts == {
        "HEIF images": 1,
        "camera raw images": 1,
        left_out.NO_SUFFIX: 1,
        "archives": 2,
        "Parquet or Arrow files": 1,
        left_out.OTHER: 1,
    }
    said = left_out.warning(source.left_out)
    assert (
        said.startswith("Left out: 8 hidden")
        and f"1 HEIF image ({how_to_install('pillow_heif')} reads them" in said
        and "1 other file" in said
    )
    (tmp_path / "d" / "x.parquet").unlink()
    assert kind_of(str(tmp_path / "d")) == "folder"
    for name in ("1.zip", "2.zip", "3.heic"):
        touch(tmp_path / "zips" / name)
    with refused(tmp_path / "zips") as error:
        open_source(str(tmp_path / "zips"))
    assert error.value.problems[0].nearest.startswith("it holds 2 archives (unpack them), 1 HEIF image")


def test_what_only_is_called_like_an_image_is_none(tmp_path, monkeypatch):
    """Links that lead nowhere, pipes and sockets; and to tell costs no question for a regular file."""
    place = tmp_path / "d"
    for name in ("1.jpg", "2.jpg", "a/3.jpg"):
        touch(place / name)
    for name, target in (
        ("gone.jpg", "nowhere.jpg"),
        ("gone", "nowhere"),
        ("4.jpg", "1.jpg"),
        ("to-pipe.jpg", "pipe.jpg"),
    ):
        (place / name).symlink_to(target)
    os.mkfifo(place / "pipe.jpg")
    os.mkfifo(place / "pipe")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(os.path.relpath(place / "socket.jpg"))
    asked, stat = Counter(), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.update([os.path.basename(path)]) or stat(path, **more))
    source = folder(str(place))
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == ["1.jpg", "2.jpg", "4.jpg", "3.jpg"]
    assert source.left_out == {left_out.DANGLING_LINKS: 2, left_out.SPECIAL: 4}
    assert not asked.keys() & {"1.jpg", "2.jpg", "3.jpg"}
    assert "2 links that lead nowhere" in left_out.warning(source.left_out)


def test_folders_deeper_than_a_path_may_be_are_told_as_that(deep, tmp_path, monkeypatch):
    touch(tmp_path / "d" / "1.jpg")
    monkeypatch.chdir(tmp_path / "d")
    for _ in range(20):
        os.mkdir("n" * 250)
        os.chdir("n" * 250)
    source = open_source(str(tmp_path / "d"))
    assert len(source) == 1 and source.left_out == {left_out.TOO_DEEP: 1}


@pytest.mark.parametrize(
    "patterns, kept",
    [
        ((), ["a/1.jpg", "a/1_mask.png", "b/raw/2.jpg", "c/3.jpg"]),
        (("*_mask.png", "raw"), ["a/1.jpg", "c/3.jpg"]),
        (("b/raw/", "c/*.jpg"), ["a/1.jpg", "a/1_mask.png"]),
        (("[ab]",), ["c/3.jpg"]),
    ],
)
def test_patterns_of_what_to_leave_out(tmp_path, patterns, kept):
    for name in ("a/1.jpg", "a/1_mask.png", "b/raw/2.jpg", "c/3.jpg"):
        touch(tmp_path / "d" / name)
    source = open_source(str(tmp_path / "d"), exclude=patterns)
    assert [os.path.relpath(source.name(i), tmp_path / "d") for i in range(len(source))] == kept


def make_run(place):
    """What a run has written by its first update."""
    for name in (".lock", "config.yaml", "metrics.jsonl", "logs/progress.json", "checkpoints/1/x", "gallery/a/1.jpg"):
        touch(place / name)


def test_runs_among_the_images_are_none_of_them(tmp_path):
    """Wherever they lie, and however much of them there is."""
    for name in ("hat/1.jpg", "shoe/2.jpg", "shoe/logs/3.jpg"):
        touch(tmp_path / "d" / name)
    touch(tmp_path / "d" / "hat" / "config.yaml")
    for place in ("runs/one", "runs/two", "three", "hat/four"):
        make_run(tmp_path / "d" / place)
    touch(tmp_path / "d" / "runs" / "begins" / ".lock")
    (tmp_path / "d" / "runs" / "begins" / "logs").mkdir()
    make_run(tmp_path / "d" / "copied")
    (tmp_path / "d" / "copied" / ".lock").unlink()
    source = open_source(str(tmp_path / "d"))
    names = [os.path.relpath(source.name(i), tmp_path / "d") for i in range(len(source))]
    assert names == ["hat/1.jpg", "shoe/2.jpg", "shoe/logs/3.jpg"] and source.classes == ["hat", "shoe"]
    assert source.left_out[left_out.RUN_FOLDERS] == 6 and folders_in(str(tmp_path / "d")) == ["hat", "shoe"]
    assert "6 folders of runs (the pictures in them are their own)" in left_out.warning(source.left_out)
    assert left_out.warning({left_out.RUN_FOLDERS: 1}).startswith("Left out: 1 folder of a run (")
    assert len(open_source(str(tmp_path / "d" / "three" / "gallery"))) == 1  # who names it means it


def test_a_run_beside_tars_or_splits_changes_nothing_about_them(tmp_path):
    touch(tmp_path / "tars" / "1.tar")
    make_run(tmp_path / "tars" / "runs" / "one")
    assert kind_of(str(tmp_path / "tars")) == "tar"
    for name in ("train/a/1.jpg", "train/b/2.jpg", "runs/other.txt"):
        touch(tmp_path / "d" / name)
    make_run(tmp_path / "d" / "runs" / "one")
    assert split_folders(str(tmp_path / "d")) == []
    (tmp_path / "d" / "runs" / "other.txt").unlink()
    assert split_folders(str(tmp_path / "d")) == [str(tmp_path / "d" / "train")]


def test_many_class_folders_are_not_read_to_see_whether_they_are_runs(tmp_path, monkeypatch):
    for n in range(300):
        touch(tmp_path / "d" / "a" / f"{n}.jpg")
    asked, is_folder = [], files.is_folder
    monkeypatch.setattr(files, "is_folder", lambda entry: asked.append(entry.name) or is_folder(entry))
    assert folders_in(str(tmp_path / "d")) == ["a"] and len(asked) == 2
