"""The step never waits for the host: no value of a tensor is read between two metric lines (DESIGN rule 6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seer_scale.data.batch import Batch
from seer_scale.distributed import World
from seer_scale.training.metric_window import MetricWindow
from tests.tiny import losses_of, micro_batches, tiny

WORLD = World()
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


class _Reads(TorchDispatchMode):
    """Collects the operations that make the host wait for a value or a shape."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize(
    "over", [{}, {"swav.queue": 16, "swav.freeze_samples": 16}, {"train.precision": "fp16"}, {"train.micro_batch": 2}]
)
def test_no_value_is_read_between_metrics(optimizer, over):
    config, engine = tiny(WORLD, **{"parallel.engine": "single", "optim.name": optimizer}, **over)
    losses_of(engine, config, WORLD, range(1))
    window = MetricWindow(WORLD, Path())
    for step in range(1, 4):  # frozen and not, queue filling and full
        parts = micro_batches(config, step, WORLD)
        batch = Batch([], [], torch.arange(8), 8 * step, [])
        with _Reads() as reads:
            loss = engine.gradients(parts, samples_seen=8 * step).loss
            engine.update(0.01, 8 * step)
            window.add(batch, loss)
        assert reads.found == []


def test_the_test_would_see_a_read():
    with _Reads() as reads:
        float(torch.ones(()))
    assert reads.found == ["_local_scalar_dense"]
