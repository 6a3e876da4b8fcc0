"""The nearest features of features, exact, by blocks on any device; and what they vote for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from seer_scale.distributed import World
from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.evaluate.features import gather_rows
from seer_scale.evaluate.metrics import share_right
from seer_scale.extras import how_to_install

if TYPE_CHECKING:
    from seer_scale.evaluate.context import Evaluation

BLOCK_BYTES = 1 << 28
"""Of similarities at a time."""


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, evaluation: Evaluation, *, faiss_from: int = 0
) -> tuple[Tensor, Tensor]:
    """The k nearest of bank [n, D] to each of queries [Q, D] by cosine: similarities float32 [Q, k], most similar
    first, and rows of the bank int64 [Q, k], on the host of every rank. Of equal ones the earlier row stands first.
    Queries are shared out among ranks; one all-gather each. faiss_from: rows of the bank from which Faiss searches."""
    world, progress = evaluation.world, evaluation.progress
    bounds = np.linspace(0, len(queries), world.size + 1).round().astype(int)
    mine = queries[bounds[world.rank] : bounds[world.rank + 1]]
    search: Callable[[Tensor, Tensor, int, World], tuple[Tensor, Tensor]] = by_blocks
    if faiss_from and len(bank) >= faiss_from:
        search = by_faiss
    with progress.doing(f"searching {len(bank):,} images for the nearest", len(queries)):
        similarity, rows = search(bank, mine, k, world)
    device = world.device
    return gather_rows(similarity.to(device), world).cpu(), gather_rows(rows.to(device), world).cpu()


def by_blocks(bank: Tensor, queries: Tensor, k: int, world: World) -> tuple[Tensor, Tensor]:
    """Exact: the whole matrix of similarities, a block of bank and queries at a time."""
    device = world.device
    q_step = max(1, min(len(queries), 4096))
    b_step = max(k, BLOCK_BYTES // (4 * q_step))
    similarities, rows = [], []
    for first in range(0, len(queries), q_step):
        asked = normalize(queries[first : first + q_step].to(device), dim=1)
        best = asked.new_empty(len(asked), 0)
        best_rows = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank), b_step):
            part = normalize(bank[start : start + b_step].to(device), dim=1)
            both = torch.cat([best, asked @ part.T], 1)
            numbers = torch.arange(start, start + len(part), device=device).expand(len(asked), -1)
            both_rows = torch.cat([best_rows, numbers], 1)
            order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
            best, best_rows = both.gather(1, order), both_rows.gather(1, order)
        similarities.append(best.cpu())
        rows.append(best_rows.cpu())
    if not similarities:
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat(similarities), torch.cat(rows)


def by_faiss(bank: Tensor, queries: Tensor, k: int, world: World) -> tuple[Tensor, Tensor]:
    """Faiss' flat index of inner products: exact as well. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        rule = "is not installed, and searches banks of this size"
        fix = f"{how_to_install('faiss-cpu')}, or --faiss-from 0"
        raise UserError(Problem("faiss", NOTHING, rule, fix)) from error
    index = faiss.IndexFlatIP(bank.shape[1])
    for start in range(0, len(bank), 1 << 16):
        index.add(normalize(bank[start : start + (1 << 16)], dim=1).numpy())
    if not len(queries):
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    similarity, rows = index.search(normalize(queries, dim=1).numpy(), k)
    return torch.from_numpy(similarity), torch.from_numpy(rows)


def vote(
    found: tuple[Tensor, Tensor], labels: np.ndarray, truth: np.ndarray, classes: int, k: int, temperature: float
) -> dict[str, float]:
    """Top-1 and top-5 in percent with standard errors, of queries [Q] whose `found` neighbours' labels (int64 [n], of
    the bank) vote with exp(similarity / temperature)."""
    similarity, rows = (x[:, :k] for x in found)
    of_bank = torch.from_numpy(labels)[rows]
    votes = torch.zeros(len(rows), classes, dtype=torch.float64)
    beyond = similarity.double() - similarity[:, :1].double()  # of the nearest: the order is the same, none overflows
    votes.scatter_add_(1, of_bank, (beyond / temperature).exp())
    ranked = votes.topk(min(5, classes), dim=1).indices == torch.from_numpy(truth)[:, None]
    return share_right("top1", ranked[:, 0]) | share_right("top5", ranked.any(1))
