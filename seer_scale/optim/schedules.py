"""Learning rate, weight decay and whatever else changes in a run, as functions of `samples_seen`.

`linear` and `cosine` are for any of them, such as a method's temperature or the momentum of a moving average. Plateau
(SEER's other schedule of the learning rate: constant, halved whenever the loss stops falling) also depends on the
losses seen, which are the same on all ranks. It weighs every update alike, in windows on a fixed grid of samples, and
what it remembers, the window under way too, is a few numbers in the checkpoint: so neither metric lines nor stops move
a cut."""

from __future__ import annotations

import math
from typing import TypedDict

from seer_scale.config import Config


def linear(samples_seen: int, begin: float, end: float, samples: int) -> float:
    """From `begin` at sample 0 to `end` at `samples`, and `end` from there on."""
    return begin + (end - begin) * _fraction(samples_seen, samples)


def cosine(samples_seen: int, begin: float, end: float, samples: int) -> float:
    """From `begin` at sample 0 to `end` at `samples`, by half a period of a cosine, and `end` from there on."""
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * _fraction(samples_seen, samples)))


def _fraction(samples_seen: int, samples: int) -> float:
    return min(1.0, samples_seen / samples) if samples > 0 else 1.0


def weight_decay(config: Config, samples_seen: int) -> float:
    """Of the next update: optim.weight_decay, or a cosine from there to optim.weight_decay_end, without a warm-up."""
    begin, end = config.optim.weight_decay, config.optim.weight_decay_end
    return begin if end is None else cosine(samples_seen, begin, end, config.decay_samples)


class PlateauState(TypedDict):
    """Cuts so far, the least mean loss of a window (None before the first), and sum and count of the window under
    way."""

    cuts: float
    best: float | None
    sum: float
    count: float


class LearningRate:
    """`lr(samples_seen)` for the next update; `observe` feeds the global mean losses of the updates since it was
    called."""

    def __init__(self, config: Config):
        self.config, self.peak, self.warmup = config.schedule, config.peak_lr, config.warmup_samples
        self.total, self._batch = config.decay_samples, config.train.global_batch
        self.state: PlateauState = {"cuts": 0, "best": None, "sum": 0.0, "count": 0.0}

    def __call__(self, samples_seen: int) -> float:
        config = self.config
        if samples_seen < self.warmup:
            return self.peak * linear(samples_seen, config.warmup_from, 1.0, self.warmup)
        if config.name == "plateau":
            return self.peak * config.plateau_factor ** self.state["cuts"]
        return self.peak * cosine(samples_seen - self.warmup, 1.0, config.final, self.total - self.warmup)

    def ends_window(self, samples_seen: int) -> bool:
        """Whether the update that begins at `samples_seen` is the last of a window, so that `observe` is due after
        it."""
        return self._window(samples_seen) != self._window(samples_seen + self._batch)

    def observe(self, samples_seen: int, total: float, count: float) -> bool:
        """Account `count` losses that sum to `total`, of updates of one window up to `samples_seen`; whether they made
        the rate fall."""
        config, state, window = self.config, self.state, self._window(samples_seen - self._batch)
        if window < 0:
            return False
        state |= {"sum": state["sum"] + total, "count": state["count"] + count}
        if self._window(samples_seen) == window or not state["count"]:
            return False
        mean, best = state["sum"] / state["count"], state["best"]
        fell = best is None or mean < best * (1 - config.plateau_threshold)
        state |= {
            "best": mean if best is None else min(mean, best),
            "sum": 0.0,
            "count": 0.0,
            "cuts": state["cuts"] + (not fell),
        }
        return not fell

    def _window(self, samples_seen: int) -> int:
        """Which window an update falls into that begins there: they are counted from the end of the warm-up."""
        config = self.config
        return (
            (samples_seen - self.warmup) // config.plateau_samples
            if config.name == "plateau" and samples_seen >= self.warmup
            else -1
        )
