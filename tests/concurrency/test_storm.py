"""Signals at random times to four processes on one table: a short form of storm.py, and checks that it can fail."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from storm import Storm, StormError, quantile_ms, run_storm
from storm_parts import HANDLERS, NUM_BUCKETS, bucket_of

SIGNALS = 3000


def test_storm(tmp_path: Path) -> None:
    figures = run_storm(tmp_path, signals=SIGNALS, seed=1)
    print(figures)
    assert figures["signals"] >= SIGNALS
    assert {name.split()[0] for name in figures["outcomes"]} == {"loop", "handler", "thread"}
    update = ("loop update: ok", "loop update: interrupted", "handler update: ok")
    for what in (*update, "loop snapshot: ok", "loop apply: ok"):
        assert figures["outcomes"].get(what), f"the storm never saw {what}: {figures}"
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_held_is_found(tmp_path: Path) -> None:
    storm = Storm(tmp_path, 0, 0, 1, list(HANDLERS))
    storm.check_locks()
    for place, name in ((1, "gate"), ((1 << 32) + 5, "blocks and rows"), ((1 << 62) + 5, "blocks and rows")):
        fd = os.open(tmp_path / "table" / "lock", os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, place, 1, 0))
        with pytest.raises(StormError, match=name):
            storm.check_locks()
        os.close(fd)
    storm.check_locks()


def test_a_process_without_progress_is_found(tmp_path: Path) -> None:
    storm = Storm(tmp_path, 0, 0, 1, list(HANDLERS))
    storm.check_progress()
    storm.board["last_beat_ns"][0] = 1
    with pytest.raises(StormError, match="hangs"):
        storm.check_progress()


def test_quantiles_of_the_histogram() -> None:
    histogram = np.zeros(NUM_BUCKETS, np.int64)
    for held_ns in (500, 10_000, 10_000, 10_000, 50_000_000):
        histogram[bucket_of(held_ns)] += 1
    assert 0.010 <= quantile_ms(histogram, 0.5) <= 0.012
    assert 50 <= quantile_ms(histogram, 1.0) <= 60
