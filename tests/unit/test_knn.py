"""kNN against brute force over whole matrices, on one rank and on two."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import torch

from seer_scale.config import Config, Data, Knn
from seer_scale.data.loader import decoded
from seer_scale.data.views import to_float
from seer_scale.evaluate.knn import knn, labelled_images
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
