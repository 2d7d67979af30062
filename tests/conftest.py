"""Common settings of all tests: hypothesis draws the same examples in every run and prints how to replay a failure.

`pytest --hypothesis-profile explore` draws new examples instead, and more of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import hashemb

COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **COMMON)
settings.register_profile("explore", max_examples=500, **COMMON)
settings.load_profile("fixed")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Restore the number of threads after a test that changes it."""
    before = hashemb.get_num_threads()
    yield
    hashemb.set_num_threads(before)
