"""List files against a plain reading of them, whatever the lines; and what is kept of a long one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.data.sources import left_out, lists, open_source
from seer_scale.errors import DataError
from tests.problems import refused

NAMES = st.text(st.sampled_from("ab /é.\t#"), max_size=6)


@settings(deadline=None, max_examples=200)
@given(
    lines=st.lists(NAMES, max_size=40), end=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), mark=st.booleans(),
    labelled=st.booleans(), stride=st.integers(1, 5), chunk=st.integers(1, 30),
)  # fmt: skip
def test_lines_are_those_of_a_plain_reading(tmp_path_factory, lines, end, last, mark, labelled, stride, chunk):
    lines = [line.replace("\t", "") for line in lines]
    lines = [line.strip() if line.strip().startswith("#") else line for line in lines]
    lines = [f"{line}\t{len(line) % 3}" if labelled and line.strip() else line for line in lines]
    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_bytes((lists.MARK if mark else b"") + (end.join(lines) + end * last).encode())
    there = [line for line in lines if not line.startswith("#")]  # of lines that begin so, none names a file
    expected = [line.partition("\t") for line in there if line.partition("\t")[0].strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "STRIDE", stride)
        patch.setattr(lists, "LIST_CHUNK_BYTES", chunk)
        for question in ("exists", "isfile"):
            patch.setattr(os.path, question, lambda name: not name.startswith(f"{path.parent}/#"))
        if not expected:
            with refused(path):
                lists.ListFile(str(path))
            return
        source = pickle.loads(pickle.dumps(lists.ListFile(str(path))))
        assert [source.name(i) for i in range(len(source))] == [
            os.path.join(path.parent, name) for name, *_ in expected
        ]
        assert source.has_labels == labelled
        assert source.left_out.get(left_out.COMMENTS, 0) == len(lines) - len(there)
        if labelled:
            assert [source.classes[n] for n in source.labels] == [label for *_, label in expected]


@pytest.mark.parametrize(
    "text, names, labels, told",
    [
        ("a.jpg\tcat\tsome words\nb.jpg\tdog\t\n", "ab", ["cat", "dog"], {"lines with further columns": 2}),
        ("a.jpg\tcat\nb.jpg\t\na.jpg\t  \r\n", "aba", ["cat", None, None], {}),
        ("a.jpg\t\nb.jpg\t\n", "ab", [None, None], {}),
        ("\nfile_name\tclass\na.jpg\tcat\n", "a", ["cat"], {"header lines": 1}),
        ("Path\na.jpg\nb.jpg\n", "ab", [None, None], {"header lines": 1}),
        ("File Name\tClass\na.jpg\tcat\n", "a", ["cat"], {left_out.HEADERS: 1}),
        ("#path\tlabel\na.jpg\tcat\n", "a", ["cat"], {left_out.HEADERS: 1}),
        ("picture of it\nb.jpg\ngone.jpg\n#1.jpg\n", "b?#", [None] * 3, {left_out.HEADERS: 1}),
        ("gone.jpg\na.jpg\n", "?a", [None, None], {}),  # an image that is gone, and no name of a column
        (
            "# my list\n\n#a.jpg\tcat\nImage-File\tclass\na.jpg\tcat\n#1.jpg\tdog\n# b.jpg\n",
            "a#",
            ["cat", "dog"],
            {left_out.HEADERS: 1, left_out.COMMENTS: 3},
        ),
        (
            '"filename"\t"class"\n"a.jpg"\t"a ""cat"""\n"q"\tdog\nb.jpg\t""\n',
            "aqb",
            ['a "cat"', "dog", None],
            {left_out.HEADERS: 1},
        ),
        ("a.jpg\tcat\nb.jpg\tdog\n#gone\tcow", "ab", ["cat", "dog"], {left_out.COMMENTS: 1}),
        ("images\na.jpg\n", "a", [None], {left_out.HEADERS: 1}),  # there is a folder of this name
        ("image\na.jpg\n", "ia", [None, None], {}),  # there is a file of this name
        ("a.jpg  \nb.jpg \tdog \n".replace("a.jpg  ", " a.jpg  \tcat"), "ab", ["cat", "dog"], {}),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_lines_are_read_as_readers_of_tables_do(tmp_path, monkeypatch, text, names, labels, told, chunk):
    monkeypatch.setattr(lists, "LIST_CHUNK_BYTES", chunk)
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "image", "#1.jpg", '"q"'):
        (tmp_path / name).write_text(name.strip('"')[0])
    (tmp_path / "list.txt").write_bytes(text.encode())
    source = open_source(str(tmp_path / "list.txt"))
    found = (source.read_run(i, 1)[0] for i in range(len(source)))
    assert "".join("?" if isinstance(data, DataError) else data.decode() for data in found) == names
    assert [None if (n := source.label(i)) is None else source.classes[n] for i in range(len(source))] == labels
    assert source.has_labels == (None not in labels) and source.left_out == told


