"""What every task of `seer-scale eval` stands on: features that are the same on any number of ranks and after a kill,
nearest neighbours, options, what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from seer_scale.cli.evaluate import as_text
from seer_scale.config import Knn, resolve
from seer_scale.data.transforms.views import resize_centre
from seer_scale.distributed import World
from seer_scale.errors import CheckpointError, ConfigError, UserError
from seer_scale.evaluate import context, nearest, places, table
from seer_scale.evaluate.context import Evaluation
from seer_scale.evaluate.knn import knn, labelled_images
from seer_scale.evaluate.metrics import weighted_votes
from seer_scale.evaluate.nearest import by_faiss, by_products, nearest_neighbours, vote
from seer_scale.evaluate.published import TABLE, difference, published
from seer_scale.evaluate.registry import first_line, task_class, task_names
from seer_scale.evaluate.run import as_record, option_of, publish, read_settings, results_folder, told_of_replaced
from seer_scale.evaluate.shards import Shards
from seer_scale.evaluate.splits import open_data_set
from seer_scale.evaluate.subject import Subject, open_subject
from seer_scale.evaluate.suite import read_suite
from seer_scale.evaluate.task import Result
from seer_scale.models.registry import build_backbone
from seer_scale.observe.chart import Chart
from seer_scale.observe.progress import Progress
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.unit.test_knn import encode, write_corpus
from tests.unit.test_load import backbone, checkpoint

SIZE = 16
CPU = torch.device("cpu")


class Colours(nn.Module):
    """[N, 3, S, S] to three features."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return encode(images)[0]


