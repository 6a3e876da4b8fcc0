"""Sinkhorn at the size of a recipe against the least its own traffic could take, and against the textbook's.

The bound: a rank's scores are a matrix of [B / ranks, K] fp32 a crop. `passes` counts how often the implementation
goes through a matrix of this size, once for each that an operation reads and once for each that it writes, whatever
caches may save. A pass that only reads is priced at the time of torch's sum over a matrix of this size, a pass that
reads one and writes one at the time of a copy_ into memory already there; to these come the `iterations` + 1
all-reduces of crops * K floats. All three are measured in the same run, on all ranks at once, between the timed calls.

The textbook is main_swav.py's distributed_sinkhorn, a crop at a time, with its all-reduces.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.bench.ranks import run_ranks, seconds, where
from seer_scale.bench.reference_swav import textbook_sinkhorn
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json
from seer_scale.methods.losses.sinkhorn import ABSORB, sinkhorn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8192, help="global batch")
    parser.add_argument("--prototypes", type=int, default=16000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--crops", type=int, default=1, help="assigned crops")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, with one call of each in turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def passes(iterations: int) -> tuple[int, int]:
    """(passes that read a matrix, passes that read one and write one) of `sinkhorn`.

    Columns: their maximum reads; the shift and exp_ are 2 of the second kind, their sum reads. Each absorption: the
    shift and softmax, 2 of the second kind. Each further iteration: a matrix-vector product reads, and a second one
    where the iteration does not end in an absorption.
    """
    further = iterations - 1
    absorptions = -(-further // ABSORB)
    return 2 + 2 * further - absorptions, 2 + 2 * (1 + absorptions)


def measure(world: World, given: argparse.Namespace) -> dict:
    crops, rows, k = given.crops, given.batch // world.size, given.prototypes
    generator = torch.Generator(world.device).manual_seed(world.rank)
    # cosines in 256 dimensions have a standard deviation of 1/16
    scores = torch.randn(crops, rows, k, generator=generator, device=world.device) / 16
    other, floats = torch.empty_like(scores), torch.zeros(crops * k, device=world.device)

    def exchange() -> None:
        dist.all_reduce(floats, dist.ReduceOp.MAX)
        for _ in range(given.iterations):
            dist.all_reduce(floats)

    out: dict[str, Iterable[Tensor]] = {}
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: out.update(ours=sinkhorn([scores], given.epsilon, given.iterations, world)[0]),
        "read": lambda: scores.sum(),
        "copy": lambda: other.copy_(scores),
        "exchange": exchange,
        "textbook": lambda: out.update(
            textbook=[textbook_sinkhorn(s, given.epsilon, given.iterations, world) for s in scores]
        ),
    }
    times: dict[str, list[float]] = {n: [] for n in works}
    for turn in range(given.rounds + 1):  # the first warms up
        for name, work in works.items():
            out.pop(name, None)
            times[name] += [seconds(work, world)] * bool(turn)
    apart = torch.stack([(a - b).abs().max() for a, b in zip(out["ours"], out["textbook"])]).max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    return {"times": times, "apart": apart.item(), "bytes": scores.numel() * 4, "where": where(world.device)}


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    if args.ranks < 1 or args.batch % args.ranks:
        ranks = max(1, args.ranks)
        near = max(1, args.batch // ranks) * ranks
        raise UserError(Problem("--batch", args.batch, f"must divide evenly among {args.ranks} ranks", (near,)))
    got = run_ranks(measure, args, ranks=args.ranks, device=args.device)
    times, mib = got["times"], got["bytes"] / 2**20
    reads, copies = passes(args.iterations)
    moves = [reads * r + copies * c for r, c in zip(times["read"], times["copy"])]
    bounds = [m + e for m, e in zip(moves, times["exchange"])]
    mid = {n: statistics.median(t) for n, t in times.items()} | {
        "bound": statistics.median(bounds),
        "moves": statistics.median(moves),
    }
    against_bound = statistics.median(o / b for o, b in zip(times["ours"], bounds))
    against_textbook = statistics.median(t / o for o, t in zip(times["ours"], times["textbook"]))
    gb = args.ranks * got["bytes"] / 1e9
    if args.json:
        return to_json({
            "batch": args.batch, "prototypes": args.prototypes, "iterations": args.iterations, "crops": args.crops,
            "ranks": args.ranks, "where": got["where"], "seconds": mid, "ours_to_bound": against_bound,
            "textbook_to_ours": against_textbook, "differ": got["apart"],
        }, indent=1)  # fmt: skip
    return "\n".join([
        (
            f"B = {args.batch:,}, K = {args.prototypes:,}, {args.iterations} iterations, {args.crops} crops, "
            f"{args.ranks} ranks, {got['where']}"
        ),
        f"its bytes: {reads} passes that read the scores ({mib:.1f} MiB a rank) and {copies} that read and write them: "
        f"{(reads + 2 * copies) * gb:.1f} GB on all ranks",
        (
            f"memory speed of all ranks at once: {gb / mid['read']:.1f} GB/s reading (sum), "
            f"{2 * gb / mid['copy']:.1f} GB/s reading and writing (copy_)"
        ),
        f"ours      {mid['ours']:8.3f} s",
        (
            f"bound     {mid['bound']:8.3f} s   {mid['moves']:.3f} s to move its bytes, {mid['exchange']:.3f} s "
            f"for {args.iterations + 1} all-reduces of {args.crops * args.prototypes:,} floats"
        ),
        f"textbook  {mid['textbook']:8.3f} s   codes differ by at most {got['apart']:.1e}",
        (
            f"ours / bound: {against_bound:.2f}; textbook / ours: {against_textbook:.2f} (medians of {args.rounds} "
            "interleaved rounds)"
        ),
    ])  # fmt: skip
