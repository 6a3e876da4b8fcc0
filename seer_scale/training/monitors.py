"""What a metric line shows to be wrong. A monitor is a function of the line; another one is another entry in
`monitors_of`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from seer_scale.config import Config
from seer_scale.errors import Problem, TrainingError
from seer_scale.methods.base import Method
from seer_scale.training.event_log import LogEvent

Row = Mapping[str, Any]
"""A metric line, and `skipped_in_a_row`: the longest row of skipped updates that this start has seen."""
Monitor = Callable[[Row], Problem | None]

STARVED_SHARE, STARVED_LINES = 0.05, 3
"""Of the time between two metric lines, the share of waiting for images that is too much in so many lines in a row."""
LOW_RANK, LOW_SHARE = 3.0, 0.25
"""An effective rank of embeddings below which they point the same way; where few images or dimensions allow no more
than some, this share of that."""
SMALLER_STEPS = "lower optim.lr, lengthen schedule.warmup_samples, or use train.precision bf16"


class Monitors:
    """fatal: what these find in a metric line ends the run, by TrainingError. by_event: what these find is told once,
    as an event of that kind. of_evaluation: the same for the figures of an evaluation. told: the kinds that were told,
    in starts before, too."""

    def __init__(
        self,
        fatal: Collection[Monitor],
        by_event: Mapping[str, Monitor],
        of_evaluation: Mapping[str, Monitor],
        log_event: LogEvent,
        told: Collection[str] = (),
    ):
        self._fatal, self._by_event, self._of_evaluation = fatal, by_event, of_evaluation
        self._log_event, self.told = log_event, set(told)

    def check(self, row: Row) -> None:
        for monitor in self._fatal:
            if problem := monitor(row):
                raise TrainingError(problem)
        self._tell(self._by_event, row)

    def check_evaluation(self, row: Row) -> None:
        self._tell(self._of_evaluation, row)

    def _tell(self, monitors: Mapping[str, Monitor], row: Row) -> None:
        for kind, monitor in monitors.items():
            if kind not in self.told and (problem := monitor(row)):
                self.told.add(kind)
                self._log_event(kind, str(problem))


def monitors_of(
    config: Config, method: Method[Any, Any], *, run_dir: Path, workers: int, cores: int, is_contended: bool
) -> tuple[list[Monitor], dict[str, Monitor]]:
    """(fatal, by_event) of a run. workers, cores: of each rank."""
    fatal: list[Monitor] = [partial(skipped_in_a_row, most=config.train.max_skips)]
    if config.train.precision == "fp16":
        fatal.append(partial(small_loss_scale, least=config.train.min_loss_scale))
    by_event: dict[str, Monitor] = {"collapse": partial(method.health, config=config)}
    if workers or cores > 1:  # a rank without a core to spare loads by itself
        bench = (
            f"seer-scale bench data {shlex.quote(config.data.path)} --recipe "
            f"{shlex.quote(str(run_dir / 'config.yaml'))}"
        )
        by_event["starved"] = Starvation(workers, cores, is_contended, bench)
    return fatal, by_event


def skipped_in_a_row(row: Row, *, most: int) -> Problem | None:
    if row["skipped_in_a_row"] < most:
        return None
    return Problem(
        "train.max_skips",
        most,
        f"{row['skipped_in_a_row']} updates in a row were skipped because gradients were not finite (loss scale "
        f"{row['loss_scale']:g})",
        f"{SMALLER_STEPS}; the newest checkpoint stands",
    )


def small_loss_scale(row: Row, *, least: float) -> Problem | None:
    if row["loss_scale"] >= least:
        return None
    return Problem(
        "train.min_loss_scale",
        least,
        f"the loss scale has fallen to {row['loss_scale']:g}, because gradients overflow fp16 again and again",
        f"{SMALLER_STEPS}; the newest checkpoint stands",
    )


@dataclass
class Starvation:
    """Several metric lines in a row waited too long for images. bench: the command that measures how many a core
    makes."""

    workers: int
    cores: int
    is_contended: bool
    bench: str
    lines: int = 0

    def __call__(self, row: Row) -> Problem | None:
        share = row["time/data_wait_frac"]
        self.lines = self.lines + 1 if share > STARVED_SHARE else 0
        if self.lines < STARVED_LINES:
            return None
        if self.is_contended:  # more processes would only take from each other
            fix = "free the cores of what else runs on them, or store the images smaller"
        elif self.workers < self.cores:
            fix = f"raise it to {self.cores}"
        else:
            fix = "give each rank more cores, or store the images smaller"
        return Problem(
            "data.workers",
            self.workers,
            f"updates wait for images {100 * share:.0f} % of their time",
            f"{fix} ({self.bench} says how many a core makes)",
        )


def low_rank(row: Row) -> Problem | None:
    """Embeddings of different images that all point the same way, after training began: before it, those of random
    weights may."""
    rank = row.get("health/rankme_embeddings")
    if rank is None or not row["samples_seen"]:
        return None
    least = min(LOW_RANK, LOW_SHARE * row["health/rankme_embeddings_limit"])
    if not rank < least:
        return None
    return Problem(
        "health/rankme_embeddings",
        round(rank, 2),
        f"embeddings of different images use at least {least:g} directions while a network learns: they have collapsed",
        "where they fell, go back to a checkpoint from before, with a lower optim.lr or a longer "
        "schedule.warmup_samples; where they always were, a small vision transformer wants model.layer_scale 1",
    )


EVALUATION_MONITORS: Mapping[str, Monitor] = {"low_rank": low_rank}
TOLD_ONCE_A_RUN = frozenset({"collapse", *EVALUATION_MONITORS})
"""The kinds of events that a later start does not tell again."""
