"""Buffers go by their kind, whichever layer has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seer_scale.distributed import World
from seer_scale.methods.base import BufferKind
from seer_scale.models.layers.stateful import StatefulLayer, Tape, keep_eager, share_statistics
from seer_scale.parallel.buffers import Buffers
from tests.tiny import losses_of, tiny

CROPS = 2
"""Resolutions, of which each forward counts one."""


class RunningMax(nn.Module):
    """A stateful layer of nobody's."""

    group: object = "unset"

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def share_statistics(self, group) -> None:
        self.group = group

    def reset_buffers(self) -> None:
        self.largest.zero_()

    def forward(self, x: Tensor) -> Tensor:
        tape = Tape.current()
        if tape is None or not tape.replay:
            self.seen.add_(1)
            self.largest.copy_(torch.maximum(self.largest, x.amax(0)))
        return x / (1 + self.largest)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = RunningMax()

    def buffer_kind(self, name: str) -> BufferKind:
        return BufferKind.STATISTICS


def test_any_stateful_layer_is_known_by_its_protocol():
    holder = Holder()
    assert isinstance(holder.layer, StatefulLayer) and not isinstance(nn.Linear(1, 1), StatefulLayer)
    share_statistics(holder, None)
    assert holder.layer.group is None
    keep_eager(holder)
    assert "forward" in vars(holder.layer) and "forward" not in vars(holder)


def test_what_is_not_to_move_statistics_moves_none_and_no_count():
    holder = Holder()
    buffers = Buffers(holder, torch.device("cpu"))
    holder.layer(torch.ones(2, 3))
    buffers.keep()
    with buffers.unmoved():
        holder.layer(torch.full((2, 3), 5.0))
        assert holder.layer.seen == 2 and buffers.statistics.max() == 5
    assert holder.layer.seen == 1 and holder.layer.largest.tolist() == [1, 1, 1]


def test_a_look_at_the_batch_is_not_counted():
    config, engine = tiny(World(), **{"parallel.engine": "single", "train.micro_batch": 4})
    losses_of(engine, config, World(), range(1))
    counts = {b.item() for n, b in engine.method.named_buffers() if n.startswith("backbone") and n.endswith("tracked")}
    assert counts == {CROPS * config.num_micro_batches(1)}
