"""The report is one file that needs nothing else, tells the truth of metrics.jsonl, and copes with what is missing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from seer_scale.observe.gallery import Gallery, read_gallery
from seer_scale.observe.report import headline, write_report
from seer_scale.observe.sinks import RunLog, read_metrics

SECTIONS = [
    "How it went",
    "The life of the run",
    "What the network sees",
    "Nearest neighbours",
    "What prototypes collect",
    "Restarts and other events",
]
PLOTS = ["Loss", "kNN top-1", "Learning rate", "Prototypes in use", "Entropy of the assignments", "Throughput"]
VOID = {"img", "meta", "link", "br"}


def picture(seed: int, side: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, side, side + 7), dtype=np.uint8)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A short run with one restart, and a full gallery."""
    monkeypatch.setattr(RunLog, "_open_tensorboard", lambda self, purge_from=None: None)
    monkeypatch.setattr(RunLog, "_to_tensorboard", lambda self, row: None)
    run = tmp_path / "my <run>"
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: {name: regnety_400mf}\nswav: {prototypes: [64]}\n"
        "train: {samples: 6400, global_batch: 64}\nparallel: {engine: fsdp}\n"
    )

    def stretch(log, steps):
        for step in steps:
            log.log({
                "step": step, "samples_seen": 64 * step, "epoch": step / 10, "loss": 4.159 - step / 100, "lr": 0.1,
                "throughput/img_per_s": 100.0, "mem/peak_gib": 1.5,
                "swav/prototype_use": 0.8, "swav/assignment_entropy": 0.5,
            })  # fmt: skip

    with RunLog(run, 6400, 4.159, active=True) as log:
        log.event("start", "A new run.", samples_seen=0, ranks=2, parameters=3_947_000)
        log.log({"samples_seen": 0, "knn/top1": 31.25})
        stretch(log, range(1, 51))
    with RunLog(run, 6400, 4.159, active=True) as log:
        log.event("resume", "Going on from 2,560 images.", samples_seen=2560, ranks=4, parameters=3_947_000)
        stretch(log, range(41, 101))
        log.log({"samples_seen": 6400, "knn/top1": 58.59})

    gallery = Gallery(run)
    gallery.add_crops(7, [picture(0), picture(1, 40)])
    for stage in ("before", "after"):
        gallery.add_neighbours(
            stage, picture(2), "cat & dog", [(picture(3), "cat & dog", 0.9), (picture(4), "ship", 0.8)]
        )
    gallery.add_prototype(12, 0.031, [picture(5), picture(6)])
    gallery.save()
    return run


