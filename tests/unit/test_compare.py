"""The page of several runs: what differs, where each stands, and curves of runs that are not alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import seer_scale
from seer_scale.cli import main
from seer_scale.config import resolve
from seer_scale.errors import UserError
from seer_scale.models.compute import training_flops
from seer_scale.models.registry import build_backbone
from seer_scale.observe.report import comparison, write_comparison
from seer_scale.observe.report.compared_run import MAX_RUNS, names_of, read_runs, standing
from seer_scale.observe.report.plots import MAX_POINTS
from tests.tiny import RECIPE

PLOTS = [{"title": "In use", "caption": "Of all.", "key": "swav/use", "name": "use", "scale": 100, "unit": "%"}]


def a_run(
    place: Path, num: int, *, every: int = 64, ends: str = "done", knn: float | None = None, baseline: float = 2.0,
    recipe: dict | None = None, more: dict | None = None,
) -> Path:  # fmt: skip
    """A run of `num` metric lines, ten seconds apart, on two ranks."""
    place.mkdir(parents=True)
    sections = resolve(RECIPE, {}, world_size=1).to_dict()
    for section, keys in (recipe or {}).items():
        sections[section] = sections[section] | keys
    sections["run"]["dir"] = str(place)
    (place / "config.yaml").write_text(yaml.safe_dump(sections))
    start = {
        "event": "start",
        "samples_seen": 0,
        "ranks": 2,
        "baseline": ["ln K", baseline],
        "plots": PLOTS,
        "end": 640,
    }
    lines = [start | {"spent": {"start": 5.0}}]
    for i in range(num + 1):
        row = {"step": i, "loss": 2 - i / 1000, "lr": 0.1, "swav/use": 0.5} | (more or {}) if i else {}
        if knn is not None and i in (0, num):
            row |= {"knn/top1": knn if i else 10.0, "knn/top1_stderr": 1.0, "knn/measurement": "m"}
        lines.append(row | {"samples_seen": every * i, "spent": {"useful": 10.0 if i else 0.0}})
    lines += [{"event": ends, "samples_seen": every * num}] if ends else []
    stamped = [json.dumps({"wall_time": 1e9 + i} | line) for i, line in enumerate(lines)]
    (place / "metrics.jsonl").write_text("\n".join(stamped) + "\n")
    return place


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The plots of a page, which are not drawn."""
    plots: list = []
    monkeypatch.setattr(comparison, "svg", lambda plot: plots.append(plot) or "<drawn>")
    return plots


def page_of(*places: Path) -> str:
    out = places[0].parent / "compare.html"
    write_comparison(places, out, training_flops)
    return out.read_text()


def test_the_page_needs_nothing_else_and_shows_each_run_in_its_colour(tmp_path):
    one, other = a_run(tmp_path / "one <a>", 10, knn=30.0), a_run(tmp_path / "other", 5, knn=25.0)
    page = page_of(one, other)
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script', page)
    assert "<a>" not in page and "one &lt;a&gt;" in page
    assert page.count("<h3>Loss</h3>") == 3  # over images, time and compute
    for key in page.split("<div class=key>")[1:]:
        lines = re.findall(r"stroke:var\(--(\w+)\).*?</svg>(.*?)</span>", key.split("</div>")[0])
        assert lines == [("blue", "one &lt;a&gt;"), ("orange", "other")]
    values = re.findall(r"<title>(.*?)</title>", page, re.DOTALL)
    assert "one &lt;a&gt;: 1.998\nother: 1.998\n128 images seen" in values
    assert "one &lt;a&gt;: 30.0 ± 1.0 %\n640 images seen" in values


def test_only_keys_that_differ_are_shown_with_defaults_resolved(tmp_path, drawn):
    one, other = a_run(tmp_path / "one", 2), a_run(tmp_path / "other", 2, recipe={"optim": {"lr": 0.25}})
    given = yaml.safe_load((other / "config.yaml").read_text())
    del given["train"]["log_every"], given["knn"]  # as an older version, which had no such keys
    (other / "config.yaml").write_text(yaml.safe_dump(given))
    found = comparison.differing_keys(read_runs([one, other], training_flops))
    assert found == {"optim.lr": [0.6, 0.25]}
    bare = a_run(tmp_path / "bare", 2)
    (bare / "config.yaml").unlink()
    found = comparison.differing_keys(read_runs([bare, one, other], training_flops))
    assert {key: values[1:] for key, values in found.items()} == {"optim.lr": [0.6, 0.25]}
    assert "all keys of their recipes have the same values" in page_of(one, a_run(tmp_path / "third", 2))


