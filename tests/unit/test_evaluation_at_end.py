"""What follows the last update: done once, by whichever start comes so far."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from seer_scale.checkpoint import store
from seer_scale.distributed import World
from seer_scale.observe.progress import Progress
from seer_scale.training import evaluation as module
from seer_scale.training.checkpointing import BestCheckpoint, known_scores
from seer_scale.training.clock import Clock
from seer_scale.training.evaluation import Evaluation
from seer_scale.training.monitors import Monitors


def evaluation(
    run_dir,
    told: list[str],
    *,
    world: World = World(),
    scores: dict[int, float] | None = None,
    patch_side=0,
    reconstruction_size=0,
    **config,
):
    """That of a run that has seen all of its 640 samples. scores: where the best checkpoint is kept, those known."""
    sections = {
        "run": SimpleNamespace(prototype_images=30, patch_images=8),
        "checkpoint": SimpleNamespace(background=True),
    }
    knn = SimpleNamespace(size=64, batch=4)
    labelled = SimpleNamespace(measurement=lambda c: "now", queries=None, query_indices=[1], bank_indices=[2])
    method = SimpleNamespace(anchors="prototypes", reconstruction_size=reconstruction_size)
    engine = SimpleNamespace(whole=lambda name: name, method=method, average_buffers=lambda: None)
    best = BestCheckpoint(run_dir, world, None, scores or {}, active=scores is not None)
    return Evaluation(
        config=SimpleNamespace(**sections | {"knn": knn} | config),
        world=world,
        run_dir=run_dir,
        engine=engine,
        clock=Clock(64, 640, 640, 10),
        labelled=labelled,
        health=None,
        begins_anew=True,
        probe=None,
        patch_side=patch_side,
        monitors=Monitors([], {}, {}, None),
        checkpoints=SimpleNamespace(save_in_step=lambda: told.append("saved")),
        best=best,
        log=SimpleNamespace(log=lambda row: None),
        log_event=lambda kind, text, **_: told.append(kind),
        progress=Progress(active=False),
        between_batches=lambda: None,
        workers=0,
    )


def at_end(
    run_dir, monkeypatch, *, images: int = 100, prototype_images: int = 30, patch_images: int = 8, patch_side: int = 0,
    stream: bool = False, reconstruction_size: int = 0,
) -> list[str]:  # fmt: skip
    """What it does and tells."""
    told: list[str] = []
    source = type("Images", (), {"__len__": lambda _: images, "is_stream": stream})()
    monkeypatch.setattr(module, "show_prototypes", lambda *_, num, **__: told.append(f"looked at {num}"))
    monkeypatch.setattr(Evaluation, "measure", lambda self, stage: told.append(stage))
    monkeypatch.setattr(module, "show_patches", lambda *_, num, **__: told.append(f"patches of {num}"))
    monkeypatch.setattr(module, "show_reconstructions", lambda *_, size, **__: told.append(f"reconstructed at {size}"))
    run = SimpleNamespace(prototype_images=prototype_images, patch_images=patch_images)
    knn, sizes = SimpleNamespace(size=64, batch=4, queries=""), dict(reconstruction_size=reconstruction_size)
    evaluation(run_dir, told, run=run, knn=knn, patch_side=patch_side, **sizes).finish(source)
    return told


def log(run_dir, *records: dict) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"samples_seen": 640} | r) + "\n" for r in records))


def test_what_a_start_before_has_done_is_not_done_again(tmp_path, monkeypatch):
    pictures = ["looked at 30", "prototypes"]
    assert at_end(tmp_path, monkeypatch) == ["after", *pictures]
    log(tmp_path, {"evaluation/stage": "after", "samples_seen": 320})
    assert at_end(tmp_path, monkeypatch) == ["after", *pictures]
    log(tmp_path, {"evaluation/stage": "after"})
    assert at_end(tmp_path, monkeypatch) == pictures
    log(tmp_path, {"evaluation/stage": "after", "knn/measurement": "now"})
    assert at_end(tmp_path, monkeypatch) == pictures
    log(tmp_path, {"evaluation/stage": "after", "knn/measurement": "then"})  # with other keys or images
    assert at_end(tmp_path, monkeypatch) == ["after", *pictures]
    log(tmp_path, {"event": "prototypes"})  # as with knn.enabled false
    assert at_end(tmp_path, monkeypatch) == ["after"]


def test_the_best_is_looked_for_among_figures_that_compare(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "published", lambda folder: [64, 128, 256, 704])
    marks = {64: {"knn/measurement": "then"}, 128: {"knn/measurement": "now"}, 256: {}, 704: {}}
    log(tmp_path, *({"samples_seen": n, "knn/top1": float(n)} | mark for n, mark in marks.items()))
    now = {"knn/measurement": "now"}
    found = known_scores(tmp_path, tmp_path, now, 640, World(), active=True)
    assert found == {128: 128.0, 256: 256.0}  # a log of old says nothing, and what is ahead was abandoned
    assert known_scores(tmp_path, tmp_path, now, 640, World(), active=False) == {}


@pytest.mark.parametrize("says", [True, False])
def test_whether_the_best_is_saved_is_rank_0_s_to_say(tmp_path, monkeypatch, says):
    """Ranks whose sums differ in the last digit, or that have heard of a failed save at another moment, still save
    together."""
    told: list[str] = []

    class Rank(World):
        def broadcast_object(self, value):
            return says

    for top1 in (9.0, 11.0):
        monkeypatch.setattr(module, "gather_features", lambda *_, **__: None)
        monkeypatch.setattr(module, "knn", lambda *_, **__: ({"knn/top1": top1}, None))  # noqa: B023
        evaluation(tmp_path, told, world=Rank(rank=1, size=2), scores={320: 10.0}).measure("during")
    assert told.count("saved") == 2 * says


def test_pictures_of_prototypes_are_bounded_and_can_be_left_out(tmp_path, monkeypatch):
    assert at_end(tmp_path, monkeypatch, images=20) == ["after", "looked at 20", "prototypes"]
    assert at_end(tmp_path, monkeypatch, prototype_images=0) == at_end(tmp_path, monkeypatch, stream=True) == ["after"]


def test_patches_are_shown_where_an_image_has_some(tmp_path, monkeypatch):
    before = ["after", "looked at 30", "prototypes"]
    shown = [*before, "patches of 8", "patches"]
    assert at_end(tmp_path, monkeypatch, patch_side=16) == shown  # 4 x 4 of 64 pixels
    assert at_end(tmp_path, monkeypatch, patch_side=32) == before  # 2 x 2
    assert at_end(tmp_path, monkeypatch, patch_side=16, patch_images=0) == before
    assert at_end(tmp_path, monkeypatch, patch_side=16, stream=True) == ["after"]
    assert at_end(tmp_path, monkeypatch, patch_side=16, images=5)[-2] == "patches of 5"
    log(tmp_path, {"event": "patches"})
    assert at_end(tmp_path, monkeypatch, patch_side=16) == before


def test_reconstructions_are_shown_of_a_method_that_makes_some(tmp_path, monkeypatch):
    before = ["after", "looked at 30", "prototypes"]
    assert at_end(tmp_path, monkeypatch, reconstruction_size=96) == [*before, "reconstructed at 96", "reconstructions"]
    assert at_end(tmp_path, monkeypatch, reconstruction_size=96, patch_images=0) == before
    assert at_end(tmp_path, monkeypatch, reconstruction_size=96, stream=True) == ["after"]
    log(tmp_path, {"event": "reconstructions"})
    assert at_end(tmp_path, monkeypatch, reconstruction_size=96) == before
