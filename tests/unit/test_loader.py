"""Batches: the same images and the same crops for any ranks, workers and restart; broken images replaced and told."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from seer_scale.config import Crop, Data, Views
from seer_scale.data.batch import Batch
from seer_scale.data.loading import tasks as jobs
from seer_scale.data.loading.loader import eval_batches, train_batches
from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.sources import open_source
from seer_scale.data.transforms.views import load_views
from seer_scale.errors import STOP_SIGNALS, SourceEnded
from tests import processes
from tests.problems import refused
from tests.sources import Counted, Endless, Passing, Waiting

VIEWS = Views(crops=(Crop(num=2, size=24), Crop(num=3, size=(16, 20), scale=(0.05, 0.14))))
N, BATCH = 30, 12


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for n in range(N):
        (root / str(n % 3)).mkdir(exist_ok=True)
        (root / str(n % 3) / f"{n}.jpg").write_bytes(jpeg(n))
    return open_source(str(root))


def batches(
    source,
    *,
    workers=0,
    rank=0,
    world_size=1,
    start=0,
    stop=5 * BATCH,
    seed=3,
    global_batch=BATCH,
    block=1,
    interleave=1,
    timeout_s=300.0,
):
    sampler = ElasticSampler([DataVersion(0, (("all", len(source)),), block, interleave)], seed, global_batch)
    part = dict(rank=rank, world_size=world_size, start=start, stop=stop)
    return list(train_batches(source, Data(workers=workers, prefetch=2, timeout_s=timeout_s), VIEWS, sampler, **part))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.samples_seen == y.samples_seen and torch.equal(x.indices, y.indices) and x.unreadable == y.unreadable
        assert all(torch.equal(p, q) for p, q in zip(x.views, y.views))


def joined(parts):
    """The batches of all ranks as one rank's: by crops, as each view tensor is crop-major."""
    out = []
    for ranks in zip(*parts):
        views = [
            torch.cat([v.unflatten(0, (c.num, -1)) for v in kind], dim=1).flatten(0, 1)
            for c, kind in zip(VIEWS.crops, zip(*(r.views for r in ranks)))
        ]
        told = [line for r in ranks for line in r.unreadable]
        out.append(Batch(views, [], torch.cat([r.indices for r in ranks]), ranks[0].samples_seen, told))
    return out


def test_shapes_and_layout(photos):
    first = batches(photos)[0]
    assert [tuple(v.shape) for v in first.views] == [(24, 3, 24, 24), (36, 3, 16, 20)]
    assert all(v.dtype == torch.uint8 and v.is_contiguous() for v in first.views) and first.indices.dtype == torch.int64
    image = int(first.indices[4])
    expected = load_views(photos.read(image), VIEWS, 3, 0, image)
    for got, crops in zip(first.views, expected):
        for c, crop in enumerate(crops):
            assert np.array_equal(got[c * BATCH + 4], crop)


def test_any_ranks_workers_and_start_give_the_same(photos):
    alone = batches(photos)
    for world_size in (1, 2, 4):
        for workers in (0, 2):
            parts = [batches(photos, rank=r, world_size=world_size, workers=workers) for r in range(world_size)]
            same(joined(parts), alone)
    same(batches(photos, start=3 * BATCH, workers=3), alone[3:])
    seen = np.concatenate([b.indices for b in alone])
    assert sorted(seen[:N]) == sorted(seen[N : 2 * N]) == list(range(N)) and seen[:N].tolist() != seen[N:].tolist()


def test_the_runs_own_generator_is_left_alone(photos):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(photos, workers=1)
    assert torch.equal(torch.rand(3), expected)


def test_crops_change_from_epoch_to_epoch(photos):
    by_image = {}
    for batch in batches(photos):
        for i, image in enumerate(batch.indices.tolist()):
            by_image.setdefault(image, []).append(batch.views[0][i])
    assert all(len(v) == 2 and not torch.equal(*v) for v in by_image.values())


# ----------------------------------------------------------------------------------------------- broken images


@pytest.fixture()
def broken(tmp_path, photos):
    """The same photographs; 5 is empty, 11 is cut short, 17 is a web page, 23 is gone."""
    names = []
    for n in range(N):
        data = {5: b"", 11: photos.read(11)[:300], 17: b"<html>"}.get(n, photos.read(n))
        if n != 23:
            (tmp_path / f"{n:02d}.jpg").write_bytes(data)
        names.append(f"{n:02d}.jpg")
    (tmp_path / "list.txt").write_text("\n".join(names))
    return open_source(str(tmp_path / "list.txt"))


