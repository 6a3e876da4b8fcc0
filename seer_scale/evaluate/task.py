"""What a task of `seer-scale eval` is: a file in `evaluate/tasks` with its options and what it measures.

A task sees a frozen backbone, labelled splits and the ranks that work on it; it gives scores, what stands behind them,
and a plot as data. Nothing here trains the backbone's run.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

from seer_scale.config.fields import opt
from seer_scale.errors import Problem
from seer_scale.observe.chart import Chart

NOT_IN_FIGURES = ("data", "test", "batch", "workers", "name", "recipe")
"""Options of tasks on which figures do not depend; of the images there is a mark of their own."""
RESERVED = ("suite", "history", "unfinished", "logs", "launch")
"""What else lies in the folder of results."""
SUFFIXES = (".json", ".jsonl", ".svg")
"""Of the files there: a folder that is called by a result's name has none."""
UNTRAINED = "-random"
"""What the name of a result of untrained weights ends with."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The options every task has; a task's own are a subclass. An option is the field's name with hyphens."""

    trains_network: ClassVar[bool] = False
    """Whether the network is trained before it is measured: its protocol then says of what BatchNorm statistics are."""

    data: str = opt("", "labelled images: a folder (of train and test parts, or of classes), a list, tars, hf:NAME, "
                        "a manifest, or the name of a data set; empty = those of the run's recipe")  # fmt: skip
    test: str = opt("", "labelled images to test on; empty = the test part of --data, or a fifth of it, held out")
    size: int = opt(0, "side of the images in pixels; 0 = what the backbone's preprocessing says", ge=0)
    batch: int = opt(64, "images a forward pass of one process", ge=1)
    workers: int = opt(-1, "loader processes of one process; -1 = by its cores", ge=-1)
    seed: int = opt(0, "of everything that is drawn", ge=0)
    name: str = opt("", "of the result, as in eval/NAME.json, where several are to be kept; empty = the task's")

    def name_problems(self, others: Collection[str]) -> list[Problem]:
        """What is wrong with `name`. others: the names of other tasks."""
        if not self.name:
            return []
        if self.name in others:
            rule = "results of another task are called so"
            return [Problem("name", self.name, rule, "choose another")]
        is_plain = re.fullmatch(r"[\w.+=-]+", self.name) and self.name[0] != "."
        if is_plain and self.name not in RESERVED and not self.name.endswith((UNTRAINED, *SUFFIXES)):
            return []
        rule = "must be a plain name of a file that nothing else in the folder of results has"
        fix = f"letters, digits, dots and hyphens, without {', '.join((UNTRAINED, *SUFFIXES))} at its end"
        return [Problem("name", self.name, rule, fix)]

    def problems(self) -> list[Problem]:
        """What no single range says; keys are the fields' names."""
        return []

    def without_effect(self) -> dict[str, str]:
        """Options on which nothing depends beside the values of the others, by field, with why: "without --augment"."""
        return {}

    def stem(self, task: str, weights: str) -> str:
        """Of the files of a result: its name, with "-random" of untrained weights."""
        return f"{self.name or task}{UNTRAINED * (weights == 'random')}"

    @property
    def given(self) -> dict[str, Any]:
        """Those of the options that figures depend on that are not the defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in NOT_IN_FIGURES and getattr(self, f.name) != f.default
        }

    @property
    def mark(self) -> str:
        """Stands for the options that figures depend on."""
        return repr([(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in NOT_IN_FIGURES])


SettingsT = TypeVar("SettingsT", bound=TaskSettings)


@dataclass(frozen=True, kw_only=True)
class Result:
    """scores: "name" -> figure, in percent unless its name says otherwise; "name_stderr" is its standard error,
    "name_std" its deviation over draws. headline: the name of the one that stands for the task. protocol: what was
    measured on what, one sentence or two. table: what stands behind (a row a head, a class, a severity ...)."""

    scores: Mapping[str, float]
    headline: str
    protocol: str
    table: Sequence[Mapping[str, Any]] = ()
    plots: Sequence[Chart] = ()
    warnings: Sequence[str] = ()
    """What figures are to be read with, a sentence each."""
    files: Sequence[str] = ()
    """Names of what else was written to the folder of results."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Anything else for the JSON file."""


class Task(ABC, Generic[SettingsT]):
    """One class a task, registered by `registry.register_task`."""

    name: ClassVar[str]
    settings: ClassVar[type[TaskSettings]]
    variants: ClassVar[Mapping[str, type[TaskSettings]]]
    """The options it has instead with a flag, by the flag, a field of all of them."""
    trains_backbone: ClassVar[bool] = False
    """Whether it leaves other weights in its subject, which no task after it is given."""
    takes_recipes: ClassVar[bool] = False
    """Whether it has an option `recipe`: files of its options, those of the package in `recipes/TASK`."""
    keeps_network: ClassVar[bool] = False
    """Whether it keeps a network, in a folder called by the result's name."""

    def __init__(self, settings: SettingsT):
        self.options = settings

    @abstractmethod
    def measure(self, evaluation: Any) -> Result:
        """On `evaluation` (an `Evaluation` of context.py); all ranks call it alike and have the same result. Work that
        takes minutes goes on where it was killed: what is done lies in `evaluation.work`. Raises UserError."""
