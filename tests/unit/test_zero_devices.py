"""DeepSpeed works on the device the run has: not on CUDA because there is some, nor on the GPU of LOCAL_RANK's
number."""

from __future__ import annotations

import os
from importlib import import_module
from types import SimpleNamespace

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils

from seer_scale.distributed import World
from seer_scale.parallel.deepspeed.private import accelerator_for
from tests.tiny import losses_of, tiny


def test_a_task_that_sees_one_gpu_works_on_that_one(monkeypatch):
    """Local rank 5 on cuda:0: what DeepSpeed's engine, its initialisation of weights and its own exchanges take."""
    taken, before = [], get_accelerator()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(torch.device(device)))
    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(deepspeed.comm, name, lambda *_: 8)
    monkeypatch.setenv("LOCAL_RANK", "5")
    set_accelerator(accelerator_for(torch.device("cuda", 0)))
    try:
        engine = SimpleNamespace(local_rank=5)
        DeepSpeedEngine._set_distributed_vars(engine, None)
        assert engine.device == torch.device("cuda", 0) and taken == [torch.device("cuda", 0)]
        assert utils.get_accelerator().device_name(os.environ["LOCAL_RANK"]) == "cuda:0"
        get_accelerator().set_device(torch.device("cuda", 5))
        assert set(taken) == {torch.device("cuda", 0)} and get_accelerator().device_name() == "cuda"
    finally:
        set_accelerator(before)


def test_a_run_on_the_cpu_of_a_machine_with_gpus_stays_there():
    """DeepSpeed has taken CUDA before, as it does by itself where there is some."""
    before = get_accelerator()
    set_accelerator(CUDA_Accelerator())
    try:
        config, engine = tiny(
            World(), **{"parallel.engine": "zero2", "parallel.offload": True, "parallel.device": "cpu"}
        )
        assert import_module("deepspeed.comm.torch").build_shm_op() is None  # nothing is compiled
        assert engine.name == "zero2" and np.isfinite(losses_of(engine, config, World(), range(2), 0.02)).all()
        engine.close()
    finally:
        set_accelerator(before)
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None
