"""Several tasks of one backbone: what is measured, written and shown, and which published figures stand beside."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml

from seer_scale.errors import NOTHING, UserError
from seer_scale.evaluate.layouts import word_of
from seer_scale.evaluate.published import published
from seer_scale.evaluate.run import run_task
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.suite import as_table, items_of, read_suite, rows_of, run_suite, to_entries
from tests.unit.test_knn import write_corpus
from tests.unit.test_load import checkpoint

SUITE = """
- knn
- {task: lowshot, shots: 50}
- {task: linear, solver: lbfgs, c: 1}
- {task: lowshot, shots: 40%, draws: 2, c: 1}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    "suite",
    [
        SUITE,
        "- {task: lowshot, finetune: true, shots: [1, 3], name: few}\n- {task: lowshot, shots: [10%]}",
        "- {task: knn, k: [5, 10], temperature: 0.2, data: a b, test: 'c:d', batch: 3}\n- {task: linear, lr: 0.1}",
        "- {task: finetune, lr: 1.0e-5}\n- {task: robustness}\n- {task: retrieval, name: r.x}",
    ],
)
def test_entries_are_what_the_items_were_made_of(suite, tmp_path):
    """As a launched evaluation takes them along: in YAML, with what was given to all."""
    (tmp_path / "suite.yaml").write_text(suite)
    items = read_suite(str(tmp_path / "suite.yaml"), {"size": "16", "test": "there"})
    again = yaml.safe_load(yaml.safe_dump(to_entries(items)))
    assert items_of(again, {}) == items and all(len(entry) < 9 for entry in again)


def test_a_suite_measures_what_it_can_of_both_weights(corpus, tmp_path, monkeypatch):
    _, place = checkpoint(tmp_path / "run")
    (tmp_path / "suite.yaml").write_text(SUITE)
    items = read_suite(str(tmp_path / "suite.yaml"), {"data": str(corpus), "size": "16", "workers": "0"})
    encoded: Counter[str] = Counter()
    plain = Subject.encode

    def counting(self, images):
        encoded[self.weights] += len(images)
        return plain(self, images)

    monkeypatch.setattr(Subject, "encode", counting)
    out = tmp_path / "eval"
    summary = run_suite(place, items, which="last", initial=["random", "trained"], out=out, device="cpu")
    assert encoded == {"random": 33 + 33 + 15, "trained": 33 + 15}, "once for all tasks; statistics, too"
    stems = {path.stem for path in out.glob("*.json")}
    assert stems == {f"{task}{end}" for task in ("knn", "linear", "lowshot-2") for end in ("", "-random")} | {"suite"}
    kept = json.loads((out / "suite.json").read_text())
    assert kept["rows"] == summary["rows"] and kept["suite"] == ["knn", "lowshot", "linear", "lowshot"]
    assert [(row["task"], row["weights"]) for row in kept["rows"]] == [
        (task, weights) for weights in ("random", "trained") for task in ("knn", "linear", "lowshot")
    ]
    assert kept["subject"]["weights"] == "trained" and kept["subject"]["samples_seen"] == 5
    assert [(p["task"], p["weights"]) for p in kept["problems"]] == [("lowshot", "random"), ("lowshot", "trained")]
    for row in kept["rows"]:
        suffix = "-random" * (row["weights"] == "random")
        assert json.loads((out / f"{row['name']}{suffix}.json").read_text())["score"] == row["score"]
        assert row["published"] == (74.03 if row["task"] == "linear" else None)

    head, *lines = as_table(summary, out, 999).splitlines()
    assert head.split() == ["task", "figure", "weights", "score", "SEER's", "seconds"]
    assert lines[6] == f"Data: {corpus}" and lines[-1] == f"Written: {out}/suite.json"
    elsewhere = [*summary["rows"][:1], *({**row, "data": "other"} for row in summary["rows"][1:])]
    head, *several = as_table({**summary, "rows": elsewhere}, out, 80).splitlines()
    assert head.split()[2] == "data" and str(corpus) in several[0] and all(" other " in line for line in several[1:6])
    linear = next(line for line in lines if line.startswith("linear") and " trained " in line)
    assert f"{kept['rows'][4]['score']:.2f} ± {kept['rows'][4]['stderr']:.2f}  " in linear and " 74.03 " in linear
    assert all("(deviation)" in line for line in lines[:6] if line.startswith("lowshot"))
    (told,) = [line for line in lines if line.startswith("Ours:")]
    assert "after 5 samples, 16 px" in told and told.endswith("on ImageNet.")
    missing = [line for line in lines if line.startswith("Not measured")]
    assert [line.split(":")[1] for line in missing] == [" lowshot, random weights", " lowshot, trained weights"]
    assert all(str(p["problem"]) in line for p, line in zip(kept["problems"], missing))


def test_results_of_a_suite_have_names_of_their_own(tmp_path):
    def names(text: str, **common: str) -> list[str]:
        (tmp_path / "suite.yaml").write_text(text)
        return [settings.name or task for task, settings in read_suite(str(tmp_path / "suite.yaml"), common)]

    assert names("[linear, {task: linear, epochs: 3}, knn, linear, {task: linear, name: linear-2}, knn]") == [
        "linear", "linear-3", "knn", "linear-4", "linear-2", "knn-2",
    ]  # fmt: skip
    assert names("[{task: knn, name: a}, {task: knn, name: b}, knn]") == ["a", "b", "knn"]
    for text, common in (
        ("[{task: knn, name: a}, {task: linear, name: a}]", {}),
        ("[{task: knn, name: linear}, linear]", {}),
        ("[knn, linear]", {"name": "both"}),
    ):
        with pytest.raises(UserError) as told:
            names(text, **common)
        assert {p.key.rpartition(": ")[2] for p in told.value.problems} == {"--name"}


