"""One LARS update of sharded parameters: norms exchanged stacked, in one all-reduce, against a loop over tensors.

Ours is the engine's own code: norms of all shards, one all-reduce of all squares, one fused update, no host
synchronisation. The loop is apex's LARC (clip off, as VISSL used it) where weights are sharded: for each tensor two
norms, an all-reduce of each square, a branch on the host, then torch.optim.SGD. Vectors are whole on every rank, as
the engine fsdp keeps them, and need no exchange in either.

A rank holds what one of `--as-if` ranks would of the recipe's real shapes, so that the largest recipes fit a laptop;
the norms are those of what the ranks measured hold together. Both start from the same values, and must end at the same.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.bench.ranks import run_ranks, seconds, where
from seer_scale.config import Config, Optim, load_recipe, resolve
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json
from seer_scale.methods.registry import build_method
from seer_scale.optim.optimizers import LARS_EPS, build_optimizer
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.shard import Shard

OPTIM = Optim(name="lars", momentum=0.9, weight_decay=1e-5, trust_coefficient=0.001)
LR = 9.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="seer_regnety_256gf", help="its parameter shapes are used")
    parser.add_argument("--ranks", type=int, default=2, help="processes that exchange norms")
    parser.add_argument("--as-if", type=int, default=512, help="number of ranks over which the matrices are sharded")
    parser.add_argument("--rounds", type=int, default=7, help="timed updates, alternating ours and the loop's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def shapes_of(recipe: str) -> dict[str, torch.Size]:
    config: Config = resolve(load_recipe(recipe), {"data": {"path": "-"}})
    return {n: p.shape for n, p in build_method(config, World()).named_parameters()}


def held(shape: torch.Size, rank: int, as_if: int) -> torch.Size:
    """What fsdp gives this rank of a tensor: a vector whole, of a matrix the rank's run of rows."""
    if len(shape) < 2:
        return shape
    rows = -(-shape[0] // as_if)
    return torch.Size([max(0, min(shape[0] - rank * rows, rows)), *shape[1:]])


class Stacked(Engine):
    """The engine's norms and update, of pieces that belong to no model."""

    def __init__(self, pieces: dict[str, Tensor], vectors: set[str], world: World):
        self.world, self.vectors = world, vectors
        self.shards = {n: Shard.of(p) for n, p in pieces.items()}
        self._spread = torch.tensor([float(self._is_spread(n)) for n in pieces], device=world.device)
        self.optimizer = build_optimizer(pieces, vectors, OPTIM)

    def _shard_group(self) -> tuple[dist.ProcessGroup | None, int]:
        return dist.group.WORLD, self.world.rank

    def _is_spread(self, name: str) -> bool:
        return name not in self.vectors

    @torch.no_grad()
    def step(self, grads: list[Tensor]) -> None:
        norms, found_inf = self._norms(grads, torch.zeros((), device=self.world.device))
        self.optimizer.update(grads, LR, norms, found_inf)


class Loop:
    """apex's LARC.step over sharded tensors."""

    def __init__(self, pieces: dict[str, Tensor], vectors: set[str]):
        self.params = [torch.nn.Parameter(p) for p in pieces.values()]
        self.spread = [n not in vectors for n in pieces]
        self.sgd = torch.optim.SGD(self.params, lr=LR, momentum=OPTIM.momentum)

    @torch.no_grad()
    def step(self, grads: list[Tensor]) -> None:
        for p, g, spread in zip(self.params, grads, self.spread):
            p.grad = g
            p_norm, g_norm = (self.norm(t, spread) for t in (p, g))
            if p_norm != 0 and g_norm != 0:
                g.add_(p, alpha=OPTIM.weight_decay)
                g.mul_(OPTIM.trust_coefficient * p_norm / (g_norm + OPTIM.weight_decay * p_norm + LARS_EPS))
        self.sgd.step()

    def norm(self, t: Tensor, spread: bool) -> float:
        square = t.norm() ** 2
        if spread:
            dist.all_reduce(square)
        return square.sqrt().item()


def measure(world: World, given: dict) -> dict:
    shapes, rounds = given["shapes"], given["rounds"]
    vectors = {n for n, s in shapes.items() if len(s) < 2}

    def values(scale: float) -> dict[str, Tensor]:
        out = {}
        for i, (n, s) in enumerate(shapes.items()):  # vectors are the same on all ranks
            generator = torch.Generator().manual_seed(i + (0 if n in vectors else len(shapes) * (world.rank + 1)))
            out[n] = scale * torch.randn(held(s, world.rank, given["as_if"]), generator=generator).to(world.device)
        return out

    start, grads = values(0.02), list(values(1e-3).values())
    grads[0].zero_()  # the rule for a norm of zero
    ours = Stacked({n: p.clone() for n, p in start.items()}, vectors, world)
    loop = Loop({n: p.clone() for n, p in start.items()}, vectors)
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    for turn in range(rounds + 1):  # the first warms up
        for name, step in (("ours", ours.step), ("loop", loop.step)):
            fresh = [g.clone() for g in grads]  # an update writes over its gradients
            times[name] += [seconds(partial(step, fresh), world)] * bool(turn)
    moved = [(p.detach() - s).abs().max() for p, s in zip(loop.params, start.values()) if p.numel()]
    apart = [(p.detach() - s.local).abs().max() for p, s in zip(loop.params, ours.shards.values()) if p.numel()]
    worst = torch.stack([torch.stack(apart).max(), torch.stack(moved).max()])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    elements = sum(p.numel() for p in start.values())
    return {
        "times": times,
        "apart": worst[0].item(),
        "moved": worst[1].item(),
        "elements": elements,
        "where": where(world.device),
    }


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    if args.as_if < args.ranks:
        raise UserError(Problem("--as-if", args.as_if, f"{args.ranks} ranks are measured", (args.ranks,)))
    shapes = shapes_of(args.recipe)
    given = {"shapes": shapes, "rounds": args.rounds, "as_if": args.as_if}
    got = run_ranks(measure, given, ranks=args.ranks, device=args.device)
    matrices = sum(len(s) > 1 for s in shapes.values())
    total = sum(s.numel() for s in shapes.values())
    ours, loop = (statistics.median(got["times"][n]) for n in ("ours", "loop"))
    ratio = statistics.median(b / a for a, b in zip(*got["times"].values()))
    if not got["apart"] <= 1e-4 * got["moved"]:
        raise AssertionError(f"the updates differ by {got['apart']:.1e}; parameters moved by {got['moved']:.1e}")
    if args.json:
        return to_json({
            "recipe": args.recipe, "ranks": args.ranks, "as_if": args.as_if, "where": got["where"],
            "elements": got["elements"], "seconds": {"ours": ours, "per_tensor_loop": loop}, "speed": ratio,
            "differ": got["apart"], "moved": got["moved"],
        }, indent=1)  # fmt: skip
    return "\n".join([
        (
            f"{args.recipe}: {total / 1e6:,.0f}M parameters in {len(shapes)} tensors ({matrices} matrices), "
            f"{args.ranks} ranks, {got['where']}"
        ),
        (
            f"each rank holds {got['elements'] / 1e6:.2f}M elements, as if one of {args.as_if} (matrices by rows, "
            "vectors whole)"
        ),
        (
            f"one stacked norm exchange  {1e3 * ours:9.2f} ms   1 all-reduce of {2 * len(shapes) + 1:,} numbers, 0 "
            "host synchronisations"
        ),
        (
            f"a per-tensor loop          {1e3 * loop:9.2f} ms   {2 * matrices:,} all-reduces of one number, "
            f"{2 * len(shapes):,} host synchronisations"
        ),
        f"ours: {ratio:.2f} times the speed (median of {args.rounds} interleaved rounds)",
        (
            f"same parameters after {args.rounds + 1} updates: they moved by up to {got['moved']:.2e} and differ "
            f"by at most {got['apart']:.1e}"
        ),
    ])  # fmt: skip
