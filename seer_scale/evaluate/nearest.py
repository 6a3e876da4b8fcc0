"""The nearest features of features, exact, by blocks on any device; and what they vote for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from seer_scale.errors import NOTHING, Problem, UserError
from seer_scale.evaluate.features import gather_rows
from seer_scale.evaluate.metrics import share_right, weighted_votes
from seer_scale.evaluate.table import blocks, rows_a_block
from seer_scale.extras import how_to_install

if TYPE_CHECKING:
    from seer_scale.evaluate.context import Evaluation

BLOCK_BYTES = 1 << 28
"""Of similarities, and of queries, at a time."""
MAX_QUERIES = 4096


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, evaluation: Evaluation, *, faiss_from: int = 0
) -> tuple[Tensor, Tensor]:
    """The k nearest of bank [n, D] to each of queries [Q, D] by cosine: similarities float32 [Q, k], most similar
    first, and rows of the bank int64 [Q, k], on the host of every rank. Of equal ones the earlier row stands first.
    Queries are shared out among ranks; one all-gather each. faiss_from: rows of the bank from which Faiss searches."""
    world, progress = evaluation.world, evaluation.progress
    bounds = np.linspace(0, len(queries), world.size + 1).round().astype(int)
    mine = queries[bounds[world.rank] : bounds[world.rank + 1]]
    device = world.device
    search = by_faiss if faiss_from and len(bank) >= faiss_from else by_products
    with progress.doing(f"searching {len(bank):,} images for the nearest", len(queries)):
        similarity, rows = search(bank, mine, k, device)
    return gather_rows(similarity.to(device), world).cpu(), gather_rows(rows.to(device), world).cpu()


def by_products(bank: Tensor, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Exact: the whole matrix of similarities, a block of bank and queries at a time."""

    def search(asked: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        similarity = torch.cat([asked @ normalize(rows.to(device), dim=1).T for rows in blocks(part)], 1)
        return similarity, torch.arange(len(part), device=device).expand(len(asked), -1)

    step = max(k, BLOCK_BYTES // (4 * _queries_a_block(queries)))
    return _searched(search, bank, step, queries, k, device)


def by_faiss(bank: Tensor, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Faiss' search by brute force, on CPUs: exact as well. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        rule = "is not installed, and searches banks of this size"
        fix = f"{how_to_install('faiss-cpu')}, or --faiss-from 0"
        raise UserError(Problem("faiss", NOTHING, rule, fix)) from error

    def search(asked: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        rows = normalize(part, dim=1).numpy()
        found = faiss.knn(asked.numpy(), rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        similarity, numbers = map(torch.from_numpy, found)
        return similarity, numbers

    return _searched(search, bank, rows_a_block(bank), queries, k, torch.device("cpu"))


def _queries_a_block(queries: Tensor) -> int:
    return max(1, min(len(queries), MAX_QUERIES, BLOCK_BYTES // (4 * queries.shape[1])))


def _searched(
    search: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], bank: Tensor, step: int, queries: Tensor, k: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best of the bank to each query, `step` rows of it at a time. search: queries of unit length [q, D], and
    rows of the bank [b, D] as they are -> similarities and places among the b of the k best, or of more, [q, >= k]."""
    similarities, rows = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.int64)]
    for few in queries.split(_queries_a_block(queries)):
        if not len(few):
            break
        asked = normalize(few.to(device), dim=1)
        best, best_rows = asked.new_empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank), step):
            similarity, places = search(asked, bank[start : start + step])
            both, both_rows = torch.cat([best, similarity], 1), torch.cat([best_rows, start + places], 1)
            order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
            best, best_rows = both.gather(1, order), both_rows.gather(1, order)
        similarities.append(best.cpu())
        rows.append(best_rows.cpu())
    return torch.cat(similarities), torch.cat(rows)


def vote(
    found: tuple[Tensor, Tensor], labels: np.ndarray, truth: np.ndarray, classes: int, k: int, temperature: float
) -> dict[str, float]:
    """Top-1 and top-5 in percent with standard errors, of queries [Q] whose `found` neighbours' labels (int64 [n], of
    the bank) vote with exp(similarity / temperature)."""
    similarity, rows = (x[:, :k] for x in found)
    votes = weighted_votes(similarity, torch.from_numpy(labels)[rows], classes, temperature)
    ranked = votes.topk(min(5, classes), dim=1).indices == torch.from_numpy(truth)[:, None]
    return share_right("top1", ranked[:, 0]) | share_right("top5", ranked.any(1))
