"""Learning rates as functions of `samples_seen`.

Cosine is a pure function. Plateau (SEER's other schedule: constant, halved whenever the loss stops falling) also
depends on the losses seen, which are the same on all ranks; what it remembers is a few numbers in the checkpoint.
"""

from __future__ import annotations

import math

from seer_scale.config import Config


class LearningRate:
    """`lr(samples_seen)` for the next update; `observe` feeds the global mean loss of a metric line."""

    def __init__(self, config: Config):
        self.config, self.peak = config.schedule, config.peak_lr
        self.total = config.train.samples
        self.state: dict[str, float] = {"cuts": 0, "best": math.inf, "sum": 0.0, "count": 0, "window_end": 0}

    def __call__(self, samples_seen: int) -> float:
        c = self.config
        if samples_seen < c.warmup_samples:
            return self.peak * (c.warmup_from + (1 - c.warmup_from) * samples_seen / c.warmup_samples)
        if c.name == "plateau":
            return self.peak * c.plateau_factor ** self.state["cuts"]
        done = min(1.0, (samples_seen - c.warmup_samples) / max(1, self.total - c.warmup_samples))
        return self.peak * (c.final + (1 - c.final) * 0.5 * (1 + math.cos(math.pi * done)))

    def observe(self, samples_seen: int, loss: float) -> bool:
        """Account one global mean loss; returns whether it made the rate fall. Windows begin after the warm-up."""
        c, s = self.config, self.state
        if c.name != "plateau" or samples_seen <= c.warmup_samples or not math.isfinite(loss):
            return False
        s["window_end"] = s["window_end"] or c.warmup_samples + c.plateau_samples
        s["sum"], s["count"] = s["sum"] + loss, s["count"] + 1
        if samples_seen < s["window_end"]:
            return False
        mean = s["sum"] / s["count"]
        fell = mean < s["best"] * (1 - c.plateau_threshold)
        s |= {"best": min(mean, s["best"]), "sum": 0.0, "count": 0, "window_end": samples_seen + c.plateau_samples}
        s["cuts"] += not fell
        return not fell
