"""Weights in the layouts of VISSL's files, as its CheckpointWriter and fairscale's FSDP write them."""

from __future__ import annotations

import re

import torch
from torch import nn


class AttrDict(dict):
    """What VISSL's files have beside their weights."""


def vissl(name: str, part: str = "") -> str:
    """A name of ours as VISSL's trunk has it (vissl/models/trunks/regnet.py, classy_vision/models/anynet.py)."""
    if name.startswith("stem."):
        return name.replace("stem.conv", "_feature_blocks.conv1.stem.0").replace(
            "stem.bn", "_feature_blocks.conv1.stem.1"
        )
    s, b, rest = re.fullmatch(r"s(\d)\.b(\d+)\.(.+)", name).groups()
    for mine, theirs in (
        ("conv1.conv", "f.a.0"), ("conv1.bn", "f.a.1"), ("conv2.conv", "f.b.0"), ("conv2.bn", "f.b.1"),
        ("se.fc1", "f.se.excitation.0"), ("se.fc2", "f.se.excitation.2"), ("conv3.conv", "f.c"),
        ("conv3.bn", "f.final_bn"), ("downsample.conv", "proj"), ("downsample.bn", "bn"),
    ):  # fmt: skip
        if rest.startswith(f"{mine}."):
            return f"_feature_blocks.res{int(s) + 1}.{part.format(s)}block{s}-{int(b) - 1}.{rest.replace(mine, theirs)}"
    raise KeyError(name)


def classy(trunk, heads, **more) -> dict:
    """As VISSL's CheckpointWriter leaves it."""
    return {
        "type": "consolidated",
        "phase_idx": 3,
        "config": AttrDict(MODEL=AttrDict(name="regnet"), list=[AttrDict()]),
        "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}, **more}, "optimizer": {}},
    }


def sharded(trunk: dict[str, torch.Tensor], size: int) -> list[dict]:
    """Local state dicts and their metadata of fairscale's FSDP, of `size` ranks: two units, flattened and padded, and a
    buffer each rank has; as FullyShardedDataParallel.local_metadata_dict has it."""
    buffers = {n: t for n, t in trunk.items() if "running" in n or "tracked" in n}
    parameters = {n: t for n, t in trunk.items() if n not in buffers}
    inner = "_feature_blocks.res2"
    units = {
        inner: {n: t for n, t in parameters.items() if n.startswith(f"{inner}.")},
        "": {n: t for n, t in parameters.items() if not n.startswith(f"{inner}.")},
    }
    ranks = [{"model": {"trunk": dict(buffers)}, "meta": {"trunk": {"param_metadata": [], "buffer_names": [*buffers]}}}
             for _ in range(size)]  # fmt: skip
    for path, members in units.items():
        flat = torch.cat([t.flatten() for t in members.values()])
        chunk = -(-len(flat) // size)
        for rank, held in enumerate(ranks):
            run = flat[rank * chunk : (rank + 1) * chunk]
            padding = chunk - len(run)
            held["model"]["trunk"][f"{path}.flat_param_0" if path else "flat_param_0"] = nn.functional.pad(
                run, (0, padding)
            )
            about = {
                "names": [n.removeprefix(f"{path}.") if path else n for n in members],
                "shapes": [t.shape for t in members.values()],
                "numels": [t.numel() for t in members.values()],
                "padding": padding,
            }
            held["meta"]["trunk"]["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": about},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [],
                }
            )
    return [{"classy_state_dict": {"base_model": held}, "type": "shard"} for held in ranks]
