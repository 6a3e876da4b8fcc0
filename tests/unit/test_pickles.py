"""Files of torch.save are read without running anything in them, and claim nothing that they do not hold."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from seer_scale.errors import UserError
from seer_scale.interop import pickles
from seer_scale.interop.pickles import Inert, StoredTensor, read_pickle

RUN = []
"""What a hostile file has called in this process."""


def called(*args):
    RUN.append(args)
    return dict(*args)


class AttrDict(dict):
    """As the configurations beside VISSL's weights."""

    def __setstate__(self, state):
        RUN.append(state)


class ByReduce:
    def __reduce__(self):
        return called, ([("a", 1)],)


class ByState:
    def __reduce__(self):
        return collections.OrderedDict, (), {"x": 1}


class ByState2:
    """As `ByReduce`, and then a state."""

    def __reduce__(self):
        return AttrDict, (), {"y": os.system}


class BySystem:
    def __reduce__(self):
        return os.system, ("echo ran >&2",)


def content():
    base = torch.arange(24.0)
    return {
        "weights": collections.OrderedDict(w=base[4:16].view(3, 4).t(), same=base, half=torch.ones(2).half()),
        "parameter": torch.nn.Parameter(torch.full((2, 1), 3.0)),
        "counts": [1, 2.5, "three", None, True, (4, 5)],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "config": AttrDict(a=1),
        "hostile": [ByReduce(), ByState(), ByState2(), BySystem()],
        "set": {1, 2},
        "device": torch.device("cpu"),
        (1, 2): "an odd key",
    }


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_and_plain_containers_come_out_and_nothing_runs(is_zip, protocol, tmp_path, capfd):
    path = tmp_path / "x.pth"
    torch.save(content(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    RUN.clear()
    modules = set(sys.modules)
    found = read_pickle(path)
    assert RUN == [] and set(sys.modules) == modules and "ran" not in capfd.readouterr().err
    wanted = content()
    for name, tensor in wanted["weights"].items():
        stored = found["weights"][name]
        assert isinstance(stored, StoredTensor) and stored.shape == tensor.shape
        read = stored.read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor) and read.is_contiguous()
    for name in ("parameter", "empty", "scalar", "brain"):
        assert torch.equal(found[name].read(), wanted[name].detach())
    assert found["counts"] == wanted["counts"]
    kinds = [type(value) for value in found["hostile"]]
    assert kinds == [Inert, dict, Inert, Inert] and isinstance(found["config"], Inert) and (1, 2) not in found


def archive(path: Path, program: bytes, data: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as out:
        out.writestr("x/data.pkl", program)
        out.writestr("x/byteorder", "little")
        for key, content in (data or {}).items():
            out.writestr(f"x/data/{key}", content)
    return path


def legacy(path: Path, program: bytes, keys: list[str], data: bytes) -> Path:
    first = [pickles.LEGACY_MAGIC, pickles.LEGACY_PROTOCOL, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in first) + program + pickle.dumps(keys, 2) + data)
    return path


class Word:
    """A global of that name, in a pickle."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Program(pickle._Pickler):
    """Writes tuples that begin with "storage" as persistent ids, and Words as globals."""

    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    def save_word(self, word):
        self.write(pickle.GLOBAL + f"{word.module}\n{word.name}\n".encode())

    dispatch = pickle._Pickler.dispatch | {Word: save_word}


def program(*, numel=4, shape=(2, 2), stride=(2, 1), offset=0, key="0", view=()) -> bytes:
    """{"w": a tensor}, as torch writes it."""
    out = io.BytesIO()
    pickler = Program(out, 2)
    storage = ("storage", Word("torch", "FloatStorage"), key, "cpu", numel, *view)
    out.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
    for piece in ("w", Word("torch._utils", "_rebuild_tensor_v2")):
        pickler.save(piece)
    pickler.save((storage, offset, shape, stride, False, None))
    out.write(pickle.REDUCE + pickle.SETITEM + pickle.STOP)
    return out.getvalue()


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def test_what_these_tests_write_is_what_torch_writes(tmp_path):
    for path in (
        archive(tmp_path / "zip", program(), {"0": FOUR}),
        legacy(tmp_path / "legacy", program(view=(None,)), ["0"], struct.pack("<q", 4) + FOUR),
    ):
        assert read_pickle(path)["w"].read().tolist() == [[1, 2], [3, 4]]


CLAIMS = {
    "a storage of more than the file": {"numel": 1 << 50, "shape": (1 << 49, 2)},
    "a storage of more than its data": {"numel": 8},
    "a view past its end": {"offset": 1},
    "a row past its end": {"stride": (3, 1)},
    "a negative offset": {"offset": -1},
    "a negative stride": {"stride": (-2, 1)},
    "a negative size": {"shape": (-2, -2)},
    "one element many times": {"shape": (1 << 40,), "stride": (0,)},
    "sizes whose product overflows": {"shape": (1 << 33, 1 << 33), "stride": (0, 0)},
    "data that is not there": {"key": "1"},
    "data of another place": {"key": "../../x"},
    "half a shape": {"stride": (1,)},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_claims_of_what_is_not_there_are_refused(claim, is_zip, tmp_path):
    if is_zip:
        path = archive(tmp_path / "x", program(**claim), {"0": FOUR})
    else:
        path = legacy(tmp_path / "x", program(**claim, view=(None,)), ["0"], struct.pack("<q", 4) + FOUR)
    with pytest.raises(UserError) as caught:
        read_pickle(path)
    assert caught.value.problems[0].key == str(path)


def raw(*pieces: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(pieces) + pickle.STOP


SYSTEM = pickle.GLOBAL + b"os\nsystem\n"
PROGRAMS = {
    "persistent id of a line": raw(pickle.PERSID, b"os.system\n"),
    "persistent id of a callable": raw(SYSTEM, pickle.BINPERSID),
    "extension": raw(pickle.EXT1, b"\x01"),
    "too deep": raw(pickle.MARK * 3),
    "nothing on the stack": raw(pickle.REDUCE),
    "bytes": raw(pickle.BYTEARRAY8, struct.pack("<Q", 1 << 40)),
    "text": raw(pickle.BINUNICODE8, struct.pack("<Q", 1 << 40)),
    "frame": raw(pickle.FRAME, struct.pack("<Q", 1 << 60)),
    "state of a callable": raw(SYSTEM, pickle.EMPTY_DICT, pickle.BUILD, pickle.EMPTY_TUPLE, pickle.BUILD, pickle.POP),
    "no end": raw()[:-1],
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_are_none_of_torch_save_are_refused(name, is_zip, tmp_path):
    path = tmp_path / "x"
    archive(path, PROGRAMS[name]) if is_zip else legacy(path, PROGRAMS[name], [], b"")
    with pytest.raises(UserError) as caught:
        read_pickle(path)
    assert caught.value.problems[0].key == str(path)


def test_every_instruction_that_could_call_makes_something_inert(tmp_path, capfd):
    calls = [
        raw(pickle.MARK, b"S'echo ran >&2'\n", pickle.INST, b"os\nsystem\n"),
        raw(pickle.MARK, SYSTEM, b"S'echo ran >&2'\n", pickle.OBJ),
        raw(SYSTEM, b"S'echo ran >&2'\n", pickle.TUPLE1, pickle.REDUCE),
        raw(SYSTEM, b"S'echo ran >&2'\n", pickle.TUPLE1, pickle.NEWOBJ),
        raw(SYSTEM, b"S'echo ran >&2'\n", pickle.TUPLE1, pickle.EMPTY_DICT, pickle.NEWOBJ_EX),
        raw(b"S'os'\nS'system'\n", pickle.STACK_GLOBAL, b"S'echo ran >&2'\n", pickle.TUPLE1, pickle.REDUCE),
        raw(b"S'torch'\nS'os.system'\n", pickle.STACK_GLOBAL, b"S'echo ran >&2'\n", pickle.TUPLE1, pickle.REDUCE),
        raw(pickle.MARK, b"S'echo ran >&2'\n", pickle.FROZENSET),
    ]
    for i, called in enumerate(calls):
        found = read_pickle(archive(tmp_path / f"{i}", called))
        assert type(found) is Inert and not found, i
    assert "ran" not in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_a_key_that_takes_for_ever_to_hash_is_not_hashed(tmp_path):
    nested = raw(pickle.EMPTY_DICT, pickle.NONE, *[pickle.DUP + pickle.TUPLE2] * 200, pickle.NONE, pickle.SETITEM)
    assert read_pickle(archive(tmp_path / "x", nested)) == {}


def test_what_is_cut_off_compressed_or_no_such_file_is_refused(tmp_path):
    whole = tmp_path / "whole"
    for is_zip in (True, False):
        torch.save(content(), whole, _use_new_zipfile_serialization=is_zip)
        bytes_ = whole.read_bytes()
        for i in range(1, 10):
            (tmp_path / "cut").write_bytes(bytes_[: len(bytes_) * i // 10])
            with pytest.raises(UserError):
                read_pickle(tmp_path / "cut")
    archive(tmp_path / "small", program(), {"0": FOUR}, compression=zipfile.ZIP_DEFLATED)
    (tmp_path / "text").write_text("weights")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    for name in ("text", "empty", "photo.jpg"):
        with pytest.raises(UserError, match=f"{name} is no file of weights; give one of torch.save or safetensors"):
            read_pickle(tmp_path / name)
    for name in ("small", "gone", "."):
        with pytest.raises(UserError):
            read_pickle(tmp_path / name)