def test_nothing_is_replaced_but_results_of_the_same_task(tmp_path):
    """Before work begins: there are no images."""
    _, place = checkpoint(tmp_path / "run")
    out = tmp_path / "out"

    def problems(tasks: str, initial: list[str], **given: str) -> list[tuple[str, object]]:
        items = read_suite(tasks, {"data": str(tmp_path / "none"), "workers": "0", **given})
        with pytest.raises(UserError) as told:
            run_suite(place, items, which="last", initial=initial, out=out, device="cpu")
        for task, settings in items if len(items) == 1 else ():
            with pytest.raises(UserError) as alone:
                run_task(task, place, settings, initial=initial, out=out, device="cpu")
            assert alone.value.problems == told.value.problems
        return [(p.key, p.value) for p in told.value.problems]

    not_found = [(str(tmp_path / "none"), NOTHING)]
    (out / "finetune").mkdir(parents=True)
    (out / "finetune-random").mkdir()
    assert problems("knn", ["trained"]) == problems("finetune", ["trained"]) == not_found, "an empty folder is no loss"
    (out / "finetune-random" / "README.md").write_text("mine")
    (out / "finetune" / "model.safetensors").write_bytes(b"")
    assert problems("finetune", ["trained"]) == not_found, "an earlier network"
    assert problems("finetune", ["trained", "random"]) == [("--out", str(out / "finetune-random"))]
    (out / "finetune" / "notes.txt").write_text("mine")
    assert problems("finetune", ["trained"]) == [("--out", str(out / "finetune"))]

    (out / "a.json").write_text('{"task": "svm", "scores": {}}')
    (out / "linear.json").write_text('{"task": "linear"}')
    assert problems("knn", ["trained"], name="a") == [("--name", "a")]
    assert problems("svm", ["trained"], name="a") == not_found
    assert problems("knn,linear", ["trained"]) == problems("linear", ["trained"]) == [("--out", str(out))]
    (out / "suite.json").write_text("[1]")
    assert problems("knn,lowshot", ["trained"]) == [("--out", str(out))]


def test_a_suite_that_measures_nothing_says_why_of_each_task(corpus, tmp_path):
    _, place = checkpoint(tmp_path / "run")
    items = read_suite("lowshot", {"data": str(corpus / "none"), "workers": "0"})
    with pytest.raises(UserError) as told:
        run_suite(place, items, which="last", initial=["trained"], out=tmp_path / "eval", device="cpu")
    assert told.value.problems[0].key == str(corpus / "none") and told.value.args[0].startswith("eval lowshot: ")


def test_published_figures_stand_beside_those_of_the_same_kind_alone():
    def of(task: str, figure: str, data: str) -> float | None:
        row = published(task, figure, word_of(data), "regnety_128gf")
        return row.score if row else None

    for task, score in (("linear", 75.96), ("finetune", 84.5)):
        assert [of(task, "top1", data) for data in ("imagenet", "imagenet:/x", "photos", "")] == [score] * 4
        assert of(task, "top1", "voc07") is None
        assert of(task, "map", "photos") is of(task, "map", "imagenet") is None
    assert of("knn", "top1", "imagenet") is of("linear", "top1", "inat18:/x") is None
    assert [of("finetune", "top1", data) for data in ("inat18:/x", "places205")] == [82.6, 67.5]
    for shot, score in (("1%", 57.5), ("10%", 76.7)):
        figure = f"{shot}_finetuned_top1"
        assert [of("lowshot", figure, data) for data in ("imagenet:/x", "photos", "places205")] == [score, score, None]
        assert of("lowshot", f"{shot}_top1", "imagenet") is of("finetune", figure, "imagenet") is None


def test_each_figure_beside_which_a_published_one_stands_has_a_row():
    subject = {"backbone": "regnety_256gf", "weights": "trained", "parameters": 5, "samples_seen": 7}
    names = [f"lowshot/{shot}_finetuned_{name}" for shot in ("1%", "10%", "5") for name in ("top1", "top1_std", "top5")]
    record = {
        "task": "lowshot", "headline": names[6], "scores": {n: float(i) for i, n in enumerate(names)},
        "data": "imagenet", "settings": {"data": "imagenet", "name": ""}, "subject": subject, "size": 224,
        "seconds": 1.0, "warnings": [],
    }  # fmt: skip
    rows = rows_of(record)
    assert [(r["figure"], r["published"]) for r in rows] == [(names[0], 60.5), (names[3], 77.9), (names[6], None)]
    assert [(r["score"], r["std"]) for r in rows] == [(0, 1), (3, 4), (6, 7)]
    (told,) = {r["difference"] for r in rows[:2]}
    assert told.startswith("Ours: regnety_256gf (5) after 7 samples, 224 px, on imagenet; SEER: regnety_256gf (1.27B)")
    assert rows_of(record | {"settings": {"data": "inat18", "name": ""}})[0]["figure"] == names[6]
