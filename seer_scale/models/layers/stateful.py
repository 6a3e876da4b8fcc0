"""Layers whose forward is more than a function of its input, and what makes a second run of them leave no trace.

Such a layer exchanges with other ranks, moves its buffers and counts. Engines know it by this protocol alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

Record = tuple[Tensor, ...]


@runtime_checkable
class StatefulLayer(Protocol):
    """Its float buffers are running statistics. In forward it asks `Tape.current()` whether this run is a second one:
    it then takes what it exchanged from there, and moves and counts nothing. Compilers leave it as it is."""

    def share_statistics(self, group: dist.ProcessGroup | None) -> None:
        """The batches of these ranks count as one; None: of this rank alone."""

    def reset_buffers(self) -> None:
        """Its buffers as they are before any training."""


def share_statistics(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Every stateful layer in `module` takes the batches of this group of ranks as one; None: of this rank."""
    for layer in module.modules():
        if isinstance(layer, StatefulLayer):
            layer.share_statistics(group)


def keep_eager(module: nn.Module) -> None:
    """torch.compile leaves every stateful layer in `module` as it is."""
    for layer in list(module.modules()):
        if isinstance(layer, StatefulLayer):
            vars(layer)["forward"] = torch.compiler.disable(vars(layer).get("forward") or layer.forward)


_thread = threading.local()


@dataclass
class Tape:
    """A context in which this thread's stateful layers write what they exchanged, or read it back (`replay`).

    `records`: shared by the tapes of the first run of a block and of those that repeat it.
    """

    records: list[Record]
    replay: bool
    _left: Iterator[Record] = field(default=iter(()), init=False)

    @staticmethod
    def current() -> Tape | None:
        """The tape of this thread."""
        return getattr(_thread, "tape", None)

    @classmethod
    def contexts(cls) -> tuple[Tape, Tape]:
        """(first, again): two contexts, the first to record a forward and the second to repeat it, for
        `torch.utils.checkpoint.checkpoint(block, xs, use_reentrant=False, context_fn=Tape.contexts)`."""
        records: list[Record] = []
        return cls(records, replay=False), cls(records, replay=True)

    def write(self, record: Record) -> None:
        self.records.append(record)

    def next(self) -> Any:
        """What the layer that asks wrote in the first run: layers run in the same order."""
        return next(self._left)

    def __enter__(self) -> None:
        assert Tape.current() is None, "recomputed units do not nest"
        self._left = iter(self.records)  # a graph kept for a second backward is recomputed from the first layer again
        _thread.tape = self

    def __exit__(self, *_: object) -> None:
        _thread.tape = None