def evaluation_of(folder: Path, world: World = World(), task: str = "knn", **given: object) -> Evaluation:
    settings = read_settings(task, {"workers": "0", "batch": "4", "data": str(folder), **given})
    subject = Subject(path=folder, model=Colours(), fingerprint="0", weights="trained", size=SIZE)
    return Evaluation(
        task=task, subject=subject, options=settings, world=world, progress=Progress(active=False),
        folder=folder / "eval",
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def features_on_ranks(rank: int, size: int, corpus: Path) -> tuple:
    world = world_of(rank, size)
    context.SHARD = 8
    evaluation = evaluation_of(corpus, world)
    data = evaluation.data_set()
    table = evaluation.features(data.train)
    result = task_class("knn")(evaluation.options).measure(evaluation)
    evaluation.clean()
    return table.features.numpy(), table.rows, table.targets, dict(result.scores), evaluation.subject.model.seen


def test_features_are_those_of_one_rank_on_two(corpus, monkeypatch):
    monkeypatch.setattr(context, "SHARD", 8)
    alone = features_on_ranks(0, 1, corpus)
    pair = run_ranks(2, features_on_ranks, corpus)
    for ranks in pair:
        for mine, other in zip(ranks[:3], alone[:3]):
            assert np.array_equal(mine, other)
        assert ranks[3] == alone[3]
    assert sum(ranks[4] for ranks in pair) == alone[4] == 33 + 15, "each image once; what cannot be read is left out"
    assert not (corpus / "eval" / "unfinished").exists()


def test_what_was_computed_before_a_kill_is_not_computed_again(corpus, monkeypatch):
    monkeypatch.setattr(context, "SHARD", 8)
    whole = evaluation_of(corpus)
    data = whole.data_set()
    expected = whole.features(data.train)
    whole.clean()

    killed = evaluation_of(corpus)
    model, forward = killed.subject.model, killed.subject.model.forward

    def until(images):
        if model.seen >= 20:
            raise KeyboardInterrupt
        return forward(images)

    model.forward = until
    with pytest.raises(KeyboardInterrupt):
        killed.features(data.train)
    again = evaluation_of(corpus)
    found = again.features(data.train)
    assert torch.equal(found.features, expected.features) and np.array_equal(found.targets, expected.targets)
    assert again.subject.model.seen == 33 - 16, "two shards of eight were whole"
    folder = again.work("features", data.train.mark, SIZE, "")
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["matrix.npy", "rows.npy"], (
        "shards that were joined go"
    )
    torn = table.matrix_path(folder)
    torn.write_bytes(torn.read_bytes()[:-5])
    assert torch.equal(evaluation_of(corpus).features(data.train).features, expected.features)
    again.clean()


@pytest.mark.parametrize(("where", "name"), [(np, "save"), (os, "replace"), (os, "fsync"), (Path, "unlink")])
def test_a_kill_while_shards_are_joined_loses_no_feature(corpus, monkeypatch, where, name):
    monkeypatch.setattr(context, "SHARD", 8)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def killed(shards: Shards) -> int:
        patch.setattr(where, name, interrupted)
        return table.join(shards)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(context, "join", killed)
        first = evaluation_of(corpus)
        first.features(first.data_set().train)
    again = evaluation_of(corpus)
    found = again.features(again.data_set().train)
    again.clean()
    assert first.subject.model.seen == len(found.features) == 33 and not again.subject.model.seen
    alone = evaluation_of(corpus)
    assert torch.equal(alone.features(alone.data_set().train).features, found.features)
    alone.clean()


def test_what_killed_commands_left_is_removed_once_nothing_has_touched_it_for_long(corpus):
    """But what is in use: by this command, or by one that wrote to it lately, however deep, or has just taken it up;
    and what no command of ours has made."""
    first, left = evaluation_of(corpus), time.time() - places.STALE_S - 60
    stale, written, taken, spared = (first.folder / "unfinished" / f"{name}-0" for name in ("a", "b", "c", "features"))
    mine = first.folder / "unfinished" / "thesis"
    for place in (stale, written, taken, spared, mine):
        (place / "deep").mkdir(parents=True)
        lock = place / ("chapter.txt" if place == mine else places.LOCK)
        for path in (place / "deep" / "state.safetensors", lock):
            path.touch()
        for path in (place / "deep" / "state.safetensors", lock, place / "deep", place):
            os.utime(path, (left, left))
    os.utime(written / "deep" / "state.safetensors")
    os.utime(taken)  # as `work` does
    own = first.work("x")
    kept = {spared}
    first.clean(kept)
    assert not own.exists() and not stale.exists() and kept == {spared}
    assert written.exists() and taken.exists() and spared.exists()
    assert sorted(p.name for p in mine.iterdir()) == ["chapter.txt", "deep"]
    shutil.rmtree(mine)
    os.utime(taken, (left, left))
    places.remove([written])
    places.remove_stale(first.folder / "unfinished")
    assert not (first.folder / "unfinished").exists()
    old = first.work("y")
    os.utime(old, (left, left))
    assert evaluation_of(corpus).work("y") == old
    places.remove_stale(first.folder / "unfinished")
    assert old.exists(), "a command goes on with it"
    places.remove([old])
    assert not old.exists()


def one_of_two_commands(rank: int, size: int, corpus: Path) -> tuple:
    """The second has written a shard of its features before the first begins, the rest once that has ended."""
    context.SHARD = 8
    evaluation = evaluation_of(corpus)
    model, forward = evaluation.subject.model, evaluation.subject.model.forward

    def halted(images):
        if model.seen == 12:
            dist.barrier(), dist.barrier()
        return forward(images)

    if rank == 0:
        dist.barrier()
    else:
        model.forward = halted
    result = task_class("knn")(evaluation.options).measure(evaluation)
    evaluation.clean()
    if rank == 0:
        dist.barrier()
    return dict(result.scores), model.seen


def test_two_commands_at_once_end_with_the_figures_of_one(corpus):
    alone = evaluation_of(corpus)
    expected = dict(task_class("knn")(alone.options).measure(alone).scores)
    alone.clean()
    found = run_ranks(2, one_of_two_commands, corpus)
    assert found == [(expected, 33 + 15)] * 2 and not (corpus / "eval" / "unfinished").exists()


def test_other_weights_go_on_with_nothing(corpus):
    first, second = evaluation_of(corpus), evaluation_of(corpus)
    object.__setattr__(second.subject, "fingerprint", "1")
    assert first.work("x") != second.work("x") != second.work("y")
    third = evaluation_of(corpus)
    third.subject.statistics = "of other images"
    assert third.work("x") != first.work("x"), "untrained weights with statistics of other images"
    first.clean(), second.clean(), third.clean()


def test_features_that_are_not_finite_are_refused(corpus):
    evaluation = evaluation_of(corpus)
    evaluation.subject.model.forward = lambda images: encode(images)[0] / 0
    with pytest.raises(CheckpointError, match="not finite"):
        evaluation.features(evaluation.data_set().test)
    evaluation.clean()


def test_neighbours_are_those_of_brute_force(corpus, monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 4 * 9 * 7)
    monkeypatch.setattr(table, "MAX_ROWS", 4)
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=draw), torch.randn(9, 8, generator=draw)
    norm = torch.nn.functional.normalize
    expected = (norm(queries, dim=1) @ norm(bank, dim=1).T).sort(dim=1, descending=True, stable=True)
    evaluation = evaluation_of(corpus)
    similarity, rows = nearest_neighbours(bank, queries, 7, evaluation)
    assert torch.equal(rows, expected.indices[:, :7])
    assert torch.allclose(similarity, expected.values[:, :7], atol=1e-6)
    by_index = by_faiss(bank, queries, 7, CPU)
    assert torch.equal(by_index[1], rows) and torch.allclose(by_index[0], similarity, atol=1e-6)
    alike = torch.eye(8)[torch.arange(50) % 5]
    assert by_products(alike, alike[:2], 3, CPU)[1].tolist() == [[0, 5, 10], [1, 6, 11]], "the earlier of equal ones"
    assert by_products(bank, queries[:0], 7, CPU)[1].shape == by_faiss(bank, queries[:0], 7, CPU)[1].shape == (0, 7)


