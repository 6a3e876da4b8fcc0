"""Sources: what is found, in which order, with which labels; and one sentence for everything that cannot be read."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.data.sources import left_out, open_source, subset, tar_index, tar_survey, tars
from seer_scale.errors import NOTHING, DataError
from seer_scale.files import shown
from tests.problems import refused, unreadable

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return Path(os.environ["XDG_CACHE_HOME"]) / "seer_scale"


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
    read = [source.read(i) for i in range(len(source))]  # first: a server is not asked for names
    return [(source.name(i), data, source.label(i)) for i, data in enumerate(read)]


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
    assert len(source) == len(names) and not source.has_labels
    assert None in [source.label(i) for i in range(len(source))]


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
    with refused(path, nearest="complete or remove classes.txt"):
        open_source(str(path)).labels  # noqa: B018


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
    assert Path(f"{path}.index.npz").exists() and not list(tmp_path.glob(".*.unfinished"))
    walk = tar_index.walk_tar
    monkeypatch.setattr(tar_index, "walk_tar", lambda *a: pytest.fail("walked again"))
    assert open_source(str(path)).read(0) == b"one"
    monkeypatch.setattr(tar_index, "walk_tar", walk)
    write_tar(path, {"1.jpg": b"another", "2.jpg": b"two"})
    assert open_source(str(path)).read(0) == b"another"
    Path(f"{path}.index.npz").write_bytes(b"torn")
    assert open_source(str(path)).read(1) == b"two"


def test_index_goes_to_the_cache_folder_where_the_data_is_read_only(tmp_path, cache):
    (tmp_path / "data").mkdir()
    path = write_tar(tmp_path / "data" / "x.tar", {"1.jpg": b"one"})
    (tmp_path / "data").chmod(0o555)  # root could write there, and must not
    try:
        open_source(str(path))
        assert os.listdir(tmp_path / "data") == ["x.tar"]
        assert sorted(p.suffixes[0] for p in cache.iterdir()) == [".index", ".tars"]
    finally:
        (tmp_path / "data").chmod(0o755)


def test_a_tar_cut_anywhere_says_so(tmp_path):
    whole = write_tar(tmp_path / "x.tar", {f"{n}.jpg": b"%d" % n * 700 for n in range(4)}).read_bytes()
    end = 4 * (512 + 1024)
    for cut in (600, 1536 + 100, 1536 + 512, 3 * 1536 + 1000, end - 1):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with refused(tmp_path / "cut.tar", nearest="fetch it again or remove it"):
            open_source(str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one zero block ends it well enough
    assert len(open_source(str(tmp_path / "cut.tar"))) == 4
    for images in (1, 4):  # after a member, as some writers leave it: read, and told
        (tmp_path / "cut.tar").write_bytes(whole[: images * 1536])
        source = open_source(str(tmp_path / "cut.tar"))
        assert len(source) == images and source.left_out == {left_out.NO_END: 1}


def test_a_tar_that_shrinks_while_in_use(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one" * 1000})
    used, unused = open_source(str(path)), open_source(str(path))
    assert used.read(0) == b"one" * 1000
    os.truncate(path, 600)
    with refused(path, nearest="start again"):
        used.read(0)
    with refused(path, nearest="start again"):
        unused.read(0)
    assert unused.name(0) == f"{path}::0"  # a log needs a name all the same


def test_more_tars_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_TARS", 2)
    for n in range(5):
        write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": b"%d" % n})
    source = open_source(str(tmp_path))
    assert [source.read(i) for i in (0, 1, 2, 3, 4, 0, 2)] == [b"0", b"1", b"2", b"3", b"4", b"0", b"2"]
    assert source._open.cache_info().currsize <= 2
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


# ------------------------------------------------------------------------------------------------ many tars


def numbered_tars(folder: Path, num: int, images: int = 3, **members: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    made = []
    for n in range(num):
        inside = {f"c{n % 2}/{n}_{k}.jpg": b"%d,%d " % (n, k) * (k + 1) for k in range(images)}
        made.append(write_tar(folder / f"{n:05d}.tar", inside | members))
    return made


def test_only_a_tar_that_changed_is_indexed_again(tmp_path, cache, monkeypatch):
    made = numbered_tars(tmp_path / "d", 5)
    before = contents(open_source(str(tmp_path / "d")))
    for index in (tmp_path / "d").glob("*.npz"):
        index.unlink()  # to open the same tars again takes none
    walked, walk = [], tar_index.walk_tar
    monkeypatch.setattr(tar_index, "walk_tar", lambda tar, size: walked.append(tar) or walk(tar, size))
    assert len(open_source(str(tmp_path / "d"))) == 15 and not walked
    write_tar(made[3], {"c0/new.jpg": b"new"})
    source = open_source(str(tmp_path / "d"))
    assert len(source) == 13 and walked == [str(made[3])]
    assert contents(source) == before[:9] + [(f"{made[3]}::c0/new.jpg", b"new", 0)] + before[12:]
    os.utime(made[0], ns=(0, 0))
    unchanged = len(walked)
    with refused(made[0], nearest="start again"):
        pickle.loads(pickle.dumps(source)).read(0)
    assert len(walked) == unchanged


def test_a_collection_file_that_is_torn_is_made_anew(tmp_path, cache):
    numbered_tars(tmp_path / "d", 3)
    before = contents(open_source(str(tmp_path / "d")))
    [collection] = cache.glob("*.tars.npz")
    collection.write_bytes(collection.read_bytes()[:100])
    assert contents(open_source(str(tmp_path / "d"))) == before


def test_tars_indexed_by_processes_are_those_indexed_alone(tmp_path, cache, monkeypatch):
    numbered_tars(tmp_path / "d", 300)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("this process may have threads and a GPU"))
    parallel = open_source(str(tmp_path / "d"))
    indexes = {p.name: p.read_bytes() for p in (tmp_path / "d").glob("*.npz")}
    assert len(indexes) == 300
    for path in [*(tmp_path / "d").glob("*.npz"), *cache.iterdir()]:
        path.unlink()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    alone = open_source(str(tmp_path / "d"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").glob("*.npz")} == indexes
    assert contents(alone) == contents(parallel) and len(alone) == 900


def test_a_bad_tar_among_many_is_named_and_the_work_on_the_others_kept(tmp_path, monkeypatch):
    numbered_tars(tmp_path / "d", 60)
    (tmp_path / "d" / "00059.tar").write_bytes(b"text" * 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with refused(tmp_path / "d" / "00059.tar", nearest="unpack a compressed one first"):
        open_source(str(tmp_path / "d"))
    assert len(list((tmp_path / "d").glob("*.npz"))) == 59


def test_few_indexes_are_kept_and_what_travels_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "KEPT_IMAGES", 40)
    numbered_tars(tmp_path / "d", 20, images=10)
    source = open_source(str(tmp_path / "d"))
    assert [source.read(i) for i in (5, 199, 17, 100, 60, 5)][0] == source.read(5) == b"0,5 " * 6
    assert len(source._indexes) <= 4
    assert len(pickle.dumps(source)) < 20 * (len(str(tmp_path)) + 60) + 1500


def test_labels_are_counted_without_reading_an_index(tmp_path, monkeypatch):
    numbered_tars(tmp_path / "d", 4)
    numbered_tars(tmp_path / "one", 3, images=0, **{"same/1.jpg": b"x"})
    open_source(str(tmp_path / "d"))
    with monkeypatch.context() as patch:
        patch.setattr(tars.Tars, "_load", lambda *_: pytest.fail("an index was read"))
        assert open_source(str(tmp_path / "d")).has_labels
        unlabelled = open_source(str(tmp_path / "one"))
        assert not unlabelled.has_labels and unlabelled.labels is None and not unlabelled.classes
    assert open_source(str(tmp_path / "d")).labels.tolist() == [0, 0, 0, 1, 1, 1] * 2


def test_long_work_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tar_survey, "SURVEY_LOG_EVERY_S", 0)
    numbered_tars(tmp_path / "d", 2)
    open_source(str(tmp_path / "d"))
    assert capfd.readouterr().err == "Indexing tars: 1 of 2.\nIndexing tars: 2 of 2.\n"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Tars with gaps of every kind between images, and an empty one."""
    root = tmp_path_factory.mktemp("mixed")
    write_tar(
        root / "0.tar", {"1.jpg": b"a" * 10, "1.cls": b"1", "1.json": b"{}" * 400, "2.jpg": b"", "3.jpg": b"c" * 3000}
    )
    write_tar(root / "1.tar", {"only.txt": b"no image"})
    write_tar(root / "2.tar", {"far.bin": b"z" * 5000, "4.jpg": b"d", "far2.bin": b"z" * 5000, "5.jpg": b"e" * 700})
    write_tar(root / "3.tar", {f"{n}.jpg": b"%d" % n * n for n in range(9)})
    return root


