"""Features of a backbone's layers: its pooled output, its stages, pooled, or several of these side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from seer_scale.errors import Problem, UserError
from seer_scale.evaluate.subject import Subject
from seer_scale.evaluate.table import Rows, blocks
from seer_scale.formatting import counted

LAST = "last"
STAGE = re.compile(r"s[1-9]")


def layer_problems(layers: Sequence[str], key: str = "layers") -> list[Problem]:
    def is_known(stage: str) -> bool:
        return stage == LAST or STAGE.fullmatch(stage) is not None

    bad = [layer for layer in layers if not all(map(is_known, layer.split("+")))]
    rule = f"must be {LAST} or a stage, such as s3, or several of them joined by +"
    return [Problem(key, layer, rule, ("last", "s3+s4")) for layer in bad]


@dataclass(frozen=True)
class Layers:
    """names: of layers. columns: where each stage they need lies in a row of what `encode` gives."""

    subject: Subject
    names: tuple[str, ...]
    columns: Mapping[str, slice]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, S, S] -> float32 [n, D], the pooled stages side by side; one forward, and another
        for the pooled output beside stages where more than a mean makes it of the last."""
        if list(self.columns) == [LAST]:
            return self.subject.encode(images)
        model = self.subject.model
        pooled = {f"s{i}": maps[0].mean((2, 3)) for i, maps in enumerate(model.forward_stages([images]), 1)}
        if LAST in self.columns:
            pooled[LAST] = self.subject.encode(images) if model.after_stages() else pooled[f"s{len(pooled)}"]
        return torch.cat([pooled[stage] for stage in self.columns], 1).float()

    @property
    def mark(self) -> str:
        """Stands for `encode`; "" for the backbone's features, which other tasks compute, too."""
        return "" if list(self.columns) == [LAST] else "+".join(self.columns)

    def width(self, layer: str) -> int:
        return sum(self.columns[stage].stop - self.columns[stage].start for stage in layer.split("+"))


def layers_of(subject: Subject, names: Sequence[str], option: str = "--layers") -> Layers:
    """Raises UserError for a layer that the backbone has not."""
    model = subject.model
    needed = list(dict.fromkeys(stage for name in names for stage in name.split("+")))
    maps = model.stage_maps() if needed != [LAST] else []
    widths = {LAST: model.num_features} | {f"s{i}": stage.channels for i, stage in enumerate(maps, 1)}
    if missing := [stage for stage in needed if stage not in widths]:
        rule = f"this backbone has {counted(len(maps), 'stage')} that can be pooled"
        raise UserError(Problem(option, missing[0], rule, tuple(widths)))
    columns, first = {}, 0
    for stage in needed:
        columns[stage] = slice(first, first + widths[stage])
        first += widths[stage]
    return Layers(subject, tuple(names), columns)


@dataclass(frozen=True)
class Inputs:
    """Rows that `Layers.encode` has made to what a classifier of each layer takes: shifted and scaled by column, then
    (unit) to unit length."""

    layers: Layers
    shift: Tensor
    scale: Tensor
    unit: bool

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """[n, D] -> for each layer [n, width]."""
        rows = self._scaled(rows)
        return {name: self._layer(rows, name) for name in self.layers.names}

    def _scaled(self, rows: Tensor) -> Tensor:
        return (rows - self.shift.to(rows.device)) * self.scale.to(rows.device)

    def _layer(self, rows: Tensor, name: str) -> Tensor:
        parts = [rows[:, self.layers.columns[stage]] for stage in name.split("+")]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return normalize(whole, dim=1) if self.unit else whole

    def of(self, rows: Tensor, name: str) -> Tensor:
        """[n, D] -> [n, width] of one layer."""
        return self._layer(self._scaled(rows), name)


def fit_inputs(layers: Layers, rows: Tensor | Rows, how: str) -> Inputs:
    """how: "standardize" (each column to mean 0 and variance 1 over `rows` [n, D], as a BatchNorm without weights that
    has seen them all), "l2" (unit length) or "none"."""
    shift, scale = torch.zeros(rows.shape[1]), torch.ones(rows.shape[1])
    if how == "standardize":
        mean, variance = mean_and_variance(rows)
        shift, scale = mean.float(), (variance + 1e-5 * variance.mean().clamp(min=1e-30)).rsqrt().float()
    return Inputs(layers, shift, scale, how == "l2")


def mean_and_variance(rows: Tensor | Rows) -> tuple[Tensor, Tensor]:
    """Of each column of [n, D], without Bessel's correction, float64 [D]; in one pass (Chan et al. 1979, eq. 2.1)."""
    num, mean, variance = 0, *torch.zeros(2, rows.shape[1], dtype=torch.float64)
    for block in blocks(rows):
        wide = block.double()
        num += len(wide)
        share, apart = len(wide) / num, wide.mean(0) - mean
        variance = (1 - share) * (variance + share * apart.square()) + share * wide.var(0, correction=0)
        mean = mean + share * apart
    return mean, variance
