"""The report is one file that needs nothing else, tells the truth of metrics.jsonl, and copes with what is missing."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes

from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.methods.registry import build_method
from seer_scale.observe import report, run_log
from seer_scale.observe.gallery import Gallery, read_gallery
from seer_scale.observe.metric_plot import MetricPlot, ReportSection
from seer_scale.observe.records import read_metrics
from seer_scale.observe.report import figures, write_report
from seer_scale.observe.report.pictures import Pictures
from seer_scale.observe.report.plots import COLOURS, Plot, metric, smoothed, svg
from seer_scale.observe.run_log import RunLog
from tests.tiny import RECIPE

SECTIONS = [
    "How it went",
    "The life of the run",
    "What the network sees",
    "Nearest neighbours",
    "What prototypes collect",
    "How to reproduce it",
    "Restarts and other events",
]
PLOTS = [
    "Loss", "kNN top-1", "Learning rate", "Prototypes in use", "Entropy of the assignments", "Gradient norm",
    "Peak host memory", "Time of an update", "Throughput",
]  # fmt: skip
OF_THE_METHOD = {
    "baseline": ("ln K", 4.159),
    "plots": [dataclasses.asdict(p) for p in build_method(resolve(RECIPE, {}, world_size=1), World()).plots],
}
VOID = {"img", "meta", "link", "br"}


def headline(rows) -> str | None:
    found = report.headline(rows)
    return found and str(found)


def picture(seed: int, side: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, side, side + 7), dtype=np.uint8)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A short run with one restart, and a full gallery."""
    monkeypatch.setattr(run_log, "open_sinks", lambda names, run_dir: [])
    run = tmp_path / "my <run>"
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: {name: regnety_400mf}\nswav: {prototypes: [64]}\n"
        "train: {total_samples: 6400, global_batch: 64}\nparallel: {engine: fsdp}\n"
    )

    def stretch(log, steps):
        for step in steps:
            log.log({
                "step": step, "samples_seen": 64 * step, "epoch": step / 10, "loss": 4.159 - step / 100, "lr": 0.1,
                "throughput/img_per_s": 100.0, "mem/peak_gib": 1.5, "grad_norm": 0.25, "time/step_s": 0.64,
                "time/data_wait_frac": 0.25,
                "swav/prototype_use": 0.8, "swav/assignment_entropy": 0.5,
            })  # fmt: skip

    with RunLog(run, 6400, ("ln K", 4.159), active=True) as log:
        log.event("start", "A new run.", samples_seen=0, ranks=2, parameters=3_947_000, **OF_THE_METHOD)
        log.log({"samples_seen": 0, "knn/top1": 31.25, "knn/top1_stderr": 1.5})
        stretch(log, range(1, 51))
    with RunLog(run, 6400, ("ln K", 4.159), active=True) as log:
        log.event("resume", "Going on from 2,560 images.", samples_seen=2560, ranks=4, parameters=3_947_000,
                  versions={"torch": "9.9"})  # fmt: skip
        stretch(log, range(41, 101))
        log.log({"samples_seen": 6400, "knn/top1": 58.59, "knn/top1_stderr": 1.5, "knn/majority": 12.5})

    gallery = Gallery(run)
    gallery.add_crops(7, [picture(0), picture(1, 40)])
    for stage in ("before", "after"):
        gallery.add_neighbours(
            stage, picture(2), "cat & dog", [(picture(3), "cat & dog", 0.9), (picture(4), "ship", 0.8)]
        )
    gallery.add_prototype(12, 0.031, [picture(5), picture(6)])
    gallery.set_use([0.5, 0.25, 0.25, 0.0])
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
    assert re.findall(r"<h3>(.*?)</h3>", html) == [*PLOTS, "How the images are shared out"]
    assert html.count("<svg") == 2 * (len(PLOTS) + 2) and "Not measured" not in html  # for wide and for narrow screens
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert sum(url.startswith("data:") for url in page.fetched) == 2 + 2 * 2 + 1 + 2
    for words in (
        "my <run>",
        "regnety_400mf",
        "3.95M with head",
        "fsdp · 4 ranks",
        "100 images/s",
        "ln K = 4.159",
        "cat & dog",
        "Going on from",
        "58.6 % ± 1.5 after",
        "the commonest class every time would be right for 12.5 %",
        "seer-scale train my <run>/config.yaml --run.dir NEW",
        "9.9",
        "prototypes: [64]",
        "Of 4 prototypes, 1 are the nearest of no image",
    ):
        assert words in page.text, words
    assert [p.name for p in run_dir.glob("report*")] == ["report.html"]


