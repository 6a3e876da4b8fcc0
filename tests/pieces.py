"""Checkpoints of many ranks, written by one process: each tensor in as many pieces as there are ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from seer_scale.bench.load import even_layout
from seer_scale.checkpoint import store


def write_in_pieces(folder: Path, state: Mapping[str, torch.Tensor], meta: dict, ranks: int) -> Path:
    """A checkpoint of `state` as if `ranks` ranks had each held an equal run of every tensor."""
    layout = even_layout(state, ranks)
    aside = folder / ".tmp-pieces"
    aside.mkdir(parents=True)
    written: dict[str, dict[str, int]] = {}
    for rank in range(ranks):
        if parts := layout.written_by(rank):
            runs = [store._bytes_of(state[name], part) for name, part in parts.items()]
            store._write(aside / store._file_of(rank), [layout.header(rank), *runs], written)
    return store.publish_files(aside, meta, written, layout)


def bytes_read_by(work: Callable[[], object]) -> int:
    """What this process asked the system to read while `work` ran."""

    def so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar:")).split()[1])

    before = so_far()
    work()
    return so_far() - before