def test_votes_of_several_k_are_those_of_each_alone(corpus):
    """And of the evaluation that a run makes as it trains."""
    evaluation = evaluation_of(corpus, k="1,3,5", temperature="0.2,0.07")
    result = task_class("knn")(evaluation.options).measure(evaluation)
    evaluation.clean()
    config = resolve(
        {"train": {"total_samples": 8}, "swav": {"prototypes": [8]}, "data": {"path": str(corpus)}}, {}, world_size=1
    )
    images = labelled_images(config)
    for row in result.table:
        of_run = Knn(size=SIZE, k=row["k"], temperature=row["temperature"], batch=4)
        scores, _ = knn(encode, images, of_run, workers=0, world=World())
        assert {name: row[name] for name in ("top1", "top5")} == pytest.approx(
            {name: scores[f"knn/{name}"] for name in ("top1", "top5")}
        )
    assert {row["k"] for row in result.table} == {1, 3, 5} and len(result.table) == 6
    first = next(row for row in result.table if row["k"] == 1 and row["temperature"] == 0.2)
    assert result.scores["knn/top1"] == first["top1"] and "k is 1, the temperature 0.2." in result.protocol
    assert result.scores["knn/queries"] == 15 and result.scores["knn/majority"] == pytest.approx(100 / 3)


def test_a_vote_by_hand():
    found = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.4, 0.3]]), torch.tensor([[0, 1, 2], [2, 1, 0]])
    labels = np.array([0, 1, 1])
    assert vote(found, labels, np.array([0, 1]), 2, 1, 0.1)["top1"] == 100
    assert vote(found, labels, np.array([1, 1]), 2, 2, 0.1)["top1"] == 50
    assert vote(found, labels, np.array([1, 1]), 2, 3, 100.0)["top1"] == 100, "two votes of one weight beat one"


def test_the_parts_of_a_folder_and_what_is_held_out(corpus, tmp_path):
    data = open_data_set(str(corpus), "", None)
    assert len(data.train) == 34 and len(data.test) == 15 and data.classes == ["class0", "class1", "class2"]
    assert [data.train.source.class_of(i) for i in range(34)] == [data.classes[t] for t in data.train.targets]
    held = open_data_set(str(corpus / "test"), "", None)
    assert (len(held.train), len(held.test)) == (12, 3)
    names = [{split.source.name(i) for i in range(len(split))} for split in (held.train, held.test)]
    assert not names[0] & names[1]
    part = data.train.take(np.array([3, 30]))
    assert len(part) == len(part.source) == 2 and part.mark != data.train.mark
    assert "Pretraining sees" not in data.protocol
    (tmp_path / "odd" / "class9").mkdir(parents=True)
    (tmp_path / "odd" / "class0").mkdir()
    for name in ("class0", "class9"):
        Image.new("RGB", (8, 8)).save(tmp_path / "odd" / name / "a.png")
    with pytest.raises(UserError) as told:
        open_data_set(str(corpus / "train"), str(tmp_path / "odd"), None)
    assert told.value.problems[0].key == "--test" and "knn." not in str(told.value)
    assert "1 class that" in str(told.value) and "has not: class9" in str(told.value)
    with pytest.raises(UserError, match="--data is missing"):
        open_data_set("", "", None)


