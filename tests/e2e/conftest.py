"""The rule that no run leaves a process behind."""

from __future__ import annotations

import time

import pytest

from tests.e2e import runs


@pytest.fixture(autouse=True)
def no_stray_process():
    yield
    until = time.monotonic() + 5  # loader processes end when they see that the run has
    while (left := runs.processes()) and time.monotonic() < until:
        time.sleep(0.01)
    runs.end_all()
    assert not left
