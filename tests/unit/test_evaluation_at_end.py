"""What follows the last update: done once, by whichever start comes so far."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from seer_scale.distributed import World
from seer_scale.observe.progress import Progress
from seer_scale.training import loop


def at_end(run_dir, monkeypatch, *, images: int = 100, prototype_images: int = 30, stream: bool = False) -> list[str]:
    """What a run that has seen all of its 640 samples does and tells."""
    told: list[str] = []
    made = object.__new__(loop.Trainer)
    run = SimpleNamespace(prototype_images=prototype_images)
    made.config = SimpleNamespace(run=run, knn=SimpleNamespace(size=16, batch=4))
    made.workers = 0
    made.world, made.run_dir, made.samples_seen, made.progress = World(), run_dir, 640, Progress(active=False)
    source = type("Images", (), {"__len__": lambda _: images, "is_stream": stream})()
    made.data_history = SimpleNamespace(source=source)
    made.engine = SimpleNamespace(whole=lambda name: name, method=SimpleNamespace(anchors="prototypes"))
    made._evaluate = told.append
    made.labelled = SimpleNamespace(measurement=lambda c: "now")
    monkeypatch.setattr(loop, "show_prototypes", lambda *_, num, **__: told.append(f"looked at {num}"))
    made._log_event = lambda kind, text, **_: told.append(kind)
    made._evaluate_at_end()
    return told


def log(run_dir, *records: dict) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"samples_seen": 640} | r) + "\n" for r in records))


def test_what_a_start_before_has_done_is_not_done_again(tmp_path, monkeypatch):
    pictures = ["looked at 30", "prototypes"]
    assert at_end(tmp_path, monkeypatch) == ["after", *pictures]
    log(tmp_path, {"knn/stage": "after", "samples_seen": 320})
    assert at_end(tmp_path, monkeypatch) == ["after", *pictures]
    log(tmp_path, {"knn/stage": "after"})
    assert at_end(tmp_path, monkeypatch) == pictures
    log(tmp_path, {"knn/stage": "after", "knn/measurement": "now"})
    assert at_end(tmp_path, monkeypatch) == pictures
    log(tmp_path, {"knn/stage": "after", "knn/measurement": "then"})  # with other keys or images
    assert at_end(tmp_path, monkeypatch) == ["after", *pictures]
    log(tmp_path, {"event": "prototypes"})  # as with knn.enabled false
    assert at_end(tmp_path, monkeypatch) == ["after"]


def test_the_best_is_looked_for_among_figures_that_compare(tmp_path, monkeypatch):
    made = object.__new__(loop.Trainer)
    made.world, made.run_dir, made.folder, made.samples_seen = World(), tmp_path, tmp_path, 640
    made.config = SimpleNamespace(knn=None, checkpoint=SimpleNamespace(keep_best=True))
    made.labelled = SimpleNamespace(measurement=lambda c: "now")
    monkeypatch.setattr(loop.store, "published", lambda folder: [64, 128, 256])
    marks = {64: {"knn/measurement": "then"}, 128: {"knn/measurement": "now"}, 256: {}}
    log(tmp_path, *({"samples_seen": n, "knn/top1": float(n)} | mark for n, mark in marks.items()))
    assert made._scored() == {128: 128.0, 256: 256.0}  # a log of old says nothing


@pytest.mark.parametrize("says", [True, False])
def test_whether_the_best_is_saved_is_rank_0_s_to_say(monkeypatch, says):
    """Ranks whose sums differ in the last digit, or that have heard of a failed save at another moment, still save
    together."""
    saved: list[bool] = []

    class Rank(World):
        def broadcast_object(self, value):
            return says

    for top1 in (9.0, 11.0):
        made = object.__new__(loop.Trainer)
        made.world, made.samples_seen, made.workers, made.progress = (
            Rank(rank=1, size=2),
            640,
            0,
            Progress(active=False),
        )
        made.config = SimpleNamespace(knn=None, checkpoint=SimpleNamespace(keep_best=True, background=True))
        made.labelled = SimpleNamespace(measurement=lambda c: "", query_indices=[1], bank_indices=[2])
        made.engine, made.log = SimpleNamespace(average_buffers=lambda: None), SimpleNamespace(log=lambda row: None)
        made._top1, made._log_event = {320: 10.0}, lambda *_, **__: None
        made._save = lambda in_background: saved.append(in_background)
        monkeypatch.setattr(loop, "knn", lambda *_, **__: ({"knn/top1": top1}, None))  # noqa: B023
        made._evaluate("during")
    assert saved == [True] * 2 * says


def test_pictures_of_prototypes_are_bounded_and_can_be_left_out(tmp_path, monkeypatch):
    assert at_end(tmp_path, monkeypatch, images=20) == ["after", "looked at 20", "prototypes"]
    assert at_end(tmp_path, monkeypatch, prototype_images=0) == at_end(tmp_path, monkeypatch, stream=True) == ["after"]
