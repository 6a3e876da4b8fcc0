"""What of the engines' libraries a trace cannot run as it is: torch's DDP, whose reducer is C++ that reads addresses.

FSDP2, DeepSpeed and fairscale run as they are, but for loops of ZeRO's stage 3 over all ranks' pieces, and fairscale's
wait for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seer_scale.config import Config
from seer_scale.distributed import World
from seer_scale.parallel import ENGINES, load
from seer_scale.parallel.ddp import DDP
from seer_scale.parallel.engine import Engine

DDP_FIRST_BUCKET, DDP_BUCKET = 2**20, 25 * 2**20
"""Bytes of gradients that torch's reducer averages together (c10d::kDefaultFirstBucketBytes, bucket_cap_mb)."""


def engine_class(config: Config, world: World) -> type[Engine]:
    """Of a recipe that names its engine."""
    name = "single" if world.size == 1 and not config.parallel.offload else config.parallel.engine
    if name == "ddp":
        return BucketedDDP
    module, cls = ENGINES[name]
    return getattr(load(module), cls)


class BucketedDDP(DDP):
    """DDP with a reducer in Python: gradients are views of buckets, which are averaged beside backward as they fill.

    As torch's with gradient_as_bucket_view after its first update: buckets in the order in which gradients come, which
    is about the reverse of the forward's.
    """

    def wrap_materialised(self, module: nn.Module) -> nn.Module:
        trained = [p for p in module.parameters() if p.requires_grad]
        self._is_last, self._buckets = True, list(_filled(reversed(trained)))
        self._left = [0] * len(self._buckets)
        device = self.world.device
        self._beside = torch.get_device_module(device).Stream() if device.type != "cpu" else None
        for number, params in enumerate(self._buckets):
            flat = torch.empty(sum(p.numel() for p in params), device=device)
            for p, view in zip(params, flat.split([p.numel() for p in params])):
                p.register_post_accumulate_grad_hook(self._hook(number, flat, view.view_as(p)))
        return module

    def _hook(self, number: int, flat: Tensor, view: Tensor) -> Any:
        @torch.no_grad()
        def reduce(p: Tensor) -> None:
            if not self._is_last or p.grad is None:
                return
            torch.mul(p.grad, 1 / self.world.size, out=view)
            p.grad = view
            self._left[number] -= 1
            if not self._left[number]:
                with self._on_stream():
                    dist.all_reduce(flat)

        return reduce

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._beside is None:
            yield
            return
        streams = torch.get_device_module(self.world.device)
        self._beside.wait_stream(streams.current_stream())
        with streams.stream(self._beside):
            yield

    def _accumulating(self, last: bool) -> AbstractContextManager:
        self._is_last = last
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._left = [len(params) for params in self._buckets]
        super()._backward(loss)
        if self._beside is not None:
            torch.get_device_module(self.world.device).current_stream().wait_stream(self._beside)


def _filled(params: Iterator[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Buckets of parameters, each closed as it reaches its size."""
    bucket: list[nn.Parameter] = []
    size, limit = 0, DDP_FIRST_BUCKET
    for p in params:
        bucket.append(p)
        size += p.numel() * p.itemsize
        if size >= limit:
            yield bucket
            bucket, size, limit = [], 0, DDP_BUCKET
    if bucket:
        yield bucket


def on_many_gpus(engine: type[Engine]) -> AbstractContextManager[None]:
    """Around an engine's updates: its library waits where it would for CUDA, and what it does for each rank's piece of
    a parameter is done for all of them at once."""
    if engine.name == "zero3":
        from seer_scale.parallel.deepspeed import private

        return private.pieces_at_once()
    if engine.name == "fairscale":
        from seer_scale.parallel import fairscale

        return fairscale.broadcasting(_waiting_first)
    return nullcontext()


def _waiting_first(broadcast: Callable[[Any], None]) -> Callable[[Any], None]:
    """fairscale waits for CUDA before it broadcasts, and for no other device."""

    def waiting(oss: Any) -> None:
        device = oss.param_groups[0]["params"][0].device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        broadcast(oss)

    return waiting


@contextmanager
def already_there() -> Iterator[None]:
    """Libraries that move a module to its device, where it is, do not: a tensor without values cannot be swapped."""
    with mock.patch.object(nn.Module, "to", lambda self, *_, **__: self):
        yield
