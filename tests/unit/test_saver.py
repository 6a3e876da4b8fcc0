"""Background saves: every element is copied by one rank, what is written is the moment of `begin`, failures are
told."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.checkpoint import layout as layout_of_files
from seer_scale.checkpoint import saver, store
from seer_scale.checkpoint.layout import Layout, run_of
from seer_scale.checkpoint.saver import Saver
from seer_scale.checkpoint.staging import Staging
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, CheckpointError, Problem
from seer_scale.parallel.shard import Shard

META = {"samples_seen": 8}


def fake_world(rank: int, states: list[dict[str, torch.Tensor]]) -> SimpleNamespace:
    """Of ranks with these states, as a plan of files sees it."""

    def gather_objects(mine: tuple) -> list[tuple]:
        return [(mine[0], np.array([run_of(t) for t in state.values()])) for state in states]

    return SimpleNamespace(rank=rank, gather_objects=gather_objects)


@st.composite
def layouts(draw):
    """(whole tensors, for each rank its state): tensors spread over groups of ranks in runs, and repeated by the
    groups."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    wholes, states = {}, [{} for _ in range(size)]
    for n in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        whole = torch.rand(shape)
        spread = draw(st.sampled_from([k for k in (1, 2, 3, 4, 8) if size % k == 0]))
        cuts = [
            0,
            *sorted(draw(st.lists(st.integers(0, whole.numel()), min_size=spread - 1, max_size=spread - 1))),
            whole.numel(),
        ]
        wholes[f"t{n}"] = whole
        for rank in range(size):
            start, stop = cuts[rank % spread : rank % spread + 2]
            is_plain = spread == 1 and draw(st.booleans())
            states[rank][f"t{n}"] = (
                whole.clone() if is_plain else Shard(whole.flatten()[start:stop].clone(), start, whole.shape)
            )
    return wholes, states


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from([1, 40, 4 << 20]))
def test_each_element_is_copied_by_one_rank_whatever_holds_it(layout, share):
    wholes, states = layout
    with pytest.MonkeyPatch.context() as m:
        m.setattr(layout_of_files, "BYTES_A_WRITER", share)
        copies = [Staging(state, fake_world(rank, states)).fill(state) for rank, state in enumerate(states)]
    for name, whole in wholes.items():
        got, times = torch.zeros(whole.numel()), torch.zeros(whole.numel())
        for mine in (copy for copy in copies if name in copy):
            got[mine[name].start : mine[name].stop] = mine[name].local
            times[mine[name].start : mine[name].stop] += 1
        assert torch.equal(got, whole.flatten()) and (times == 1).all()


def test_a_replicated_state_is_shared_out_evenly():
    state = {"big": torch.zeros(4096, 4096), "odd": torch.zeros(3, 1000, 1000)} | {
        f"small{i}": torch.zeros(300, 1000) for i in range(64)
    }
    held = [Staging(state, fake_world(r, [state] * 16)).nbytes for r in range(16)]
    whole = sum(t.nbytes for t in state.values())
    writers = [h for h in held if h]
    assert sum(held) == whole and len(writers) == 3 and max(writers) - min(writers) <= 16


def test_a_reader_of_a_small_part_reads_that_alone(tmp_path):
    whole = torch.rand(1000, 100)
    path = store.save(tmp_path, {"w": whole}, META, World())
    mine = Shard(torch.zeros(5000), 30_000, whole.shape)
    assert store.load(path, {"w": mine}, World()) == mine.local.nbytes
    assert torch.equal(mine.local, whole.flatten()[30_000:35_000])


def test_a_save_plans_nothing_and_gathers_lengths_and_checksums_alone(tmp_path, monkeypatch, recwarn):
    told = []

    class Listening(World):
        def gather_objects(self, value):
            told.append(len(pickle.dumps(value)))
            return super().gather_objects(value)

    state = {f"model/{i}": torch.full((8,), float(i)) for i in range(2000)}
    background = Saver(tmp_path, state, Listening(), keep_last=1, keep_every_samples=0)
    monkeypatch.setattr(Layout, "plan", None)
    told.clear()
    for samples in (8, 16):
        background.begin(state, {"samples_seen": samples})
        assert background.wait().path
    of_ours = [
        str(w) for w in recwarn.list if not issubclass(w.category, ResourceWarning)
    ]  # what other tests left open
    assert sum(told) < 2000 and not of_ours, (told, of_ours)


def test_the_thread_is_on_the_device_of_its_rank_and_asks_nothing_of_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: calls.append((threading.current_thread().name, d, any(tmp_path.iterdir())))
    )
    for name in ("synchronize", "current_stream", "current_device", "Stream", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, n=name, **__: calls.append(n))
    background = Saver(tmp_path, at(1.0), World(device=torch.device("cuda", 1)), keep_last=1, keep_every_samples=0)
    background.begin(at(1.0), META)
    assert background.wait().path and calls == [("checkpoint", torch.device("cuda", 1), False)]


