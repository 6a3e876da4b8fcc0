"""`import seer_scale` as a notebook uses it: train, look, load, embed, and look at augmentations."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import seer_scale
from seer_scale.checkpoint import store
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import open_source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World
from seer_scale.methods.registry import build_method
from seer_scale.parallel import build_engine
from tests.e2e.runs import RECIPE

SMALL = RECIPE | {"train": RECIPE["train"] | {"total_samples": 32}, "knn": RECIPE["knn"] | {"enabled": False}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos) -> seer_scale.Run:
    return seer_scale.train(SMALL, photos, run_dir=tmp_path_factory.mktemp("api") / "run")


def test_the_face_has_what_it_says_and_costs_nothing_before():
    program = (
        "import sys, seer_scale\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(hasattr(seer_scale, name) and name in dir(seer_scale) for name in seer_scale.__all__)\n"
        "try: seer_scale.trian\n"
        "except AttributeError: print('fine')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "fine\n"


def test_a_run_goes_on_where_it_stopped_and_tells_of_itself(trained, photos):
    assert trained.samples_seen == 32 and trained.is_complete and trained.config.train.global_batch == 8
    longer = seer_scale.train(SMALL, photos, run_dir=trained.path, train={"total_samples": 48}, **{"optim.lr": 0.05})
    assert longer == trained and trained.samples_seen == 48
    lines = [r["samples_seen"] for r in trained.metrics() if "loss" in r]
    assert lines == sorted(lines) and lines[-1] == 48
    (event,) = [e for e in trained.events() if e["event"] == "resume"]
    assert "optim.lr" in event["text"]
    assert "<title>run</title>" in trained.report().read_text()


def test_in_a_thread_too(photos, tmp_path):
    """Where no signal can be taken, and none is."""
    made = []
    thread = threading.Thread(
        target=lambda: made.append(
            seer_scale.train(SMALL, photos, run_dir=tmp_path / "run", train={"total_samples": 8})
        )
    )
    thread.start()
    thread.join(120)
    assert made and made[0].samples_seen == 8


def test_what_cannot_be_is_told_at_once_as_data(tmp_path, photos):
    with pytest.raises(seer_scale.ConfigError) as caught:
        seer_scale.train("demo", tmp_path / "gone", run_dir=tmp_path / "run", optim={"lr": -1}, train={"presicion": 1})
    assert {p.key for p in caught.value.problems} == {"data.path", "optim.lr", "train.presicion"}
    assert not (tmp_path / "run").exists()
    with pytest.raises(seer_scale.ConfigError) as caught:
        seer_scale.train(SMALL, photos)
    assert caught.value.problems[0].key == "run.dir"
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(seer_scale.UserError):
            seer_scale.load(path)
    with pytest.raises(seer_scale.UserError) as caught:
        seer_scale.views("demo", np.zeros((3, 8, 8), np.float32))
    assert caught.value.problems[0].key == "image"
    with pytest.raises(seer_scale.UserError, match="is no run's folder"):
        seer_scale.Run(tmp_path / "gone").report()
    assert not (tmp_path / "gone").exists()
    train = seer_scale.train
    for wrong in (lambda: train("demo", run=3), lambda: train(None), lambda: seer_scale.views([], photos)):
        with pytest.raises(seer_scale.UserError):
            wrong()
    for image in (tmp_path, tmp_path / "gone.jpg", 3):
        with pytest.raises(seer_scale.UserError):
            seer_scale.views("demo", image)
    for key, value in {"batch": 0, "size": 0, "workers": -1}.items():
        with pytest.raises(seer_scale.UserError) as caught:
            seer_scale.embed(torch.nn.Flatten(), photos, **{key: value})
        assert caught.value.problems[0].key == key
    with pytest.raises(seer_scale.UserError, match="must be a module"):
        seer_scale.embed("runs/x", photos)


def test_what_is_loaded_is_what_the_run_computes(trained, photos):
    """The features of the engine that evaluates, to the bit; by any of its names."""
    model = trained.load()
    assert isinstance(model, torch.nn.Module) and not model.training
    newest = store.latest(trained.path / "checkpoints", World())
    config = trained.config
    engine = build_engine(build_method(config, World()), config, World(), loaded=("",))
    state = {k: v for k, v in engine.state().items() if k.startswith("model/")}
    store.load(newest, state, World(), prefixes="model/")
    engine.refresh()
    source, size = open_source(str(photos)), config.knn.size
    images = next(eval_batches(source, np.arange(8), size, batch=8, workers=0))[0]
    want = engine.encode(to_float(images)).features
    with torch.no_grad():
        assert torch.equal(model(to_float(images)), want)
    for other in (
        seer_scale.load(newest),
        seer_scale.load(trained.path, which=int(newest.name.removeprefix("samples-"))),
    ):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    with pytest.raises(seer_scale.UserError, match="has no checkpoint 7"):
        seer_scale.load(trained.path, which="7")
    found = seer_scale.embed(model, photos, batch=8, workers=0)
    torch.testing.assert_close(found.features[:8], want, rtol=1e-5, atol=1e-6)
    assert len(found.names) == len(found.features) == len(found.labels) == len(source)
    assert found.features.shape[1] == model.num_features
    two = seer_scale.embed(model, [source.name(3), source.name(0)], workers=0)
    torch.testing.assert_close(two.features, want[[3, 0]], rtol=1e-5, atol=1e-6)
    one = model.transform(source.name(3))
    torch.testing.assert_close(one, to_float(images)[3])
    torch.testing.assert_close(model.transform(source.read(3)), one)
    assert model.transform(Image.open(source.name(3))).shape == one.shape


def test_the_home_folder_is_expanded_as_a_shell_does(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").symlink_to(photos)
    home = seer_scale.train(SMALL, "~/photos", run_dir="~/home", train={"total_samples": 8})
    assert home.path == tmp_path / "home" and home.config.data.path == str(tmp_path / "photos")
    model, one = seer_scale.load("~/home"), "~/photos/class0/0.jpg"
    assert len(seer_scale.embed(model, "~/photos", workers=0).names) == 24
    assert seer_scale.embed(model, [one], workers=0).names == [str(tmp_path / "photos/class0/0.jpg")]
    assert seer_scale.views(SMALL, one).crops


def test_views_are_those_that_training_sees(photos):
    source = open_source(str(photos))
    sheet = seer_scale.views(SMALL, source.read(5), index=5, epoch=2)
    again = seer_scale.views(SMALL, source.name(5), index=5, epoch=2)
    other = seer_scale.views(SMALL, source.name(5), index=5, epoch=3)
    assert [c.shape[:3] for c in sheet.crops] == [(k["num"], k["size"], k["size"]) for k in SMALL["views"]["crops"]]
    assert all(np.array_equal(a, b) for a, b in zip(sheet.crops, again.crops))
    assert not all(np.array_equal(a, b) for a, b in zip(sheet.crops, other.crops))
    plain = seer_scale.views(SMALL, source.name(5), views={"jitter_p": 0, "grayscale_p": 0, "blur_p": 0, "flip": 0})
    assert plain.sheet().size[0] > 0 and plain._repr_png_()[:4] == b"\x89PNG"


def test_under_torchrun_every_process_calls_the_same(tmp_path, photos):
    (tmp_path / "recipe.json").write_text(json.dumps(SMALL))
    (tmp_path / "go.py").write_text(
        "import json, seer_scale\n"
        f"recipe, longer = json.load(open('recipe.json')), {{'total_samples': 16}}\n"
        f"run = seer_scale.train(recipe, {str(photos)!r}, run_dir='run', train=longer)\n"
        "print('seen', run.samples_seen, flush=True)\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "go.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("seen 16") == 2, done.stdout + done.stderr
    (start,) = [e for e in seer_scale.Run(tmp_path / "run").events() if e["event"] == "start"]
    assert start["ranks"] == 2
