"""A straight line through accuracies against the logarithm of a size: y = a + b log10(x), by least squares.

Standard errors are those of ordinary least squares with n - 2 degrees of freedom (Draper and Smith, Applied Regression
Analysis, chapters 1 and 3); that of a prediction is of one new run: s sqrt(1 + 1/n + (log10 x - mean)^2 / Sxx).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MIN_SIZES = 3
"""Distinct sizes of which the largest is predicted from the others."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """y = a + b log10(x) through `runs` points at `sizes` distinct x. residual: standard deviation about the line, and
    with it every standard error: None where there are two points."""

    a: float
    b: float
    a_stderr: float | None
    b_stderr: float | None
    residual: float | None
    mean: float
    sxx: float
    runs: int
    sizes: int

    def at(self, x: float) -> tuple[float, float | None]:
        """What it predicts at x, and the standard error of that for one run."""
        u = math.log10(x)
        spread = math.sqrt(1 + 1 / self.runs + (u - self.mean) ** 2 / self.sxx)
        return self.a + self.b * u, None if self.residual is None else self.residual * spread


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """At x, by the runs at smaller sizes; measured: the mean of those there, None where there is none."""

    x: float
    predicted: float
    stderr: float | None
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """line: through all points. held: the largest size, by the line through all others. next: a larger one."""

    line: Line
    held: Prediction | None
    next: Prediction

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """xs, ys: a point each, [n]. Raises ValueError without two distinct, positive x."""
    if len(set(xs)) < 2 or min(xs) <= 0:
        raise ValueError("a line needs points at two positive sizes")
    u, y = np.log10(np.asarray(xs, np.float64)), np.asarray(ys, np.float64)
    mean, n = u.mean(), len(u)
    sxx = ((u - mean) ** 2).sum()
    b = ((u - mean) * (y - y.mean())).sum() / sxx
    a = y.mean() - b * mean
    residual = float(np.sqrt(((y - a - b * u) ** 2).sum() / (n - 2))) if n > 2 else None
    of_a = None if residual is None else residual * math.sqrt(1 / n + mean**2 / sxx)
    of_b = None if residual is None else residual / math.sqrt(sxx)
    return Line(
        a=float(a), b=float(b), a_stderr=of_a, b_stderr=of_b, residual=residual, mean=float(mean), sxx=float(sxx),
        runs=n, sizes=len(set(xs)),
    )  # fmt: skip


def scaling(xs: Sequence[float], ys: Sequence[float], planned: Collection[float] = ()) -> Scaling | None:
    """The line, and how well its smaller sizes predict the largest; None without two distinct x. planned: other sizes,
    the first of which beyond the largest is predicted; otherwise one as far beyond it as it is beyond the one
    before."""
    sizes = sorted(set(xs))
    if len(sizes) < 2:
        return None
    line, largest = fit_line(xs, ys), sizes[-1]
    held = None
    if len(sizes) >= MIN_SIZES:
        smaller = [(x, y) for x, y in zip(xs, ys) if x < largest]
        predicted, stderr = fit_line(*zip(*smaller)).at(largest)
        there = [y for x, y in zip(xs, ys) if x == largest]
        held = Prediction(x=largest, predicted=predicted, stderr=stderr, measured=sum(there) / len(there))
    beyond = min((x for x in planned if x > largest), default=largest * largest / sizes[-2])
    predicted, stderr = line.at(beyond)
    return Scaling(line=line, held=held, next=Prediction(x=beyond, predicted=predicted, stderr=stderr))