RANKS = 512


def fsdp_runs(shapes: dict[str, tuple[int, ...]], ranks: int) -> np.ndarray:
    """[ranks, tensors, 2]: rows spread as FSDP does, vectors whole on all."""
    out = np.zeros((ranks, len(shapes), 2), dtype=np.int64)
    for i, shape in enumerate(map(torch.Size, shapes.values())):
        rows, inner = -(-shape[0] // ranks), shape[1:].numel()
        edges = np.minimum(np.arange(ranks + 1) * rows, shape[0]) * inner
        out[:, i] = np.stack([edges[:-1], edges[1:]], axis=1) if len(shape) > 1 else (0, shape[0])
    return out


def test_on_512_ranks_a_reader_opens_few_files_and_the_layout_is_short():
    shapes = {f"w{i}": (3000 + i, 40) for i in range(30)} | {f"v{i}": (3000,) for i in range(60)}
    runs = fsdp_runs(shapes, RANKS)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    world = SimpleNamespace(gather_objects=lambda mine: [(mine[0], r) for r in runs])
    layout = Layout.plan(state, world)
    num = sum(len(s.parts) for s in layout.tensors.values())
    assert (
        len(layout.to_json()) < 30 * num + 80 * len(shapes) and num < (runs[..., 0] < runs[..., 1])[:, :30].sum() + 61
    )
    again = Layout.from_json(layout.to_json())
    assert again.tensors == layout.tensors
    for ranks, most in (
        (RANKS, 2),
        (RANKS // 2, 4),
        (2 * RANKS, 4),
    ):  # its own or two neighbours', and the one with the vectors
        for mine in fsdp_runs(shapes, ranks)[:: ranks // 16]:
            asked = [p for (a, b), stored in zip(mine.tolist(), layout.tensors.values()) for p in stored.within(a, b)]
            assert sum(p.stop - p.start for p in asked) == (mine[:, 1] - mine[:, 0]).sum()
            assert len({p.file for p in asked}) <= most


def at(value: float) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((300, 7), value), "model/zero_dim": torch.tensor(value)}


def test_what_is_written_is_the_moment_of_begin(tmp_path, monkeypatch):
    """Training changes the state at once, and the thread comes to writing later."""
    may_write = threading.Event()
    monkeypatch.setattr(saver.store, "save", lambda *a: (may_write.wait(), store_save(*a))[1])
    state = at(1.0)
    background = Saver(tmp_path, state, World(), keep_last=1, keep_every_samples=0)
    meta = META | {"schedule": {"sum": 1.0}}
    background.begin(state, meta)
    for t in state.values():
        t.fill_(2.0)
    meta["schedule"] |= {"sum": 2.0}
    assert background.ended() is None
    may_write.set()
    saved = background.wait()
    assert saved.path == store.latest(tmp_path, World()) and saved.samples_seen == 8 and not saved.problem
    assert background.wait() is None and background.ended() is None
    loaded = at(0.0)
    store.load(saved.path, loaded, World())
    assert all(torch.equal(loaded[k], t) for k, t in at(1.0).items())
    assert store.read_meta(saved.path)["schedule"] == {"sum": 1.0}
    assert background.nbytes == sum(t.nbytes for t in state.values())


def test_a_save_that_fails_is_told_and_the_next_one_works(tmp_path, monkeypatch):
    state, disk_is_full = at(1.0), Problem("the disk", NOTHING, "is full", "free some space")
    background = Saver(tmp_path, state, World(), keep_last=1, keep_every_samples=0)

    def full(*_):
        raise CheckpointError(disk_is_full)

    with monkeypatch.context() as m:
        m.setattr(saver.store, "save", full)
        background.begin(state, META)
        assert background.wait() == saver.Saved(8, None, disk_is_full, None, pytest.approx(0, abs=5))
    with monkeypatch.context() as m:
        m.setattr(saver.store, "prune", full)
        background.begin(state, META)
        saved = background.wait()
        assert saved.path.name == "samples-000000000008" and saved.problem is None
        assert str(saved.kept_old).endswith(" cannot be deleted: the disk is full; free some space.")
    with monkeypatch.context() as m:  # a lost rank, say: no outcome to tell, so training ends
        m.setattr(saver.store, "save", lambda *_: 1 / 0)
        background.begin(state, META)
        with pytest.raises(ZeroDivisionError):
            background.wait()
    background.begin(state, {"samples_seen": 16})
    assert background.wait().path.name == "samples-000000000016"
    assert [p.name for p in tmp_path.iterdir()] == ["samples-000000000016"]


store_save = store.save
