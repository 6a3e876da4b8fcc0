"""kNN against brute force over whole matrices, on one rank and on two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from seer_scale.config import Config, Data, Knn
from seer_scale.data.batched import to_float
from seer_scale.data.loader import decoded
from seer_scale.data.sources import Source
from seer_scale.errors import CheckpointError, UserError
from seer_scale.evaluate.knn import knn, labelled_images
from seer_scale.evaluate.look import show_neighbours, show_prototypes
from seer_scale.evaluate.run import knn_of_run
from seer_scale.observe.gallery import read_gallery
from seer_scale.world import World
from tests.ranks import run_ranks
from tests.tiny import world_of

KNN = Knn(size=16, k=5, temperature=0.2, batch=4)


def represent(images):
    features = images.mean((2, 3)) @ torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.3], [0.5, 0.0, 1.0]])
    return features, features


def write_corpus(folder):
    draw = np.random.default_rng(0)
    for split, num in (("train", 11), ("test", 5)):
        for c, colour in enumerate(([200, 60, 60], [60, 200, 60], [90, 120, 180])):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(num):
                image = np.clip(draw.normal(colour + draw.normal(0, 60, 3), 20, (20, 24, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / split / f"class{c}" / f"{i}.jpg"), image)
    (folder / "train" / "class1" / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    return folder


def images_of(folder):
    c = Config(data=Data(path=str(folder / "train")), knn=dataclasses.replace(KNN, queries=str(folder / "test")))
    return labelled_images(c)


def brute_force(images):
    def whole(source, indices):
        parts = list(decoded(source, indices, KNN.size, batch=100, workers=0))
        return torch.nn.functional.normalize(represent(to_float(parts[0][0]))[0], dim=1), parts[0][1]

    q, qy = whole(images.queries, images.query_indices)
    b, by = whole(images.bank, images.bank_indices)
    top = (q @ b.T).topk(KNN.k, dim=1)
    votes = torch.zeros(len(q), 3).scatter_add_(1, by[top.indices], (top.values / KNN.temperature).exp())
    return 100 * (votes.argmax(1) == qy).float().mean().item(), top.values


def not_finite(images):
    """A network whose features of some images are not finite; an image is told by its mean."""
    features, _ = represent(images)
    return features.where(features[:, :1] < features[:, :1].median(), torch.inf), features


def failure_on_rank(rank, size, folder):
    with pytest.raises(CheckpointError, match="features are not finite") as told:
        knn(not_finite, images_of(folder), KNN, workers=0, world=world_of(rank, size))
    return str(told.value)


def score_on_rank(rank, size, folder):
    scores, found = knn(represent, images_of(folder), KNN, workers=0, world=world_of(rank, size))
    return scores["knn/top1"], found.similarity.numpy(), found.queries.numpy()


def test_equal_to_brute_force(tmp_path):
    images = images_of(write_corpus(tmp_path))
    scores, found = knn(represent, images, KNN, workers=0, world=World())
    top1, similarity = brute_force(images)
    assert abs(scores["knn/top1"] - top1) < 1e-4 and 40 < top1 < 100
    torch.testing.assert_close(found.similarity, similarity)
    assert scores["knn/top5"] == 100.0  # three classes


def test_the_same_on_two_ranks(tmp_path):
    images = images_of(write_corpus(tmp_path))
    scores, found = knn(represent, images, KNN, workers=0, world=World())
    for top1, similarity, queries in run_ranks(2, score_on_rank, tmp_path):
        assert abs(top1 - scores["knn/top1"]) < 1e-4
        np.testing.assert_array_equal(queries, found.queries.numpy())
        np.testing.assert_allclose(similarity, found.similarity.numpy(), atol=1e-6)


def test_a_fifth_is_held_out_where_no_queries_are_given(tmp_path):
    folder = write_corpus(tmp_path)
    images = labelled_images(Config(data=Data(path=str(folder / "train")), knn=KNN))
    assert len(images.query_indices) == -(-len(images.bank) // 5)
    assert not set(images.query_indices) & set(images.bank_indices)
    assert len(images.query_indices) + len(images.bank_indices) == len(images.bank)


class Many(Source):
    """More images than could be numbered in memory, in two classes."""

    classes = ("a", "b")
    has_labels = True

    def __len__(self):
        return 10**12


def test_no_more_is_drawn_than_asked_for(tmp_path):
    c = Config(data=Data(path="unused"), knn=dataclasses.replace(KNN, limit=30, limit_queries=7))
    images = labelled_images(c, Many())
    queries, bank = images.query_indices, images.bank_indices
    assert len(queries) == 7 and len(bank) == 30 and not set(queries) & set(bank)
    assert (np.diff(queries) > 0).all() and (np.diff(bank) > 0).all() and bank.max() > 10**11

    write_corpus(tmp_path)
    c = dataclasses.replace(c, data=Data(path=str(tmp_path / "train")))
    beside = dataclasses.replace(c.knn, queries=str(tmp_path / "test"), limit=9)
    few = labelled_images(dataclasses.replace(c, knn=beside))
    assert len(few.query_indices) == 7 and len(few.bank_indices) == 9
    everything = labelled_images(dataclasses.replace(c, knn=dataclasses.replace(c.knn, limit=0, limit_queries=0)))
    assert len(everything.query_indices) == 7 and len(everything.bank_indices) == 27  # of 34


def test_numbers_as_labels(tmp_path):
    """Bank and queries have the same numbers, not the same positions of them: names decide."""
    write_corpus(tmp_path)
    named = images_of(tmp_path)
    for name, split, classes, num in (("bank", "train", range(3), 11), ("queries", "test", (1, 2), 5)):
        lines = [f"{split}/class{n}/{i}.jpg\t{7 * n}\n" for n in classes for i in range(num)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    c = dataclasses.replace(KNN, queries=str(tmp_path / "queries.txt"))
    images = labelled_images(Config(data=Data(path=str(tmp_path / "bank.txt")), knn=c))
    assert images.classes == ["0", "7", "14"] and images.query_to_bank.tolist() == [1, 2]
    scores, found = knn(represent, images, KNN, workers=0, world=World())
    named = dataclasses.replace(named, query_indices=np.arange(5, 15))
    assert scores == knn(represent, named, KNN, workers=0, world=World())[0]
    show_neighbours(tmp_path, "after", images, found)
    assert {e["label"] for e in read_gallery(tmp_path)["after"]} == {"7", "14"}


def test_features_that_are_not_finite(tmp_path):
    images = images_of(write_corpus(tmp_path))
    with pytest.raises(CheckpointError, match="features are not finite.*use an earlier checkpoint"):
        knn(not_finite, images, KNN, workers=0, world=World())
    calls = []

    def broken_bank(batch):
        calls.append(0)
        return not_finite(batch) if len(calls) > 4 else represent(batch)  # 15 queries in batches of 4

    with pytest.raises(CheckpointError, match="features are not finite"):
        knn(broken_bank, images, KNN, workers=0, world=World())
    assert len(set(run_ranks(2, failure_on_rank, tmp_path))) == 1


def test_pictures_of_images_that_vanished(tmp_path):
    images = images_of(write_corpus(tmp_path))
    _, found = knn(represent, images, KNN, workers=0, world=World())

    def vanish(batch):
        """Between features and pictures, one query vanishes, and half the bank is no images any more."""
        Path(images.queries.name(int(found.queries[0]))).unlink(missing_ok=True)
        for i in range(0, len(images.bank), 2):
            Path(images.bank.name(i)).write_bytes(b"no image")
        return represent(batch)

    show_prototypes(tmp_path, vanish, torch.eye(3), images.bank, size=16, batch=64, workers=0, world=World())
    assert 0 < sum(len(e["images"]) for e in read_gallery(tmp_path)["prototypes"]) < 3 * 8
    show_neighbours(tmp_path, "after", images, found)
    rows = read_gallery(tmp_path)["after"]
    assert len(rows) == 5 and 0 < sum(len(e["neighbours"]) for e in rows) < 5 * KNN.k  # of six queries


def test_eval_of_a_run_that_evaluated_nothing(tmp_path):
    write_corpus(tmp_path)
    recipe = {"data": {"path": str(tmp_path / "train")}, "train": {"samples": 8}, "knn": {"enabled": False}}
    recipe |= {"swav": {"prototypes": [8]}, "parallel": {"ranks": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="has no valid checkpoint yet"):
        knn_of_run(tmp_path, ["--knn.enabled", "false"], World())


def test_prototypes_shown_are_apart_from_each_other():
    """Where many prototypes share a place, one of them is shown."""
    import torch

    from seer_scale.evaluate.look import _apart

    directions = torch.eye(8)[:4]
    prototypes = torch.cat([directions + 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    closeness = torch.linspace(1, 0.5, 20)
    closeness[3::4] = -1  # of no image
    chosen = _apart(prototypes, closeness, 3)
    assert chosen[0] == 0 and sorted(k % 4 for k in chosen) == [0, 1, 2]
