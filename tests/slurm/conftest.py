"""One cluster for all tests that ask for it; SEER_SCALE_SLURM=required makes its absence a failure."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from tests.slurm.virtual_cluster import LAB_DIR, Cluster, obstacle


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := obstacle():
        (pytest.fail if os.environ.get("SEER_SCALE_SLURM") == "required" else pytest.skip)(why)
    lock = os.open(LAB_DIR.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another session's tests end first
    lab = Cluster()
    try:
        lab.up()
        yield lab
    finally:
        lab.clean()
        os.close(lock)


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no job is left and no node is without power."""
    lab = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if lab:
        lab.tidy()