def test_a_method_of_a_plugin_that_is_not_loaded_shows_its_keys_as_they_were_written(tmp_path, drawn):
    one, other = a_run(tmp_path / "one", 2), a_run(tmp_path / "other", 2)
    given = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(
        yaml.safe_dump({k: v for k, v in given.items() if k != "swav"} | {"method": {"name": "mine"}, "mine": {"a": 3}})
    )
    found = comparison.differing_keys(read_runs([one, other], training_flops))
    assert found["method.name"] == ["swav", "mine"] and found["mine.a"][1] == 3
    assert {key.partition(".")[0] for key in found} == {"method", "mine", "swav"}
    assert ">mine</td>" in page_of(one, other)


def test_runs_of_other_lengths_metrics_and_baselines(tmp_path, drawn):
    long = a_run(tmp_path / "long", 100, more={"mine/x": 1.0})
    short = a_run(tmp_path / "short", 7, every=100, ends="", knn=40.0, baseline=3.0)
    nothing = a_run(tmp_path / "nothing", 0, ends="")
    (nothing / "metrics.jsonl").unlink()
    page = page_of(long, short, nothing)
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert {"In use", "mine/x", "kNN top-1", "Learning rate"} < set(titles) and "Linear probe" not in titles
    loss, relative_title = drawn[0], "Loss relative to its baseline"
    assert [c.name for c in loss.curves] == ["long", "short"] and loss.until == 6400 and loss.level is None
    assert [c.x[-1] for c in loss.curves] == [6400, 700]
    relative = drawn[titles.index(relative_title)]
    assert [c.y[0] for c in relative.curves] == pytest.approx([1.999 / 2, 1.999 / 3])
    assert titles.count("Loss") == 1 and titles.count(relative_title) == 3  # over images, time and compute
    assert "Not measured by long, nothing." in page
    head, *table = standing(read_runs([long, short, nothing], training_flops))
    rows = {row[0]: dict(zip(head, row)) for row in table}
    assert rows["long"]["state"] == "done" and rows["short"]["state"] == "running"
    assert rows["nothing"]["state"] == "not started" and rows["nothing"]["loss"] == ""
    assert rows["short"]["best kNN"] == "40.0 % ± 1.00 at 700" and rows["long"]["kNN top-1"] == ""
    assert rows["long"]["running"] == "0:17 h" and rows["long"]["rank-hours"] == f"{2 * 1005 / 3600:.3g}"


def test_time_and_compute_are_those_of_the_log_and_the_backbone(tmp_path, drawn):
    one, other = (a_run(tmp_path / name, 10) for name in "ab")
    config = resolve(RECIPE, {}, world_size=1)
    backbone = build_backbone(**{k: v for k, v in RECIPE["model"].items()})
    flops = 6 * (2 * backbone.num_macs(24) + 2 * backbone.num_macs(16))
    assert training_flops(config) == flops
    page_of(one, other)
    by_time, by_compute = ([p for p in drawn if along in p.along][0].curves[0].x for along in ("minutes", "FLOP"))
    assert by_time == pytest.approx([(5 + 10 * i) / 60 for i in range(1, 11)])
    assert by_compute == pytest.approx([64 * i * flops / 1e9 for i in range(1, 11)])


def test_a_backbone_that_cannot_be_built_here_has_no_compute(tmp_path, drawn):
    one, other = a_run(tmp_path / "one", 2), a_run(tmp_path / "other", 2, recipe={"model": {"name": "of_a_plugin"}})
    page = page_of(one, other)
    assert "Not known of other" in page
    assert [c.name for p in drawn if "FLOP" in p.along for c in p.curves] == ["one"]


def test_figures_of_other_measurements_are_said_not_to_compare(tmp_path, drawn):
    one, other = (a_run(tmp_path / name, 3, knn=20.0) for name in "ab")
    told = "were measured with other images or keys, and do not compare"
    assert told not in page_of(one, other)
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace('"knn/measurement": "m"', '"knn/measurement": "n"'))
    assert told in page_of(one, other)


def test_what_a_restart_did_again_is_drawn_once_and_its_time_counts(tmp_path, drawn):
    one, other = a_run(tmp_path / "one", 10, ends=""), a_run(tmp_path / "other", 10)
    again = [{"event": "resume", "samples_seen": 320, "ranks": 4, "spent": {"start": 5.0}, "wall_time": 1e9 + 100}]
    again += [
        {"samples_seen": 64 * i, "step": i, "loss": 1.0, "spent": {"useful": 10.0}, "wall_time": 1e9 + 100 + i}
        for i in (6, 7)
    ]
    with (one / "metrics.jsonl").open("a") as log:
        log.write("\n".join(map(json.dumps, again)) + '\n{"torn')
    run = read_runs([one, other], training_flops)[0]
    assert run.samples_seen == 448 and [r["loss"] for r in run.rows if "loss" in r][-3:] == [1.995, 1.0, 1.0]
    assert run.running_s == 130 and run.rank_s == 2 * 105 + 4 * 25 and run.rows[-1]["running_s"] == 130


