"""The order in which a method becomes what an engine calls: each step after those it builds on."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from seer_scale.config import resolve
from seer_scale.distributed import World
from seer_scale.methods.registry import build_method
from seer_scale.parallel import parallelize as module
from tests.tiny import RECIPE


def test_compile_recompute_shard_materialise_wrap(monkeypatch):
    calls = []

    def noted(name, real):
        def call(*args, **options):
            calls.append(name)
            return real(*args, **options)

        return call

    for name in ("compile_units", "apply_activation_checkpointing", "compute_small_maps_in_fp32", "Buffers"):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))

    class Wrapping:
        averages = {}

        def shard_on_meta(self, method):
            assert all(p.is_meta for p in method.parameters())
            calls.append("shard")
            return method

        def materialise(self):
            calls.append("materialise")
            method.to_empty(device="cpu")

        def wrap_materialised(self, module):
            assert not any(p.is_meta for p in module.parameters())
            calls.append("wrap")
            return torch.nn.Sequential(module)

        def recomputing(self, units):
            return nullcontext()

    changes = {"train": {"compile": True, "precision": "bf16"}, "parallel": {"activation_checkpoint": "every 1"}}
    config = resolve(RECIPE, changes, world_size=1)
    method = build_method(config, World())
    made, _ = module.parallelize(method, config, World(), Wrapping())
    assert calls == [
        "compile_units", "apply_activation_checkpointing", "shard", "compute_small_maps_in_fp32", "materialise",
        "Buffers", "wrap",
    ]  # fmt: skip
    assert isinstance(made, torch.nn.Sequential) and made[0] is method
