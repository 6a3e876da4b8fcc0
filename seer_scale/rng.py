"""Randomness as pure functions of keys, so that nothing random needs to be saved.

Every draw is named by (seed, words...): the same key gives the same numbers on any rank, worker or restart
(DESIGN rule 2). A number in a long row of them is a function of (seed, words, index): whoever needs a part of the row
draws that part alone.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, *words: object) -> int:
    """A 128-bit key for (seed, words), stable across processes, machines and Python versions."""
    text = "\x1f".join([str(seed), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def numpy_generator(seed: int, *words: object) -> np.random.Generator:
    """A counter-based generator for one key; costs some 20 microseconds."""
    return np.random.Generator(np.random.Philox(key=key(seed, *words)))


PER_COUNT = 8
"""Floats of 32 bits that Philox makes of one count."""


def draw(seed: int, *words: object, start: int, stop: int) -> np.ndarray:
    """The numbers [start, stop) of the row named by (seed, words): fp32, uniform in [0, 1)."""
    bits = np.random.Philox(key=key(seed, *words))
    bits.advance(start // PER_COUNT)
    generator = np.random.Generator(bits)
    generator.random(start % PER_COUNT, dtype=np.float32)
    return generator.random(stop - start, dtype=np.float32)
