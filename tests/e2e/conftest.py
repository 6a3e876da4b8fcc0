"""The run that all others are held against, and the rule that none leaves a process behind."""

from __future__ import annotations

import time

import pytest

from tests.e2e import runs
from tests.e2e.runs import recipe, run


@pytest.fixture(scope="session")
def straight(tmp_path_factory, photos):
    """A run of 20 updates on one process, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    text = run("train", recipe(folder, photos), "--run.dir", folder / "run", folder=folder)
    assert "kNN top-1: " in text and text.index("kNN top-1: ") < text.index("Report: ")
    return folder / "run"


@pytest.fixture(autouse=True)
def no_stray_process():
    yield
    until = time.monotonic() + 5  # loader processes end when they see that the run has
    while (left := runs.processes()) and time.monotonic() < until:
        time.sleep(0.01)
    runs.end_all()
    assert not left
