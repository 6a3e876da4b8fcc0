"""A run goes on with the images it was trained on: in parts of the same names, sizes and order, mixed as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from seer_scale.config import Config, resolve
from seer_scale.errors import UserError
from seer_scale.training.data_history import open_data_history


def config(path: object, **data: object) -> Config:
    return resolve(
        {
            "data": {"path": str(path)} | data,
            "train": {"total_samples": 1000, "global_batch": 4},
            "swav": {"prototypes": [4]},
        },
        world_size=1,
    )


def folder(path: Path, num: int) -> str:
    path.mkdir()
    for i in range(num):
        (path / f"{i}.jpg").write_bytes(b"x")
    return str(path)


def manifest(path: Path, *parts: dict) -> Path:
    path.write_text(yaml.safe_dump({"parts": list(parts)}))
    return path


def saved(*where: object, **data: object) -> dict:
    """The data's state as a checkpoint keeps it."""
    return json.loads(json.dumps(open_data_history(config(*where, **data), Path("run"), None).state()))


def test_parts_are_those_of_the_checkpoint(tmp_path):
    a, b = ({"path": folder(tmp_path / name, num), "name": name} for name, num in (("a", 20), ("b", 30)))
    state = saved(manifest(tmp_path / "1.yaml", a, b))
    moved = {**a, "path": folder(tmp_path / "moved", 20)}
    assert len(open_data_history(config(manifest(tmp_path / "2.yaml", moved, b)), tmp_path, state).source) == 50
    fewer, more = ({"path": folder(tmp_path / f"{num}", num), "name": name} for name, num in (("a", 19), ("b", 31)))
    other = {"path": folder(tmp_path / "other", 20), "name": "c"}
    for parts, said in (
        ((b, a), "has b (30 images) where this run's checkpoint was trained on a (20 images)"),
        ((fewer, more), "has a (19 images) where this run's checkpoint was trained on a (20 images)"),
        ((other, b), "has c (20 images) where this run's checkpoint was trained on a (20 images)"),
        ((a, b, other), "has 70 images, but this run's checkpoint was trained on 50"),
    ):
        with pytest.raises(UserError) as error:
            open_data_history(config(manifest(tmp_path / "3.yaml", *parts)), tmp_path, state)
        assert said in str(error.value) and "seer-scale data refresh" in str(error.value)


def test_one_part_may_move(tmp_path):
    state = saved(folder(tmp_path / "here", 20))
    history = open_data_history(config(folder(tmp_path / "there", 20)), tmp_path, state)
    assert history.versions[-1].parts == ((str(tmp_path / "there"), 20),)
    del state["buffer"]  # a checkpoint of an earlier version
    assert len(open_data_history(config(tmp_path / "here"), tmp_path, state).source) == 20


def test_a_stream_is_mixed_as_before(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": b"%d" % i, "path": None} for i in range(50)]
    made = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    made.to_parquet(tmp_path / "x.parquet")
    given = dict(kind="stream", length=50)
    state = saved(tmp_path / "x.parquet", buffer=8, **given)
    assert len(open_data_history(config(tmp_path / "x.parquet", buffer=8, **given), tmp_path, state).source) == 50
    with pytest.raises(UserError, match="data.buffer is 9, but this run mixes its stream through 8 images"):
        open_data_history(config(tmp_path / "x.parquet", buffer=9, **given), tmp_path, state)