@settings(deadline=None, max_examples=60)
@given(
    first=st.integers(0, 13),
    num=st.integers(0, 14),
    gap=st.sampled_from([1, 600, 2000, 1 << 16]),
    longest=st.sampled_from([1, 2000, 1 << 26]),
)
def test_a_run_is_its_images(mixed, first, num, gap, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tars, "GAP", gap)
        patch.setattr(tars, "LONGEST_READ", longest)
        source = open_source(str(mixed))
        num = min(num, len(source) - first)
        assert source.read_run(first, num) == [source.read(i) for i in range(first, first + num)]
        assert source.read_run(first, num) == super(tars.Tars, source).read_run(first, num)


def test_a_run_takes_few_reads_and_carries_its_errors(tmp_path, monkeypatch):
    write_tar(
        tmp_path / "0.tar",
        {**{f"{n}.jpg": b"x" * 1000 for n in range(20)}, "big.txt": b"t" * tars.GAP, "last.jpg": b"y"},
    )
    write_tar(tmp_path / "1.tar", {f"{n}.jpg": b"x" * 1000 for n in range(20)})
    source = open_source(f"{tmp_path}/*.tar")
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a[1:]) or pread(*a))
    assert len(source.read_run(5, 30)) == 30 and len(reads) == 3
    os.truncate(tmp_path / "1.tar", 600)
    run = source.read_run(20, 3)
    assert run[0] == b"y" and [error.problems[0].key for error in run[1:]] == 2 * [f"{tmp_path}/1.tar"]


