"""Events bear the sample a run is at; what one rank alone has seen is told by it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from seer_scale.distributed import World
from seer_scale.errors import DataError
from seer_scale.training.clock import Clock
from seer_scale.training.event_log import EventLog, disk_may_fill


@pytest.mark.parametrize("rank", [0, 1])
def test_events_of_all_and_of_one_rank(rank, capsys):
    logged: list[tuple] = []
    log = SimpleNamespace(event=lambda kind, text, **fields: logged.append((kind, text, fields)))
    clock = Clock(4, 80)
    events = EventLog(log, clock, World(rank=rank, size=2))
    clock.advance()
    events.log_event("note", "all", key=1)
    assert logged == [("note", "all", {"samples_seen": 4, "key": 1})]  # whose log is closed writes none
    events.log_event_of_rank("note", "mine")
    assert len(logged) == 2 - rank and ("Rank 1: mine" in capsys.readouterr().err) == bool(rank)


def test_a_disk_costs_what_is_written_and_nothing_else(capsys):
    for error in (OSError(28, "No space left on device"), DataError("gone")):
        with disk_may_fill():
            raise error
    told = capsys.readouterr().err
    assert "(No space left on device)" in told and "(gone)" in told
    with pytest.raises(ValueError), disk_may_fill():
        raise ValueError
