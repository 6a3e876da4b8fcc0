"""Background saves: every element is copied by one rank, what is written is the moment of `begin`, failures are told."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.checkpoint import saver, staging, store
from seer_scale.checkpoint.saver import Saver
from seer_scale.checkpoint.staging import Staging
from seer_scale.errors import CheckpointError
from seer_scale.parallel.shard import Shard
from seer_scale.world import World

META = {"samples_seen": 8}


@st.composite
def layouts(draw):
    """(whole tensors, for each rank its state): tensors spread over groups of ranks in runs, and repeated by the groups."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    wholes, states = {}, [{} for _ in range(size)]
    for n in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        whole = torch.rand(shape)
        spread = draw(st.sampled_from([k for k in (1, 2, 3, 4, 8) if size % k == 0]))
        cuts = [0, *sorted(draw(st.lists(st.integers(0, whole.numel()), min_size=spread - 1, max_size=spread - 1))), whole.numel()]
        wholes[f"t{n}"] = whole
        for rank in range(size):
            start, stop = cuts[rank % spread : rank % spread + 2]
            is_plain = spread == 1 and draw(st.booleans())
            states[rank][f"t{n}"] = whole.clone() if is_plain else Shard(whole.flatten()[start:stop].clone(), start, whole.shape)
    return wholes, states


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from([1, 40, 4 << 20]))
def test_each_element_is_copied_by_one_rank_whatever_holds_it(layout, part):
    wholes, states = layout
    everyone = [{name: staging._run(t) for name, t in state.items()} for state in states]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(staging, "PART", part)
        copies = [
            Staging(state, SimpleNamespace(rank=rank, gather_objects=lambda _: everyone)).fill(state)
            for rank, state in enumerate(states)
        ]
    for name, whole in wholes.items():
        got, times = torch.zeros(whole.numel()), torch.zeros(whole.numel())
        for mine in copies:
            got[mine[name].start : mine[name].stop] = mine[name].local
            times[mine[name].start : mine[name].stop] += 1
        assert torch.equal(got, whole.flatten()) and (times == 1).all()


def test_a_replicated_state_is_shared_out_evenly():
    state = {"big": torch.zeros(4096, 4096), "odd": torch.zeros(3, 1000, 1000)} | {f"small{i}": torch.zeros(300, 1000) for i in range(64)}
    everyone = [{name: staging._run(t) for name, t in state.items()}] * 16
    held = [Staging(state, SimpleNamespace(rank=r, gather_objects=lambda _: everyone)).nbytes for r in range(16)]
    whole = sum(t.nbytes for t in state.values())
    assert sum(held) == whole and max(held) <= whole / 16 + staging.PART


def test_a_reader_of_a_small_part_reads_little(tmp_path, monkeypatch):
    """A checkpoint of one rank, read by one of many: no more than pieces around what it needs."""
    monkeypatch.setattr(staging, "PIECE", 40_000)
    whole = torch.rand(1000, 100)
    path = store.save(tmp_path, Staging({"w": whole}, World()).fill({"w": whole}), META, World())
    mine = Shard(torch.zeros(5000), 30_000, whole.shape)
    read = store.load(path, {"w": mine}, World())
    assert torch.equal(mine.local, whole.flatten()[30_000:35_000])
    assert 20_000 <= read <= 2 * 45_000 < whole.nbytes / 4


def at(value: float) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((300, 7), value), "model/zero_dim": torch.tensor(value)}


def test_what_is_written_is_the_moment_of_begin(tmp_path, monkeypatch):
    """Training changes the state at once, and the thread comes to writing later."""
    may_write = threading.Event()
    monkeypatch.setattr(saver.store, "save", lambda *a: (may_write.wait(), store_save(*a))[1])
    state = at(1.0)
    background = Saver(tmp_path, state, World(), keep_last=1, keep_every_samples=0)
    background.begin(state, META)
    for t in state.values():
        t.fill_(2.0)
    assert background.ended() is None
    may_write.set()
    saved = background.wait()
    assert saved.path == store.newest(tmp_path, World()) and saved.samples_seen == 8 and not saved.problem
    assert background.wait() is None and background.ended() is None
    loaded = at(0.0)
    store.load(saved.path, loaded, World())
    assert all(torch.equal(loaded[k], t) for k, t in at(1.0).items())
    assert background.nbytes == sum(t.nbytes for t in state.values())


def test_a_save_that_fails_is_told_and_the_next_one_works(tmp_path, monkeypatch):
    state = at(1.0)
    background = Saver(tmp_path, state, World(), keep_last=1, keep_every_samples=0)

    def full(*_):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as m:
        m.setattr(saver.store, "save", full)
        background.begin(state, META)
        assert background.wait() == saver.Saved(8, None, "the disk is full", "", pytest.approx(0, abs=5))
    with monkeypatch.context() as m:
        m.setattr(saver.store, "retain", full)
        background.begin(state, META)
        saved = background.wait()
        assert saved.path.name == "samples-000000000008" and "the disk is full" in saved.kept_old
    with monkeypatch.context() as m:  # a lost rank, say: no outcome to tell, so training ends
        m.setattr(saver.store, "save", lambda *_: 1 / 0)
        background.begin(state, META)
        with pytest.raises(ZeroDivisionError):
            background.wait()
    background.begin(state, {"samples_seen": 16})
    assert background.wait().path.name == "samples-000000000016"
    assert [p.name for p in tmp_path.iterdir()] == ["samples-000000000016"]


store_save = store.save
