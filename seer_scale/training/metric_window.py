"""What happened between two metric lines, and the line that is made of it."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from seer_scale.data.batch import Batch
from seer_scale.data.sampling.order import mix
from seer_scale.distributed import World
from seer_scale.parallel.engine import Engine
from seer_scale.training.clock import Clock
from seer_scale.training.data_history import newest_manifest


class MetricWindow:
    """What happened since the last metric line: sums on the device, counts on the host."""

    def __init__(self, world: World, run_dir: Path):
        self.world, self._run_dir = world, run_dir
        self.newest_manifest = 0
        self.reset()

    def reset(self) -> None:
        # in float64 a sum of losses is the same, however it is divided among metric lines
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.loss_count = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.fingerprint, self.updates = 0, 0
        self.unreadable: list[str] = []
        self.waited_s, self.stalled_s, self._begin = 0.0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A checkpoint or an evaluation: its time is none of the updates'."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        finite = loss.isfinite()
        self.loss_sum += torch.where(finite, loss, 0.0)
        self.loss_count += finite
        self.fingerprint = (self.fingerprint + fingerprint(batch.indices.numpy())) % 2**52
        self.unreadable += batch.unreadable
        self.updates += 1

    def reduce(self, metrics: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Means over the ranks of loss sum and count and of `metrics`; sums of fingerprints and unreadable images. What
        the slowest rank has waited and rank 0's newest manifest are then every rank's, too. One all-reduce of float64,
        in which whole numbers of up to 53 bits are exact."""
        named = {"loss_sum": self.loss_sum, "loss_count": self.loss_count} | metrics
        world, parts = self.world, [v.flatten().double() for v in named.values()]
        high, low = divmod(self.fingerprint, 2**26)
        host = torch.zeros(4 + world.size, dtype=torch.float64)
        host[:4] = torch.tensor(
            [high, low, len(self.unreadable), newest_manifest(self._run_dir) if world.is_main else 0]
        )
        host[4 + world.rank] = self.waited_s  # each rank a place of its own, of which the largest is taken
        flat = world.sum_(torch.cat([*parts, host.to(world.device)])).cpu()
        *parts, host = flat.split([*(len(p) for p in parts), len(host)])
        high, low, unreadable, self.newest_manifest = (int(x) for x in host[:4])
        self.waited_s = host[4:].max().item()
        return {name: part / world.size for name, part in zip(named, parts)}, [(high * 2**26 + low) % 2**52, unreadable]

    def timing(self, global_batch: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self._begin
        return {
            "time/step_s": elapsed / self.updates,
            "time/data_wait_frac": min(1.0, self.waited_s / elapsed),
            "time/checkpoint_stall_s": self.stalled_s,
            "throughput/img_per_s": global_batch * self.updates / elapsed,
        }


class MetricLine(NamedTuple):
    """row: for the log. loss_sum, loss_count: of the updates since the line before, means over the ranks.
    skipped_in_a_row: the longest row of skipped updates of this start. unreadable: images replaced, on all ranks."""

    row: dict[str, Any]
    loss_sum: float
    loss_count: float
    skipped_in_a_row: int
    unreadable: int


def metric_line(
    window: MetricWindow,
    engine: Engine,
    clock: Clock,
    *,
    rates: dict[str, float],
    epoch: float,
    stats: dict[str, torch.Tensor],
    metrics: dict[str, torch.Tensor],
) -> MetricLine:
    """Of the updates in the window; it reads the device. stats: of the last update. metrics: what its loss gave, or
    none. rates: of the last update. One all-reduce, in `window.reduce`."""
    means, (images, unreadable) = window.reduce(metrics)
    scaler = engine.scaler
    own = [stats["grad_norm"], stats["param_norm"], scaler.scale, scaler.skipped, scaler.longest_streak]
    grad_norm, param_norm, scale, skipped, streak = torch.stack(own).tolist()
    total, count = means.pop("loss_sum").item(), means.pop("loss_count").item()
    loss = total / count if count else math.nan
    row = {
        "step": clock.step,
        "samples_seen": clock.samples_seen,
        "epoch": epoch,
        "loss": loss,
        **rates,
        "loss_scale": scale,
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "skipped": int(skipped),
        **window.timing(clock.global_batch),
        "mem/peak_gib": _peak_gib(engine.world),
        **engine.method.metrics(means, loss),
        "data/unreadable": unreadable,
        "data/fingerprint": images,
    }
    return MetricLine(row, total, count, int(streak), unreadable)


def _peak_gib(world: World) -> float:
    """Peak memory of this rank: of the accelerator where there is one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def fingerprint(indices: np.ndarray) -> int:
    """A sum over image numbers that shows whether two runs saw the same images, in whatever order and on however many
    ranks."""
    return int((mix(indices.astype(np.uint64) + np.uint64(1)) >> np.uint64(12)).sum() % np.uint64(2**52))
