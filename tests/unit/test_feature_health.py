"""The health of features against direct formulas in numpy, on one rank and on two; and where collapse is told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from seer_scale.config import Config, Data, Health
from seer_scale.data.loading.loader import eval_batches
from seer_scale.data.sources import open_source
from seer_scale.data.transforms.on_device import to_float
from seer_scale.distributed import World
from seer_scale.evaluate import feature_health as module
from seer_scale.evaluate.feature_health import (
    HealthImages,
    alignment,
    feature_health,
    health_images,
    rankme,
    uniformity,
)
from seer_scale.evaluate.features import FeatureTable, gather_features, second_view
from seer_scale.evaluate.knn import knn
from seer_scale.training.monitors import Monitors, low_rank
from tests.ranks import run_ranks
from tests.tiny import world_of
from tests.unit.test_knn import KNN, images_of, write_corpus

HOW = {"size": KNN.size, "batch": KNN.batch, "workers": 0}


def encode(images):
    """Features that differ in more than colour, and unit vectors that are others."""
    features = images[:, :, ::4, ::4].flatten(1)
    return features, torch.nn.functional.normalize(features[:, :20], dim=1)


def spread(num: int, width: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(num, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn * torch.linspace(1, 0.01, width), dim=1)


@pytest.mark.parametrize(("num", "width"), [(50, 12), (12, 50)])
def test_rankme_is_that_of_the_singular_values(num, width):
    x = spread(num, width)
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert rankme(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert rankme(torch.eye(num)) == pytest.approx(num, rel=1e-4)
    assert rankme(x[:1].expand(num, -1)) == pytest.approx(1, abs=1e-3)  # all alike
    assert 1 <= rankme(torch.zeros(num, width)) < 1.1
    assert np.isnan(rankme(torch.full((num, width), torch.nan)))


def test_alignment_and_uniformity_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(module, "SIMILARITY_ROWS", 7)
    x, y = spread(20, 5), spread(20, 5, seed=1)
    a, b = x.double().numpy(), y.double().numpy()
    assert alignment(x, y) == pytest.approx(np.mean([np.sum((p - q) ** 2) for p, q in zip(a, b)]))
    far = [np.exp(-2 * np.sum((a[i] - a[j]) ** 2)) for i in range(20) for j in range(20) if i != j]
    assert uniformity(x) == pytest.approx(np.log(np.mean(far)))
    assert uniformity(x[:1].expand(9, -1)) == pytest.approx(0, abs=1e-6)
    assert np.isnan(uniformity(x[:1]))


def measured(folder, world: World, *, labelled: bool, calls: list[int] | None = None):
    """The figures beside kNN, and kNN's; or those of the images trained on."""
    config = Config(data=Data(path=str(folder / "train")), knn=KNN, health=Health(images=9))
    labels = images_of(folder) if labelled else None
    images = health_images(config, open_source(config.data.path), labels)

    def counted(x):
        if calls is not None:
            calls.append(len(x))
        return encode(x)

    ordered = images.pairs_first(labels.query_indices if labels else images.indices)
    table = gather_features(counted, images.source, ordered, num_pairs=len(images.pairs), world=world, **HOW)
    scores = knn(counted, labels, KNN, workers=0, world=world, queries=table)[0] if labels else {}
    return feature_health(table, images), scores, images


def measured_on_rank(rank, size, folder):
    return [measured(folder, world_of(rank, size), labelled=labelled)[:2] for labelled in (True, False)]


def direct(images) -> dict[str, float]:
    """From all images at once."""
    pixels, _, numbers = next(eval_batches(images.source, images.indices, KNN.size, batch=100, workers=0))
    x = to_float(pixels)
    (f, z), (_, other) = encode(x), encode(second_view(x))
    paired = torch.isin(numbers, torch.from_numpy(images.pairs))
    norms = f.double().norm(dim=1).numpy()
    return {
        "health/rankme": rankme(f),
        "health/rankme_embeddings": rankme(z),
        "health/rankme_embeddings_limit": min(z.shape),
        "health/feature_norm": norms.mean(),
        "health/feature_norm_std": norms.std(),
        "health/alignment": alignment(z[paired], other[paired]),
        "health/uniformity": uniformity(z),
        "health/images": len(x),
    }


