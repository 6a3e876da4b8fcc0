"""A checkpoint exists whole or not at all: every damage is passed over, no failure and no kill costs a published
one."""

import errno
import fcntl
import io
import json
import math
import multiprocessing
import os
import random
import resource
import time
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_scale.checkpoint import store
from seer_scale.checkpoint.lock import RunLock
from seer_scale.checkpoint.saver import Saver
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, UserError
from tests.forks import fork

ALONE = World()


def state_of(value: float, size: int = 4096) -> store.State:
    return {"model/w": torch.full((size,), float(value)), "optim/w/momentum": torch.full((size, 2), -float(value))}


def save(folder: Path, samples: int, value: float | None = None, size: int = 4096) -> Path:
    value = samples if value is None else value
    return store.save(folder, state_of(value, size), {"samples_seen": samples, "value": value}, ALONE)


def value_of(path: Path, size: int = 4096) -> float:
    """The value a checkpoint was saved with; the test fails unless meta and all tensors agree on it."""
    state = state_of(0, size)
    store.load(path, state, ALONE)
    value = store.read_meta(path)["value"]
    assert all(torch.equal(state[k], want) for k, want in state_of(value, size).items())
    return value


def find(folder: Path, **options) -> tuple[str | None, list[str]]:
    warnings: list[str] = []
    path = store.latest(folder, ALONE, warn=warnings.append, **options)
    return path and path.name, warnings


# ------------------------------------------------------------------------------------------------ round trip

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.filterwarnings(
    "error", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of other tests
def test_round_trip_of_every_kind_of_tensor_is_exact_and_in_place(tmp_path, device):
    state = {
        "model/param": torch.nn.Parameter(torch.randn(3, 5, device=device)),
        "model/view": torch.randn(8, 8, device=device)[2:4, ::2],
        "model/channels_last": torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last),
        "model/zero_dim": torch.tensor(2.5, device=device),
        "model/empty": torch.empty(0, 128, device=device),
        "model/nan": torch.tensor([float("nan"), -0.0, float("inf")], device=device),
        "queue/int64": torch.tensor([2**62, -1], device=device),
        "queue/uint8": torch.arange(256, dtype=torch.uint8, device=device),
        "queue/bool": torch.tensor([True, False], device=device),
        "scaler/double": torch.tensor(1 / 3, dtype=torch.float64, device=device),
    }
    meta = {"samples_seen": 7, "config": {"lr": 0.1, "crops": [{"size": 96}]}, "none": None, "best": 1e-17}
    path = store.save(tmp_path, state, meta, ALONE)
    assert path == tmp_path / "samples-000000000007"
    assert store.read_meta(path) == meta

    loaded = {k: torch.zeros_like(v).requires_grad_(v.requires_grad) for k, v in state.items()}
    before = dict(loaded)
    store.load(path, loaded, ALONE)
    for k, v in state.items():
        assert loaded[k] is before[k] and loaded[k].dtype == v.dtype
        torch.testing.assert_close(loaded[k], v, rtol=0, atol=0, equal_nan=True)


def test_safetensors_reads_it_without_us(tmp_path):
    """And it is all there is: nothing that a reader would have to run, and nothing of the machine that wrote it."""
    path = save(tmp_path, 3)
    assert sorted(os.listdir(path)) == ["manifest.json", "state-00000.safetensors", "tensors.json"]
    plain = safetensors.torch.load_file(path / "state-00000.safetensors")
    assert plain.keys() == state_of(3).keys() and all(torch.equal(plain[k], v) for k, v in state_of(3).items())
    for file in path.iterdir():
        for word in (os.uname().nodename, str(tmp_path), "pathlib"):
            assert word.encode() not in file.read_bytes(), (file.name, word)


def test_every_byte_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """What fsync finds of each file is the whole of it; the folders come after, and the name last."""
    synced, real, rename = {}, os.fsync, os.rename

    def fsync(fd: int) -> None:
        synced[Path(os.readlink(f"/proc/self/fd/{fd}")).name] = os.fstat(fd).st_size
        real(fd)

    def publish(old, new) -> None:
        assert synced.keys() == {*os.listdir(old), Path(old).name}
        assert all(synced[f.name] == f.stat().st_size > 0 for f in Path(old).iterdir())
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", publish)
    save(tmp_path, 3)
    assert list(synced)[-2:] != [tmp_path.name] and tmp_path.name in synced


