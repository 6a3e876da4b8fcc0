"""A corpus of which everything is known is described as it is; what breaks readers is named, not survived by luck."""

import argparse
import json
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image

from seer_scale.corpus import describe as module
from seer_scale.data.sources import open_source
from seer_scale.errors import DataError
from tests.pictures import encode, photo
from tests.problems import refused
from tests.sources import Fatal

HOSTILE = Path(__file__).parents[3] / "shared" / "data" / "hostile"


def inspect(path, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(path), "--workers", "2", *map(str, words)]))


def facts(path, *words):
    return json.loads(inspect(path, "--json", *words))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two classes: 8 colour JPEGs, of which two equal and one on its side; a grey one, a CMYK one, a PNG, two
    broken."""
    root = tmp_path_factory.mktemp("corpus")
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    images = [Image.fromarray(photo(60, 80, seed)) for seed in range(11)]
    data = {f"a/{n}.jpg": encode(image) for n, image in enumerate(images[:6])}
    data["a/6.jpg"] = data["a/0.jpg"]
    data["a/7.jpg"] = encode(images[7], exif=on_its_side)
    data["b/grey.jpg"] = encode(images[8].convert("L").resize((30, 20)))
    data["b/cmyk.jpg"] = encode(images[9].convert("CMYK"))
    data["b/large.png"] = encode(Image.fromarray(photo(200, 300)), "PNG")
    data["b/page.jpg"], data["b/short.jpg"] = b"<!DOCTYPE html><p>404", data["a/1.jpg"][:400]
    for name, bytes_ in data.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(bytes_)
    return root


@pytest.mark.parametrize("workers", (0, 1, 3))
def test_known_contents(corpus, workers):
    got, sizes = facts(corpus, "--all", "--workers", workers), [p.stat().st_size for p in corpus.rglob("*.*")]
    assert got["kind"] == "folder" and got["images"] == got["sample"] == 13
    assert got["labels"] == {"classes": 2, "labelled": 13, "largest": ["a", 8], "smallest": ["b", 5]}
    assert got["bytes"]["total"] == sum(sizes) and got["bytes"]["median"] == round(np.median(sizes))
    assert got["formats"] == {"JPEG": 11, "PNG": 1, "a web page": 1} and got["slow_decoder"] == 1
    assert got["modes"] == {"RGB": 9, "L": 1, "CMYK": 1} and got["greyscale"] == 1 and got["rotated"] == 1
    assert got["pixels"] == {"median": [60, 80], "smallest": [20, 30], "largest": [200, 300]}
    assert got["duplicates"] == 1 and got["images_per_s"] > 0
    assert got["unreadable"]["count"] == 2
    assert (
        got["unreadable"]["first"][0]
        == f"{corpus}/b/page.jpg: its first bytes are those of no image format that is read here"
    )
    assert got["unreadable"]["first"][1].startswith(f"{corpus}/b/short.jpg: it is no whole image")


def test_text_sheet_and_list(corpus, tmp_path):
    text = inspect(corpus, "--sheet", tmp_path / "sheet.jpg", "--unreadable", tmp_path / "bad.txt")
    assert "13 images; 2 classes from b (5) to a (8)" in text and "JPEG 11 (84.6 %)" in text and "404" not in text
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG" and sheet.size == (12 * module.SHEET_SIDE, module.SHEET_SIDE)
        last, absent = (sheet.getpixel((column * module.SHEET_SIDE + 9, 9)) for column in (10, 11))
        assert absent == (255, 255, 255) != last
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{corpus}/b/page.jpg", f"{corpus}/b/short.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "sheet.jpg"]


def test_sample_is_spread_evenly(corpus):
    got = facts(corpus, "--sample", 5)
    assert got["sample"] == 5 and got["images"] == 13
    job = module._Facts(open_source(str(corpus)), 5, 2)
    assert [job.at(p) for p in range(5)] == [0, 2, 5, 7, 10]
    read = [len(job.source.read(job.at(p))) for p in range(5)]
    assert got["bytes"]["total"] == round(sum(read) / 5 * 13)


def test_of_many_images_few_values_are_kept(tmp_path, monkeypatch):
    """Counts and extremes stay exact; all copies of an image are looked at, or none, so duplicates are estimated."""
    monkeypatch.setattr(module, "KEPT", 100)
    rng, tally = np.random.default_rng(0), module.CorpusStats(1000)
    rows = np.zeros((1000, 7), np.int64)
    rows[:, module.BYTES], rows[:, module.HEIGHT], rows[:, module.WIDTH] = (
        rng.integers(900, 1100, 1000),
        np.arange(1, 1001),
        7,
    )
    rows[:, module.HASH] = np.repeat(rng.integers(-(2**63), 2**63 - 1, 500), 2)
    for part in np.array_split(rows, 7):
        tally.add(part)
    got = tally.facts(2000)
    assert tally._kept.shape == (100, 3) and (tally._kept[:, 1] == np.arange(1, 1001, 10)).all()
    assert got["bytes"]["total"] == 2 * rows[:, module.BYTES].sum() and got["formats"] == {"JPEG": 1000}
    assert got["pixels"]["smallest"] == (1, 7) and got["pixels"]["largest"] == (1000, 7)
    assert abs(got["pixels"]["median"][0] - 500) < 10 and 300 < got["duplicates"] < 700
    assert tally.readable(4).tolist() == [0, 330, 660, 990]


def test_images_that_end_their_process_are_named(corpus, tmp_path, monkeypatch, capfd):
    """Every image of class a does, side by side: still each is refused, and the rest described."""
    real = module.open_source

    def open_fatal(path, kind):
        source = real(path, kind)
        return Fatal(source, {i for i in range(len(source)) if source.name(i).startswith(f"{corpus}/a/")})

    monkeypatch.setattr(module, "open_source", open_fatal)
    got = facts(corpus, "--unreadable", tmp_path / "bad.txt")
    assert got["unreadable"]["count"] == 10 and got["modes"] == {"RGB": 1, "L": 1, "CMYK": 1}
    assert got["unreadable"]["first"][3] == f"{corpus}/a/3.jpg: it ended or stopped its loader twice"
    assert f"was ended by SIGKILL at {corpus}/a/3.jpg" in capfd.readouterr().err


def test_nothing_readable(tmp_path):
    (tmp_path / "src").mkdir()
    for n in range(3):
        (tmp_path / "src" / f"{n}.jpg").write_bytes(b"")
    got = facts(tmp_path / "src", "--sheet", tmp_path / "sheet.jpg")
    assert got["unreadable"]["count"] == 3 and got["bytes"]["total"] == 0 and got["pixels"]["median"] is None
    assert "largest none" in inspect(tmp_path / "src")


def test_stream(monkeypatch):
    class Stream:
        def __len__(self):
            return 40

        def iterate(self, seed, epoch, first):
            for position in range(first, 40):
                yield (
                    position,
                    DataError("it is gone") if position == 3 else encode(Image.fromarray(photo(seed=position))),
                )

    monkeypatch.setattr(module, "open_source", lambda path, kind: Stream())
    got = facts("hf:any", "--kind", "stream", "--sample", 10)
    assert (
        got["images"] == 40
        and got["sample"] == 10
        and got["unreadable"] == {"count": 1, "first": ["image 3: it is gone"]}
    )
    with refused("--all"):
        inspect("hf:any", "--kind", "stream", "--all")


def test_bad_arguments(corpus):
    with refused("--sample", 0, 1):
        inspect(corpus, "--sample", 0)
    with refused("--sheet", ANY, "make it first"):
        inspect(corpus, "--sheet", corpus / "a" / "0.jpg" / "sheet.jpg")
    with refused("--unreadable", ANY, "make it first"):
        inspect(corpus, "--unreadable", corpus / "a" / "0.jpg" / "list.txt")


def test_progress(monkeypatch, capsys):
    now = iter((0.0, 2.0, 6.0, 7.0, 12.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    progress = module.Progress("Images looked at", 4000)
    for done in (100, 1000, 1500, 3000):
        progress.update(done, done)
    assert capsys.readouterr().err.splitlines() == [
        "Images looked at: 1,000 of 4,000, 167 images/s, 18 s left.",
        "Images looked at: 3,000 of 4,000, 250 images/s, 4 s left.",
    ]


@pytest.mark.skipif(not HOSTILE.exists(), reason="needs shared/data/hostile")
def test_hostile_files(tmp_path):
    known = [f for f in json.loads((HOSTILE / "manifest.json").read_text())["files"] if "bomb_11000" not in f["file"]]
    (tmp_path / "list.txt").write_text("".join(f"{HOSTILE / f['file']}\n" for f in known))
    got = facts(tmp_path / "list.txt", "--unreadable", tmp_path / "bad.txt")
    refused = {Path(line.partition(": ")[0]).name for line in (tmp_path / "bad.txt").read_text().splitlines()}
    strict = {Path(f["file"]).name: f["expect"] for f in known if f["strict"]}
    assert {n for n, expect in strict.items() if expect == "skip"} <= refused
    assert not {n for n, expect in strict.items() if expect == "decode"} & refused
    whole = [f for f in known if Path(f["file"]).name not in refused]
    assert got["rotated"] == sum(f.get("exif_orientation", 1) in range(2, 9) for f in whole)
    assert got["formats"]["WebP"] == sum(f.get("format_by_content") == "WEBP" for f in known)
    assert got["formats"]["no bytes"] == 1 and got["formats"]["a web page"] == 1


def test_images_are_decoded_as_training_does_it(monkeypatch):
    """Small where they may be, and told in their own size: what only fails so would be called whole."""
    asked = []
    monkeypatch.setattr(module, "decode", lambda data, at_least: asked.append(at_least(400, 600)))
    assert module._whole_size(b"") == (400, 600) and asked == [(200, 300)]
