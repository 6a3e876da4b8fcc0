"""seer-scale inspect CHECKPOINT: true sizes, no tensor read, and damage told."""

from __future__ import annotations

import json
import math

import pytest
import torch

from seer_scale import cli
from seer_scale.checkpoint import inspect, store
from seer_scale.data.transforms.views import eval_preprocessing
from seer_scale.distributed import World
from seer_scale.parallel.shard import Shard


@pytest.fixture
def saved(tmp_path):
    state = {
        "model/w": Shard(torch.randn(4000), 0, torch.Size([80, 50])),
        "model/running_mean": torch.zeros(50),
        "optim/w/momentum": torch.randn(80, 50),
        "scaler/scale": torch.tensor(2.0**16),
    }
    meta = {
        "samples_seen": 640,
        "step": 10,
        "method": {"name": "swav", "state": {}},
        "export": {"prefix": "backbone."},
        "preprocessing": eval_preprocessing(56) | {"training_sizes": [[48, 64], 24]},
        "engine": "zero3",
        "world_size": 4,
        "seer_scale": "0.1.0",
        "torch": "2.15",
        "time": 0.0,
        "config": {"model": {"name": "regnety_200mf"}, "train": {"total_samples": 1000}},
        "data": {"versions": []},
    }
    return store.save(tmp_path, state, meta, World())


def test_what_is_printed_is_what_is_there(saved, capsys):
    assert cli.main(["inspect", str(saved), "--tensors", "2"]) == 0
    text = capsys.readouterr().out
    assert "640 of 1,000, in 10 updates" in text and "regnety_200mf" in text and "by zero3 on 4 ranks" in text
    assert (
        "contents were not read" in text
        and text.index("model/w") < text.index("\n\n  model ")
        and "running_mean" not in text
    )
    assert cli.main(["inspect", str(saved), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["model"]["elements"] == 4050 and found["parts"]["optim"]["tensors"] == 1
    assert found["tensors"]["model/w"]["shape"] == [80, 50] and found["tensors"]["scaler/scale"]["dtype"] == "float32"
    assert found["problem"] is None and found["verified"] == "contents"
    assert found["bytes"] == sum(f.stat().st_size for f in saved.iterdir())
    for t in found["tensors"].values():
        assert t["bytes"] == 4 * math.prod(t["shape"])


def test_what_an_exporter_needs_is_told_and_no_network_is_built(saved, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a module is built"))
    assert cli.main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "swav, its backbone's tensors model/backbone.*" in text
    assert (
        "short side 64 (bilinear, antialiased), centre 56, mean 0.485 0.456 0.406" in text
        and "crops of 48x64, 24" in text
    )
    assert cli.main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"]["name"] == "swav" and found["export"]["prefix"] == "backbone."
    assert found["preprocessing"]["std"] == [0.229, 0.224, 0.225]


def test_no_tensor_is_read(saved):
    """All data is overwritten by noise of the same size: that shows only when it is asked for."""
    for file in saved.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert inspect.describe(saved)["problem"] is None
    assert "checksum" in inspect.describe(saved, verify=True)["problem"]


def test_damage_is_told_and_is_a_failure(saved, capsys):
    file = next(saved.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["inspect", str(saved)]) == 1
    assert f"no: it has {file.stat().st_size} bytes in {file.name}" in capsys.readouterr().out
    (saved / "tensors.json").write_bytes(b"?")
    assert cli.main(["inspect", str(saved)]) == 2
    assert "could not be read" in capsys.readouterr().err


def test_a_folder_that_is_none(saved, capsys):
    assert cli.main(["inspect", str(saved.parent)]) == 2
    assert f"did you mean {saved}?" in capsys.readouterr().err
    assert cli.main(["inspect", "nowhere"]) == 2
    assert "nowhere, but it does not exist" in capsys.readouterr().err