def test_beside_knn_and_without_labels_on_one_rank_and_on_two(tmp_path, monkeypatch):
    """The figures are of the chosen images alone; kNN's are what they are without it; only the pairs cost a second
    forward; and nothing counts twice on two ranks, with an image that cannot be read on one of them."""
    write_corpus(tmp_path)
    monkeypatch.setattr(module, "MAX_PAIRS", 4)
    calls: list[int] = []
    health, scores, images = measured(tmp_path, World(), labelled=True, calls=calls)
    assert health == pytest.approx(direct(images)) and health["health/images"] == 9 and len(images.pairs) == 4
    labels = images_of(tmp_path)
    assert scores == knn(encode, labels, KNN, workers=0, world=World())[0]
    assert sum(calls) == len(labels.query_indices) + len(labels.bank_indices) - 1 + 4  # one cannot be read
    monkeypatch.undo()  # ranks are processes of their own
    alone = [measured(tmp_path, World(), labelled=labelled)[:2] for labelled in (True, False)]
    assert alone[1][0] == pytest.approx(direct(measured(tmp_path, World(), labelled=False)[2]))
    for on_rank in run_ranks(2, measured_on_rank, tmp_path):
        for (one, knn_of_one), (two, knn_of_two) in zip(alone, on_rank, strict=True):
            assert two == pytest.approx(one, rel=1e-5) and knn_of_two == pytest.approx(knn_of_one)


def test_images_and_pairs_are_fixed_and_what_depends_on_them_is_named(tmp_path):
    write_corpus(tmp_path)
    source = open_source(str(tmp_path / "train"))
    config = Config(data=Data(path="unused"), health=Health(images=20))
    images = health_images(config, source, None)
    assert set(images.pairs) <= set(images.indices) and len(images.indices) == 20
    fewer = health_images(dataclasses.replace(config, health=Health(images=10)), source, None)
    assert set(fewer.indices) < set(images.indices)
    assert len({images.measurement(32), images.measurement(48), fewer.measurement(32)}) == 3
    assert health_images(dataclasses.replace(config, health=Health(images=0)), source, None) is None
    stream = type("Stream", (), {"__len__": lambda _: 10, "is_stream": True})()
    assert health_images(config, stream, None) is None


def test_a_second_view_is_a_part_mirrored():
    x = torch.arange(20.0).expand(1, 3, 20, 20)
    view = second_view(x)
    assert view.shape == x.shape and view[0, 0, 0].diff().max() <= 0 and view.min() >= 6  # 0.7 of the side


def test_a_rank_that_falls_to_a_few_is_told_once():
    told: list[tuple[str, str]] = []
    monitors = Monitors([], {}, {"low_rank": low_rank}, lambda kind, text, **_: told.append((kind, text)))

    def row(seen: int, rank: float, limit: int = 64) -> dict:
        return {"samples_seen": seen, "health/rankme_embeddings": rank, "health/rankme_embeddings_limit": limit}

    # random weights; another row; features that are not finite; healthy; as healthy as two dimensions allow
    for fine in (row(0, 1.1), {"samples_seen": 100}, row(200, float("nan")), row(300, 30.0), row(300, 1.8, limit=2)):
        monitors.check_evaluation(fine)
    assert not told
    problem = low_rank(row(400, 1.2))
    assert (problem.key, problem.value) == ("health/rankme_embeddings", 1.2) and "optim.lr" in problem.nearest
    for seen in (400, 500):
        monitors.check_evaluation(row(seen, 1.2))
    assert [kind for kind, _ in told] == ["low_rank"]


def test_embeddings_drawn_together_are_told():
    """Directions of images that differ by a thousandth of their length."""
    images = HealthImages(None, np.arange(100), np.arange(4))
    apart = spread(100, 64)
    for embeddings, is_told in ((apart, False), (torch.nn.functional.normalize(apart[:1] + 1e-3 * apart), True)):
        numbers = torch.arange(100)
        table = FeatureTable(apart, embeddings, numbers, numbers, embeddings[:4, None].expand(-1, 2, -1))
        found = low_rank({"samples_seen": 64} | feature_health(table, images))
        assert (found is not None) == is_told
