"""Classifiers fitted to convergence by scikit-learn, as rows of weights: what SGD's are checked against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.evaluate.context import Evaluation
from seer_scale.extras import how_to_install
from seer_scale.files import safetensors_header, write_whole
from seer_scale.formatting import counted

MAX_ITERATIONS = 1000
_COUNT = "unconverged"


class Linear(NamedTuple):
    """weight float32 [classes, D], bias [classes]. unconverged: fits behind it that ended before they had converged."""

    weight: Tensor
    bias: Tensor
    unconverged: int = 0

    def scores(self, rows: Tensor) -> Tensor:
        """[n, classes] of rows [n, D]."""
        return torch.nn.functional.linear(rows, self.weight, self.bias)


def sklearn_module(name: str) -> Any:
    """A module of scikit-learn. Raises UserError where it is not installed."""
    try:
        from importlib import import_module

        return import_module(f"sklearn.{name}")
    except ImportError as error:
        rule = "is not installed, and fits the classifiers"
        raise UserError(Problem("scikit-learn", NOTHING, rule, how_to_install("scikit-learn"))) from error


def logistic(rows: Tensor, targets: np.ndarray, classes: int, c: float) -> Linear:
    """scikit-learn's LogisticRegression (lbfgs, `c` the inverse strength of its L2 penalty) of rows [n, D], which are
    not copied where they are float64, and targets [n]; where targets are [n, classes], one for each class on the rows
    that count. A class without images gets a bias of -inf."""
    x = rows.double().numpy()
    if targets.ndim == 1:
        return _fit(x, targets, classes, c)
    of_class = [_fit(x[t >= 0], t[t >= 0], 2, c) for t in targets.T]
    return Linear(
        torch.stack([w[1] - w[0] for w, _, _ in of_class]),
        torch.stack([(b[1] - b[0]).clamp(-1e9, 1e9) for _, b, _ in of_class]),
        sum(fit.unconverged for fit in of_class),
    )


def told_of_unconverged(num: int, of: str = "logistic regression", iterations: int = 0) -> tuple[str, ...]:
    """A warning where so many fits are not the best there are. iterations: their limit, MAX_ITERATIONS otherwise."""
    limit = f"{iterations or MAX_ITERATIONS:,} iterations"
    told = f"{counted(num, 'fit')} of {of} did not converge in {limit}; smaller --c do."
    return (told,) if num else ()


def _fit(x: np.ndarray, y: np.ndarray, classes: int, c: float) -> Linear:
    weight, bias = torch.zeros(classes, x.shape[1]), torch.full((classes,), -torch.inf)
    present = np.unique(y)
    if len(present) < 2:
        bias[torch.from_numpy(present).long()] = 0
        return Linear(weight, bias)
    model = sklearn_module("linear_model").LogisticRegression(C=c, max_iter=MAX_ITERATIONS, tol=1e-4)
    with warnings.catch_warnings(record=True) as told:  # they are counted instead
        warnings.simplefilter("always")
        model.fit(x, y)
    unconverged = any(issubclass(w.category, sklearn_module("exceptions").ConvergenceWarning) for w in told)
    w, b = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(present) == 2:  # one row, of the second class
        w, b = torch.cat([-w, w]) / 2, torch.cat([-b, b]) / 2
    found = torch.from_numpy(present).long()
    weight[found], bias[found] = w.float(), b.float()
    return Linear(weight, bias, int(unconverged))


def fitted(
    jobs: Sequence[tuple[str, Callable[[], Linear]]], evaluation: Evaluation[Any], place: Path, what: str
) -> list[Linear]:
    """What each job (a name, and what fits) gives, on every rank; ranks share them out, and what `place` holds is not
    fitted again. Collective."""
    paths = [place / f"{name}.safetensors" for name, _ in jobs]

    def fit(i: int) -> None:
        weight, bias, unconverged = jobs[i][1]()
        write_whole(
            paths[i], save({"weight": weight.contiguous(), "bias": bias.contiguous()}, {_COUNT: str(unconverged)})
        )

    evaluation.complete(paths, fit, f"fitting {what}", "fits")
    return [_read(path) for path in paths]


def _read(path: Path) -> Linear:
    metadata = safetensors_header(path).get("__metadata__") or {}
    return Linear(**load(path.read_bytes()), unconverged=int(metadata.get(_COUNT, 0)))