QUICK = {"linear": {"solver": "lbfgs", "c": "1"}, "lowshot": {"shots": "50%", "draws": "1"},
         "svm": {"c": "1", "folds": "2"}, "robustness": {"corruptions": "fog", "severities": "1"}}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "given"),
    [("knn", {}), *QUICK.items(), ("robustness", QUICK["robustness"] | {"classifier": "linear"})],
)
def test_a_protocol_says_what_images_are_for_and_which_classes_lack_some(corpus, tmp_path, task, given):
    evaluation = evaluation_of(corpus / "train", task=task, test=str(write_two_classes(tmp_path)), size="32", **given)
    protocol = task_class(task)(evaluation.options).measure(evaluation).protocol
    evaluation.clean()
    votes = task in ("knn", "robustness") and "classifier" not in given
    assert ("vote on" in protocol) == votes and ("Trained on" in protocol) != votes
    assert "Images at 32 pixels." in protocol
    assert "Classes without test images: class1." in protocol and "without training" not in protocol


def write_two_classes(folder: Path) -> Path:
    for name, shade in (("class0", 200), ("class2", 90)):
        (folder / "two" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (60, shade, 60)).save(folder / "two" / name / "a.png")
    return folder / "two"


def test_a_part_of_other_classes_is_left_out_and_said_so(tmp_path):
    for part, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    protocol = open_data_set(str(tmp_path), "", None).protocol
    assert f"{tmp_path}/val is left out: it has 1 class that {tmp_path}/train has not: c." in protocol


def test_options_are_checked_together_and_told_as_they_are_written():
    with pytest.raises(ConfigError) as told:
        read_settings("knn", {"k": "0,1", "faiss_from": "-1", "batch": "x", "temperature": "0.1"})
    assert [p.key for p in told.value.problems] == ["--k", "--faiss-from", "--batch"]


@pytest.mark.parametrize("task", sorted(task_names()))
def test_an_entry_that_is_given_twice_is_refused_in_every_list(task):
    lists = [f for f in dataclasses.fields(task_class(task).settings) if str(f.type).endswith("...]")]
    for field in lists:
        one = "1" if "str" not in str(field.type) else "1%"
        one = {"layers": "last", "corruptions": "fog", "steps": "0.5", "train_sizes": "64"}.get(field.name, one)
        with pytest.raises(ConfigError) as told:
            read_settings(task, {field.name: f"{one},{one}"})
        assert "has an entry twice" in str(told.value) and option_of(field.name) in str(told.value)


def test_what_is_replaced_by_a_result_of_other_options_is_told(corpus, tmp_path):
    def told(**given):
        evaluation = evaluation_of(corpus, **given)
        result = Result(scores={"knn/top1": 1.0}, headline="knn/top1", protocol="So.")
        record = as_record("knn", evaluation.options, evaluation, result, 1.0)
        text = told_of_replaced(record, tmp_path)
        publish(record, result, tmp_path)
        return text

    assert told(k="3") == told(k="3", batch="8") == "", "nothing was there, or nothing else is measured"
    text = told(k="5", size="10")
    assert "knn.json" in text and f"--size {SIZE}" in text and "--k [3]" in text and "--name" in text
    assert told(k="5", size="10", test="x") and told(k="5", size="10", name="other") == ""