def test_a_method_brings_a_section_of_its_own(run_dir):
    section = ReportSection(
        "Reconstructions",
        "What the <decoder> fills in.",
        (MetricPlot("Error", "Lower.", "grad_norm", "error"),),
        "filled",
    )
    with RunLog(run_dir, 6400, ("ln K", 4.159), active=True) as log:
        log.event("resume", "Going on.", samples_seen=6400, sections=[dataclasses.asdict(section)])
    gallery = Gallery(run_dir)
    gallery.add_strip("filled", "image 3", [picture(7), picture(8)], small="75 % <masked>")
    gallery.save()
    html = write_report(run_dir).read_text()
    own = Page(html[html.index("<h2>Reconstructions") - 9 : html.index("<section><h2>How to reproduce")])
    assert own.open == []
    for words in ("What the <decoder> fills in.", "Error", "image 3", "75 % <masked>"):
        assert words in own.text, words
    assert sum(url.startswith("data:") for url in own.fetched) == 2 and "Not measured" not in own.text
    for path in (run_dir / "gallery").iterdir():
        path.unlink()
    assert "What the <decoder> fills in." in Page(write_report(run_dir).read_text()).text


@pytest.mark.parametrize("maps,words", [
    (0, ()), (1, ("the CLS token.",)), (2, ("the CLS token, then the register.",)),
    (5, ("then each of 4 registers",)),
])  # fmt: skip
def test_patches_have_a_section(run_dir, maps, words):
    gallery = Gallery(run_dir)
    gallery.add_strip("patches", "image 3", [picture(20), *(picture(n, 4) for n in range(maps + 1))])
    gallery.save()
    html = write_report(run_dir).read_text()
    own = Page(html[html.index("<h2>What its patches hold") - 9 : html.index("<section><h2>How to reproduce")])
    assert own.open == [] and "image 3" in own.text and ("attends to" in own.text) == bool(maps)
    assert all(word in own.text for word in words)
    assert sum(url.startswith("data:") for url in own.fetched) == maps + 2


def test_the_headline_has_the_numbers_of_the_metrics(run_dir):
    rows, _ = read_metrics(run_dir)
    evaluated = [r["knn/top1"] for r in rows if "knn/top1" in r]
    assert evaluated == [31.25, 58.59]
    assert headline(rows) == f"kNN top-1: {evaluated[0]:.1f} % ± 1.5 before, {evaluated[-1]:.1f} % ± 1.5 after"
    assert headline(rows) in Page(write_report(run_dir).read_text()).text


def test_the_headline_claims_no_more_than_was_measured():
    assert headline([]) is None
    assert headline([{"samples_seen": 0, "knn/top1": 20.0}]) == "kNN top-1: 20.0 % before"
    assert (
        headline([{"samples_seen": 64, "knn/top1": 20.0}, {"samples_seen": 96, "knn/top1": 30.0}])
        == "kNN top-1: 30.0 % after"
    )
    assert headline([{"samples_seen": 0, "knn/top1": None}]) is None
    rows = [{"samples_seen": n, "knn/top1": 20.0 + n, "knn/measurement": mark} for n, mark in ((0, "a"), (9, "b"))]
    assert (
        headline(rows) == "kNN top-1: 29.0 % after (what stood before, 20.0 %, was measured with other images or keys)"
    )
    assert headline([rows[0] | {"knn/measurement": "b"}, rows[1]]) == "kNN top-1: 20.0 % before, 29.0 % after"


def test_the_headline_says_where_a_figure_is_from_that_is_not_of_the_end():
    rows = [{"samples_seen": n, "knn/top1": 20.0 + n, "evaluation/stage": s} for n, s in ((0, "before"), (9, "after"))]
    assert headline(rows) == "kNN top-1: 20.0 % before, 29.0 % after"
    assert headline([*rows, {"samples_seen": 4480}]) == "kNN top-1: 20.0 % before, 29.0 % at 9 samples"
    during = rows[1] | {"samples_seen": 1280, "evaluation/stage": "during"}
    assert headline([rows[0], during]) == "kNN top-1: 20.0 % before, 29.0 % at 1,280 samples"
    assert headline([during, {"samples_seen": 1281}]) == "kNN top-1: 29.0 % at 1,280 samples"


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
    assert html.count("so there is nothing to show here") == 3 and "shared out" not in html


