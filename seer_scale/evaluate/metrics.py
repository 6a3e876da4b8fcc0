"""Figures of classifiers' scores: accuracy, and average precision where an image may have several labels.

Targets are int64 [n], a class each, or int8 [n, classes]: 1 has it, 0 has it not, -1 is not to be counted.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Curve = Literal["area", "interpolated", "11point"]
"""What of a curve of precision against recall is its average: the area under its steps, as scikit-learn's; under its
envelope from the right, as VISSL's; or the envelope's mean at recalls of 0, 0.1 ... 1, as published for VOC07."""


def share_right(name: str, is_right: Tensor) -> dict[str, float]:
    """The share of right answers and its standard error, in percent."""
    share = is_right.double().mean().item()
    return {name: 100 * share, f"{name}_stderr": 100 * math.sqrt(share * (1 - share) / len(is_right))}


def weighted_votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """float64 [Q, classes]: of each query its neighbours' votes by exp(similarity / temperature), as shares of the
    nearest's, which do not overflow. similarity: [Q, k], nearest first; labels: their classes, int64 [Q, k]."""
    beyond = similarity.double() - similarity[:, :1].double()
    votes = beyond.new_zeros(len(beyond), classes)
    return votes.scatter_add_(1, labels, (beyond / temperature).exp())


def topk_accuracy(scores: Tensor, targets: np.ndarray, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """ "topK" in percent with "topK_stderr", of scores [n, classes]; a k beyond the classes stands for all of them."""
    ranked = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices.cpu() == torch.from_numpy(targets)[:, None]
    return {key: value for k in ks for key, value in share_right(f"top{k}", ranked[:, :k].any(1)).items()}


def per_class_accuracy(scores: Tensor, targets: np.ndarray) -> np.ndarray:
    """Of each class the percentage of its images that are right: float64 [classes], nan where it has none."""
    num = np.bincount(targets, minlength=scores.shape[1])
    right = targets[scores.argmax(1).cpu().numpy() == targets]
    with np.errstate(invalid="ignore"):
        return 100 * np.bincount(right, minlength=scores.shape[1]) / num


def average_precision(scores: np.ndarray, targets: np.ndarray, curve: Curve = "area") -> float:
    """Of one class: scores [n], targets [n]; in percent, nan where no image has it. Equal scores are one threshold, so
    the order of images counts for nothing."""
    counted = targets >= 0
    scores, is_positive = scores[counted], targets[counted] == 1
    if not is_positive.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, is_positive = scores[order], is_positive[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each threshold
    positives = np.cumsum(is_positive)[last]
    precision, recall = positives / (last + 1), positives / positives[-1]
    if curve != "area":
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if curve == "11point":
        at = np.searchsorted(recall, np.arange(11) / 10 - 1e-12)  # recall ends at 1
        return float(100 * precision[at].mean())
    return float(100 * np.sum(np.diff(recall, prepend=0.0) * precision))


def average_precisions(scores: Tensor, targets: np.ndarray, curve: Curve = "area") -> np.ndarray:
    """Of each class, of scores [n, classes] and int8 [n, classes]: float64 [classes] in percent, nan where no image has
    it. Their mean without these is mAP."""
    of_class = scores.cpu().numpy().T
    return np.array([average_precision(s, t, curve) for s, t in zip(of_class, targets.T)])


def mean_of(figures: np.ndarray) -> float:
    """The mean of those classes that have a figure; nan where none has."""
    return float(np.nanmean(figures)) if not np.isnan(figures).all() else math.nan
