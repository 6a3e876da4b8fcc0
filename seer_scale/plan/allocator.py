"""What a caching allocator takes from the device for what is held: torch's rules for CUDA, replayed over a trace.

(c10/cuda/CUDACachingAllocator.cpp: sizes are rounded; small ones are cut from segments of 2 MiB, larger ones of 20 MiB,
the largest have one of their own, in multiples of 2 MiB; the smallest free block that is large enough is taken, and cut
where enough is left; free neighbours of one segment become one block; a stream takes only its own. What was taken from
the device is kept. It would be given back before memory ran out, which is left out here.)
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT, ROUND = 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(eq=False)
class _Block:
    """A run of a segment, from address `at`; before, after: its neighbours in it."""

    at: int
    nbytes: int
    is_free: bool = True
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """reserved: bytes taken from the device."""

    def __init__(self, block_bytes: int):
        self.reserved = 0
        self._round = block_bytes
        self._free: defaultdict[tuple[bool, int], list[tuple[int, int, _Block]]] = defaultdict(list)

    def allocate(self, nbytes: int, stream: int) -> _Block:
        size = max(self._round, -(-nbytes // self._round) * self._round)
        is_small = size <= SMALL
        pool = self._free[is_small, stream]
        found = next((i for i, entry in enumerate(pool) if entry[0] >= size), None)
        if found is None:
            segment = SMALL_SEGMENT if is_small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
            block = _Block(self.reserved, segment)
            self.reserved += segment
        else:
            block = pool.pop(found)[2]
        block.is_free = False
        rest = block.nbytes - size
        if rest >= self._round if is_small else rest > SMALL:
            cut = _Block(block.at + size, rest, True, block, block.after)
            if block.after:
                block.after.before = cut
            block.nbytes, block.after = size, cut
            self._put(cut, is_small, stream)
        return block

    def free(self, block: _Block, is_small: bool, stream: int) -> None:
        pool = self._free[is_small, stream]
        for other in (block.before, block.after):
            if other and other.is_free:
                pool.remove((other.nbytes, other.at, other))
                block.nbytes += other.nbytes
                if other is block.before:
                    block.at, block.before = other.at, other.before
                    if other.before:
                        other.before.after = block
                else:
                    block.after = other.after
                    if other.after:
                        other.after.before = block
        self._put(block, is_small, stream)

    def _put(self, block: _Block, is_small: bool, stream: int) -> None:
        block.is_free = True
        insort(self._free[is_small, stream], (block.nbytes, block.at, block))


def reserved(changes: Iterable[tuple[object, int, int, bool]], block_bytes: int, updates: int = 2) -> int:
    """Bytes taken from the device after so many updates in a row: changes are (what, bytes, stream, whether it comes),
    in order; what is not freed was there before the first, or stays."""
    events = list(changes)
    born: set[int] = set()
    lasting: set[int] = set()
    for what, _, _, comes in events:
        if comes:
            born.add(id(what))
        else:
            born.discard(id(what))
    lasting = born
    allocator = CachingAllocator(block_bytes)
    alive: dict[int, tuple[_Block, int, int]] = {}
    for update in range(updates):
        for what, nbytes, stream, comes in events:
            key = id(what)
            if not nbytes or update and key in lasting:
                continue
            if comes:
                alive[key] = allocator.allocate(nbytes, stream), nbytes, stream
            elif key in alive:
                block, size, of = alive.pop(key)
                allocator.free(block, max(block_bytes, -(-size // block_bytes) * block_bytes) <= SMALL, of)
    return allocator.reserved
