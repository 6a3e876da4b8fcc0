"""When a run saves and what it tells of it, whatever the disk does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from seer_scale.checkpoint.saver import Saved
from seer_scale.config import Checkpoint, Config, Data
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, TrainingError
from seer_scale.observe.progress import Progress
from seer_scale.training.checkpointing import BestCheckpoint, Checkpointing
from seer_scale.training.clock import Clock


class FakeSaver:
    """Ends what was begun when it is waited for; the saves at `fails` fail."""

    def __init__(self, *fails: int):
        self.fails, self.begun, self.metas = fails, None, []

    def begin(self, state, meta) -> None:
        assert self.begun is None
        self.begun, _ = meta["samples_seen"], self.metas.append(meta)

    def wait(self) -> Saved | None:
        seen, self.begun = self.begun, None
        if seen is None:
            return None
        failed = seen in self.fails
        return Saved(
            seen,
            None if failed else Path(f"samples-{seen:012d}"),
            Problem("the disk", NOTHING, "is full") if failed else None,
        )

    ended = wait


def made(saver: FakeSaver, *, finite: bool = True, **given) -> tuple[Checkpointing, Clock, list[str]]:
    told: list[str] = []
    clock = Clock(8, 80, **given)
    method = SimpleNamespace(name="any", state=lambda: {}, export_prefix="trunk.")
    engine = SimpleNamespace(is_finite=lambda: finite, average_buffers=lambda: None, method=method, name="single")
    checkpoints = Checkpointing(
        config=Config(data=Data(path="x"), checkpoint=Checkpoint(every_samples=24)),
        world=World(),
        engine=engine,
        state=dict,
        saver=saver,
        clock=clock,
        best=BestCheckpoint(Path(), World(), None, {8: 50.0}, active=False),
        state_of_run=lambda: {"data": "now"},
        log_event=lambda kind, text, **_: told.append(kind),
        watchdog=SimpleNamespace(patient=lambda seconds: nullcontext()),
        progress=Progress(active=False),
        resumed_from=Path("samples-000000000008") if given else None,
    )
    return checkpoints, clock, told


def test_a_state_is_saved_once():
    saver = FakeSaver()
    checkpoints, clock, told = made(saver)
    clock.advance()
    assert checkpoints.save().name == checkpoints.save().name == "samples-000000000008"
    assert told == ["checkpoint"] and len(saver.metas) == 1 and saver.metas[0]["data"] == "now"
    assert saver.metas[0]["export"] == {"prefix": "trunk."} and saver.metas[0]["preprocessing"]["size"] == 224
    checkpoints.forget_newest()  # other data
    assert checkpoints.newest is None and checkpoints.save() and len(saver.metas) == 2


def test_what_a_run_goes_on_from_is_saved():
    saver = FakeSaver()
    checkpoints, clock, _ = made(saver, samples_seen=8, step=1)
    assert checkpoints.save() == checkpoints.newest == Path("samples-000000000008") and not saver.metas
    clock.advance()
    assert checkpoints.save().name == "samples-000000000016"


def test_a_save_in_the_background_is_told_when_it_has_ended_and_waited_for_by_the_next():
    checkpoints, clock, told = made(FakeSaver())
    due = []
    for _ in range(6):
        clock.advance()
        if checkpoints.is_due:
            due.append(clock.samples_seen)
            checkpoints.save_in_step()
            assert checkpoints.newest is None or checkpoints.newest.name != f"samples-{clock.samples_seen:012d}"
    assert due == [24, 48] and told == ["checkpoint"]
    checkpoints.report_ended()
    assert told == ["checkpoint"] * 2 and checkpoints.newest.name == "samples-000000000048"


def test_a_save_that_failed_is_told_and_counts_for_nothing():
    checkpoints, clock, told = made(FakeSaver(8))
    clock.advance()
    assert checkpoints.save() is None and checkpoints.newest is None and told == ["checkpoint_failed"]
    assert not checkpoints.best.scores


def test_weights_that_are_not_finite_take_no_good_ones_place():
    saver = FakeSaver()
    checkpoints, clock, _ = made(saver, finite=False)
    clock.advance()
    with pytest.raises(TrainingError) as caught:
        checkpoints.save()
    assert caught.value.problems[0].key == "optim.lr" and not saver.metas