@pytest.mark.parametrize("metrics", [None, "", '{"samples_seen": 64, "step": 1, "loss": null}\n{"samples_'])
def test_a_run_that_has_hardly_begun_has_a_report_too(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    page = Page(write_report(tmp_path).read_text())
    assert page.text.count("Not measured yet.") == len(PLOTS) - len(OF_THE_METHOD["plots"])
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


def test_pictures_keep_their_shape(tmp_path):
    """Of a crop less high than wide, and of the largest, whose longer side is longer on the page."""
    gallery = Gallery(tmp_path)
    gallery.add_crops(0, [np.zeros((3, 60, 80), np.uint8), np.zeros((3, 40, 40), np.uint8)])
    gallery.save()
    ((wide, square),) = [strip.pictures for strip in Pictures(tmp_path).crops()]
    assert (wide.width, wide.height, square.width, square.height) == (136, 102, 84, 84)


def test_smoothing_begins_and_ends_on_the_data_and_never_crosses_a_restart():
    x, y = list(range(200)), [1.0] * 100 + [5.0] * 99 + [7.0]
    for breaks in ([], [99]):
        out = smoothed(x, y, breaks, share=0.1)
        assert len(out) == len(y) and out[0] == y[0] and out[-1] == y[-1]
        assert (1.0 < out[99] < 5.0) == (not breaks)
    assert smoothed(x, y, [99])[:100] == [1.0] * 100


def test_values_show_under_the_pointer_and_colours_follow_the_reader():
    rows = [{"samples_seen": 64 * i, "a": i / 10, "b": None if i == 2 else 0.5} for i in range(400)]
    curves = [
        metric(rows, "a", "one", COLOURS["blue"], unit="s"),
        metric(rows, "b", "two", COLOURS["orange"], spread="c"),
    ]
    picture = svg(Plot(curves, "s", until=64 * 400))
    values = re.findall(r"<title>(.*?)</title>", picture, re.DOTALL)
    assert "one: 0 s\ntwo: 0.5\n0 images seen" in values and 50 < len(values) / 2 <= 80
    assert all(f"var(--{c})" in picture for c in ("blue", "orange", "ink", "grid"))
    assert not re.search(r"#[0-9a-f]{6}\b", picture.replace("#000000", ""))  # matplotlib's default, of clip paths


def test_a_single_evaluation_has_an_axis_that_begins_at_0():
    picture = svg(Plot([metric([{"samples_seen": 0, "knn/top1": 30.0}], "knn/top1", "kNN", COLOURS["green"])], until=1))
    assert "-" not in "".join(re.findall(r"<text[^>]*>([^<]*)</text>", picture)).replace("kNN top-1", "")


def test_the_commonest_class_is_in_the_picture_where_it_is_right_more_often_than_the_network(run_dir, monkeypatch):
    with RunLog(run_dir, 6400, ("ln K", 4.159), active=True) as log:
        log.log({"samples_seen": 6464, "knn/top1": 60.0, "knn/top1_stderr": 21.7, "knn/majority": 75.0})
    plots = []
    monkeypatch.setattr(figures, "svg", lambda plot: plots.append(plot) or "")
    write_report(run_dir)
    (knn,) = (p for p in plots if [c.name for c in p.curves] == ["kNN top-1"])
    assert knn.level[0] == 75.0 and knn.limits[1] > max(75.0, 60.0 + 21.7)


def test_points_of_different_measurements_are_not_joined(run_dir, monkeypatch):
    rows = [
        {"samples_seen": n, "a": 1.0, "knn/measurement": mark}
        for n, mark in enumerate((None, "x", None, "x", "y", "y"))
    ]
    assert metric(rows, "a", "a", COLOURS["green"], apart="knn/measurement").gaps == [4]  # a log of old says nothing
    assert "no line joins" not in write_report(run_dir).read_text()
    with RunLog(run_dir, 6400, 4.159, active=True) as log:
        for samples, mark in ((6464, "x"), (6528, "y")):
            log.log({"samples_seen": samples, "knn/top1": 60.0, "knn/measurement": mark})
    assert "Points that no line joins were measured with other images or keys" in write_report(run_dir).read_text()


def test_values_at_the_ends_stand_clear_of_the_level_and_of_error_bars(monkeypatch):
    written = []
    monkeypatch.setattr(
        Axes,
        "annotate",
        lambda self, text, at, **how: written.append((text, at[1], how["va"])) if "va" in how else None,
    )
    rows = [{"samples_seen": n, "a": y, "e": 2.0} for n, y in ((0, 19.0), (9, 23.0))]
    curve = metric(rows, "a", "a", COLOURS["green"], digits=".0f", unit="%", spread="e", ends=True)
    for level, expected in (
        (None, [("19 %", 17.0, "top"), ("23 %", 25.0, "bottom")]),
        (18.0, [("19 %", 21.0, "bottom"), ("23 %", 25.0, "bottom")]),
        (20.0, [("19 %", 17.0, "top"), ("23 %", 25.0, "bottom")]),
    ):
        written.clear()
        svg(Plot([curve], level=(level, "level") if level else None, until=9))
        assert written == 2 * expected


def test_health_of_features_has_curves_where_it_was_measured(run_dir):
    assert "Effective rank" not in titles_of(run_dir)
    figures_of_health = {
        "health/rankme": 30.0,
        "health/rankme_embeddings": 12.5,
        "health/alignment": 0.21,
        "health/uniformity": -1.5,
        "health/feature_norm": 3.0,
        "health/feature_norm_std": 0.5,
    }
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"samples_seen": 0} | figures_of_health) + "\n")
    page = write_report(run_dir).read_text()
    assert titles_of(run_dir)[2:5] == ["Effective rank", "Alignment and uniformity", "Norm of features"]
    assert all(said in page for said in ("embeddings: 12.5", "alignment: 0.21", "uniformity: -1.50", "norm: 3 ± 0.5"))


