"""How long training stands still for a checkpoint: written in the background, against a save that waits for the disk.

Both write the same state, in turn, to the same folder: the blocking one is `store.save` of the state itself, ours is
what the trainer does (copy, then a thread writes). Between them a small step of matrix products goes on, alone and
beside the thread, for what the writing costs those who do not wait.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from seer_scale.checkpoint import store
from seer_scale.checkpoint.saver import Saver
from seer_scale.distributed import World
from seer_scale.errors import Problem, UserError
from seer_scale.files import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state (default: %(default)s)")
    parser.add_argument(
        "--tensors", type=int, default=400, help="number of tensors it has, half of them large (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="rounds, of which medians are printed (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        default="",
        help="where to write, such as a file system of the cluster (default: the temporary folder)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def state_of(gib: float, tensors: int) -> store.State:
    """Half of the tensors hold nearly everything, as convolutions do beside vectors."""
    large = max(1, tensors // 2)
    rows = max(1, round(gib * 2**30 / 4 / 1024 / large))
    return {f"model/{i}": torch.randn(rows, 1024) if i < large else torch.randn(256) for i in range(tensors)}


def measure(folder: Path, state: store.State, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round: what blocks, what stalls, how long the thread writes, a step alone and beside it."""
    world = World()
    out: dict[str, list[float]] = {k: [] for k in ("blocking", "stall", "background", "step", "step_beside")}
    saver = Saver(folder / "background", state, world, keep_last=1, keep_every_samples=0)
    a = torch.randn(512, 512)

    def step() -> float:
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        return time.perf_counter() - begin

    for i in range(rounds + 1):  # the first is a warm-up
        meta = {"samples_seen": i}
        begin = time.perf_counter()
        store.save(folder / "blocking", state, meta, world)
        blocking = time.perf_counter() - begin
        store.prune(folder / "blocking", 1, 0, world)
        alone = [step() for _ in range(20)]
        begin = time.perf_counter()
        saver.begin(state, meta)
        stall, beside = time.perf_counter() - begin, []
        while (saved := saver.ended()) is None:
            beside.append(step())
        if saved.problem:
            raise UserError(saved.problem)
        if i:
            for key, value in zip(
                out, (blocking, stall, saved.seconds, statistics.median(alone), statistics.median(beside or alone))
            ):
                out[key].append(value)
    return out


def run(args: argparse.Namespace) -> str:
    """Measure; returns the lines to print. Raises UserError."""
    if args.gib <= 0:
        raise UserError(Problem("--gib", args.gib, "must be above 0", (1,)))
    for option, number in (("--rounds", args.rounds), ("--tensors", args.tensors)):
        if number < 1:
            raise UserError(Problem(option, number, "must be at least 1", (1,)))
    torch.manual_seed(0)
    state = state_of(args.gib, args.tensors)
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        found = measure(Path(folder), state, args.rounds)
    middle = {k: statistics.median(v) for k, v in found.items()}
    share = statistics.median(s / b for s, b in zip(found["stall"], found["blocking"]))
    slower = statistics.median(b / a for a, b in zip(found["step"], found["step_beside"]))
    gib = sum(t.nbytes for t in state.values()) / 2**30
    if args.json:
        return to_json(
            {"gib": gib, "seconds": middle, "stall_of_blocking": share, "step_beside_of_alone": slower}, indent=1
        )
    return "\n".join([
        (
            f"{gib:.2f} GiB in {len(state)} tensors, written to {args.folder or tempfile.gettempdir()}; medians of "
            f"{args.rounds} rounds"
        ),
        f"blocking save        {middle['blocking']:8.3f} s",
        f"stall of ours        {middle['stall']:8.3f} s   {share:.3f} of the blocking save",
        (
            f"written meanwhile in {middle['background']:8.3f} s   with {gib:.2f} GiB of copies; a step takes "
            f"{slower:.2f} times as long beside it"
        ),
    ])  # fmt: skip
