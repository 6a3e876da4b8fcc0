"""Exported weights on the disk: whole, by our names, and what is wrong with a file is one sentence."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from seer_scale.errors import UserError
from seer_scale.interop import artefact
from seer_scale.interop.artefact import ABOUT, About, Artefact, TensorInfo, write_artefact

TENSORS = {
    "stem.conv.weight": torch.randn(4, 3, 3, 3),
    "s1.b1.conv1.bn.num_batches_tracked": torch.tensor(3),
    "s1.b1.se.fc1.bias": torch.randn(5).bfloat16(),
    "s1.b1.conv1.bn.bias": torch.randn(1),
    "s1.b1.conv2.bn.num_batches_tracked": torch.tensor(2**40),
    "s4.b2.downsample.bn.running_var": torch.zeros(0),
    "head/0.weight": torch.randn(2, 2).half(),
}
PREPROCESSING = {"size": 32}
NAMED = {"name": "regnety_200mf"}


def write(out, about=None, tensors=TENSORS, **options):
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()}
    about = about or About("safetensors", NAMED, PREPROCESSING, {"samples_seen": 7})
    write_artefact(out, about, infos, tensors.__getitem__, **options)


def test_a_file_is_what_safetensors_itself_reads(tmp_path):
    write(tmp_path / "x.safetensors")
    theirs = load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == TENSORS.keys() and all(torch.equal(theirs[n], t) for n, t in TENSORS.items())
    assert all(theirs[n].dtype == t.dtype for n, t in TENSORS.items())
    found = Artefact(tmp_path / "x.safetensors")
    assert found.about.origin["samples_seen"] == 7 and found.about.model == NAMED
    assert all(torch.equal(found.read(n), t) for n, t in TENSORS.items())


def test_shards_hold_no_more_than_asked_and_every_tensor_once(tmp_path):
    write(tmp_path, max_shard_bytes=440)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 and not (tmp_path / artefact.WEIGHTS).exists()
    assert [sum(t.nbytes for t in load_file(f).values()) for f in files] == [440, 30]
    found = Artefact(tmp_path)
    assert found.tensors.keys() == TENSORS.keys() and all(torch.equal(found.read(n), t) for n, t in TENSORS.items())


def test_what_is_no_artefact_is_told_in_one_sentence(tmp_path):
    whole = tmp_path / "x.safetensors"
    write(whole)
    content = whole.read_bytes()
    good = About("safetensors", NAMED, PREPROCESSING).to_json()
    as_text = {
        "empty": b"",
        "short": content[:-1],
        "header": (2**60).to_bytes(8, "little") + content[8:],
        "zip": b"PK\x03\x04" + bytes(100),
    }
    for name, wrong in as_text.items():
        (tmp_path / f"{name}.safetensors").write_bytes(wrong)
    metadata = {
        "foreign": None,
        "not_json": {ABOUT: "{"},
        "no_dict": {ABOUT: "[]"},
        "newer": {ABOUT: json.dumps(json.loads(good) | {"version": 99})},
        "more": {ABOUT: json.dumps(json.loads(good) | {"more": 1})},
        "nameless": {ABOUT: json.dumps(json.loads(good) | {"model": {}})},
        "format": {ABOUT: json.dumps(json.loads(good) | {"format": "keras"})},
    }
    for name, about in metadata.items():
        save_file({"stem.conv.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", about)
    timm = {ABOUT: About("timm", NAMED, PREPROCESSING).to_json()}
    save_file({"somewhere.else": torch.zeros(1)}, tmp_path / "names.safetensors", timm)
    for name in [*as_text, *metadata, "names", "gone"]:
        with pytest.raises(UserError) as caught:
            Artefact(tmp_path / f"{name}.safetensors")
        (problem,) = caught.value.problems
        assert name in problem.key and "\n" not in str(problem), name
    for index in (
        b"{",
        b"[]",
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "../x.safetensors"}}',
        b'{"weight_map": {"a": 1}}',
    ):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / artefact.WEIGHTS_INDEX).write_bytes(index)
        with pytest.raises(UserError, match="is damaged"):
            Artefact(folder)


def test_names_of_any_bytes(tmp_path):
    """safetensors itself takes UTF-8 alone."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 \x1b[31m")
    folder.mkdir()
    write(folder / "x.safetensors")
    found = Artefact(folder / "x.safetensors")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())