@pytest.mark.parametrize(
    "path, means",
    [
        ("{08..11}.tar", ["08", "09", "10", "11"]),
        ("{8..10}.tar", ["8", "9", "10"]),
        ("{0..1}{a,b}.tar", ["0a", "0b", "1a", "1b"]),
        ("{a,b}.tar,c.tar", ["a", "b", "c"]),
        ("{0..1}*.tar", ["00", "01", "10"]),
    ],
)
def test_braces(tmp_path, monkeypatch, path, means):
    monkeypatch.chdir(tmp_path)
    for name in {*means, "zz"}:
        write_tar(tmp_path / f"{name}.tar", {"x.jpg": b"x"})
    source = open_source(path)
    assert [source.name(i) for i in range(len(source))] == [f"{name}.tar::x.jpg" for name in means]


def test_braces_that_cannot_be_meant(tmp_path):
    for path in ("{5..1}.tar", "{0..99999999999}.tar"):
        with refused("data.path", ANY):
            open_source(str(tmp_path / path))
    write_tar(tmp_path / "1.tar", {"1.jpg": b"x"})
    with refused(tmp_path / "2.tar", nearest=f"did you mean {tmp_path}/1.tar?"):
        open_source(f"{tmp_path}/{{1..2}}.tar")


# --------------------------------------------------------------------------------------------- tars that do harm


def pax(name: bytes, value: bytes) -> bytes:
    body = b"%s=%s\n" % (name, value)
    length = next(n for n in range(len(body), len(body) + 20) if len(b"%d %s" % (n, body)) == n)
    return b"%d %s" % (length, body)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_headers_that_claim_to_be_huge_take_no_memory(tmp_path):
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        with open(tmp_path / "x.tar", "wb") as file:
            file.write(header("x", 1 << 40, kind))
            file.truncate(1 << 32)  # really so long, as far as the file goes
        with refused(tmp_path / "x.tar", nearest="fetch it again or remove it"):
            open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("size", [b"-1024", b"999999999999", b"-1", b"1e99", b"0x10"])
def test_sizes_that_lie(tmp_path, size):
    record = pax(b"size", size)
    good = header("1.jpg", 512) + b"x" * 512
    data = good + header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0") + good + bytes(1024)
    path = touch(tmp_path / "x.tar", data)
    try:
        source = open_source(str(path))
        assert all(len(source.read(i)) <= 512 for i in range(len(source)))
    except DataError as error:
        assert error.problems[0].key == str(path)


def test_headers_that_nest_without_end(tmp_path):
    path = touch(tmp_path / "x.tar", header("x", 0, tarfile.GNUTYPE_LONGNAME) * 1900 + bytes(1024))
    with unreadable(path):
        open_source(str(path))


def test_members_whose_names_are_not_utf8(tmp_path):
    name = os.fsdecode(b"\xff/\xfe.jpg")
    folder = tmp_path / os.fsdecode(b"\xfd")
    folder.mkdir()
    path = write_tar(folder / "x.tar", {name: b"odd"})
    assert contents(open_source(str(path))) == [(f"{shown(path)}::{shown(name)}", b"odd", None)]


