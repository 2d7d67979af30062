"""The fault sweep (tests/faults.py): each system call fails, once or persistently, and nothing half-done remains."""

from __future__ import annotations

import json

import pytest
import shim
from faults import KINDS, SCENARIOS

NAMES = [name for name in SCENARIOS if name != "canary"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.compiled(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def sweep(library, tmp_path):
    """Return a function that runs the sweep and returns its findings and the number of attempts."""

    def run(stride, variants, *names):
        with shim.fast_directory(tmp_path) as work:
            done = shim.run(library, "faults.py", str(work), str(stride), str(variants), *names)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    return run


def complaints(found):
    return "\n".join(
        f"{wrong['scenario']}, call {wrong['n']}, {wrong['mode']}, {wrong['variant']}:\n{wrong['what']}"
        for wrong in found["wrong"]
    )


def check(found):
    assert found["wrong"] == [], complaints(found)
    assert set(found["kinds"]) == set(KINDS)
    assert set(found["scenarios"]) == set(NAMES) - {"lr"}  # a learning rate is set by a store: no call can fail


def test_every_call_fails_once(sweep):
    """In every seventh attempt all later calls fail too, or all of the same kind; or the call does half its work."""
    found = sweep(7, 1)
    check(found)
    print(found["scenarios"], found["kinds"])


@pytest.mark.slow
def test_every_call_fails_in_every_way(sweep):
    found = sweep(1, 3)
    check(found)
    print(sum(found["scenarios"].values()), found["scenarios"], found["kinds"])


def test_canary(sweep):
    """An operation that leaves half of its work is detected."""
    found = sweep(1, 1, "canary")
    assert found["wrong"], "the sweep saw nothing wrong in an operation that is not whole"
    assert "AssertionError" in complaints(found)