def test_a_result_is_written_whole_with_its_plot(corpus, tmp_path):
    evaluation = evaluation_of(corpus, k="1,3")
    result = task_class("knn")(evaluation.options).measure(evaluation)
    evaluation.clean()
    record = as_record("knn", evaluation.options, evaluation, result, 1.0)
    path = publish(record, result, tmp_path)
    kept = json.loads(path.read_text())
    assert path.name == "knn.json" and kept["files"] == ["knn.json", "knn.svg"]
    assert kept["score"] == record["scores"]["knn/top1"] and kept["settings"]["k"] == [1, 3]
    assert kept["given"] == {"k": [1, 3]} and kept["data_name"] == corpus.name
    assert (tmp_path / "knn.svg").read_text().count("<svg") == 1
    object.__setattr__(evaluation.subject, "weights", "random")
    record = as_record("knn", evaluation.options, evaluation, result, 1.0)
    assert publish(record, result, tmp_path).name == "knn-random.json"
    named = dataclasses.replace(evaluation.options, name="knn-others")
    record = as_record("knn", named, evaluation, result, 1.0)
    assert publish(record, result, tmp_path).name == "knn-others-random.json"
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == 3 * [kept["score"]] and "table" not in lines[0]


def test_what_is_said_of_an_export_shows_its_name_as_it_may_be_printed():
    name = os.fsdecode(b"caf\xe9")
    told = as_text(record_of({"knn/top1": 12.5, "knn/top1_stderr": 0.5}, path=name), Path(name))
    assert told == "knn/top1 12.50 ± 0.50 (caf\\xe9)\n  So.\n  Written: caf\\xe9/knn.json, knn.svg"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_result_is_a_block_of_lines_with_the_path_of_what_was_written(width):
    figures = {f"knn/figure_{i}": 10.25 * i for i in range(12)}
    scores = {"knn/x": 1.5, "knn/x_stderr": 0.5, **figures, "knn/top1": 50.0, "knn/top1_stderr": 1.5, "knn/n": 1500}
    record = record_of(scores, protocol=40 * "words and " + "an end.", warnings=["Few."])
    folder = Path("a folder/" + 12 * "long/")
    head, *lines, warning, written = as_text(record, folder, width).splitlines()
    assert head == "knn/top1 50.00 ± 1.50 (untrained weights)" and warning == "  Warning: Few."
    assert written == f"  Written: {folder}/knn.json, knn.svg", "in one line, to be copied"
    assert all(len(line) <= width and line.startswith("  ") for line in lines)
    told = " ".join(line.strip() for line in lines)
    assert told.startswith("x 1.50 ± 0.50, figure_0 0, figure_1 10.25, ") and "n 1,500 words and" in told
    assert not any(line.endswith(("figure_5", "±")) for line in lines), "a figure stands by its name"


def record_of(scores: dict[str, float], path: str = "", protocol: str = "So.", **more: object) -> dict:
    subject = {"weights": "trained" if path else "random", "checkpoint": "", "path": path}
    return {"task": "knn", "scores": scores, "headline": "knn/top1", "subject": subject, "protocol": protocol,
            "warnings": [], "files": ["knn.json", "knn.svg"], **more}  # fmt: skip


def test_the_name_of_a_result_is_that_of_a_file_and_changes_no_figure():
    """And of nothing else that lies in the folder of results, such as those of other tasks."""
    rest = ("suite", "history", "unfinished", "logs", "history.jsonl", "knn.json", "knn.svg", "knn~2")
    for wrong in ("a/b", ".a", "a b", "..", "knn-random", *rest, *(task_names().keys() - {"knn"})):
        with pytest.raises(ConfigError) as told:
            read_settings("knn", {"name": wrong})
        assert [p.key for p in told.value.problems] == ["--name"]
    assert read_settings("knn", {"name": "knn-b"}).mark == read_settings("knn", {}).mark
    assert read_settings("knn", {"name": "knn"}).name == "knn"


def test_plots_and_results_never_have_one_name(corpus, tmp_path):
    evaluation = evaluation_of(corpus, task="robustness")
    chart = Chart(title="a", x="b", y="c", series={"d": [(0, 1.0)]})
    result = Result(scores={"a": 1.0}, headline="a", protocol="", plots=(chart, chart))
    files: list[str] = []
    for name in ("", "robustness-2", "robustness.2"):
        options = dataclasses.replace(evaluation.options, name=name)
        files += as_record("robustness", options, evaluation, result, 1.0)["files"]
    assert len(set(files)) == 3 * 3
    with pytest.raises(ConfigError):
        read_settings("robustness", {"name": Path(files[2]).stem})