def test_a_meta_without_a_number_in_json_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not JSON compliant"):
        store.save(tmp_path, state_of(1), {"samples_seen": 1, "best": float("inf")}, ALONE)


def test_newest_is_by_samples_and_a_second_save_at_the_same_count_replaces_the_first(tmp_path):
    assert find(tmp_path / "absent") == (None, [])
    for samples in (900, 10**13, 1000):
        save(tmp_path, samples)
    assert find(tmp_path) == ("samples-10000000000000", [])
    for again in range(12):
        path = save(tmp_path, 10**13, value=again)
        assert store.latest(tmp_path, ALONE) == path and value_of(path) == again
    assert len(os.listdir(tmp_path)) == 3


def test_stray_files_and_leftovers_are_ignored_and_leftovers_go_with_the_next_save(tmp_path):
    (tmp_path / ".tmp-5-dead").mkdir()
    (tmp_path / ".tmp-5-dead" / "state-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-file").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "samples-best").mkdir()
    assert find(tmp_path) == (None, [])
    path = save(tmp_path, 5)
    (path / ".nfs0001").write_text("stray")
    assert find(tmp_path) == (path.name, [])
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", path.name, "samples-best"]


# ------------------------------------------------------------------------------------------------ damage


def _flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def _swap_samples(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"samples_seen": 20', '"samples_seen": 21'))


def _another_format(number: int, **meta: float):
    def change(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        del content["crc32"]
        content |= {"format": number, "meta": content["meta"] | meta}
        (folder / "manifest.json").write_text(json.dumps({"crc32": store._seal(content)} | content))

    return change


DAMAGE = {
    "flipped data": (
        lambda p: _flip(p / "state-00000.safetensors", 0.5),
        "has a state-00000.safetensors with a wrong checksum",
    ),
    "flipped last byte": (
        lambda p: _flip(p / "state-00000.safetensors", 1),
        "has a state-00000.safetensors with a wrong checksum",
    ),
    "flipped metadata": (lambda p: _flip(p / "tensors.json", 0.3), "has a tensors.json with a wrong checksum"),
    "flipped manifest": (lambda p: _flip(p / "manifest.json", 0.5), "manifest.json"),
    "changed meta": (_swap_samples, "has a damaged manifest.json"),
    "cut data": (lambda p: os.truncate(p / "state-00000.safetensors", 1000), "has 1000 bytes"),
    "emptied data": (lambda p: os.truncate(p / "state-00000.safetensors", 0), "has 0 bytes"),
    "cut manifest": (lambda p: os.truncate(p / "manifest.json", 40), "has a damaged manifest.json"),
    "emptied manifest": (lambda p: os.truncate(p / "manifest.json", 0), "has a damaged manifest.json"),
    "manifest of another kind": (lambda p: (p / "manifest.json").write_text("[1]"), "has a damaged manifest.json"),
    "no data": (lambda p: (p / "state-00000.safetensors").unlink(), "lacks state-00000.safetensors"),
    "no metadata": (lambda p: (p / "tensors.json").unlink(), "lacks tensors.json"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "empty folder": (lambda p: [f.unlink() for f in p.iterdir()], "has no manifest.json"),
    "a file": (lambda p: ([f.unlink() for f in p.iterdir()], p.rmdir(), p.write_text("")), "has no manifest.json"),
    "newer format": (_another_format(99), "format 99"),
    "older format": (_another_format(1, best=math.inf), "format 1, but this version reads format 4"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_name_and_what_is_wrong(tmp_path, kind):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    damage, words = DAMAGE[kind]
    damage(bad)
    problem = store.validate(bad, ALONE)
    assert problem.key == str(bad) and words in problem.rule
    assert find(tmp_path) == (good.name, [f"The checkpoint {bad} is passed over: it {problem.rule}."])
    # Nor does it keep the same count from being saved again, or survive that.
    again = save(tmp_path, 20)
    assert find(tmp_path) == (again.name, []) and value_of(again) == 20
    assert sorted(os.listdir(tmp_path)) == sorted([good.name, again.name])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["state-00000.safetensors", "tensors.json", "manifest.json"]),
    at=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_is_found(tmp_path_factory, name, at, bit):
    path = save(tmp_path_factory.mktemp("flip"), 1, size=16)
    content = bytearray((path / name).read_bytes())
    content[at % len(content)] ^= 1 << bit
    (path / name).write_bytes(content)
    assert store.validate(path, ALONE) is not None


def test_without_verify_sizes_must_do(tmp_path):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    _flip(bad / "state-00000.safetensors", 0.5)
    assert find(tmp_path, verify=False) == (bad.name, [])
    os.truncate(bad / "state-00000.safetensors", 9)
    assert find(tmp_path, verify=False)[0] == good.name


# ------------------------------------------------------------------------------------------------ failures


def test_a_disk_that_takes_no_more_ends_the_save_with_a_sentence(tmp_path):
    old = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2**10, 2**20 + 1000):  # in the middle of torch's writing, and of a large tensor
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError) as caught:
                save(tmp_path, 2, size=2**18)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        message = str(caught.value)
        assert str(tmp_path) in message and "2 samples" in message and os.strerror(errno.EFBIG) in message
        assert "are free there" in message and "3.0 MiB are needed" in message and "training can go on" in message
        assert "\n" not in message and message.endswith(".")
        assert os.listdir(tmp_path) == [old.name] and value_of(old) == 1


def test_no_failing_file_operation_costs_what_was_published(tmp_path, monkeypatch):
    """Each file operation of a save fails in turn, until a save meets none."""
    folder = tmp_path / "checkpoints"
    old, left, met = save(folder, 1), [0], set()

    def failing(name, real):
        def call(*args, **kwargs):
            left[0] -= 1
            met.add(name)
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    class Full(io.FileIO):
        def __init__(self, *args):
            failing("open of data", super().__init__)(*args)

        def write(self, data):
            return failing("write", super().write)(data)

    def open_text(*args, **kwargs):
        file = failing("io.open", io_open)(*args, **kwargs)
        if "w" in file.mode:
            file.write = failing("write of text", file.write)
        return file

    io_open, names = io.open, ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "scandir", "listdir", "stat")
    for point in range(1, 300):
        (folder / ".tmp-5-dead").mkdir()  # an old mishap, to be cleared
        (folder / ".tmp-5-dead" / "half").write_text("x")
        left[0] = point
        with monkeypatch.context() as m:
            for name in names:
                m.setattr(os, name, failing(name, getattr(os, name)))
            m.setattr(io, "open", open_text)
            m.setattr(store, "_Checksummed", type("Failing", (store._Checksummed, Full), {}))
            try:
                save(folder, 2)
            except CheckpointError as e:
                assert "No space left on device" in str(e) or "is not there" in str(e), str(e)
            met_all, left[0] = left[0] > 0, 0
        survivor = store.latest(folder, ALONE)
        assert value_of(survivor) == (2 if survivor != old else 1)
        assert value_of(old) == 1
        save(folder, 1, 1)  # what is left hinders nothing, and goes with the next save
        assert not list(folder.glob(".tmp-*"))
        old = next(p for p in folder.iterdir() if p.name.startswith("samples-000000000001"))
        if met_all:
            break
    assert 30 < point < 299 and value_of(store.latest(folder, ALONE)) == 2
    assert met >= {
        "open of data",
        "write",
        "io.open",
        "write of text",
        "mkdir",
        "fsync",
        "rename",
        "unlink",
        "rmdir",
        "scandir",
    }, met


def test_a_folder_that_cannot_be_made_and_a_meta_that_is_no_json(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        store.save(tmp_path, state_of(1), {"samples_seen": 1, "object": object()}, ALONE)
    assert os.listdir(tmp_path) == ["file"]


KILLS = 60


def _save_forever(folder: Path, acknowledged: Path, start: int) -> None:
    """As the trainer saves: a copy, written by a thread while the state changes."""
    torch.set_num_threads(1)
    state = state_of(start)
    saver = Saver(folder, state, ALONE, keep_last=1, keep_every_samples=0)
    for value in range(start, 10**9):
        for tensor, now in zip(state.values(), state_of(value).values()):
            tensor.copy_(now)
        saver.begin(
            state, {"samples_seen": value // 2, "value": value}
        )  # every count twice: replacing is under test too
        for tensor in state.values():
            tensor.fill_(torch.nan)
        assert saver.wait().path
        acknowledged.with_suffix(".new").write_text(str(value))
        os.replace(acknowledged.with_suffix(".new"), acknowledged)


def test_killed_at_any_instant_what_was_saved_is_there(tmp_path):
    folder, acknowledged = tmp_path / "checkpoints", tmp_path / "acknowledged"
    moments, start, unfinished = random.Random(0), 1, 0
    for _ in range(KILLS):
        acknowledged.unlink(missing_ok=True)
        child = fork(_save_forever, folder, acknowledged, start)
        child.start()
        while not acknowledged.exists():
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        child.join()
        last = int(acknowledged.read_text())
        unfinished += any(folder.glob(".tmp-*"))
        value = value_of(store.latest(folder, ALONE))
        assert value in (last, last + 1)
        start = value + 1
    assert unfinished > KILLS / 4  # the moments are those of saving


# ------------------------------------------------------------------------------------------------ loading


def test_a_difference_is_told_before_anything_is_read(tmp_path):
    path = save(tmp_path, 1)

    def refusal(changes: dict, without: str = "", **options) -> str:
        state = {k: v for k, v in (state_of(5) | changes).items() if k != without}
        kept = {k: v.clone() for k, v in state.items()}
        with pytest.raises(CheckpointError) as caught:
            store.load(path, state, ALONE, **options)
        assert all(torch.equal(state[k], v) for k, v in kept.items())
        return str(caught.value)

    message = refusal({"model/w": torch.zeros(3, 4)})
    assert message == (
        f"{path} is of another architecture: model/w is float32 [4096] in the checkpoint and float32 [3, 4] in this "
        "run; choose the recipe that wrote it, or another checkpoint."
    )
    assert "model/new is absent in the checkpoint and float32 [2]" in refusal({"model/new": torch.zeros(2)})
    assert "model/w is float32 [4096] in the checkpoint and absent" in refusal({}, without="model/w")
    assert "int64 [4096] in this run" in refusal({"model/w": torch.zeros(4096, dtype=torch.int64)})
    assert "does not fit this recipe: scaler/scale is absent" in refusal({"scaler/scale": torch.ones(())})
    assert "holds nothing under 'modle/'" in refusal({}, prefixes="modle/")


def test_only_a_prefix(tmp_path):
    path = save(tmp_path, 1)
    state = state_of(0) | {"optim/other": torch.zeros(1)}
    store.load(path, state, ALONE, prefixes="model/")
    assert torch.equal(state["model/w"], state_of(1)["model/w"])
    assert not state["optim/w/momentum"].any()


def test_what_is_no_checkpoint_is_answered_with_the_nearest_that_is(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    for near in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=f"did you mean {path}?"):
            store.read_meta(near)
    with pytest.raises(CheckpointError, match="does not exist; the nearest folder there is"):
        store.load(tmp_path / "absent", state_of(0), ALONE)
    (path / "tensors.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="could not be read.*choose another"):
        store.load(path, state_of(0), ALONE)


@pytest.mark.parametrize(
    "parts,words",
    [
        ([], "do not tile it"),
        ([[4096, 0, 0]], "do not tile it"),
        ([[5, 0, 0]], "do not tile it"),
        ([[0, 7, 0]], "state-00007"),
        ([[0, 0, 10**6]], "ends too early"),
        ([[0, "../../x", 0]], "could not be read"),
        ([[0, 0, -(10**6)]], "could not be read"),
        (7, "could not be read"),
    ],
)
def test_a_layout_made_by_someone_else_reads_nothing_else(tmp_path, parts, words):
    """With the checksums right: whoever makes such a file can make a manifest, too."""
    path = save(tmp_path, 1)
    layout, manifest = (json.loads((path / name).read_text()) for name in ("tensors.json", "manifest.json"))
    layout["model/w"]["parts"] = parts
    (path / "tensors.json").write_text(json.dumps(layout))
    manifest["files"]["tensors.json"] |= {"crc32": zlib.crc32((path / "tensors.json").read_bytes())}
    del manifest["crc32"]
    (path / "manifest.json").write_text(json.dumps({"crc32": store._seal(manifest)} | manifest))
    with pytest.raises(CheckpointError, match=words):
        store.load(path, state_of(0), ALONE)


# ------------------------------------------------------------------------------------------------ retention


def kept(folder: Path) -> list[int]:
    return sorted(int(name.split("-")[1]) for name in os.listdir(folder))


def test_the_last_and_the_milestones_stay(tmp_path):
    for samples in range(30, 400, 30):
        save(tmp_path, samples, size=8)
        store.prune(tmp_path, 2, 100, ALONE)
    assert kept(tmp_path) == [120, 210, 300, 360, 390]
    store.prune(tmp_path, 1, 0, ALONE)
    assert kept(tmp_path) == [390]
    store.prune(tmp_path / "absent", 1, 0, ALONE)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=25, unique=True).map(sorted),
    keep_last=st.integers(1, 4),
    every=st.integers(0, 60),
)
def test_retention_as_one_goes_keeps_what_it_would_keep_at_the_end(tmp_path_factory, counts, keep_last, every):
    def fake_prune(names: list[str]) -> list[str]:
        dropped: list[str] = []
        with pytest.MonkeyPatch.context() as m:
            m.setattr(store, "_names", lambda *_: names[::-1])
            m.setattr(store, "latest", lambda *_, **__: Path(names[-1]))
            m.setattr(store, "_discard", lambda path: dropped.append(path.name))
            store.prune(Path("nowhere"), keep_last, every, ALONE)
        return [n for n in names if n not in dropped]

    all_names = [f"samples-{c:012d}" for c in counts]
    going: list[str] = []
    for name in all_names:
        going = fake_prune([*going, name])
    assert going == fake_prune(all_names)
    assert going[-keep_last:] == all_names[-keep_last:]


def test_the_newest_valid_one_is_never_deleted(tmp_path):
    for samples in (1, 2, 3, 4):
        save(tmp_path, samples)
    for bad in (3, 4):
        _flip(tmp_path / f"samples-{bad:012d}" / "state-00000.safetensors", 0.5)
    store.prune(tmp_path, 1, 0, ALONE)
    assert kept(tmp_path) == [2, 4]
    assert find(tmp_path)[0] == "samples-000000000002"
    _flip(tmp_path / "samples-000000000002" / "tensors.json", 0.5)
    store.prune(tmp_path, 1, 0, ALONE)
    assert kept(tmp_path) == [2, 4], "nothing is valid: nothing goes"


# ------------------------------------------------------------------------------------------------ the lock


def _hold(run_dir: Path, pipe) -> None:
    os.environ["SLURM_JOB_ID"] = "77"
    lock = RunLock(run_dir)
    worker = os.fork()  # as a loader worker would be; it outlives its parent
    if worker == 0:
        while True:
            time.sleep(60)
    pipe.send(worker)
    pipe.recv()
    lock.release()


def test_one_run_a_directory_until_it_is_killed(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    ours, theirs = multiprocessing.Pipe()
    owner = fork(_hold, run_dir, theirs)
    owner.start()
    worker = ours.recv()
    try:
        with pytest.raises(UserError) as caught:
            RunLock(run_dir)
        (problem,) = caught.value.problems
        assert (problem.key, problem.value) == ("run.dir", run_dir)
        assert f"is in use by pid {owner.pid} on {os.uname().nodename}, job 77, started 2" in problem.rule
        assert problem.nearest == "stop it or choose another run.dir" and not caught.value.retryable
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        with pytest.raises(UserError) as caught:
            RunLock(run_dir)
        assert caught.value.retryable  # what is left of an earlier start of this job
        monkeypatch.delenv("SLURM_JOB_ID")
        owner.kill()
        owner.join()
        with RunLock(run_dir), pytest.raises(UserError, match=f"pid {os.getpid()} "):
            RunLock(run_dir)
        RunLock(run_dir).release()
    finally:
        os.kill(worker, 9)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_holds_a_run_and_says_so(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path) as lock:
        assert os.strerror(number) in lock.note and lock.note.endswith("The last to begin here was an unknown run.")
    assert f"The last to begin here was pid {os.getpid()} on " in RunLock(tmp_path).note
    number = errno.EIO
    with pytest.raises(UserError, match="cannot be locked"):
        RunLock(tmp_path)


def test_a_directory_that_cannot_hold_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another run.dir"):
        RunLock(tmp_path / "file")


def test_a_save_that_begins_meanwhile_leaves_the_mark_of_the_best(tmp_path, monkeypatch):
    """Nor does one that a kill has left half done."""
    best, replace = save(tmp_path, 8), os.replace
    (tmp_path / ".best.new").symlink_to("samples-000000000004")

    def beside_a_save(a, b) -> None:
        save(tmp_path, 16)
        replace(a, b)

    monkeypatch.setattr(os, "replace", beside_a_save)
    assert store.mark_best(tmp_path, {8: 50.0}) == store.best_of(tmp_path) == best.name
    assert find(tmp_path) == ("samples-000000000016", [])


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    def refused(folder: Path):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CheckpointError, match=f"^{tmp_path} cannot be listed \\(Permission denied\\); make it"):
        store.latest(tmp_path, ALONE)
