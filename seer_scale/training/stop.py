"""Stopping on request: signals set a flag, and all ranks agree at a step boundary.

A rank that is asked leaves word in the store of rank 0, which sends the word to all beside an update, down a tree: no
update waits for it.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from seer_scale.data.sources import remote
from seer_scale.distributed import World
from seer_scale.errors import ECHO_S, STOP_SIGNALS, StartStopped, stop_signals

STOP_POLL_S = 0.25
"""Seconds between two looks of rank 0 into the store."""
STORE_KEY = "asked to stop"


class StopRequested(Exception):
    """All ranks agreed to stop; the text is the signal's name."""


class StopRequest:
    """A context in which STOP_SIGNALS ask the run to stop; SIGINT again, a second later, ends the process, while the
    others may come as often as a queue likes.

    Enter it before ranks join: a signal that comes while they wait for each other ends that, and a later one is
    honoured at the first boundary. Signals that a launcher had blocked until now are let in. In a thread that is not
    the main one it takes none.
    """

    def __init__(self) -> None:
        self._mine = 0
        self._asked_at, self._looked_at, self._left_word = math.inf, -math.inf, False
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None
        self._interrupts = False

    def __enter__(self) -> StopRequest:
        takes_signals = threading.current_thread() is threading.main_thread()  # Python gives no other thread any
        self._before = {s: signal.signal(s, self._ask) for s in stop_signals()} if takes_signals else {}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _ask(self, number: int, _: object) -> None:
        self._mine = number
        if number == signal.SIGINT and time.monotonic() - self._asked_at > ECHO_S:
            # not the handler before ours: submitit's would start the ranks anew
            signal.signal(number, signal.default_int_handler)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT:
            self._asked_at = min(self._asked_at, time.monotonic())
        if self._interrupts:
            self._interrupts = False  # once: what comes while that is ended is one request with it
            raise KeyboardInterrupt  # which no `except Exception` takes for its own

    def asked(self) -> str | None:
        """The name of the signal that this process has got."""
        return signal.Signals(self._mine).name if self._mine else None

    @contextmanager
    def interrupting(self, what: str) -> Iterator[None]:
        """A stop that is asked for before or meanwhile ends what is done in it, by StartStopped: listing images may
        take long, and a server's answer for ever. For one rank alone, outside collectives."""

        def look() -> None:
            if self._mine:
                raise StartStopped(
                    f"Stopped by {self.asked()} while {what}, so nothing was begun. Start it again and it goes on."
                )

        before, remote.waiting = remote.waiting, look  # in threads, too, which no signal reaches
        try:
            self._interrupts = True
            look()
            yield
        except KeyboardInterrupt:
            look()
            raise
        finally:
            self._interrupts, remote.waiting = False, before

    def stop_signal(self, world: World) -> str | None:
        """The name of the signal some rank had got a moment before the previous call (alone: by now); all ranks call it
        as often."""
        self._exchange_requests(world)
        flag = torch.tensor([self._mine])
        if world.size > 1:
            work = dist.broadcast(flag, src=0, group=world.control, async_op=True)
            earlier, self._pending = self._pending, (work, flag)
            if earlier is None:
                return None
            sent, flag = earlier
            if sent is not None:  # as it is for ranks of the group
                sent.wait()
        number = int(flag)
        return signal.Signals(number).name if number else None

    def stop_if_agreed(self, world: World) -> None:
        """Between two updates or batches. Raises StopRequested on all ranks, which call this as often as
        `stop_signal`."""
        if signal_name := self.stop_signal(world):
            raise StopRequested(signal_name)

    def end_start_if_agreed(self, world: World) -> None:
        """Before there is anything to save. Collective. Raises StartStopped on all ranks."""
        if signal_name := self.stop_signal(world):
            world.barrier()  # none leaves before all have heard it
            raise StartStopped(f"Stopped by {signal_name} before training began. Start it again and it goes on.")

    def _exchange_requests(self, world: World) -> None:
        """Leave word of a signal for rank 0, which looks now and then."""
        if world.store is None:
            return
        if self._mine and not world.is_main and not self._left_word:
            world.store.set(STORE_KEY, str(self._mine))
            self._left_word = True
        elif not self._mine and world.is_main and time.monotonic() - self._looked_at > STOP_POLL_S:
            self._looked_at = time.monotonic()
            if world.store.check([STORE_KEY]):
                self._mine = int(world.store.get(STORE_KEY))
