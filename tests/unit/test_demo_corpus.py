"""The demo corpus: whole or not there, balanced, the same from the same seed, and nothing of a class in its colours."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from seer_scale.corpus import demo
from seer_scale.corpus.demo import CLASSES, TEXTURES, photograph, write_demo_corpus
from seer_scale.data.sources import open_source
from seer_scale.data.transforms.decode import decode
from seer_scale.data.transforms.views import resize_centre
from seer_scale.rng import numpy_generator
from tests.problems import refused


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo") / "corpus", train=400, test=100, seed=5)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.jpg")}


def test_classes_are_balanced_and_every_jpeg_decodes(corpus):
    for split, count in ("train", 400), ("test", 100):
        source = open_source(str(corpus / split))
        assert len(source) == count and source.classes == list(CLASSES) and source.has_labels
        assert set(Counter(source.labels.tolist()).values()) == {count // len(CLASSES)}
        for i in range(count):
            height, width, channels = decode(source.read(i)).shape
            assert 64 <= height <= 96 and 64 <= width <= 96 and channels == 3
    assert len(set(files(corpus).values())) == 500  # no image twice, in either split
    assert not list(corpus.parent.glob("*.tmp"))


def test_deterministic_and_a_longer_corpus_begins_with_the_shorter(corpus, tmp_path):
    again = files(write_demo_corpus(tmp_path / "again", train=400, test=100, seed=5))
    assert again == files(corpus)
    short = files(write_demo_corpus(tmp_path / "short", train=20, test=10, seed=5))
    assert all(again[name] == data for name, data in short.items())
    other = files(write_demo_corpus(tmp_path / "other", train=20, test=10, seed=6))
    assert not set(other.values()) & set(again.values())


def test_written_once_and_never_over_anything_else(tmp_path, monkeypatch):
    folder = write_demo_corpus(tmp_path / "c", train=10, test=10)
    with monkeypatch.context() as m:
        m.setattr(demo, "photograph", lambda *a: pytest.fail("written again"))
        write_demo_corpus(folder, train=10, test=10)
    with refused(folder):
        write_demo_corpus(folder, train=20, test=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.jpg").write_bytes(b"mine")
    with refused(tmp_path / "mine"):
        write_demo_corpus(tmp_path / "mine", train=10, test=10)
    with refused("train", 15, 20):
        write_demo_corpus(tmp_path / "odd", train=15, test=10)
    assert json.loads((folder / "manifest.json").read_text())["train"] == 10


def test_a_writer_that_dies_leaves_no_corpus(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(demo, "TEXTURES", ())  # fails in the middle of writing
        with pytest.raises(KeyError):
            write_demo_corpus(tmp_path / "c", train=10, test=10)
    assert not (tmp_path / "c").exists()
    assert len(files(write_demo_corpus(tmp_path / "c", train=10, test=10))) == 20 and os.listdir(tmp_path) == ["c"]


def test_pixels_and_colours_say_little(corpus):
    """20-NN on raw pixels stays below 45 %, and on mean colour below 30 %: what a class shares is its structure."""
    sets = [open_source(str(corpus / s)) for s in ("train", "test")]
    images = [np.stack([resize_centre(decode(s.read(i)), 32) for i in range(len(s))]).astype(np.float32) for s in sets]
    for features, most in ((lambda x: x.reshape(len(x), -1), 0.45), (lambda x: x.mean((2, 3)), 0.30)):
        bank, queries = map(features, images)
        near = ((queries[:, None] - bank[None]) ** 2).sum(-1).argsort(1)[:, :20]
        votes = np.stack([np.bincount(sets[0].labels[row], minlength=10) for row in near])
        assert (votes.argmax(1) == sets[1].labels).mean() < most


def test_structure_is_there_to_be_found():
    """A few statistics of the spectrum and gradient of the grey image tell the classes better than chance (10 %)."""

    def features(texture, n):
        grey = photograph(texture, numpy_generator(1, "test", texture.__name__, n)).astype(np.float32).mean(2)
        grey = (grey - grey.mean()) / grey.std()
        spectrum = np.abs(np.fft.rfft2(grey[:64, :64]))
        polar = [spectrum[:r].sum() for r in (2, 4, 8, 16)] + [spectrum[:, :r].sum() for r in (2, 4, 8, 16)]
        slopes = [np.abs(s).mean() for s in np.gradient(grey)]
        return np.log([*polar, spectrum.max(), *slopes, (grey**4).mean(), np.abs((grey**3).mean())])

    rows = np.array([[features(t, n) for n in range(40)] for t in TEXTURES])
    rows = (rows - rows.mean((0, 1))) / rows.std((0, 1))
    bank, queries = rows[:, :30].reshape(300, -1), rows[:, 30:].reshape(100, -1)
    nearest = ((queries[:, None] - bank[None]) ** 2).sum(-1).argsort(1)[:, :5] // 30
    guess = np.array([np.bincount(row, minlength=10).argmax() for row in nearest])
    assert (guess == np.repeat(np.arange(10), 10)).mean() > 0.4
