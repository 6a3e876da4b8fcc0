"""Figures equal scikit-learn's, and VOC's and VISSL's published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, recall_score, top_k_accuracy_score

from seer_scale.evaluate.metrics import (
    average_precision,
    average_precisions,
    mean_of,
    per_class_accuracy,
    topk_accuracy,
)

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 40), st.integers(2, 8), st.booleans())
def test_accuracies_are_scikit_learns(seed, num, classes, is_coarse):
    rng = np.random.default_rng(seed)
    scores, targets = rng.permuted(np.arange(num * classes)).reshape(num, classes) * 1.0, rng.integers(0, classes, num)
    found = topk_accuracy(torch.from_numpy(scores), targets, (1, 2, 5))
    labels = np.arange(classes)
    for k in (1, 2):
        if k < classes:  # scikit-learn warns where all are right, and takes two classes for one column
            predicted = np.argsort(-scores, 1)[:, :k]
            assert found[f"top{k}"] == pytest.approx(100 * np.mean((predicted == targets[:, None]).any(1)))
    if classes > 2:
        assert found["top2"] == pytest.approx(100 * top_k_accuracy_score(targets, scores, k=2, labels=labels))
    assert found["top5"] == 100 if classes <= 5 else found["top5"] >= found["top2"]
    own = per_class_accuracy(torch.from_numpy(scores), targets)
    theirs = recall_score(targets, scores.argmax(1), labels=labels, average=None, zero_division=np.nan)
    np.testing.assert_allclose(own, 100 * theirs)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(2, 40), st.booleans())
def test_average_precision_is_scikit_learns_also_of_ties(seed, num, has_ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (num, 3)) / 5 if has_ties else rng.normal(size=(num, 3))
    targets = rng.integers(-1, 2, (num, 3)).astype(np.int8)
    found = average_precisions(torch.from_numpy(scores), targets)
    for c in range(3):
        counted = targets[:, c] >= 0
        if (targets[:, c] == 1).any():
            assert found[c] == pytest.approx(100 * average_precision_score(targets[counted, c], scores[counted, c]))
        else:
            assert math.isnan(found[c])
    both = rng.permutation(num)
    shuffled = average_precisions(torch.from_numpy(scores[both]), targets[both])
    np.testing.assert_allclose(shuffled, found)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(2, 40))
def test_the_published_curves(seed, num):
    """The development kit's loop over 11 recalls, and VISSL's envelope with a point at either end; without ties."""
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=num), rng.integers(0, 2, num)
    targets[0] = 1
    right = targets[np.argsort(-scores)]
    precision, recall = np.cumsum(right) / np.arange(1, num + 1), np.cumsum(right) / right.sum()
    points = [max(precision[recall >= t - 1e-12], default=0.0) for t in np.arange(11) / 10]
    assert average_precision(scores, targets, "11point") == pytest.approx(100 * np.mean(points))
    r, p = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    for i in range(len(p) - 2, -1, -1):
        p[i] = max(p[i], p[i + 1])
    assert average_precision(scores, targets, "interpolated") == pytest.approx(100 * np.sum(np.diff(r) * p[1:]))


def test_the_mean_leaves_out_classes_without_a_figure():
    assert mean_of(np.array([20.0, math.nan, 40.0])) == 30.0
    assert math.isnan(mean_of(np.array([math.nan])))
