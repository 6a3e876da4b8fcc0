"""Stopping on request: signals set a flag, and all ranks agree at a step boundary.

The agreement of one step is read at the next, from an all-reduce that ran beside it on the host: no update waits.
"""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from seer_scale.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGUSR2 ask the run to stop; the same signal again has its usual effect."""

    def __init__(self, world: World):
        self.world, self._mine = world, 0
        self._before: dict[int, object] = {}
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._ask) for s in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _ask(self, number: int, _) -> None:
        self._mine = number
        signal.signal(number, self._before[number] or signal.SIG_DFL)

    def agreed(self) -> str | None:
        """The name of the signal some rank had got by the previous call; all ranks call it once a step."""
        flag = torch.tensor([self._mine])
        work = None
        if self.world.size > 1:
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        earlier, self._pending = self._pending, (work, flag)
        if earlier is None:
            return None
        if earlier[0] is not None:
            earlier[0].wait()
        number = int(earlier[1])
        return signal.Signals(number).name if number else None
