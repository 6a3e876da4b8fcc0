"""Sources: what is found, in which order, with which labels; and one sentence for everything that cannot be read."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from seer_scale.data.sources import open_source, subset, tars
from seer_scale.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(source):
    return [(source.name(i), source.read(i), source.label(i)) for i in range(len(source))]


# ----------------------------------------------------------------------------------------------------- folders


def test_folder_is_sorted_recursive_and_labelled_by_first_level(tmp_path):
    for name in ("b/2.JPG", "b/deep/1.png", "a/9.jpeg", "a/notes.txt", "a/._9.jpeg"):
        touch(tmp_path / "d" / name, name.encode())
    source = open_source(str(tmp_path / "d"))
    assert [(os.path.relpath(n, tmp_path / "d"), d, lab) for n, d, lab in contents(source)] == [
        ("a/9.jpeg", b"a/9.jpeg", 0),
        ("b/2.JPG", b"b/2.JPG", 1),
        ("b/deep/1.png", b"b/deep/1.png", 1),
    ]
    assert source.classes == ["a", "b"] and source.has_labels


@pytest.mark.parametrize("names", [("a/1.jpg", "a/2.jpg"), ("a/1.jpg", "b/2.jpg", "3.jpg")])
def test_folder_without_two_full_classes_has_no_labels(tmp_path, names):
    for name in names:
        touch(tmp_path / "d" / name)
    source = open_source(str(tmp_path / "d"))
    assert len(source) == len(names) and not source.has_labels and source.label(0) is None and not source.classes


def test_folder_follows_links_but_enters_nothing_twice(tmp_path):
    touch(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert len(open_source(str(tmp_path / "d"))) == 1


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path / "d" / os.fsdecode(b"\xff\xfe.jpg"), b"odd")
    source = open_source(str(tmp_path / "d"))
    assert source.read(0) == b"odd"


# -------------------------------------------------------------------------------------------------- list files


def test_list_file_paths_are_relative_to_it(tmp_path):
    touch(tmp_path / "images" / "1.jpg", b"one")
    absolute = touch(tmp_path / "no_suffix", b"two")
    (tmp_path / "list.txt").write_text(f"images/1.jpg\tcat\r\n\n{absolute}\tant\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.read(i) for i in range(2)] == [b"one", b"two"]
    assert source.classes == ["ant", "cat"] and [source.label(i) for i in range(2)] == [1, 0]


def test_list_file_numbers_become_classes_in_their_order(tmp_path):
    touch(tmp_path / "1.jpg")
    (tmp_path / "list.txt").write_text("1.jpg\t10\n1.jpg\t2\n1.jpg\t02\n1.jpg\t9999999999\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.label(i) for i in range(4)] == [1, 0, 0, 2] and source.classes == ["2", "10", "9999999999"]


def test_list_file_of_windows_begins_with_a_mark(tmp_path):
    touch(tmp_path / "1.jpg", b"one")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf1.jpg\r\n")
    assert open_source(str(tmp_path / "list.txt")).read(0) == b"one"


# -------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_reads_what_was_written(tmp_path, form):
    long = "x" * 90 + "/" + "y" * 90 + ".jpg"  # longer than a plain header holds, except in ustar's two parts
    members = {"a/1.jpg": b"one" * 1000, "a/1.txt": b"no image", long: b"two", "./b/2.png": b"three"}
    path = write_tar(tmp_path / "x.tar", members, form)
    source = open_source(str(path))
    assert [(n.split("::")[1], d) for n, d, _ in contents(source)] == [
        ("a/1.jpg", b"one" * 1000), (long, b"two"), ("b/2.png", b"three"),
    ]  # fmt: skip
    assert source.classes == ["a", "b", "x" * 90]


def test_tar_labels_from_cls_members_and_classes_file(tmp_path):
    members = {"k1.jpg": b"1", "k1.cls": b"1\n", "d/k2.cls": b"0", "d/k2.jpg": b"2", "k2.jpg": b"3"}
    path = write_tar(tmp_path / "x.tar", members)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    source = open_source(str(path))
    assert [source.label(i) for i in range(3)] == [1, 0, None] and source.classes == ["ant", "bee"]
    assert not source.has_labels  # the third has none
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(DataError, match="has label 1, but classes.txt beside it names only 1 classes"):
        open_source(str(path))


def test_tar_numbers_without_classes_file_become_classes(tmp_path):
    for n, label in enumerate((b"7", b"3", b"7")):
        write_tar(tmp_path / f"{n}.tar", {"k.jpg": b"x", "k.cls": label})
    source = open_source(str(tmp_path))
    assert source.has_labels and source.classes == ["3", "7"] and source.labels.tolist() == [1, 0, 1]


def test_tar_folders_are_numbered_by_classes_file(tmp_path):
    write_tar(tmp_path / "1.tar", {"bee/1.jpg": b"1"})
    write_tar(tmp_path / "2.tar", {"ant/1.jpg": b"2", "cow/1.jpg": b"3"})
    (tmp_path / "classes.txt").write_text("cow\nbee\nant\n")
    source = open_source(str(tmp_path))
    assert [source.label(i) for i in range(3)] == [1, 2, 0] and source.classes == ["cow", "bee", "ant"]


def test_tar_links_and_folders_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"evil{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("../../out.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"mine"))
    source = open_source(str(tmp_path / "x.tar"))
    assert [d for _, d, _ in contents(source)] == [b"mine"]


def test_tars_by_folder_glob_and_comma_list_are_the_same(tmp_path):
    for n in (1, 2):
        write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": b"%d" % n})
    d = tmp_path
    ways = [str(d), f"{d}/*.tar", f"{d}/1.tar,{d}/2.tar", f"{d}/1.tar, {d}/*.tar"]
    assert all(contents(open_source(w)) == contents(open_source(ways[0])) for w in ways)


def test_glob_in_a_folder_whose_name_has_brackets(tmp_path, monkeypatch):
    (tmp_path / "g[0]" / "part1").mkdir(parents=True)
    write_tar(tmp_path / "g[0]" / "part1" / "x.tar", {"1.jpg": b"one"})
    monkeypatch.chdir(tmp_path)
    for path in ("g[0]/part1/*.tar", "g[0]/part[12]/x.tar", f"{tmp_path}/g[0]/*/*.tar", "g[[]0]/part1/*.tar"):
        assert open_source(path).read(0) == b"one"


def test_index_is_cached_and_rebuilt_when_the_tar_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one"})
    open_source(str(path))
    assert Path(f"{path}.index.npz").exists() and not list(tmp_path.glob("*.tmp"))
    walk = tars._walk_tar
    monkeypatch.setattr(tars, "_walk_tar", lambda *a: pytest.fail("walked again"))
    assert open_source(str(path)).read(0) == b"one"
    monkeypatch.setattr(tars, "_walk_tar", walk)
    write_tar(path, {"1.jpg": b"another", "2.jpg": b"two"})
    assert open_source(str(path)).read(0) == b"another"
    Path(f"{path}.index.npz").write_bytes(b"torn")
    assert open_source(str(path)).read(1) == b"two"


def test_index_goes_to_the_cache_folder_where_the_data_is_read_only(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "x.tar", {"1.jpg": b"one"})
    (tmp_path / "data").chmod(0o555)  # root could write there, and must not
    try:
        open_source(str(path))
        assert os.listdir(tmp_path / "data") == ["x.tar"]
        assert len(list((tmp_path / "cache" / "seer_scale").iterdir())) == 1
    finally:
        (tmp_path / "data").chmod(0o755)


def test_a_tar_cut_anywhere_says_so(tmp_path):
    whole = write_tar(tmp_path / "x.tar", {f"{n}.jpg": b"%d" % n * 700 for n in range(4)}).read_bytes()
    end = 4 * (512 + 1024)
    for cut in (600, 1536, 1536 + 100, 1536 + 512, 3 * 1536 + 1000, end - 1, end):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        last = r"the last whole member is \d\.jpg|no member is whole"
        with pytest.raises(DataError, match=rf"cut\.tar is cut short \(({last})\); fetch it again or remove it"):
            open_source(str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one zero block ends it well enough
    assert len(open_source(str(tmp_path / "cut.tar"))) == 4


def test_a_tar_that_shrinks_while_in_use(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one" * 1000})
    source = open_source(str(path))
    os.truncate(path, 600)
    with pytest.raises(DataError, match="cut short"):
        source.read(0)


def test_more_tars_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_TARS", 2)
    for n in range(5):
        write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": b"%d" % n})
    source = open_source(str(tmp_path))
    assert [source.read(i) for i in (0, 1, 2, 3, 4, 0, 2)] == [b"0", b"1", b"2", b"3", b"4", b"0", b"2"]
    assert len(source._open) <= 2
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


# ------------------------------------------------------------------------------------------------------ errors


def test_every_bad_path_gets_one_sentence_that_helps(tmp_path):
    (tmp_path / "photos").mkdir()
    touch(tmp_path / "some.jpg")
    touch(tmp_path / "empty.txt", b"\n\n")
    touch(tmp_path / "wrong.txt", b"nowhere/1.jpg\n")
    touch(tmp_path / "mixed.txt", b"some.jpg\t1\nsome.jpg\n")
    touch(tmp_path / "binary.bin", b"\0\1\2")
    touch(tmp_path / "not.tar", b"text" * 1000)
    touch(tmp_path / "x.tar.gz")
    write_tar(tmp_path / "texts.tar", {"1.txt": b"1"})
    touch(tmp_path / "both" / "x.tar")
    touch(tmp_path / "both" / "1.jpg")
    for path, kind, words in [
        ("photo", "auto", "did you mean .*photos"),
        ("far/away/photos", "auto", f"nearest folder there is: {tmp_path}"),
        ("photos", "auto", r"holds no image.*\.jpg, \.jpeg"),
        ("photos", "tar", "holds no .tar file"),
        ("*.tarx", "auto", "holds no .tar file"),
        ("some.jpg", "auto", "single image"),
        ("some.jpg", "folder", "not a folder"),
        ("empty.txt", "auto", "lists no image"),
        ("wrong.txt", "auto", "nowhere/1.jpg.*does not exist"),
        ("mixed.txt", "auto", "line 2 has no label"),
        ("binary.bin", "auto", "line 1 holds binary data"),
        ("not.tar", "auto", "is not a plain tar"),
        ("x.tar.gz", "auto", "unpack it"),
        ("texts.tar", "auto", "holds no image"),
        ("both", "auto", "data.kind tar or data.kind folder"),
        ("photos", "webdataset", "must be one of"),
    ]:
        with pytest.raises(DataError, match=words):
            open_source(str(tmp_path / path), kind)
    with pytest.raises(DataError, match="data.path is empty"):
        open_source("")


def test_a_file_that_went_away(tmp_path):
    touch(tmp_path / "d" / "1.jpg")
    source = open_source(str(tmp_path / "d"))
    (tmp_path / "d" / "1.jpg").unlink()
    with pytest.raises(DataError, match="1.jpg cannot be read"):
        source.read(0)


def test_subset_is_a_view(tmp_path):
    for n in range(4):
        touch(tmp_path / "d" / str(n % 2) / f"{n}.jpg", b"%d" % n)
    source = open_source(str(tmp_path / "d"))
    part = subset(source, np.array([3, 0]))
    assert contents(part) == [contents(source)[3], contents(source)[0]] and part.classes == source.classes


# ------------------------------------------------------------------------------------------------- real images


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_shared_sets():
    clothing = open_source(str(SHARED / "clothing" / "train-*.tar"))
    assert len(clothing) == 1200 and len(clothing.classes) == 10 and clothing.has_labels
    cifar = open_source(str(SHARED / "cifar10" / "test-000.tar"))
    assert len(cifar) == 3000 and len(cifar.classes) == 10 and cifar.has_labels
    assert all(f"::{cifar.classes[cifar.label(i)]}/" in cifar.name(i) for i in range(0, 3000, 97))
