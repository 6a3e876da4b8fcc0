"""SwAV's section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from seer_scale.config import Config, MethodSettings, opt, register_settings
from seer_scale.errors import NOTHING, Problem

PROTOTYPES_A_SAMPLE = 4
"""The most prototypes an assignment can use for each of its samples."""


@register_settings("swav")
@dataclass(frozen=True, kw_only=True)
class SwAVSettings(MethodSettings):
    hidden: tuple[int, ...] = opt((4096, 4096), "widths of the projection head's hidden layers", ge=1, of_network=True)
    embedding_dim: int = opt(256, "width of the embedding", ge=2, of_network=True)
    batch_norm: bool = opt(True, "BatchNorm in the projection head", of_network=True)
    prototypes: tuple[int, ...] = opt((16000,), "number of prototypes of each set", ge=2, of_network=True)
    temperature: float = opt(0.1, "softmax temperature of the prediction", gt=0)
    epsilon: float = opt(0.05, "entropy weight of the Sinkhorn assignment", gt=0)
    iterations: int = opt(10, "Sinkhorn iterations", ge=1)
    queue: int = opt(0, "past embeddings that take part in the assignment, over all ranks; 0 = none", ge=0)
    queue_from_samples: int = opt(0, "the queue takes part once this many samples were seen (and it is full)", ge=0)
    freeze_samples: int = opt(0, "prototypes stay fixed until this many samples were seen", ge=0)

    def rules(self, config: Config, ranks: int) -> Iterator[Problem]:
        batch = config.train.global_batch
        assigned = batch + self.queue
        most = PROTOTYPES_A_SAMPLE * assigned
        if not self.prototypes:
            yield Problem("swav.prototypes", [], "must name at least one set", [3000])
        for number in self.prototypes:
            if number > most:
                rule = (
                    f"an assignment of {assigned} samples (train.global_batch + swav.queue) can use at most "
                    f"{PROTOTYPES_A_SAMPLE} times as many"
                )
                yield Problem("swav.prototypes", number, rule, most)
        if self.queue % batch:
            near = max(1, round(self.queue / batch)) * batch
            yield Problem("swav.queue", self.queue, f"must be a multiple of train.global_batch ({batch})", near)
        if config.views.crops and config.num_crops < 2:
            yield Problem(
                "views.crops", NOTHING, "makes 1 crop an image, but SwAV compares at least 2", "nearest: num: 2"
            )

    def needs(self) -> dict[str, tuple[bool, str]]:
        return {"queue_from_samples": (self.queue > 0, "a swav.queue")}