class Page(HTMLParser):
    """What a browser would fetch, and the text it would show; raises on a tag closed out of order."""

    def __init__(self, html: str):
        super().__init__()
        self.fetched, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k.split(":")[-1] in ("src", "href", "srcset", "data", "poster")]
        if tag in ("div", "section", "figure", "main", "header", "svg", "table", "dl"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("div", "section", "figure", "main", "header", "svg", "table", "dl"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_one_file_with_every_section_and_plot_and_no_request(run_dir):
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert page.open == []
    assert page.fetched and all(url.startswith(("data:image/", "#")) for url in page.fetched)
    assert not re.search(r"https?://|@import|<script|<link|url\((?!#)", html)
    assert [h for h in re.findall(r"<h2>(.*?)</h2>", html)] == SECTIONS
    assert re.findall(r"<h3>(.*?)</h3>", html) == PLOTS
    assert html.count("<svg") == len(PLOTS) + 1 and "Not measured" not in html
    assert sum(url.startswith("data:") for url in page.fetched) == 2 + 2 * 2 + 1 + 2
    for words in (
        "my <run>",
        "regnety_400mf",
        "3.95 M",
        "fsdp · 4 ranks",
        "100 images/s",
        "ln K = 4.159",
        "cat & dog",
        "Going on from",
    ):
        assert words in page.text, words
    assert [p.name for p in run_dir.glob("report*")] == ["report.html"]


def test_the_headline_has_the_numbers_of_the_metrics(run_dir):
    rows, _ = read_metrics(run_dir)
    evaluated = [r["knn/top1"] for r in rows if "knn/top1" in r]
    assert evaluated == [31.25, 58.59]
    assert headline(rows) == f"kNN top-1: {evaluated[0]:.1f} % before, {evaluated[-1]:.1f} % after"
    assert headline(rows) in Page(write_report(run_dir).read_text()).text


def test_the_headline_claims_no_more_than_was_measured():
    assert headline([]) is None
    assert headline([{"samples_seen": 0, "knn/top1": 20.0}]) == "kNN top-1: 20.0 % before"
    assert (
        headline([{"samples_seen": 64, "knn/top1": 20.0}, {"samples_seen": 96, "knn/top1": 30.0}])
        == "kNN top-1: 30.0 % after"
    )
    assert headline([{"samples_seen": 0, "knn/top1": None}]) is None


def test_right_and_wrong_neighbours_can_be_told_apart(run_dir):
    html = write_report(run_dir).read_text()
    assert html.count("<figure class=right>") == html.count("<figure class=wrong>") == 2
    assert "1 of 2 match before and 1 of 2 match after" in html


def test_without_labels_nothing_is_called_right_or_wrong(run_dir):
    gallery = Gallery(run_dir)
    for stage in ("before", "after"):
        gallery.add_neighbours(stage, picture(2), None, [(picture(3), None, 0.9)])
    gallery.save()
    html = write_report(run_dir).read_text()
    assert "figure class=right" not in html and "figure class=wrong" not in html and "match" not in html
    assert html.count("<figure class=unknown>") == 2


def test_without_a_gallery_each_section_says_so(run_dir):
    for path in (run_dir / "gallery").iterdir():
        path.unlink()
    (run_dir / "gallery").rmdir()
    html = write_report(run_dir).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", html) == SECTIONS
    assert html.count("so there is nothing to show here") == 3


@pytest.mark.parametrize("metrics", [None, "", '{"samples_seen": 64, "step": 1, "loss": null}\n{"samples_'])
def test_a_run_that_has_hardly_begun_has_a_report_too(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    page = Page(write_report(tmp_path).read_text())
    assert page.text.count("Not measured yet.") == len(PLOTS)
    assert "No kNN evaluation yet" in page.text


def test_a_later_stage_keeps_what_is_there_and_replaces_its_own(run_dir):
    before = read_gallery(run_dir)
    gallery = Gallery(run_dir)
    gallery.add_neighbours("after", picture(2), "cat", [(picture(9), "cat", 0.95)])
    gallery.save()
    now = read_gallery(run_dir)
    assert {k: now[k] for k in ("crops", "before", "prototypes")} == {
        k: before[k] for k in ("crops", "before", "prototypes")
    }
    assert [len(e["neighbours"]) for e in now["after"]] == [1]


def test_the_gallery_holds_exactly_the_images_it_names(run_dir):
    gallery = Gallery(run_dir)
    gallery.add_crops(8, [picture(20, 32)])
    gallery.save()
    index = (run_dir / "gallery" / "gallery.json").read_text()
    files = {p.name for p in (run_dir / "gallery").iterdir()} - {"gallery.json"}
    assert files == set(re.findall(r"[0-9a-f]{16}\.(?:png|jpg)", index))


def test_tiny_images_are_kept_to_the_pixel(tmp_path):
    from PIL import Image

    image, gallery = picture(1, 32), Gallery(tmp_path)
    gallery.add_crops(0, [image])
    gallery.save()
    name = read_gallery(tmp_path)["crops"][0]["images"][0]
    assert np.array_equal(np.array(Image.open(tmp_path / "gallery" / name)).transpose(2, 0, 1), image)