def test_a_list_of_lines_that_cannot_be_read_says_how_many_were_looked_at(tmp_path):
    (tmp_path / "list.txt").write_text("gone.jpg\n" * 1000)
    with refused(tmp_path / "list.txt", nearest="relative paths are taken from the list's own folder") as error:
        open_source(str(tmp_path / "list.txt"))
    assert "of 100 lines looked at, spread over its 1,000" in error.value.problems[0].rule
    (tmp_path / "a.jpg").touch()
    (tmp_path / "list.csv").write_text("a.jpg,cat\n" * 3)
    (tmp_path / "blanks.txt").write_text("a.jpg  cat\n" * 3)
    with refused(tmp_path / "blanks.txt", nearest="its columns must be parted by tabs, not spaces"):
        open_source(str(tmp_path / "blanks.txt"))
    (tmp_path / "home.txt").write_text("~/a.jpg\n")
    with refused(tmp_path / "home.txt", nearest="~ is not expanded: write the whole path"):
        open_source(str(tmp_path / "home.txt"))
    with refused(tmp_path / "list.csv", nearest="its columns must be parted by tabs, not commas"):
        open_source(str(tmp_path / "list.csv"))
    (tmp_path / "list.txt").write_text("# a\n# b")
    with refused(tmp_path / "list.txt", nearest="it holds 2 lines that begin with # (they name no file)"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "list.tsv").write_text("label\tpath\n" + "cat\tgone.jpg\ncat\ta.jpg\n" * 3)
    with refused(tmp_path / "list.tsv", nearest="its columns must be a path and then a label, in this order"):
        open_source(str(tmp_path / "list.tsv"))
    (tmp_path / "list.txt").write_text("gone.jpg\n" * 500 + "a.jpg\n" * 500)
    assert len(open_source(str(tmp_path / "list.txt"))) == 1000


def test_a_label_missing_far_down_is_named_by_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "LIST_CHUNK_BYTES", 64)
    (tmp_path / "a.jpg").touch()
    text = "\n" + "a.jpg\tx\n" * 1000
    (tmp_path / "list.txt").write_text(text + "a.jpg\n")
    with refused(f"{tmp_path}/list.txt, line 1002,", nearest="give every line a tab and a label, or none"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text(text + "a\0.jpg\n")
    with refused(f"{tmp_path}/list.txt, line 1002,", nearest=""):
        open_source(str(tmp_path / "list.txt"))


def test_a_long_list_takes_little_memory_and_its_index_is_kept(tmp_path, monkeypatch):
    n = 300_000
    (tmp_path / "000000000.jpg").touch()
    digits = np.arange(n)[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
    text = np.concatenate([digits, np.broadcast_to(np.frombuffer(b".jpg\n", np.uint8), (n, 5))], 1).astype(np.uint8)
    path = tmp_path / "list.txt"
    path.write_bytes(text.tobytes())
    monkeypatch.setattr(lists, "CACHED_FROM", 1)
    source = open_source(str(path))
    assert len(pickle.dumps(source)) < n / 64 * 8 + 2000  # 13 MB for 10^8
    assert all(Path(source.name(i)).name == f"{i:09d}.jpg" for i in (0, 63, 64, 123_456, n - 1))
    monkeypatch.setattr(lists, "_scan", lambda *_: pytest.fail("scanned again"))
    assert len(open_source(str(path))) == n


def test_a_list_cut_while_it_is_used_is_no_crash(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "list.txt").write_text("a.jpg\n" * 100)
    source = open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with refused(tmp_path / "list.txt", nearest="start again"):
        source.read(99)
