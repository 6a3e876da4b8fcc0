"""Retrieval: figures of labelled sets by their definitions, and those of the revisited protocol by its published
code."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from seer_scale.distributed import World
from seer_scale.errors import DataError, UserError
from seer_scale.evaluate import context
from seer_scale.evaluate.registry import task_class
from seer_scale.evaluate.revisited import SETUPS, open_revisited, read_gnd, revisited_scores
from seer_scale.evaluate.task import Result
from seer_scale.evaluate.tasks.retrieval import retrieval_scores, without_itself
from tests.pictures import encode as encoded
from tests.pictures import photo
from tests.problems import refused
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.unit.test_evaluate import evaluation_of
from tests.unit.test_knn import write_corpus


def published_ap(ranks, nres):
    """compute_ap of filipradenovic/revisitop, python/evaluate.py."""
    ap, recall_step = 0, 1.0 / nres
    for j in np.arange(len(ranks)):
        rank = ranks[j]
        precision_0 = 1.0 if rank == 0 else float(j) / rank
        precision_1 = float(j + 1) / (rank + 1)
        ap += (precision_0 + precision_1) * recall_step / 2.0
    return ap


def published_map(ranks, gnd, kappas):
    """compute_map of filipradenovic/revisitop, python/evaluate.py; ranks [n, Q]."""
    mean, nq = 0.0, len(gnd)
    pr, prs, nempty = np.zeros(len(kappas)), np.zeros((nq, len(kappas))), 0
    for i in np.arange(nq):
        qgnd = np.array(gnd[i]["ok"])
        if qgnd.shape[0] == 0:
            nempty += 1
            continue
        qgndj = np.array(gnd[i]["junk"])
        pos = np.arange(ranks.shape[0])[np.isin(ranks[:, i], qgnd)]
        junk = np.arange(ranks.shape[0])[np.isin(ranks[:, i], qgndj)]
        k = ij = 0
        if len(junk):
            ip = 0
            while ip < len(pos):
                while ij < len(junk) and pos[ip] > junk[ij]:
                    k += 1
                    ij += 1
                pos[ip] = pos[ip] - k
                ip += 1
        mean += published_ap(pos, len(qgnd))
        pos += 1
        for j in np.arange(len(kappas)):
            kq = min(max(pos), kappas[j])
            prs[i, j] = (pos <= kq).sum() / kq
        pr = pr + prs[i, :]
    return mean / (nq - nempty), pr / (nq - nempty)


@pytest.mark.parametrize("setup", SETUPS)
def test_map_and_precision_are_those_of_the_published_code(setup):
    draw = np.random.default_rng(0)
    ranked = np.array([draw.permutation(200) for _ in range(12)])
    gnd = []
    for q in range(12):
        parts = np.split(draw.permutation(200)[:40], [(5, 0, 12)[q % 3], 20])
        gnd.append(dict(zip(("easy", "hard", "junk"), (p.tolist() for p in parts))))
    right, left_out = SETUPS[setup]
    merged = [{"ok": sum((g[k] for k in right), []), "junk": sum((g[k] for k in left_out), [])} for g in gnd]
    mean, precision = published_map(ranked.T, merged, [1, 5, 10])
    aps, precisions = revisited_scores(ranked, gnd, setup, [1, 5, 10])
    assert np.nanmean(aps) == pytest.approx(mean, rel=1e-12)
    assert np.nanmean(precisions, 0) == pytest.approx(precision, rel=1e-12)
    assert np.isnan(aps).sum() == (4 if setup == "easy" else 0), "queries without an easy image are not counted"


def test_figures_of_labelled_images_by_hand():
    hits = np.array([[1, 0, 1, 0], [0, 1, 0, 0]], bool)
    scores, table = retrieval_scores(hits, np.array([2, 1]), (1, 2, 9))
    assert scores["retrieval/map_at_r"] == pytest.approx(100 * (1 / 2 + 0) / 2), "the third of the first is beyond R"
    assert scores["retrieval/r_precision"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert [(row["k"], row["recall"]) for row in table] == [(1, 50), (2, 100), (4, 100)]
    rows = np.array([[0, 2, 1], [2, 1, 0], [0, 1, 3]])  # the last stands behind so many equal ones
    assert without_itself(rows).tolist() == [[2, 1], [2, 0], [0, 1]]


class Maps(nn.Module):
    """Maps of the pixels themselves, whose mean is its feature."""

    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))

    def stage_maps(self):
        return ["pixels"]

    def forward_stages(self, xs):
        return [xs]


def measured(folder: Path, world: World = World(), **given: object) -> Result:
    evaluation = evaluation_of(folder, world, task="retrieval", **given)
    object.__setattr__(evaluation.subject, "model", Maps())
    result = task_class("retrieval")(evaluation.options).measure(evaluation)
    evaluation.clean()
    return result


def on_ranks(rank: int, size: int, corpus: Path, revisited: Path) -> list[dict]:
    context.SHARD = 4
    world = world_of(rank, size)
    found = [measured(corpus, world), measured(corpus, world, data=f"roxford5k:{revisited}", side="32")]
    return [dict(result.scores) for result in found]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


GND = [
    {"bbx": [10.0, 20.0, 60.0, 70.0], "easy": [0, 1], "hard": [2], "junk": [5]},
    {"bbx": [0.0, 0.0, 40.0, 40.0], "easy": [], "hard": [3], "junk": [1]},
]


@pytest.fixture(scope="module")
def revisited(tmp_path_factory):
    root = tmp_path_factory.mktemp("roxford5k")
    (root / "jpg").mkdir()
    from PIL import Image

    for n in range(8):
        image = Image.fromarray(photo(90 + n, 120, seed=n % 6))
        (root / "jpg" / f"all_{n}.jpg").write_bytes(encoded(image))
    found = {"imlist": [f"all_{n}" for n in range(6)], "qimlist": ["all_6", "all_7"], "gnd": GND}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(found))
    return root


def test_the_same_on_two_ranks(corpus, revisited, monkeypatch):
    monkeypatch.setattr(context, "SHARD", 4)
    alone = on_ranks(0, 1, corpus, revisited)
    for ranks in run_ranks(2, on_ranks, corpus, revisited):
        assert ranks == alone
    assert alone[0]["retrieval/queries"] == 15 and alone[0]["retrieval/gallery"] == 33
    assert set(alone[1]) >= {"retrieval/easy_map", "retrieval/medium_mp@5", "retrieval/hard_map"}


def test_a_test_part_alone_is_asked_about_the_others_of_it(corpus):
    result = measured(corpus, gallery="test", k="1,3")
    assert result.scores["retrieval/queries"] == 15 and result.scores["retrieval/gallery"] == 14
    assert [row["k"] for row in result.table] == [1, 3] and "among the others" in result.protocol


def test_pooling_and_scales_change_what_is_found(corpus):
    """Of a power of one the generalised mean is the mean, where nothing is negative."""
    plain = measured(corpus)
    model = Maps()
    task = task_class("retrieval")(evaluation_of(corpus, task="retrieval", pool="gem", gem_p="1.0").options)
    evaluation = evaluation_of(corpus, task="retrieval")
    object.__setattr__(evaluation.subject, "model", model)
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(task.describe(evaluation, images), images.mean((2, 3)), atol=1e-5)
    several = task_class("retrieval")(evaluation_of(corpus, task="retrieval", scales="1,0.5").options)
    norm = torch.nn.functional.normalize
    half = torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear").mean((2, 3))
    assert torch.allclose(several.describe(evaluation, images), norm(images.mean((2, 3))) + norm(half), atol=1e-6)
    assert plain.scores != measured(corpus, pool="gem").scores
    model.stage_maps = list
    object.__setattr__(evaluation.subject, "model", model)
    with refused("--pool", "gem", ("backbone",), error=UserError):
        task.measure(evaluation)


def test_a_pickle_of_numpy_is_read_without_numpys_code(tmp_path):
    path = tmp_path / "gnd.pkl"
    for protocol in (0, 2, 4, 5):
        value = {"gnd": [{"easy": np.array([3, 1]), "bbx": np.float64(2.5)}], "imlist": ["a"]}
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        assert read_gnd(path) == {"gnd": [{"easy": [3, 1], "bbx": 2.5}], "imlist": ["a"]}


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"gnd": np.array([Evil()], dtype=object)}),
        b"cos\nsystem\n(S'true'\ntR.",
        b"",
        pickle.dumps([1]),
        pickle.dumps({"gnd": np.arange(9)})[:-40],
    ],
)
def test_a_pickle_that_wants_to_run_code_is_refused(data, tmp_path, capsys):
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(data)
    with refused(path):
        read_gnd(path)
    assert capsys.readouterr().out == ""


def test_json_says_the_same_and_what_is_wrong_is_told(revisited, tmp_path):
    found = read_gnd(revisited / "gnd_roxford5k.pkl")
    root = tmp_path / "set"
    (root).mkdir()
    (root / "jpg").symlink_to(revisited / "jpg")
    (root / "gnd_roxford5k.json").write_text(json.dumps(found))
    expected = open_revisited("roxford5k", revisited)
    data = open_revisited("roxford5k", root)
    assert data.more == expected.more and len(data.train) == 6 and len(data.test) == 2
    from PIL import Image

    assert Image.open(io.BytesIO(data.test.source.read(0))).size == (50, 50)
    (root / "gnd_roxford5k.json").write_text(json.dumps(found | {"gnd": [GND[0] | {"easy": [6]}, GND[1]]}))
    with refused(root / "gnd_roxford5k.json", 6):
        open_revisited("roxford5k", root)
    (root / "gnd_roxford5k.json").write_text(json.dumps({"imlist": []}))
    with refused(root / "gnd_roxford5k.json"):
        open_revisited("roxford5k", root)
    (root / "gnd_roxford5k.json").unlink()
    with pytest.raises(DataError) as none:
        open_revisited("roxford5k", root)
    assert "gnd_roxford5k.json or gnd_roxford5k.pkl" in none.value.problems[0].rule
