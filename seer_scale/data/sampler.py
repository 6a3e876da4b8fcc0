"""The order of images as a function: a pseudorandom permutation of each epoch, computed by index in O(1) memory.

A Feistel network permutes the 2^m >= n numbers of m bits; walking its cycles until a number falls below n restricts
it to a permutation of [0, n) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The only state of a
run's order is the number of samples seen, so any number of ranks can go on from it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from seer_scale.rng import key

ROUNDS = 6
_WORD = 2**64 - 1


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(key(seed, "order", epoch, r) & _WORD) for r in range(ROUNDS))


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser in which every input bit reaches every output bit (splitmix64, Stafford's variant 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Image numbers int64 at `positions` (int64, each in [0, n)) of one epoch: a bijection of [0, n).

    Another seed or epoch gives another order. Raises ValueError for a position outside [0, n).
    """
    out = np.array(positions, np.int64)
    if out.size and not (0 <= out.min() and out.max() < n):
        raise ValueError(f"positions must lie in [0, {n})")
    keys = _round_keys(seed, epoch)
    bits = max(4, (n - 1).bit_length())  # below four bits the halves hold too few orders
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)

    def once(x: np.ndarray) -> np.ndarray:
        right, left = x & low_mask, x >> low
        for r, k in enumerate(keys):  # the halves take turns, so they may differ in width
            if r % 2:
                right = right ^ (_mix(left ^ k) & low_mask)
            else:
                left = left ^ (_mix(right ^ k) & high_mask)
        return (left << low) | right

    walking = np.arange(out.size)
    flat = out.reshape(-1)
    while walking.size:
        flat[walking] = once(flat[walking].astype(np.uint64)).astype(np.int64)
        walking = walking[flat[walking] >= n]
    return out


class ElasticSampler:
    """Which images each rank takes, from `samples_seen` alone.

    Global sample number p is the image at position p % n of epoch p // n; a rank takes its contiguous part of the
    global batch, so all ranks together take the same images however many they are.
    """

    def __init__(self, n: int, seed: int, global_batch: int):
        if n < 1 or global_batch < 1:
            raise ValueError(f"a sampler needs at least one image and a batch of one, not {n} and {global_batch}")
        self.n, self.seed, self.global_batch = n, seed, global_batch

    def slots(self, samples_seen: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, offsets, image numbers), each int64 [local batch], for the batch that begins at `samples_seen`."""
        local, rest = divmod(self.global_batch, world_size)
        if rest or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} has no whole part of a batch of {self.global_batch}")
        epochs, offsets = np.divmod(samples_seen + rank * local + np.arange(local, dtype=np.int64), self.n)
        indices = np.empty(local, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self.at(int(epoch), offsets[here])
        return epochs, offsets, indices

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Image numbers at offsets (int64, in [0, n)) of one epoch."""
        return permute(offsets, self.n, self.seed, epoch)
