"""The traced update of one rank of many: what it lets through, what it refuses, and that ranks agree."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple
from functools import wraps
from inspect import unwrap
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from seer_scale.config import Config, load_recipe, recipe_names, resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.methods.base import LossOutput, Method
from seer_scale.plan import proof
from seer_scale.plan import trace as trace_module
from seer_scale.plan.trace import Trace, trace
from seer_scale.training.probe import Probe
from tests.tiny import DINOV2, RECIPE, sections
from tests.toy import SIZE, Toy, make

NUM = 512
RANKS = (0, 1, 7, 8, 511)
"""The first node's first two and last, the second's first, and the last of all."""


def tiny(**overrides: Any) -> Config:
    given = {
        "train.global_batch": 2 * NUM,
        "train.total_samples": 8 * NUM,
        "parallel.sync_bn_group": 64,
    }
    return resolve(RECIPE, sections(given | overrides), world_size=NUM)


def made(kind: str) -> Callable[[Config, World], Method]:
    def method(config: Config, world: World) -> Method:
        with torch.device("meta"):
            return make(kind, world)

    return method


def toy_config(**overrides: Any) -> Config:
    return tiny(**{"views.crops": [{"num": 2, "size": SIZE}], "parallel.sync_bn_group": 0} | overrides)


# ------------------------------------------------------------------------------------------------ what it refuses


class Faulty(Toy):
    """A method that does one thing more to its loss."""

    def __init__(self, world: World, fault: Callable[[Tensor, World], Tensor]):
        super().__init__("vit")
        self.world, self.fault = world, fault

    def loss(self, views: list[Tensor], **kwargs: Any) -> LossOutput:  # type: ignore[override]
        out = super().loss(views, **kwargs)
        return out._replace(loss=self.fault(out.loss, self.world))


def faulty(fault: Callable[[Tensor, World], Tensor], *ranks: int, precision: str = "bf16") -> list[Trace]:
    def method(config: Config, world: World) -> Method:
        with torch.device("meta"):
            return Faulty(world, fault)

    config = toy_config(**{"parallel.engine": "ddp", "train.precision": precision})
    traces = [trace(config, NUM, rank=rank, method=method) for rank in ranks or (0,)]
    proof.check(traces)
    return traces


def halved(loss: Tensor, world: World) -> Tensor:
    dist.all_reduce(loss.detach().bfloat16())
    return loss


def alone(loss: Tensor, world: World) -> Tensor:
    return loss + world.sum_(loss.detach().clone()) if world.rank == 0 else loss


def turned(loss: Tensor, world: World) -> Tensor:
    for size in (3, 5) if world.rank < NUM - 1 else (5, 3):
        dist.all_reduce(loss.new_zeros(size))
    return loss


def otherwise(loss: Tensor, world: World) -> Tensor:
    dist.all_reduce(loss.detach().clone(), dist.ReduceOp.SUM if world.rank else dist.ReduceOp.MAX)
    return loss


def from_itself(loss: Tensor, world: World) -> Tensor:
    dist.broadcast(loss.detach().clone(), src=world.rank)
    return loss


def beside(does: Callable[[Tensor], Any]) -> Callable[[Tensor, World], Tensor]:
    """A fault that leaves the loss as it is."""

    @wraps(does)
    def fault(loss: Tensor, world: World) -> Tensor:
        does(loss.detach().expand(2, 2).contiguous())
        return loss

    return fault


FAULTS: dict[str, tuple[Callable[[Tensor, World], Tensor], str]] = {
    "item": (lambda loss, world: loss * loss.item(), r"item\(\), but makes the host wait"),
    "bool": (lambda loss, world: loss if loss > 0 else -loss, r"item\(\), but makes the host wait"),
    "mask": (lambda loss, world: loss.view(1)[loss.view(1) > 0].sum(), "nonzero|index"),
    "cpu": (lambda loss, world: loss + 0 * loss.detach().cpu(), "makes the host wait"),
    "from the host": (lambda loss, world: loss * torch.tensor([1.0, 2.0], device=loss.device).sum(), "from the host"),
    "left on the host": (lambda loss, world: loss * torch.ones(2), "two devices"),
    "half": (halved, "sums over ranks in bfloat16"),
} | {
    name: (beside(does), says)
    for name, (does, says) in {
        "a number": (lambda x: torch.tensor(2.0, device=x.device), r"\(copy from the host\); .*torch.full"),
        "format": (lambda x: f"{x[0, 0]:.2f}", r"item\(\), but makes the host wait"),
        "print": (lambda x: f"{x}", "a tensor as text"),
        "numpy": (lambda x: x.cpu().numpy(), r"numpy\(\), but asks for values"),
        "cuda": (lambda x: torch.cuda.synchronize(), r"wait for the device .*\(synchronize\)"),
        "accelerator": (lambda x: torch.accelerator.synchronize(), r"wait for the device .*\(synchronize\)"),
        "stream": (lambda x: torch.accelerator.current_stream().synchronize(), r"\(Stream.synchronize\)"),
        "event": (lambda x: torch.Event(device=x.device).synchronize(), r"\(Event.synchronize\)"),
        "eigh": (lambda x: torch.linalg.eigh(x), r"torch.linalg.eigh, whose outcome is read"),
        "inv": (lambda x: torch.linalg.inv(x), r"torch.linalg, whose outcome is read"),
        "inv_ex": (lambda x: torch.linalg.inv_ex(x, check_errors=True), r"torch.linalg.inv_ex, whose outcome is read"),
        "multinomial": (lambda x: torch.multinomial(x, 1), r"torch.multinomial, whose outcome is read"),
        "host sum": (lambda x: dist.all_reduce(torch.ones(3)), "wait for other ranks .* on the host.*on the device"),
        "barrier": (lambda x: dist.barrier(), r"wait for other ranks .*\(barrier\)"),
        "objects": (lambda x: dist.all_gather_object([None] * NUM, 1), "dist.all_gather_object, but pickles"),
        "send": (lambda x: dist.send(x, 1), r"a single rank \(send\)"),
        "functional": (lambda x: functional.all_reduce(x, "sum", dist.group.WORLD), "a functional collective"),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_that_names_its_line(name):
    fault, says = FAULTS[name]
    with pytest.raises(UserError, match=says) as caught:
        faulty(fault)
    line = unwrap(fault).__code__.co_firstlineno
    (problem,) = caught.value.problems
    assert problem.key in (f"{__file__}:{line}", f"{__file__}:{line + 1}")
    assert "\n" not in str(problem)


def test_a_trace_leaves_no_mark_on_later_errors():
    before = sys.excepthook
    tried = faulty(lambda loss, world: loss)
    assert tried and sys.excepthook is before


def test_without_a_fault_it_passes():
    """Nor does what only looks like one."""

    def like(x: Tensor) -> None:
        torch.full((), 2.0, device=x.device)
        torch.linalg.inv_ex(x)
        torch.multinomial(x, 3, True)
        dist.all_reduce(x.half(), dist.ReduceOp.MAX)

    faulty(beside(like), 0, NUM - 1)


@pytest.mark.parametrize("fault", [alone, turned, otherwise, from_itself])
def test_a_collective_that_differs_between_ranks(fault):
    with pytest.raises(UserError, match=r"differ between ranks: the \d+th of rank 0 is (all-reduce|broad)") as caught:
        faulty(fault, 0, NUM - 1)
    assert "test_trace.py" in str(caught.value)


# ------------------------------------------------------------------------------------------------ what passes

METHODS = ("swav", "classifier", "teacher", "autoencoder")
PRECISIONS = ("fp32", "fp16", "bf16")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "hsdp": {"parallel.engine": "fsdp", "parallel.replicate_degree": 64},
    "zero1": {},
    "zero2": {},
    "fairscale": {},
    "zero3": {},
}
CASES = [
    (engine, precision, METHODS[(i + j + 3) % 4], (0, NUM - 1) if j == i % 3 else (NUM - 1,))
    for i, engine in enumerate(ENGINES)
    for j, precision in enumerate(PRECISIONS)
]
"""Each engine in each precision, with one of the methods, and in one of them as two ranks; the product is `long`."""


def checked(engine: str, precision: str, kind: str, ranks: tuple[int, ...], **more: Any) -> list[Trace]:
    over = {"parallel.engine": engine, "train.precision": precision} | ENGINES[engine] | more
    config = tiny(**over) if kind == "swav" else toy_config(**over)
    traces = [
        trace(config, NUM, rank=rank) if kind == "swav" else trace(config, NUM, rank=rank, method=made(kind))
        for rank in ranks
    ]
    proof.check(traces)
    return traces


WAITING = dict.fromkeys(("zero1", "zero2", "zero3"), "/deepspeed/runtime/") | {"fairscale": "/fairscale/optim/oss.py"}
"""Engines whose libraries wait by themselves, and where."""


@pytest.mark.parametrize("engine,precision,kind,ranks", CASES)
def test_no_wait_and_one_sequence_on_all_ranks(engine, precision, kind, ranks):
    (found, *_) = checked(engine, precision, kind, ranks)
    assert found.collectives
    assert bool(found.syncs) == (engine in WAITING)
    assert all(WAITING[engine] in sync.where for sync in found.syncs)
    kinds = {held.kind for held, _ in found.changes}
    assert "parameters" in kinds and (precision != "fp32" or "half-precision weights" not in kinds)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", METHODS)
def test_every_engine_precision_and_method(engine, precision, kind):
    checked(engine, precision, kind, RANKS)


class Probing:
    """A loss beside which a probe learns."""

    world: World | None = None

    def __call__(self, loss: Tensor, world: World) -> Tensor:
        if self.world is not world:
            self.world, self.probe = world, Probe(0.1, ["a", "b"], 4, None, world)  # type: ignore[arg-type]
        features, labels = loss.detach().expand(3, 4), torch.zeros(3, dtype=torch.int64, device=loss.device)
        self.probe.update(features, labels)
        return loss


def test_a_probe_is_one_all_reduce_more_and_no_wait():
    (without,), (found, _) = faulty(lambda loss, world: loss), faulty(Probing(), 0, NUM - 1)
    assert len(found.collectives) == len(without.collectives) + 1


def test_a_backbone_of_timm():
    """zero2 asks where in memory its pieces are, which tensors without values need not warn of."""
    pytest.importorskip("timm")
    given = {"model": {"name": "timm/resnet18"}, "train": {"global_batch": 2 * NUM, "total_samples": 8 * NUM}}
    config = resolve(RECIPE | given, {"parallel": {"engine": "zero2"}}, world_size=NUM)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Accessing the data pointer")
        proof.check([trace(config, NUM, rank=NUM - 1)])


@pytest.mark.parametrize("engine,copies", [("fsdp", 4), ("zero2", 1)])
def test_dinov2_with_its_teacher_and_masks(engine, copies):
    """Masks leave without a wait; a copy of the teacher is held by as many ranks as one of the student."""
    num = 4
    over = sections({"parallel.engine": engine, "train.precision": "bf16"})
    config = resolve(DINOV2, over, world_size=num)
    traces = [trace(config, num, rank=rank) for rank in (0, num - 1)]
    proof.check(traces)
    whole = 4 * sum(shape.numel() for name, shape in traces[0].shapes.items() if name.startswith("teacher"))
    held = sum(held.nbytes for held, comes in traces[0].changes if comes and held.kind == "moving averages")
    assert whole / copies <= held < 1.4 * whole / copies


@pytest.mark.parametrize("precision,kernel", [("bf16", "flash"), ("fp32", "efficient")])
def test_attention_is_cuda_s_kernel_a_resolution(precision, kernel):
    model = {"name": "vit", "width": 32, "depth": 3, "heads": 4, "patch": 8}
    given = {"model": model, "train": {"global_batch": 2 * NUM, "total_samples": 8 * NUM, "precision": precision}}
    found = trace(resolve(RECIPE | given, {"parallel": {"engine": "fsdp"}}, world_size=NUM), NUM)
    for end in ("", "_backward"):
        flops = [op.flops for op in found.ops if op.name == f"_scaled_dot_product_{kernel}_attention{end}"]
        assert len(flops) == 3 * 2 and all(flops)
    assert not [op for op in found.ops if op.name == "_safe_softmax"]


def test_zero3_s_pieces_at_once_are_what_deepspeed_does_a_piece_at_a_time(monkeypatch):
    num = 6  # which no shape is a multiple of
    given = {"parallel.engine": "zero3", "train.precision": "bf16", "parallel.sync_bn_group": 3}
    config = resolve(RECIPE, sections(given | {"train.global_batch": num}), world_size=num)
    shorter = trace(config, num, rank=num - 1)
    monkeypatch.setattr(trace_module, "on_many_gpus", lambda engine: nullcontext())
    whole = trace(config, num, rank=num - 1)
    assert shorter.steps == whole.steps
    assert in_order(shorter) == in_order(whole)


def in_order(found: Trace) -> list[tuple]:
    """What is held, from when to when."""
    return sorted(astuple(held) for held, comes in found.changes if comes)


@pytest.mark.parametrize("ranks,over", [
    (RANKS, {"parallel.reshard_after_forward": False, "swav.queue": 2 * NUM, "optim.name": "adamw"}),
    ((0, 511), {"parallel.activation_checkpoint": "every 1", "train.global_batch": 4 * NUM, "train.micro_batch": 2}),
])  # fmt: skip
def test_ranks_of_fsdp_agree_whatever_the_recipe_says(ranks, over):
    traces = checked("fsdp", "bf16", "swav", ranks, **over)
    gathers = [c for c in traces[0].collectives if c.kind == "all-gather" and c.group == "default_pg"]
    matrices = sum(s.numel() for s in traces[0].shapes.values() if len(s) > 1)
    of_units = sum(c.nbytes for c in gathers if c.dtype == torch.bfloat16)
    assert of_units >= 2 * matrices  # once at least, in the compute type, with what fills up the last rank's rows
    sums = {c.dtype for c in traces[0].collectives if c.kind in proof.REDUCTIONS}
    assert sums == {torch.float32}


LARGEST = (
    "seer_regnety_20b", "seer_regnety_40b", "dinov2_regnety_8gf", "dinov2_vitg14", "dinov2_vitl14",
    "dinov2_vitl14_518", "dinov2_vitl16_short",
)  # fmt: skip
"""What `make test` does not trace: the 10B's engine, precision and kind of block, or the small recipes' method, for
longer."""
AS_TWO = ("demo", "cifar_laptop", "photos_laptop", "dinov2_laptop", "seer_regnety_8gf")
"""Recipes of which `make test` traces the first rank, too."""


def trace_recipe(name: str, *ranks: int) -> list[Trace]:
    """`auto` as ddp, which it takes where everything fits; and for one rank as of two, as one has none to agree with.
    ranks: -1 is the last."""
    raw = load_recipe(name) | {"data": {"path": "unused"}}
    parallel = raw["parallel"]
    num = max(2, parallel["ranks"])
    config = resolve(raw, {"parallel": {"engine": parallel.get("engine", "ddp")}}, world_size=num)
    return [trace(config, num, rank=rank % num) for rank in ranks]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in LARGEST])
def test_every_recipe_with_its_own_engine(name):
    proof.check(trace_recipe(name, *((0, -1) if name in AS_TWO else (-1,))))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in AS_TWO])
def test_every_large_recipe_as_two_ranks(name):
    proof.check(trace_recipe(name, 0, -1))