@pytest.mark.parametrize("text", ["", " "])
def test_an_option_of_nothing_is_refused_as_it_was_given(text):
    for task, option in (("knn", "k"), ("lowshot", "shots"), ("linear", "lr"), ("linear", "augment"), ("svm", "c")):
        with pytest.raises(ConfigError) as told:
            read_settings(task, {option: text})
        assert str(told.value.problems[0]).startswith(f"--{option} is {text!r}, but ")


def test_what_is_evaluated_is_in_eval_mode_and_depends_on_no_neighbour(tmp_path):
    """Running statistics, not those of a batch; and the weights that the method exports, such as a teacher's."""
    net, place = checkpoint(tmp_path, prefix="teacher.backbone.", **{"student.backbone": backbone(seed=1)})
    subject = open_subject(place, "last", "trained", torch.device("cpu"))
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {n: b.clone() for n, b in subject.model.named_buffers()}
    whole = subject.encode(images)
    assert torch.allclose(whole[2:3], subject.encode(images[2:3]), atol=1e-6)
    assert torch.allclose(whole, net(images), atol=1e-6) and not subject.model.training
    assert all(torch.equal(b, before[n]) for n, b in subject.model.named_buffers())
    other = open_subject(place, "last", "random", torch.device("cpu"))
    assert other.fingerprint != subject.fingerprint and other.samples_seen == 0
    assert subject.size == 32 and subject.backbone == "regnety" and subject.checkpoint == place.name


def test_pixels_are_those_of_torchvision_as_published(tmp_path):
    """Resize the short side to 256, cut 224 from the centre: to the level that rounding leaves."""
    y, x = np.mgrid[:600, :874]
    image = (127 + 120 * np.sin(np.stack([y / 31, x / 23, (x + y) / 41], 2))).astype(np.uint8)
    ours = resize_centre(image, 224).astype(int)

    def apart(short_side: int) -> float:
        of_torch = torch.from_numpy(image).permute(2, 0, 1)
        theirs = v2.CenterCrop(224)(v2.Resize(short_side, antialias=True)(of_torch)).numpy()
        return float(np.abs(ours - theirs).mean())

    assert apart(256) < 2 < 10 < apart(224)


def test_a_suite_is_read_whole_with_every_problem(tmp_path):
    given = tmp_path / "suite.yaml"
    given.write_text("- knn\n- {task: knn, faiss-from: 3, k: [2, 1]}\n")
    first, second = read_suite(str(given), {"batch": "7", "size": "32"})
    assert first[1] == read_settings("knn", {"batch": "7", "size": "32"})
    assert second[1].faiss_from == 3 and second[1].k == (2, 1) and second[1].batch == 7
    given.write_text("- knm\n- {task: knn, kk: 3}\n- [1]\n")
    with pytest.raises(ConfigError) as told:
        read_suite(str(given), {})
    keys = [f"entry {n} of {given}{key}" for n, key in ((1, ": TASK"), (2, ": --kk"), (3, ""))]
    assert [p.key for p in told.value.problems] == keys and "[1]" not in str(told.value)
    for wrong in ("", str(tmp_path / "none.yaml")):
        with pytest.raises(UserError) as none:
            read_suite(wrong, {})
        assert none.value.problems[0].key == "--tasks"


def test_published_figures_stand_beside_with_what_tells_them_apart():
    assert published("linear", "top1", "", "regnety_128gf").score == 75.96
    smallest = published("finetune", "top1", "imagenet", "regnety")
    assert smallest.backbone == "regnety_32gf"
    for row in TABLE:
        with torch.device("meta"):
            assert sum(p.numel() for p in build_backbone(row.backbone).parameters()) == row.parameters
    told = difference(smallest, "regnety", 300_000, 9000, "clothing", 64)
    assert "9,000 samples, 64 px, on clothing" in told and "regnety_32gf (141M) after 1B images" in told
    assert told.endswith("on ImageNet.")


