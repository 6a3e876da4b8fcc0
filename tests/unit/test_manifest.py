"""Manifests: what they name, in whatever spelling, and what they may not."""

import io
from unittest.mock import ANY

import numpy as np
import pytest
import yaml
from PIL import Image

from seer_scale.data.sources import open_source
from seer_scale.data.sources.manifest import absolute, read_manifest
from seer_scale.errors import NOTHING
from tests.problems import refused


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), seed, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def parts(tmp_path):
    for n, name in enumerate(("a/cat", "a/dog", "b/dog", "b/emu")):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(picture(10 * n + i))
    return tmp_path


def write(folder, text):
    (folder / "m.yaml").write_text(text)
    return str(folder / "m.yaml")


def test_joined_parts(parts):
    source = open_source(write(parts, "parts: [a, {path: b, name: second}]"))
    assert len(source) == 12 and source.parts == ((str(parts / "a"), 6), ("second", 6))
    apart = [s for p in "ab" for s in [open_source(str(parts / p))]]
    assert [source.read(i) for i in range(12)] == [s.read(i) for s in apart for i in range(6)]
    assert source.read_run(4, 5) == [source.read(i) for i in range(4, 9)]
    assert [source.classes[c] for c in source.labels] == ["cat"] * 3 + ["dog"] * 6 + ["emu"] * 3
    assert source.name(7) == str(parts / "b/dog/1.png")


NEEDS_PARTS = "give a list `parts`, each with a path (kind and name are optional)"


@pytest.mark.parametrize("text, where, value, nearest", [
    ("parts: [m.yaml]", ", part 1: kind", "manifest", ANY),
    ("parts: [{path: a, kind: stream}]", ", part 1: kind", "stream", ANY),
    ("parts: [a, {path: b, exclude: x}]", ", part 2: exclude", "x", ANY),
    ("parts: [a, a/]", "", NOTHING, "give each path once, or different names"),
    ("parts: [{path: a, knd: x}]", ", part 1: knd", NOTHING, "did you mean kind?"),
    ("parts: [{name: a}]", ", part 1", NOTHING, ANY),
    ("parts: []", "", NOTHING, NEEDS_PARTS),
    ("a: b: c", "", NOTHING, ""),
    ("[1, 2]", "", NOTHING, NEEDS_PARTS),
    ("{parts: [a], more: 1}", ": more", NOTHING, ANY),
])  # fmt: skip
def test_what_is_no_manifest(parts, text, where, value, nearest):
    path = write(parts, text)
    with refused(f"{path}{where}", value, nearest):
        open_source(path)


def test_a_part_that_cannot_be_read_is_named(parts):
    path = write(parts, "parts: [c]")
    with refused(parts / "c") as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}, part {parts}/c: ")


def test_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with,comma").mkdir()
    same = {absolute("x"), absolute("./x/"), absolute("y/../x"), absolute("../x", str(tmp_path / "y"))}
    assert same == {str(tmp_path / "x")}
    assert absolute("x/{a,b}.tar, y.tar") == f"{tmp_path}/x/{{a,b}}.tar,{tmp_path}/y.tar"
    assert absolute("with,comma") == str(tmp_path / "with,comma")
    assert absolute("s3://a/b,c/d.tar") == "s3://a/b,c/d.tar" and absolute("hf:a/b") == "hf:a/b"
    assert [p.path for p in read_manifest(write(tmp_path, "parts: ['x/*.tar,z.tar', 'https://a/b.tar']"))] == [
        f"{tmp_path}/x/*.tar,{tmp_path}/z.tar",
        "https://a/b.tar",
    ]


def test_a_split_and_a_column_of_a_part(tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = lambda tag: [{"bytes": b"%s %d" % (tag, i), "path": None} for i in range(3)]  # noqa: E731
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    made = {
        s: datasets.Dataset.from_dict({"left": cells(b"l" + s.encode()), "right": cells(b"r" + s.encode())}, features)
        for s in ("train", "test")
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "x")
    part = {"path": "x", "kind": "hub", "image_key": "right"}
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"parts": [part | {"split": "test"}, part | {"split": "train"}]}))
    source = open_source(str(path))
    assert [source.read(i) for i in (0, 5)] == [b"rtest 0", b"rtrain 2"]
    assert [name for name, _ in source.parts] == [f"{tmp_path}/x[test]", f"{tmp_path}/x[train]"]
    path.write_text(yaml.safe_dump({"parts": [{"path": "x", "split": "test"}]}))
    with refused(f"{path}, part 1: split", "test", "add kind: hub, or leave it out"):
        open_source(str(path))
