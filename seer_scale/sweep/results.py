"""What is there of a sweep's points: how far each run is, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seer_scale.checkpoint import store
from seer_scale.config import load_recipe
from seer_scale.distributed import World
from seer_scale.errors import NOTHING, ConfigError, Problem, UserError
from seer_scale.evaluate.run import RESULTS, record_in
from seer_scale.evaluate.suite import Item
from seer_scale.files import plain
from seer_scale.launch.job import Job
from seer_scale.launch.runs import is_running
from seer_scale.sweep.points import Point, changed

BY_HARDWARE = ("batch", "workers")
"""Options of a task that move no figure."""
ON_ITS_WAY = "but queued or running"


@dataclass(frozen=True, kw_only=True)
class Score:
    """In percent, with the standard error that the test images leave."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """samples_seen: by the newest checkpoint. images: it was trained on, 0 = not known. scores: by the name of what was
    measured, once it is trained. training, evaluation: their jobs, while these are queued or running."""

    point: Point
    samples_seen: int
    images: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    training: Job | None = None
    evaluation: Job | None = None

    @property
    def is_trained(self) -> bool:
        return self.samples_seen >= self.point.samples

    @property
    def epochs(self) -> float | None:
        return self.point.samples / self.images if self.images else None

    def lacks(self, items: Sequence[Item]) -> str:
        """What it has not, as a clause; empty where it has all."""
        if not self.is_trained:
            seen = f"{self.samples_seen:,} of {self.point.samples:,} samples" if self.samples_seen else "not trained"
            return f"{seen}, {ON_ITS_WAY}" if self.training else seen
        left = [name for name in map(name_of, items) if name not in self.scores]
        lack = f"trained, not evaluated by {', '.join(left)}" if left else ""
        return f"{lack}, {ON_ITS_WAY}" if lack and self.evaluation else lack


def name_of(item: Item) -> str:
    task, settings = item
    return settings.name or task


def check_unchanged(points: Sequence[Point]) -> None:
    """That what lies in the folders of the points is of their recipes. Raises ConfigError."""
    problems = []
    for point in points:
        recipe = point.run_dir / "config.yaml"
        if recipe.is_file() and (differing := changed(point, load_recipe(str(recipe)))):
            rule = f"was begun with another recipe ({', '.join(differing)})"
            fix = "give the recipe as it was, or another --out, or remove that folder to train it anew"
            problems.append(Problem(str(point.run_dir), NOTHING, rule, fix))
    if problems:
        raise ConfigError(problems, "The sweep")


def result_of(point: Point, items: Sequence[Item]) -> Result:
    """Raises UserError where its folder cannot be read."""
    found = store.latest(point.run_dir / "checkpoints", World(), verify=False, warn=lambda _: None)
    meta = store.read_meta(found) if found else None
    seen = meta["samples_seen"] if meta else 0
    images = sum(num for _, num in meta["data"]["versions"][-1]["parts"]) if meta else point.config.data.max_images
    scores: dict[str, Score] = {}
    if seen >= point.samples:
        scores = {name_of(item): score for item in items if (score := _score(point, item, seen))}
    return Result(
        point=point, samples_seen=seen, images=images, scores=scores, training=_job_in(point.run_dir),
        evaluation=_job_in(point.run_dir / RESULTS),
    )  # fmt: skip


def _job_in(folder: Path) -> Job | None:
    """That is queued or running there."""
    try:
        job = Job.read(folder)
        return job if job and is_running(job) else None
    except UserError:  # SLURM does not say
        return None


def _score(point: Point, item: Item, seen: int) -> Score | None:
    """What was measured of these weights with these options."""
    task, settings = item
    record = record_in(
        point.run_dir / RESULTS / f"{settings.stem(task, 'trained')}.json",
        "headline", "score", "scores", "settings", "subject",
    )  # fmt: skip
    wanted: dict[str, Any] = plain(asdict(settings))
    if not record or record["subject"].get("samples_seen") != seen:
        return None
    if any(record["settings"].get(key) != value for key, value in wanted.items() if key not in BY_HARDWARE):
        return None
    return Score(value=record["score"], stderr=record["scores"].get(f"{record['headline']}_stderr"))