def test_each_task_says_what_it_measures():
    for name, what in task_names().items():
        assert what and what[0].islower() or what.split()[0].isupper(), f"{name}: a clause that help can show"
        assert task_class(name).settings.__dataclass_params__.frozen
    assert first_line("One line\n that goes on.\n\nMore.") == "One line that goes on"


def test_images_of_the_same_names_and_labels_are_other_images(tmp_path):
    """Features of what was there before are not taken for those of what is there now."""
    marks = []
    for shade in (10, 10, 200):
        folder = tmp_path / str(len(marks))
        for name in ("a", "b"):
            (folder / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (shade, i, 0)).save(folder / name / f"{i}.png")
        marks.append(open_data_set(str(folder), "", None).train.mark)
    assert marks[0] == marks[1] != marks[2]


def test_results_of_an_export_lie_beside_it(tmp_path):
    (tmp_path / "ex").mkdir()
    assert results_folder(tmp_path / "ex", None) == tmp_path / "ex-eval"
    (tmp_path / "x.safetensors").touch()
    assert results_folder(tmp_path / "x.safetensors", None) == tmp_path / "x-eval"


@pytest.mark.parametrize("temperature", [0.001, 0.003, 0.01, 0.03, 0.07, 0.3, 1.0])
def test_votes_at_any_temperature_are_those_in_float64(corpus, temperature):
    """Of a run as of the task: in float32 exp(1 / 0.01) is infinite, and what is infinite ties."""
    evaluation = evaluation_of(corpus, k="7", temperature=str(temperature))
    result = task_class("knn")(evaluation.options).measure(evaluation)
    data = evaluation.data_set()
    bank, asked = (evaluation.features(split) for split in (data.train, data.test))
    unit = (table.features.double() / table.features.double().norm(dim=1, keepdim=True) for table in (bank, asked))
    b, q = (x.numpy() for x in unit)
    similarity = q @ b.T
    nearest_7 = np.argsort(-similarity, axis=1)[:, :7]
    votes = np.zeros((len(q), 3), np.longdouble)  # of 15 bits of exponent
    for row, columns in enumerate(nearest_7):
        np.add.at(votes[row], bank.targets[columns], np.exp(np.longdouble(similarity[row, columns]) / temperature))
    evaluation.clean()
    expected = 100 * (votes.argmax(1) == asked.targets).mean()
    recipe = {"train": {"total_samples": 8}, "swav": {"prototypes": [8]}, "data": {"path": str(corpus)}}
    images, of_run = labelled_images(resolve(recipe, {}, world_size=1)), Knn(size=SIZE, k=7, temperature=temperature)
    scores, _ = knn(encode, images, of_run, workers=0, world=World())
    assert scores["knn/top1"] == pytest.approx(expected) and result.scores["knn/top1"] == pytest.approx(expected)
    far = weighted_votes(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 1, 1]]), 2, temperature / 10)
    assert far.isfinite().all() and far.argmax() == 0


def fail_on_one(rank: int, size: int) -> list[str]:
    """What ranks are told where one of them fails within `World.together`."""
    world, told = world_of(rank, size), []
    for error in (UserError("One sentence."), OSError(28, "No space left")):
        try:
            with world.together():
                if rank == 1:
                    raise error
        except (UserError, OSError) as e:
            told.append(f"{type(e).__name__}: {e}")
    with world.together():
        pass
    return told


def test_what_ends_one_rank_ends_all():
    first, second = run_ranks(2, fail_on_one)
    assert first[0] == second[0] == "UserError: One sentence."
    assert first[1] == "UserError: Rank 1 ended (OSError: [Errno 28] No space left)."
    assert second[1] == "OSError: [Errno 28] No space left"


def test_what_stands_behind_a_plus_minus_is_told_in_words():
    scores = {"knn/top1": 50.0, "knn/top1_std": 1.5, "knn/b": 60.25, "knn/b_stderr": 2.5, "knn/c_std": 3.0}
    told = as_text(record_of(scores), Path("eval")).splitlines()
    assert told[:2] == ["knn/top1 50.00 ± 1.50 (deviation) (untrained weights)", "  b 60.25 ± 2.50, c_std 3"]