def test_broken_images_are_replaced_by_the_next_of_the_order(photos, broken):
    bad = {5, 11, 17, 23}
    whole, got = batches(photos, stop=60), batches(broken, stop=60)
    order = np.concatenate([b.indices for b in whole])
    used = np.concatenate([b.indices for b in got])
    told = [line for b in got for line in b.unreadable]
    for p in range(60):
        epoch, offset = divmod(p, N)
        while (image := order[epoch * N + offset % N]) in bad:
            offset += 1
        assert used[p] == image
    assert len(told) >= 2 * len(bad) and {Path(t.split(": ")[0]).stem for t in told} == {"05", "11", "17", "23"}
    assert any("05.jpg: the file is empty" in t for t in told)
    kept = [(a, b) for a, b in zip(whole, got) if not set(a.indices.tolist()) & bad]
    for a, b in kept:
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views))


def test_a_replacement_has_the_crops_of_its_own_image(broken):
    for batch in batches(broken, stop=N // BATCH * BATCH):
        for i, image in enumerate(batch.indices.tolist()):
            own = load_views(broken.read(image), VIEWS, 3, 0, image)
            assert np.array_equal(batch.views[0][i], own[0][0])


def test_replacement_does_not_depend_on_ranks_or_workers(broken):
    alone = batches(broken)
    same(joined([batches(broken, rank=r, world_size=4, workers=2) for r in range(4)]), alone)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_sentence(tmp_path, workers):
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(b"")
    with refused("data.path") as error:
        batches(open_source(str(tmp_path)), workers=workers)
    assert "0.jpg: the file is empty" in error.value.problems[0].nearest


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_file_is_no_image(tmp_path, workers):
    """A pipe that nobody writes to, a device that never ends, a file larger than any image: told at once."""
    for n in range(N):
        (tmp_path / f"{n:02d}.jpg").write_bytes(jpeg(n))
    for n in (13, 14, 15):
        (tmp_path / f"{n}.jpg").unlink()
    os.mkfifo(tmp_path / "13.jpg")
    (tmp_path / "14.jpg").symlink_to("/dev/zero")
    with (tmp_path / "15.jpg").open("wb") as file:
        file.truncate(1 << 33)
    (tmp_path / "list.txt").write_text("".join(f"{n:02d}.jpg\n" for n in range(N)))  # a folder leaves pipes out
    got = batches(open_source(str(tmp_path / "list.txt")), workers=workers, stop=2 * BATCH + 6)
    told = {line.partition(": ")[0][-6:]: line for b in got for line in b.unreadable}
    assert "it is no regular file" in told["13.jpg"] and "it is no regular file" in told["14.jpg"]
    assert "its 8,589,934,592 bytes are more than" in told["15.jpg"]
    assert not {13, 14, 15} & set(np.concatenate([b.indices for b in got]).tolist())


def test_an_image_that_is_never_read_is_replaced_like_a_broken_one(photos, capfd):
    """It holds up its loader twice; then the next image takes its place."""
    got = batches(Endless(photos, {13}), workers=2, stop=2 * BATCH + 6, timeout_s=0.5)
    told = [line for b in got for line in b.unreadable]
    assert told and all("it ended or stopped its loader twice" in line for line in told)
    assert capfd.readouterr().err.count("has been at it for 0.5 s at") == 2
    assert 13 not in np.concatenate([b.indices for b in got])


def test_to_wait_for_a_server_is_not_to_hang(photos, capfd):
    same(batches(Waiting(photos), workers=2, stop=BATCH, timeout_s=0.7), batches(photos, stop=BATCH))
    assert "takes its place" not in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was_and_replaces_what_is_broken(photos, broken, workers, capfd):
    """Also where what went by before takes longer than an image may."""
    alone = batches(Passing(broken), block=0)
    assert [i for b in alone for i in b.indices.tolist()][:4] == [0, 1, 2, 3] and any(b.unreadable for b in alone)
    assert all(line.startswith("passing: ") for b in alone for line in b.unreadable)
    same(batches(Passing(broken), block=0, workers=workers, start=2 * BATCH, timeout_s=1.0), alone[2:])
    assert "takes its place" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_of_a_stream_is_replaced_by_what_came_before_it(tmp_path, workers, monkeypatch):
    """Not by its beginning, for which it would have to go by once more."""
    for n in range(24):
        (tmp_path / f"{n:02d}.jpg").write_bytes(jpeg(n) if n < 20 else b"broken")
    begun, iterate = [], Passing.iterate
    monkeypatch.setattr(Passing, "iterate", lambda self, *a: begun.append(a[2]) or iterate(self, *a))
    got = batches(Passing(open_source(str(tmp_path))), block=0, workers=workers, stop=2 * BATCH)
    assert got[1].indices.tolist()[-4:] == [19, 19, 19, 19] and len(got[1].unreadable) == 16  # four tries each
    assert workers or begun == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_ends_early_ends_the_run_with_its_own_words(photos, workers):
    with pytest.raises(SourceEnded, match=r"^it ended after 20 images\.$"):
        batches(Passing(photos, ends=20), block=0, workers=workers)


def test_a_stream_whose_loader_is_killed(photos, capfd):
    made, killed = [], False
    sampler = ElasticSampler([DataVersion(0, (("all", N),), 0, 1)], 3, BATCH)
    for b in train_batches(
        Passing(photos), Data(workers=2, prefetch=2), VIEWS, sampler, rank=0, world_size=1, start=0, stop=5 * BATCH
    ):
        made.append(b)
        if not killed:
            os.kill(processes.workers(os.getpid())[0], signal.SIGKILL)
            killed = True
    same(made, batches(Passing(photos), block=0))
    assert "another takes its place" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------- tars, in blocks


@pytest.mark.parametrize("world_size,workers", [(1, 0), (1, 3), (3, 2), (6, 1)])
def test_blocks_are_read_once_each_whoever_reads(photos, broken, tmp_path, world_size, workers):
    """30 images in blocks of 5, 6 interleaved, batches of 6: six blocks an epoch (one run each, two for the one that
    goes on at image 0), and the same batches as image by image; a broken image's replacement is read by itself."""
    for source, name in ((photos, "whole"), (broken, "broken")):
        counts = tmp_path / name
        counts.touch()
        options = dict(global_batch=6, block=5, interleave=6, stop=60)
        alone = batches(source, **options)
        parts = [
            batches(Counted(source, counts), rank=r, world_size=world_size, workers=workers, **options)
            for r in range(world_size)
        ]
        same(joined(parts), alone)
        reads = counts.read_text().split("\n")[:-1]
        replaced = sum(len(b.unreadable) for b in alone)
        runs = [line for line in reads if line != "one"]
        assert 12 <= len(runs) <= 14 + replaced and sum(int(line.split()[1]) for line in runs) <= 60 + 5 * replaced
        assert len(reads) - len(runs) <= 2 * replaced
        if name == "whole":
            assert sorted(np.concatenate([b.indices for b in alone])[:30]) == list(range(30))


def test_what_is_read_ahead_is_bounded(photos, tmp_path, monkeypatch):
    """At the limit images are read one by one: the same batches, and no block that is thrown away before its use."""
    options = dict(global_batch=6, block=5, interleave=6, stop=60)
    expected = batches(photos, **options)
    (tmp_path / "counts").touch()
    size = max(len(photos.read(i)) for i in range(N))
    monkeypatch.setattr(jobs, "READ_AHEAD", 9 * size)
    most, kept, fetch = [], jobs._ReadAhead._fetch, lambda self, *a: most.append(self._bytes) or kept(self, *a)
    monkeypatch.setattr(jobs._ReadAhead, "_fetch", fetch)
    same(batches(Counted(photos, tmp_path / "counts"), **options), expected)
    lines = (tmp_path / "counts").read_text().split()
    assert 0 < max(most) <= 9 * size and "one" in lines and "run" in lines
    read = lines.count("one") + sum(int(n) for n in lines if n.isdigit())
    assert read <= 60 + 5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_epoch_is_whole_whoever_loads_it_and_however_often_it_stops(photos, data):
    """Two epochs in legs of any length, each on other ranks and workers, in blocks or not: every image once an
    epoch."""
    block, interleave = data.draw(st.sampled_from([(1, 1), (5, 6), (2, 12), (10, 6)]))
    at, seen, views = 0, [], []
    while at < 2 * N:
        stop = data.draw(st.integers(at // 6 + 1, 2 * N // 6)) * 6
        world_size, workers = data.draw(st.sampled_from([1, 2, 3, 6])), data.draw(st.integers(0, 2))
        options = dict(
            world_size=world_size,
            workers=workers,
            start=at,
            stop=stop,
            global_batch=6,
            block=block,
            interleave=interleave,
        )
        for b in joined([batches(photos, rank=r, **options) for r in range(world_size)]):
            seen += b.indices.tolist()
            views.append(b.views[0])
        at = stop
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N)) and seen[:N] != seen[N:]
    alone = batches(photos, stop=2 * N, global_batch=6, block=block, interleave=interleave)
    assert all(torch.equal(v, b.views[0]) for v, b in zip(views, alone, strict=True))


def test_a_loader_takes_the_same_memory_whatever_the_length_of_the_list(tmp_path):
    """Resident memory of a worker's own (Pss) at 2,000 and at 2,000,000 lines: what is mapped is shared, and little of
    it."""
    (tmp_path / "1.jpg").write_bytes(jpeg(0))
    own = []
    for num in (2_000, 2_000_000):
        (tmp_path / f"{num}.txt").write_text(f"{tmp_path}/1.jpg\n" * num)
        source = open_source(str(tmp_path / f"{num}.txt"))
        sampler = ElasticSampler([DataVersion(0, (("all", num),))], 0, BATCH)
        made = train_batches(
            source, Data(workers=1, prefetch=1), VIEWS, sampler, rank=0, world_size=1, start=0, stop=40 * BATCH
        )
        for _ in range(20):
            next(made)
        (worker,) = processes.workers(os.getpid())
        lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()
        own.append(
            sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024
        )
        made.close()
    assert own[1] < own[0] + 15 and own[1] < 120, own


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_is_in_order_and_leaves_out_the_broken(photos, broken, workers):
    got = list(eval_batches(photos, [4, 2, 9, 1, 0], 32, batch=2, workers=workers))
    assert [i.tolist() for _, _, i in got] == [[4, 2], [9, 1], [0]]
    assert all(images.shape == (len(i), 3, 32, 32) and images.dtype == torch.uint8 for images, _, i in got)
    assert all(labels.tolist() == [photos.label(n) for n in i.tolist()] for _, labels, i in got)
    got = list(eval_batches(broken, [4, 5, 11, 17, 23, 6], 32, batch=2, workers=workers))
    assert [i.tolist() for _, _, i in got] == [[4], [6]] and all((lab == -1).all() for _, lab, _ in got)


# ----------------------------------------------------------------------------------------------------- workers

RUN = """
import sys, os
from seer_scale.config import Data
from seer_scale.data.loading.loader import train_batches
from seer_scale.data.sampling.sampler import ElasticSampler, DataVersion
from seer_scale.data.sources import open_source
from tests.unit.test_loader import VIEWS
source = open_source(sys.argv[1])
sampler = ElasticSampler([DataVersion(0, (("all", len(source)),))], 0, 4)
it = train_batches(source, Data(workers=2), VIEWS, sampler, rank=0, world_size=1, start=0, stop=10**9)
next(it)
print(os.getpid(), flush=True)
for line in sys.stdin:
    print(next(it).samples_seen, flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_workers_ignore_stop_signals_and_die_with_their_parent(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        children = processes.workers(int(run.stdout.readline()))
        assert len(children) == 2
        for stop in STOP_SIGNALS:
            for child in children:
                os.kill(child, stop)
        for step in range(1, 20):  # more than was prefetched: the workers are still at work
            print(file=run.stdin, flush=True)
            assert run.stdout.readline().strip() == str(4 * step)
    finally:
        run.kill()
        run.wait()
    deadline = time.monotonic() + 20
    while any(alive(c) for c in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_relative_paths_are_those_of_now(photos, tmp_path, monkeypatch):
    """The server of loaders began in another folder."""
    assert len(list(eval_batches(photos, [0, 1], 32, batch=2, workers=1))) == 1
    (tmp_path / "here").mkdir()
    for n in range(2):
        (tmp_path / "here" / f"{n}.jpg").write_bytes(jpeg(n))
    monkeypatch.chdir(tmp_path)
    ((images, _, _),) = eval_batches(open_source("here"), [0, 1], 32, batch=2, workers=1)
    assert len(images) == 2


def test_the_folder_that_loaders_work_in_may_be_gone(photos, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert len(list(eval_batches(photos, [0, 1], 32, batch=2, workers=1))) == 1
