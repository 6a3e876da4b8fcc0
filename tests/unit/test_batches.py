"""A rank's batches go on from where the run stands, over to other data, and say whether a fault may pass."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml

from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.errors import DataError
from seer_scale.training import batches as module
from seer_scale.training.batches import Batches
from seer_scale.training.clock import Clock
from seer_scale.training.data_history import manifest_of, open_data_history

CROPS = {"views": {"crops": [{"num": 2, "size": 16}]}, "swav": {"prototypes": [4]}}


def made(run_dir, photos, **given) -> tuple[Batches, Clock, list[str]]:
    config = resolve(CROPS | {"data": {"path": str(photos)}, "train": {"total_samples": 16, "global_batch": 4}})
    told: list[str] = []
    clock = Clock(4, config.end())
    events = SimpleNamespace(
        log_event=lambda kind, text, **_: told.append(kind), log_event_of_rank=lambda kind, text: told.append(kind)
    )
    watchdog = SimpleNamespace(patient=lambda seconds: nullcontext())
    history = open_data_history(config, run_dir, None)
    return Batches(config, World(), run_dir, history, clock, events, watchdog, workers=0, **given), clock, told


def give_manifest(run_dir, number: int, *parts: object) -> None:
    path = manifest_of(run_dir, number)
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"parts": [{"path": str(part), "name": str(part)} for part in parts]}))


def test_they_follow_the_clock_to_its_end(tmp_path, photos):
    batches, clock, _ = made(tmp_path, photos)
    seen = []
    with batches:
        while batch := batches.next():
            seen.append(batch.samples_seen)
            clock.advance()
            assert batches.waited_s > 0
    assert seen == [0, 4, 8, 12] and clock.at_end and batches.epoch == pytest.approx(16 / 24)


def test_they_go_over_to_other_data_where_the_clock_stands(tmp_path, photos):
    batches, clock, told = made(tmp_path, photos)
    with batches:
        before = batches.next()
        clock.advance()
        give_manifest(tmp_path, 1, photos, photos / "class0")
        assert not batches.refresh(0) and batches.refresh(1) and not batches.refresh(1)
        after = batches.next()
    assert (before.samples_seen, after.samples_seen) == (0, 4)
    assert len(batches.source) == 32 and batches.history.refreshes == 1 and told == ["refresh"]


def test_a_manifest_that_cannot_be_used_is_told_of_once(tmp_path, photos):
    batches, _, told = made(tmp_path, photos)
    give_manifest(tmp_path, 1, tmp_path / "nowhere")
    assert not batches.refresh(1) and not batches.refresh(1) and told == ["refresh_failed"]
    give_manifest(tmp_path, 2, photos, photos / "class0")
    assert batches.refresh(2) and told == ["refresh_failed", "refresh"]


@pytest.mark.parametrize("was_read", [False, True])
def test_what_cannot_be_read_may_pass_where_it_was_read_before(tmp_path, photos, monkeypatch, was_read):
    def breaks(after: int):
        def train_batches(*_, **__):
            yield from range(1, after + 1)
            raise DataError("no image can be read")

        monkeypatch.setattr(module, "train_batches", train_batches)

    for after in (0, 1):
        batches, clock, _ = made(tmp_path, photos, was_read=was_read)
        breaks(after)
        with batches, pytest.raises(DataError) as caught:
            while batches.next():
                clock.advance()
        assert caught.value.single_rank and caught.value.retryable == (was_read or after > 0)