def titles_of(run_dir) -> list[str]:
    return [plot.title for plot in figures.plots_of_run(figures.Figures(*read_metrics(run_dir)))]


def test_a_probe_has_curves_where_there_is_one(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as f:
        for seen in (64, 128):
            row = {"probe/loss": 2.5, "probe/train_top1": 20.0, "probe/top1": 31.5, "probe/top1_stderr": 1.5}
            f.write(json.dumps({"samples_seen": seen} | row) + "\n")
    assert titles_of(run_dir)[2:4] == ["Linear probe", "Loss of the linear probe"]
    assert "held-out images: 31.5 ± 1.5 %" in write_report(run_dir).read_text()


def test_what_eval_has_measured_has_rows_and_charts(run_dir):
    chart = {"title": "By <k>", "x": "k", "y": "top-1, %", "series": {"a": [[1, 20.0], [5, 30.0]]}, "log_x": True}
    bars = {
        "title": "Bars",
        "x": "corruption",
        "y": "%",
        "series": {"a": [["blur", 2.0]], "b": [["fog", 3.0]]},
        "kind": "bars",
    }
    (run_dir / "eval").mkdir()
    record = {
        "task": "knn", "headline": "knn/top1", "scores": {"knn/top1": 41.5, "knn/top1_stderr": 2.25},
        "protocol": "On <these>.", "subject": {"checkpoint": "samples-000000000064"}, "plots": [chart, bars],
    }  # fmt: skip
    for name, kept in {
        "other": record | {"plots": []},
        "other-random": record | {"data": "others", "scores": {"knn/top1": 77.5}},
        "knn": record | {"warnings": ["Only two fits."]}, "again": record, "suite": {"suite": ["knn"]},
        "knn-random": record | {"scores": {"knn/top1": 20.0}},
        "alone-random": record | {"task": "alone", "plots": [{"title": 1}]},
        "drawn": record | {"scores": {"knn/top1": 55.0, "knn/top1_std": 4.5}, "plots": [bars | {"x": ""}]},
        "damaged": record | {"task": "damaged", "plots": [{"title": "no series"}, 3], "headline": "none"},
    }.items():  # fmt: skip
        (run_dir / "eval" / f"{name}.json").write_text(json.dumps(kept))
    (run_dir / "eval" / "torn.json").write_text("{")
    page = Page(html := write_report(run_dir).read_text())
    assert page.open == [] and html.count("<h2>What it is worth</h2>") == 1
    drawn = ["By &lt;k&gt;", "Bars"]
    assert re.findall(r"<h3>(.*?)</h3>", html)[-5:] == [*drawn, "Bars", *drawn], "again, drawn, knn"
    for words in (
        "41.50 ± 2.25",
        "55.00 ± 4.50 (deviation)",
        "eval knn: %.",
        "eval knn: % by corruption.",
        "20.00",
        "On <these>. Only two fits.",
        "samples-000000000064",
        "untrained",
    ):
        assert words in page.text
    assert "77.50" not in page.text, "measured with other images"
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not any(colour in drawn for colour in COLOURS.values())
