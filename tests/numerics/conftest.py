"""Every test of numbers runs on one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def always_one_thread(one_thread: None) -> None:
    """See `one_thread` in tests/conftest.py."""
