"""Randomness as pure functions of keys, so that nothing random needs to be saved.

Every draw is named by (seed, words...): the same key gives the same numbers on any rank, worker or restart
(DESIGN rule 2). Initial weights are drawn per parameter name, in full, on the CPU: equal for every engine,
rank count and device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, *words: object) -> int:
    """A 128-bit key for (seed, words), stable across processes, machines and Python versions."""
    text = "\x1f".join([str(seed), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def numpy_generator(seed: int, *words: object) -> np.random.Generator:
    """A counter-based generator for one key; costs some 20 microseconds."""
    return np.random.Generator(np.random.Philox(key=key(seed, *words)))


@dataclass(frozen=True)
class Normal:
    """Initialise from N(0, std^2)."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Initialise from U(-bound, bound)."""

    bound: float


@dataclass(frozen=True)
class Constant:
    """Initialise with one value."""

    value: float


@dataclass(frozen=True)
class UnitRows:
    """Initialise rows from U(-bound, bound), then scale each to unit length (SwAV's prototypes)."""

    bound: float


Init = Normal | Uniform | Constant | UnitRows


def draw(init: Init, shape: torch.Size | tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """The whole initial value of parameter `name`: fp32, on the CPU, a pure function of (init, shape, seed, name)."""
    import torch  # loader processes need but the keys

    out = torch.empty(shape, dtype=torch.float32)
    if isinstance(init, Constant):
        return out.fill_(init.value)
    generator = torch.Generator().manual_seed(key(seed, "init", name) & (2**63 - 1))
    if isinstance(init, Normal):
        return out.normal_(0.0, init.std, generator=generator)
    out.uniform_(-init.bound, init.bound, generator=generator)
    return torch.nn.functional.normalize(out, dim=1) if isinstance(init, UnitRows) else out
