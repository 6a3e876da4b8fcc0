"""A run goes on with the images it was trained on: in parts of the same names, sizes and order, mixed as before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from seer_scale.config import Config, resolve
from seer_scale.data.sources import Source, open_source
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.training.components import list_images
from seer_scale.training.data_history import ask_refresh, open_data_history, training_images
from seer_scale.training.stop import StopRequest


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


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_fewer_images_are_among_more_and_follow_the_seed(tmp_path):
    path = folder(tmp_path / "a", 50)

    def drawn(most: int, seed: int = 0) -> list[str]:
        given = config(path, max_images=most)
        return names(training_images(dataclasses.replace(given, run=dataclasses.replace(given.run, seed=seed))))

    assert len(drawn(5)) == 5 and set(drawn(5)) < set(drawn(10)) < set(drawn(49)) < set(drawn(50)) == set(drawn(0))
    assert drawn(10) == drawn(10) == sorted(drawn(10), key=drawn(0).index) != drawn(10, seed=1)
    assert set(drawn(10)) != set(drawn(0)[:10])
    with pytest.raises(UserError, match=r"data.max_images is 51, but .* has 50 images; nearest: 50"):
        drawn(51)
    history = open_data_history(config(path, max_images=8), tmp_path, None)
    seen = {i for at in (0, 4) for rank in range(2) for i in history.sampler.slots(at, rank, 2)[2].tolist()}
    assert seen == set(range(8))  # of an epoch, by two ranks


def test_kNN_votes_by_all_images_where_some_are_trained_on(photos, tmp_path):
    history, labelled = list_images(config(photos, max_images=6), tmp_path, World(), StopRequest(), None)
    assert labelled is not None and len(history.source) == 6 and len(labelled.bank) == 24
    assert history.source.classes == labelled.bank.classes and history.source.has_labels


def test_a_run_on_some_images_goes_on_with_these(tmp_path):
    path = folder(tmp_path / "a", 50)
    state = saved(path, max_images=8)
    assert names(open_data_history(config(path, max_images=8), tmp_path, state).source) == names(
        training_images(config(path, max_images=8))
    )
    more = folder(tmp_path / "b", 51)
    for given, before, said in (
        (config(path, max_images=9), state, "was trained on 8 drawn from 50 images, and now it would take 9 of 50"),
        (config(path), state, "was trained on 8 drawn from 50 images, and now it would take all"),
        (config(path, max_images=50), saved(path), "was trained on all 50 images, and now it would take 50 of 50"),
        (config(more, max_images=8), state, "was trained on 8 drawn from 50 images, and now it would take 8 of 51"),
    ):
        with pytest.raises(UserError, match=said):
            open_data_history(given, tmp_path, before)
    part = manifest(tmp_path / "1.yaml", {"path": path})
    with pytest.raises(UserError, match="data.max_images is 8, but a run on some of its images takes no others"):
        ask_refresh(tmp_path, str(part), state)
    history = open_data_history(config(path, max_images=8), tmp_path, None)
    with pytest.raises(UserError, match="takes no others by a refresh"):
        history.refreshed(open_source(str(part)), 1, 4)


def test_a_stream_is_not_drawn_from(tmp_path):
    with pytest.raises(UserError, match="data.max_images is 5, but has no effect without a data.kind other than"):
        config("hf:a/b", kind="stream", max_images=5)
