"""Fixtures of the front end's tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from families import Case


@pytest.fixture(scope="session")
def case() -> Callable[[str], Case]:
    """A family by name; what it computes is kept for the session."""
    return cache(Case)