def test_long_logs_are_thinned_but_not_what_is_rare(tmp_path, drawn):
    one, other = (a_run(tmp_path / name, 5 * MAX_POINTS, knn=20.0) for name in "ab")
    run = read_runs([one, other], training_flops)[0]
    assert MAX_POINTS / 2 <= len(run.rows) <= 1.5 * MAX_POINTS
    assert [r["samples_seen"] for r in run.rows if "knn/top1" in r] == [0, 64 * 5 * MAX_POINTS]
    assert run.figures["loss"]["best"]["samples_seen"] == 64 * 5 * MAX_POINTS
    page_of(one, other)
    assert all(len(curve.x) <= MAX_POINTS + 1 for plot in drawn for curve in plot.curves)


def test_names_are_as_short_as_tells_them_apart():
    paths = [Path(p) for p in ("/r/a/x", "/r/b/x", "/r/b/y", "/x", "/r/c/b/y")]
    assert names_of(paths) == ["a/x", "b/x", "r/b/y", "/x", "c/b/y"]


def test_problems_are_told_all_at_once_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs/one", 2)
    (tmp_path / "folder").mkdir()
    assert main(["compare", "runs/one", "folder", "folder/../runs/one", "gone", "one"]) == 2
    told = capsys.readouterr().err.splitlines()
    rules = (
        "RUN is folder, but that is no run's folder",
        "RUN is gone, but it does not exist",
        "RUN is one, but it does not exist; did you mean runs/one",
        "RUN is folder/../runs/one, but that is the run runs/one, which is given already",
    )
    assert all(rule in line for rule, line in zip(rules, told, strict=True)), told
    assert main(["compare", "runs/one"]) == 2 and "seer-scale report RUN describes one" in capsys.readouterr().err
    many = [a_run(tmp_path / f"many/{i}", 0) for i in range(MAX_RUNS + 1)]
    with pytest.raises(UserError, match=f"RUN is {MAX_RUNS + 1}, but .*nearest: {MAX_RUNS}"):
        read_runs(many, training_flops)
    assert len({line for line, _ in zip(comparison.RUN_LINES, many)}) == MAX_RUNS == len(comparison.RUN_LINES)
    assert not (tmp_path / "compare.html").exists()


def test_nothing_but_a_page_is_replaced(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a", 2)
    a_run(tmp_path / "b", 2)
    log = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    for out, told in (("a/metrics.jsonl", "is not replaced"), ("a", "nearest: a/compare.html"), ("c/x", "no folder c")):
        with pytest.raises(UserError, match=told):
            seer_scale.compare(["a", "b"], out)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == log
    for _ in range(2):
        assert seer_scale.compare([seer_scale.Run(tmp_path / "a"), "b"]) == Path("compare.html")


def test_the_command_prints_the_tables_and_the_same_as_json(tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a", 4, knn=12.5)
    b = a_run(tmp_path / "b", 2, recipe={"optim": {"lr": 0.25}})
    (b / "eval").mkdir()
    result = {"task": "knn", "headline": "top1", "scores": {"top1": 71.0, "top1_stderr": 0.5}, "protocol": "P."}
    (b / "eval" / "knn.json").write_text(json.dumps(result))
    assert main(["compare", "a", "b"]) == 0
    told = capsys.readouterr().out
    assert told.endswith("\n\ncompare.html\n") and "  optim.lr  a: 0.6; b: 0.25\n" in told
    assert re.search(r"^a +done +256 of 640 +45\.0 s", told, re.M)
    assert "71.00 ± 0.50" in Path("compare.html").read_text()
    assert main(["compare", "a", "b", "--json", "--out", "other.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == "other.html" and found["differing_keys"] == {"optim.lr": {"a": 0.6, "b": 0.25}}
    one, other = found["runs"]
    assert one["figures"]["knn/top1"]["best"] == {"value": 12.5, "samples_seen": 256, "stderr": 1.0}
    assert one["metrics"]["loss"] == 1.996 and one["training_flops"] > 0
    assert [e["score"] for e in other["evaluations"]] == ["71.00 ± 0.50"]
