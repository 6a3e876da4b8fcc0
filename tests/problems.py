"""What an error says, as data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import ANY

import pytest

from seer_scale.errors import DataError, Unreadable, UserError


@contextmanager
def refused(
    key: object, value: object = ANY, nearest: object = ANY, *, error: type[UserError] = DataError
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects an error whose first problem is of this key (a path is its text), value and nearest fix."""
    with pytest.raises(error) as found:
        yield found
    problem = found.value.problems[0]
    assert (problem.key, problem.value, problem.nearest) == (key if key is ANY else str(key), value, nearest)


@contextmanager
def unreadable(name: object, reason: str = "") -> Iterator[pytest.ExceptionInfo[Unreadable]]:
    """Expects that an image or a file of this name cannot be read, for a reason in which `reason` stands."""
    with pytest.raises(Unreadable) as found:
        yield found
    assert name is ANY or found.value.name == str(name), found.value.name
    assert reason in found.value.reason