def test_sparse_members_are_left_out(tmp_path):
    record = (
        pax(b"GNU.sparse.major", b"1") + pax(b"GNU.sparse.minor", b"0") + pax(b"GNU.sparse.realsize", b"%d" % (1 << 40))
    )
    sparse = header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")
    sparse += header("s.jpg", 1024) + b"1\n0\n512\n".ljust(512, b"\0") + b"s" * 512
    path = touch(tmp_path / "x.tar", sparse + header("1.jpg", 512) + b"x" * 512 + bytes(1024))
    assert [d for _, d, _ in contents(open_source(str(path)))] == [b"x" * 512]


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_tar_gives_its_images_or_one_sentence(tmp_path_factory, data):
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    folder = tmp_path_factory.mktemp("damaged")
    path = write_tar(folder / "x.tar", {"a/1.jpg": b"one" * 300, "n" * 150 + ".jpg": b"two", "\xe9/3.jpg": b"3"}, form)
    raw = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
        begin = place // 512 * 512  # with a sum that is right, or nothing else would be looked at
        raw[begin + 148 : begin + 156] = b" " * 8
        raw[begin + 148 : begin + 156] = b"%06o\0 " % sum(raw[begin : begin + 512])
    path.write_bytes(raw)
    try:
        source = open_source(str(path))
        assert len(contents(source)) == len(source)
    except DataError as error:
        assert error.problems[0].key == str(path)


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
    no_tar = "give a folder of tars, or a glob such as shards/*.tar"
    for path, kind, nearest in [
        ("photo", "auto", f"did you mean {tmp_path}/photos?"),
        ("far/away/photos", "auto", f"the nearest folder there is: {tmp_path}"),
        ("photos", "auto", ""),
        ("photos", "tar", no_tar),
        ("*.tarx", "auto", no_tar),
        ("some.jpg", "auto", "give its folder, or a list file"),
        ("empty.txt", "auto", ""),
        ("wrong.txt", "auto", "relative paths are taken from the list's own folder"),
        ("not.tar", "auto", "unpack a compressed one first"),
        ("x.tar.gz", "auto", "unpack it to .tar files or a folder"),
        ("texts.tar", "auto", "it holds 1 other file"),
        ("both", "auto", "say what is meant by data.kind tar or data.kind folder"),
    ]:
        with refused(tmp_path / path, NOTHING, nearest):
            open_source(str(tmp_path / path), kind)
    for path, kind, key, value in [
        ("some.jpg", "folder", "data.kind", "folder"),
        ("photos", "webdataset", "data.kind", "webdataset"),
        ("photos", "list", "data.kind", "list"),
        ("mixed.txt", "auto", f"{tmp_path}/mixed.txt, line 2,", NOTHING),
        ("binary.bin", "auto", f"{tmp_path}/binary.bin, line 1,", NOTHING),
    ]:
        with refused(key, value):
            open_source(str(tmp_path / path), kind)
    with refused("data.path", NOTHING):
        open_source("")


def test_a_file_that_went_away(tmp_path):
    touch(tmp_path / "d" / "1.jpg")
    source = open_source(str(tmp_path / "d"))
    (tmp_path / "d" / "1.jpg").unlink()
    with unreadable(tmp_path / "d" / "1.jpg"):
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


def test_a_tar_replaced_while_in_use_gives_no_other_image(tmp_path):
    """By rename or in place, its index and itself held open or not: what was indexed is read, or said to have
    changed."""
    one, other = ({f"{n}.jpg": bytes([65 + n + shift]) * 1000 for n in range(4)} for shift in (0, 9))
    for way in ("renamed", "in place"):
        path = write_tar(tmp_path / f"{way}.tar", one)
        sources = [open_source(str(path)) for _ in range(3)]
        for source in sources[:2]:
            assert source.read(1) == b"B" * 1000
        sources[1]._open.cache_clear()
        write_tar(tmp_path / "new.tar", other)
        if way == "renamed":
            (tmp_path / "new.tar").rename(path)
        else:
            path.write_bytes((tmp_path / "new.tar").read_bytes())
        for source in sources:
            try:
                assert source.read(1) == b"B" * 1000
            except DataError as error:
                assert error.problems[0].nearest == "start again"


def test_no_member_takes_more_memory_than_an_image_may(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 5000)
    monkeypatch.setattr(tars, "LONGEST_READ", 2500)  # as in truth, far less
    source = open_source(
        str(write_tar(tmp_path / "x.tar", {"1.jpg": b"a" * 5000, "2.jpg": b"b" * 5001, "3.jpg": b"c"}))
    )
    first, second, third = source.read_run(0, 3)
    assert (first, third) == (b"a" * 5000, b"c") and "2.jpg cannot be read (its 5,001 bytes are more than" in str(
        second
    )


def test_what_is_named_like_an_index_and_is_none(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": b"one"})
    with open(f"{path}.index.npz", "wb") as file:
        np.save(file, np.zeros(3))
    assert open_source(str(path)).read(0) == b"one"
