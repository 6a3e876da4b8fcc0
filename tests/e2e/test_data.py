"""The data of a run: refreshed in its course, broken in part, in blocks of tars, its photometrics on the device, its
loaders killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from seer_scale.data.sampling.sampler import DataVersion, ElasticSampler
from seer_scale.data.sources.base import is_image
from tests.e2e.runs import RECIPE, assert_same_path, events, reaches, recipe, run, start, steps, until
from tests.processes import workers
from tests.unit.test_sources import write_tar

HOSTILE = Path(__file__).parents[2].parent / "shared" / "data" / "hostile"


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3)).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write(folder: Path, num: int, seed: int) -> Path:
    folder.mkdir()
    for i in range(num):
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(1000 * seed + i))
    return folder


def manifest(path: Path, *parts: Path) -> Path:
    path.write_text(yaml.safe_dump({"parts": [{"path": str(p)} for p in parts]}))
    return path


# ------------------------------------------------------------------------------------------------------- refresh


def test_a_refreshed_run_goes_on_the_same_way_after_any_kill_and_resize(tmp_path):
    a, b, c = (
        write(tmp_path / name, num, seed) for seed, (name, num) in enumerate([("a", 50), ("b", 40), ("c", 30)], 1)
    )
    first, second = manifest(tmp_path / "1.yaml", a, b), manifest(tmp_path / "2.yaml", b, c)
    given = recipe(tmp_path, first)
    places = [tmp_path / "straight", tmp_path / "other"]
    for place in places:
        run("train", given, "--run.dir", place, "--train.total_samples", 72, folder=tmp_path)
        said = run("data", "refresh", place, "--manifest", second, folder=tmp_path)
        assert "2 parts with 70 images (1 new with 30; 1 gone)" in said
    run("train", given, "--run.dir", places[0], "--train.total_samples", 240, folder=tmp_path)

    other = start("train", given, "--run.dir", places[1], "--train.total_samples", 240, ranks=2, folder=tmp_path)
    until(reaches(places[1], 120), lambda: other.text)
    for rank in (0, 1):
        other.kill(signal.SIGKILL, rank)
    other.wait()
    run("train", given, "--run.dir", places[1], "--train.total_samples", 240, folder=tmp_path)
    assert_same_path(places[1], places[0])

    (told,) = events(places[0], "refresh")
    assert told["samples_seen"] == 72 and told["images"] == 70 and told["new"] == 30 and told["gone"] == 50
    assert {e["samples_seen"] for e in events(places[1], "refresh")} == {72}
    rows = [r["epoch"] for r in steps(places[0]).values()]
    assert rows == sorted(rows) and rows[8] == pytest.approx(0.8)  # 72 of 90; then what is left of b, and c: the rest
    left = 240 - 72 - int(told["text"].split("goes on with ")[1].split(" ")[0])
    assert rows[-1] == pytest.approx(1 + left / 70)


@pytest.mark.parametrize(
    "first,part",
    [
        ("old", "../old"),
        ("old/", "../new/../old/"),
        ("old/{a,b}.tar", "../old/{a,b}.tar"),
        ("old/a.tar,old/b.tar", "../old/a.tar, ../old/b.tar"),
    ],
)
def test_one_part_however_it_is_spelled(tmp_path, monkeypatch, first, part):
    monkeypatch.chdir(tmp_path)
    for folder, num in (("old", 20), ("autumn", 8), ("new", 0)):
        write(tmp_path / folder, num, 1)
    if "tar" in first:
        for name in "ab":
            write_tar(tmp_path / "old" / f"{name}.tar", {f"{i}.jpg": jpeg(i) for i in range(10)})
    place, new = tmp_path / "run", manifest(tmp_path / "new" / "m.yaml", part, "../autumn")
    run("train", recipe(tmp_path, first), "--run.dir", place, "--train.total_samples", 16, folder=tmp_path)
    assert "2 parts with 28 images (1 new with 8; 0 gone)" in run(
        "data", "refresh", place, "--manifest", new, folder=tmp_path
    )


def test_a_running_run_takes_up_a_refresh(tmp_path):
    a, b = write(tmp_path / "a", 20, 1), write(tmp_path / "b", 20, 2)
    place, given = tmp_path / "run", recipe(tmp_path, manifest(tmp_path / "1.yaml", a))
    running = start(
        "train",
        given,
        "--run.dir",
        place,
        "--train.total_samples",
        8000,
        "--checkpoint.every_samples",
        800,
        ranks=2,
        folder=tmp_path,
    )
    until(lambda: steps(place), lambda: running.text)
    run("data", "refresh", place, "--manifest", manifest(tmp_path / "2.yaml", a, b), folder=tmp_path)
    until(lambda: events(place, "refresh"), lambda: running.text)
    at = events(place, "refresh")[0]["samples_seen"]
    until(lambda: max(steps(place)) > at + 80, lambda: running.text)
    (b / "000.jpg").unlink()  # one that cannot be used any more is told of, and training goes on
    (place / "manifests" / "0002.yaml").write_text("parts: [{path: nowhere}]")
    until(lambda: events(place, "refresh_failed"), lambda: running.text)
    running.kill(signal.SIGTERM)
    assert running.wait() == [75, 75]
    assert f"samples-{at:012d}" in running.text and "40 images in 2 parts, 20 of them new" in running.text


def test_what_cannot_be_refreshed_is_one_sentence(tmp_path):
    a = write(tmp_path / "a", 10, 1)
    place, given = tmp_path / "run", recipe(tmp_path, manifest(tmp_path / "1.yaml", a))
    run("train", given, "--run.dir", place, "--train.total_samples", 24, folder=tmp_path)
    (a / "more.jpg").write_bytes(jpeg(7))
    said = run("data", "refresh", place, "--manifest", tmp_path / "1.yaml", folder=tmp_path, status=2)
    assert "has 11 images, and had 10" in said
    said = run("train", given, "--run.dir", place, "--train.total_samples", 48, folder=tmp_path, status=2)
    assert "has 11 images, but this run's checkpoint was trained on 10" in said
    assert "no run's folder" in run(
        "data", "refresh", tmp_path, "--manifest", tmp_path / "1.yaml", folder=tmp_path, status=2
    )
    assert "does not exist" in run(
        "data", "refresh", place, "--manifest", tmp_path / "3.yaml", folder=tmp_path, status=2
    )


# ------------------------------------------------------------------------------- every format, streams, starvation


def test_every_format_is_trained_on(tmp_path):
    """None of which is unreadable; with the hostile set, where it is at hand, in the same folder."""
    folder = write(tmp_path / "photos", 8, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 4)).astype(np.uint8)
    for form in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"):
        Image.fromarray(pixels).convert("RGBA" if form == "PNG" else "RGB").save(
            folder / f"{form}.{form[:4].lower()}".replace(".jpeg", ".jp2"), form
        )
    Image.fromarray(pixels, "CMYK").save(folder / "cmyk.jpg")
    expected = 0
    if HOSTILE.exists():
        for entry in json.loads((HOSTILE / "manifest.json").read_text())["files"]:
            if entry["strict"] and is_image(entry["file"]) and (HOSTILE / entry["file"]).stat().st_size < 1 << 20:
                shutil.copyfile(HOSTILE / entry["file"], folder / f"hostile-{Path(entry['file']).name}")
                expected += entry["expect"] != "decode"
    num, place = len(list(folder.iterdir())), tmp_path / "run"
    samples = -(-num // 8) * 8
    run(
        "train",
        recipe(tmp_path, folder, data={"workers": 2}),
        "--run.dir",
        place,
        "--train.total_samples",
        samples,
        folder=tmp_path,
    )
    replaced = sum(r["data/unreadable"] for r in steps(place).values())
    assert num >= 15 and (expected <= replaced if expected else replaced == 0)
    log = place / "logs" / "unreadable-0.txt"
    told = {Path(line.partition(": ")[0]).name for line in log.read_text().splitlines()} if log.exists() else set()
    assert len(told) == expected and all(name.startswith("hostile-") for name in told)


def test_a_stream_goes_on_on_other_ranks(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": jpeg(i), "path": None} for i in range(60)] + [{"bytes": b"no image", "path": None}]
    datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "x.parquet"
    )
    stream = {"kind": "stream", "length": 61, "buffer": 16}
    given, places = recipe(tmp_path, tmp_path / "x.parquet", data=stream), [tmp_path / "straight", tmp_path / "other"]
    run("train", given, "--run.dir", places[0], folder=tmp_path)
    other = start("train", given, "--run.dir", places[1], "--data.workers", 1, ranks=2, folder=tmp_path)
    until(reaches(places[1], 48), lambda: other.text)
    other.kill(signal.SIGTERM)
    assert other.wait() == [75, 75]
    run("train", given, "--run.dir", places[1], "--data.workers", 2, folder=tmp_path)
    assert_same_path(places[1], places[0])
    assert sum(r["data/unreadable"] for r in steps(places[1]).values()) >= 2
    said = run(
        "train",
        given,
        "--run.dir",
        places[1],
        "--train.total_samples",
        240,
        "--data.buffer",
        9,
        folder=tmp_path,
        status=2,
    )
    assert "data.buffer is 9, but this run mixes its stream through 16 images" in said
    said = run(
        "train",
        given,
        "--run.dir",
        tmp_path / "long",
        "--data.length",
        70,
        "--data.workers",
        1,
        folder=tmp_path,
        status=2,
    )
    assert "ended after 61 images; nearest: 61." in said and "Traceback" not in said


def test_a_run_that_waits_for_images_says_so(tmp_path):
    """Large PNGs for a tiny network, and one loader process."""
    folder = tmp_path / "large"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (1800, 1800, 3)).astype(np.uint8)).save(
            folder / f"{i}.png", compress_level=1
        )
    place = tmp_path / "run"
    given = recipe(
        tmp_path, folder, data={"workers": 1, "prefetch": 1}, checkpoint={"every_samples": 0}
    )  # while one is written, images gather
    run("train", given, "--run.dir", place, "--train.total_samples", 64, folder=tmp_path)
    assert sorted(r["time/data_wait_frac"] for r in steps(place).values())[4] > 0.05
    (event,) = events(place, "starved")
    assert "updates wait for images" in event["text"] and "seer-scale bench data" in event["text"]


# ------------------------------------------------------------------------------------------- broken, tars, device


def test_a_source_of_which_five_percent_are_broken(tmp_path):
    folder, n = write(tmp_path / "photos", 100, 1), 100
    broken = {7, 31, 32, 58, 90}
    for i in broken:
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(i)[:200])
    place = tmp_path / "run"
    run("train", recipe(tmp_path, folder, data={"workers": 2}), "--run.dir", place, folder=tmp_path)
    sampler, expected = ElasticSampler([DataVersion(0, (("photos", n),))], 0, 8), 0
    for p in range(160):
        epoch, offset = divmod(p, n)
        while int(sampler.at(epoch, np.array([offset % n]))[0]) in broken:
            expected, offset = expected + 1, offset + 1
    assert sum(r["data/unreadable"] for r in steps(place).values()) == expected >= 8
    assert len((place / "logs" / "unreadable-0.txt").read_text().splitlines()) == expected


def test_tars_in_blocks_on_other_ranks_and_workers(tmp_path):
    (tmp_path / "tars").mkdir()
    for t in range(3):
        write_tar(tmp_path / "tars" / f"{t}.tar", {f"{i:03d}.jpg": jpeg(100 * t + i) for i in range(50)})
    given, places = recipe(tmp_path, tmp_path / "tars", data={"block": 5}), [tmp_path / "straight", tmp_path / "other"]
    run("train", given, "--run.dir", places[0], folder=tmp_path)
    other = start("train", given, "--run.dir", places[1], "--data.workers", 2, ranks=2, folder=tmp_path)
    until(reaches(places[1], 48), lambda: other.text)
    other.kill(signal.SIGTERM)
    assert other.wait() == [75, 75]
    run("train", given, "--run.dir", places[1], "--data.workers", 1, folder=tmp_path)
    assert_same_path(places[1], places[0])
    said = run(
        "train",
        given,
        "--run.dir",
        places[1],
        "--train.total_samples",
        240,
        "--data.block",
        4,
        folder=tmp_path,
        status=2,
    )
    assert "data.block is 4, but this run reads its images in blocks of 5" in said


def test_loaders_killed_all_the_time(straight, tmp_path, photos):
    place = tmp_path / "run"
    running = start("train", recipe(tmp_path, photos), "--run.dir", place, "--data.workers", 2, folder=tmp_path)
    killed, done = set(), 0
    while running.processes[0].exitcode is None:
        loaders = [p for p in workers(running.processes[0].pid) if p not in killed]
        if loaders and len(steps(place)) > done:
            done = len(steps(place))
            killed.add(loaders[-1])
            with suppress(ProcessLookupError):
                os.kill(loaders[-1], signal.SIGKILL)
    assert running.wait() == [0] and killed
    assert "another takes its place" in running.text
    assert_same_path(place, straight)


def test_photometrics_on_the_device_are_those_of_the_cpu(tmp_path, photos):
    """A pixel differs by its rounding, and codes that do not magnify that make the same loss of it."""
    calm = {
        "swav": RECIPE["swav"] | {"epsilon": 0.5, "temperature": 0.5},
        "train": RECIPE["train"] | {"total_samples": 8},
    }
    first = {}
    for where in ("cpu", "device"):
        given, place = (
            recipe(tmp_path, photos, schedule={"warmup_samples": 0}, knn={"enabled": False}, **calm),
            tmp_path / where,
        )
        run("train", given, "--run.dir", place, "--data.photometric", where, folder=tmp_path)
        (first[where],) = steps(place).values()
    assert first["cpu"]["data/fingerprint"] == first["device"]["data/fingerprint"]
    assert 0 < abs(first["device"]["loss"] / first["cpu"]["loss"] - 1) < 5e-3
