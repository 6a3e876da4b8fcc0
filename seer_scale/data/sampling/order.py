"""The order of images as a function: a pseudorandom permutation of each epoch, computed by index in O(1) memory.

A Feistel network permutes the 2^m >= n numbers of m bits; walking its cycles until a number falls below n restricts
it to a permutation of [0, n) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
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


def mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser in which every input bit reaches every output bit (splitmix64, Stafford's variant 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int, tweak: np.ndarray | None = None) -> np.ndarray:
    """Image numbers int64 at `positions` (int64, each in [0, n)) of one epoch: a bijection of [0, n).

    Another seed or epoch gives another order, and so does another tweak (uint64, one a position).
    Raises ValueError for a position outside [0, n).
    """
    out = np.array(positions, np.int64)
    if out.size and not (0 <= out.min() and out.max() < n):
        raise ValueError(f"positions must lie in [0, {n})")
    keys = _round_keys(seed, epoch)
    bits = max(4, (n - 1).bit_length())  # below four bits the halves hold too few orders
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    walking = np.arange(out.size)
    flat, tweak = out.reshape(-1), np.zeros(1, np.uint64) if tweak is None else mix(tweak.reshape(-1))

    def once(x: np.ndarray, tweak: np.ndarray) -> np.ndarray:
        right, left = x & low_mask, x >> low
        for r, k in enumerate(keys):  # the halves take turns, so they may differ in width
            if r % 2:
                right = right ^ (mix(left ^ k ^ tweak) & low_mask)
            else:
                left = left ^ (mix(right ^ k ^ tweak) & high_mask)
        return (left << low) | right

    while walking.size:
        own = tweak[walking] if tweak.size > 1 else tweak
        flat[walking] = once(flat[walking].astype(np.uint64), own).astype(np.int64)
        walking = walking[flat[walking] >= n]
    return out


class Order:
    """The order of n images in every epoch, by index: a bijection of [0, n).

    block 1: any image may follow any other. block B > 1, for sources where B neighbours are best read together: the
    images, counted from a random one on, are cut into blocks of B; blocks are shuffled, and `interleave` of them are
    read side by side, one image of each in turn (within a block shuffled, too). So any `interleave` positions in a row
    hold images of as many blocks, and whoever takes every `interleave`-th position reads one block after the other.
    What is left of whole rows, and of whole blocks, comes last. block 0: as the source has them, for streams.
    """

    def __init__(self, n: int, seed: int, block: int = 1, interleave: int = 1):
        if n < 1 or block < 0 or interleave < 1:
            raise ValueError(
                f"an order needs n and interleave of at least 1, not {n} and {interleave}, and no block of {block}"
            )
        self.n, self.seed, self.block, self.interleave = n, seed, min(block, n), interleave

    def __len__(self) -> int:
        return self.n

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Image numbers at offsets (int64, in [0, n)) of one epoch."""
        if self.block == 0:
            return np.array(offsets, np.int64)
        if self.block == 1:
            return permute(offsets, self.n, self.seed, epoch)
        whole = self.n // self.block
        window, inside = np.divmod(offsets, self.interleave * self.block)
        interleave = np.clip(
            whole - window * self.interleave, 1, self.interleave
        )  # the last window has those that are left
        place = np.where(offsets < whole * self.block, window * self.interleave + inside % interleave, whole)
        depth = np.where(place < whole, inside // interleave, offsets - whole * self.block)
        images = np.empty(len(offsets), np.int64)
        for in_block, here in (self.block, place < whole), (self.n % self.block, place == whole):
            if here.any():
                block = place[here]
                if in_block == self.block:
                    block = permute(block, whole, self.seed, epoch)
                images[here] = block * self.block + permute(
                    depth[here], in_block, self.seed, epoch, tweak=block.astype(np.uint64)
                )
        return (images + self._first(epoch)) % self.n

    def block_of(self, epoch: int, offset: int, image: int) -> tuple[int, int, int] | None:
        """(first image number, how many, how many of them come before) of the block that `image`, at `offset`, is read
        with; the numbers go on at 0 after n - 1. None where blocks are interleaved otherwise than in the rest of the
        epoch, so that no reader needs all of it."""
        if self.block < 2:
            return None
        rows = self.n // self.block // self.interleave
        if offset >= rows * self.interleave * self.block:
            return None
        first = self._first(epoch)
        before = offset % (self.interleave * self.block) // self.interleave
        return ((image - first) % self.n // self.block * self.block + first) % self.n, self.block, before

    def _first(self, epoch: int) -> int:
        return key(self.seed, "first", epoch) % self.n
