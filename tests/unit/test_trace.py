"""The traced update of one rank of many: what it lets through, what it refuses, and that ranks agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.config import Config, resolve
from seer_scale.distributed import World
from seer_scale.errors import UserError
from seer_scale.methods.base import LossOutput, Method
from seer_scale.plan import proof
from seer_scale.plan.trace import Trace, trace
from tests.tiny import RECIPE, sections
from tests.toy import SIZE, Toy, make

NUM = 512
RANKS = (0, 1, 7, 8, 511)
"""The first node's first two and last, the second's first, and the last of all."""


def tiny(**overrides: Any) -> Config:
    given = {"train.global_batch": 2 * NUM, "train.total_samples": 8 * NUM, "parallel.sync_bn_group": 64}
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

    config = toy_config(**{"parallel.engine": "fsdp", "train.precision": precision})
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


FAULTS: dict[str, tuple[Callable[[Tensor, World], Tensor], str]] = {
    "item": (lambda loss, world: loss * loss.item(), r"item\(\), but makes the host wait"),
    "tolist": (lambda loss, world: loss * loss.expand(2).tolist()[0], r"item\(\), but makes the host wait"),
    "float": (lambda loss, world: loss * float(loss.detach()), r"item\(\), but makes the host wait"),
    "bool": (lambda loss, world: loss if loss > 0 else -loss, r"item\(\), but makes the host wait"),
    "mask": (lambda loss, world: loss.view(1)[loss.view(1) > 0].sum(), "nonzero|index"),
    "cpu": (lambda loss, world: loss + 0 * loss.detach().cpu().to(loss.device), "makes the host wait"),
    "from the host": (lambda loss, world: loss * torch.tensor([1.0, 2.0], device=loss.device).sum(), "from the host"),
    "left on the host": (lambda loss, world: loss * torch.ones(2), "two devices"),
    "half": (halved, "sums over ranks in bfloat16"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_that_names_its_line(name):
    fault, says = FAULTS[name]
    with pytest.raises(UserError, match=says) as caught:
        faulty(fault)
    line = fault.__code__.co_firstlineno
    (problem,) = caught.value.problems
    assert problem.key in (f"{__file__}:{line}", f"{__file__}:{line + 1}")
    assert "\n" not in str(problem)


def test_without_a_fault_it_passes():
    faulty(lambda loss, world: loss * 2, 0, NUM - 1)


@pytest.mark.parametrize("fault", [alone, turned])
def test_a_collective_that_one_rank_lacks_or_has_out_of_order(fault):
    with pytest.raises(UserError, match=r"differ between ranks: the \d+th of rank 0 is all-reduce") as caught:
        faulty(fault, 0, NUM - 1)
    assert "test_trace.py" in str(caught.value)
