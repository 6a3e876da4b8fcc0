"""What a rank holds over an update, and when most: from a trace."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from seer_scale.plan.allocator import reserved
from seer_scale.plan.devices import Device
from seer_scale.plan.trace import Kind, Trace

SLACK, WORKSPACES = "allocator slack", "workspaces of kernels"
BESIDE_ALLOCATOR = ("communicators", "CUDA context")
"""What a process holds beside its allocator."""
GIVES_BACK = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Environment in which torch's allocator gives back what it holds unused."""
KERNEL_WORKSPACE = 350 * 2**20
"""Bytes that libraries of a GPU take for their kernels: what lacked on one H200 (docs/performance.md)."""


@dataclass(frozen=True)
class Peak:
    """Where a rank holds most. op: how many operations there were before. kinds: bytes by what they are for; workspace:
    what the operation itself takes while it runs."""

    nbytes: int
    op: int
    kinds: dict[Kind, int]
    workspace: int


def block_of(trace: Trace, device: Device) -> int:
    """What the allocator rounds the tensors of a trace to, in bytes."""
    return device.block_bytes if trace.device != "cpu" else 1


def rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def timeline(trace: Trace, block: int = 1) -> list[tuple[int, int, Kind]]:
    """(operations before, bytes, what for) of all that comes (+) and goes (-), in order, in multiples of `block`."""
    return [
        (held.born, rounded(held.nbytes, block), held.kind)
        if comes
        else (held.freed, -rounded(held.nbytes, block), held.kind)
        for held, comes in trace.changes
    ]


def states(trace: Trace, block: int = 1) -> Iterator[tuple[int, int, Counter[Kind], int]]:
    """(operations before, bytes, of them by kind, of them a workspace) after whatever comes or goes, and while an
    operation takes a workspace; the same counter every time."""
    workspaces = [(i, op.workspace) for i, op in enumerate(trace.ops) if op.workspace]
    kinds: Counter[Kind] = Counter()
    now = 0
    for at, nbytes, kind in timeline(trace, block):
        while workspaces and workspaces[0][0] < at:
            op, own = workspaces.pop(0)
            yield op, now + own, kinds, own
        kinds[kind] += nbytes
        now += nbytes
        yield at, now, kinds, 0


def find_peak(trace: Trace, block: int = 1) -> Peak:
    """block: what an allocator rounds to."""
    return max(_peaks(trace, block), key=lambda peak: peak.nbytes)


def _peaks(trace: Trace, block: int) -> list[Peak]:
    """Before the first backward of an update, and from the beginning of each until the next begins or the update
    ends."""
    is_backward = [op.phase in ("backward", "recompute") for op in trace.ops]
    begins = [i for i, now in enumerate(is_backward) if now and (not i or not is_backward[i - 1])]
    peaks = [Peak(-1, 0, {}, 0)] * (len(begins) + 1)
    for at, nbytes, kinds, workspace in states(trace, block):
        window = bisect_left(begins, at)
        if nbytes > peaks[window].nbytes:
            peaks[window] = Peak(nbytes, at, {kind: n for kind, n in kinds.items() if n}, workspace)
    return peaks


def _peak_of_more(less: list[Peak], more: list[Peak], num: int) -> tuple[Peak, Peak]:
    """(of an update of `num` micro-batches, the one of `more` that it is like), from the peaks of n - 1 and of n.

    What is held for a micro-batch all along grows with their number: at the first backward by what is made for all
    before, at the last by what stays until then. Those between hold no more than these.
    """
    count = len(more) - 1
    found = []
    for window in {0, 1, count - 1, count}:
        a, b = less[window if window <= 1 else window - 1], more[window]
        grown = {kind: _grown(a.kinds.get(kind, 0), n, num - count) for kind, n in b.kinds.items()}
        nbytes = sum(grown.values()) + b.workspace
        found.append((Peak(nbytes, b.op, grown, b.workspace), b))
    return max(found, key=lambda pair: pair[0].nbytes)


def _grown(fewer: int, more: int, by: int) -> int:
    return max(0, more + by * (more - fewer))


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes. peak: of tensors. kinds: at the peak, largest first, and what is taken beside tensors:
    workspaces of kernels, what the allocator holds unused, communicators, and the device's own. traced: the peak of
    the trace, where more micro-batches are planned than it has."""

    peak: Peak
    traced: Peak
    kinds: dict[str, int]
    capacity: int

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def beside(self) -> int:
        """What the allocator knows nothing of."""
        return sum(self.kinds.get(kind, 0) for kind in BESIDE_ALLOCATOR)

    @property
    def reserved(self) -> int:
        """What the allocator takes from the device (torch.cuda.max_memory_reserved)."""
        return self.total - self.beside

    @property
    def allocated(self) -> int:
        """The most that it has given out at once (torch.cuda.max_memory_allocated)."""
        return self.reserved - self.kinds.get(SLACK, 0)

    @property
    def room(self) -> int:
        """Negative where it does not fit."""
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        """With all that the allocator holds unused."""
        return self.room >= 0

    @property
    def lacking(self) -> int:
        """What is too much whatever of that the allocator gives back."""
        return max(0, -self.room - self.kinds.get(SLACK, 0))

    @property
    def cannot_fit(self) -> bool:
        return self.lacking > 0


def memory_of(trace: Trace, device: Device, fewer: Trace | None = None, num: int = 0) -> Memory:
    """What the update of a trace takes of a device. fewer: a trace with one micro-batch less: then of an update with
    `num` of them, whose every byte beyond what was traced the allocator takes anew."""
    is_gpu, block = trace.device != "cpu", block_of(trace, device)
    peaks = _peaks(trace, block)
    whole = max(peaks, key=lambda peak: peak.nbytes)
    peak, traced = _peak_of_more(_peaks(fewer, block), peaks, num) if fewer else (whole, whole)
    kinds: dict[str, int] = dict(sorted(peak.kinds.items(), key=lambda kind: -kind[1]))
    kinds[WORKSPACES] = peak.workspace + KERNEL_WORKSPACE * is_gpu
    if is_gpu:
        changes = ((held, held.nbytes, held.stream, comes) for held, comes in trace.changes)
        kinds[SLACK] = max(0, reserved(changes, block) - whole.nbytes)
        communicators, context = BESIDE_ALLOCATOR
        kinds[communicators] = device.communicator_bytes * len({(c.ranks, c.group) for c in trace.collectives})
        kinds[context] = device.context_bytes
    found = {kind: nbytes for kind, nbytes in kinds.items() if nbytes}
    return Memory(peak, traced, found, device.memory_bytes)
