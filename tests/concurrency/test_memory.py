"""The readers of a table share its physical memory: every page they touch belongs to the page cache.

A page that eight processes have mapped is in memory once. The *proportional set size* (PSS) charges an eighth of it to
each of them, so the sum over the readers is the size of the table, while the sum of their resident set sizes (RSS)
counts it eight times. `Anonymous` and `Private_Dirty` are private to a process. After the readers have ended, the page
cache keeps the pages until the memory is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker import Worker

import hashemb

NUM_READERS, DIM = 8, 64
KINDS = ("Rss", "Pss", "Anonymous", "Private_Dirty")


def fill(path: Path, num_rows: int) -> int:
    """Create a table and write every page of its weights; return the bytes of its weights."""
    with hashemb.create(
        path, num_embeddings=num_rows, embedding_dim=DIM, optimizer=hashemb.SGD(lr=1.0), huge_pages=False
    ) as table:
        rng, ones = np.random.default_rng(1), np.ones((1 << 16, DIM), np.float32)
        for _ in range(-(-num_rows // (1 << 16))):  # a page has 16 rows: e**-16 of them are missed
            table.update(rng.integers(0, 2**62, 1 << 16), ones)
        return table.weight.nbytes


@contextmanager
def readers(path: Path, num_rows: int) -> Iterator[list[Worker]]:
    """Start processes that have the table open and have read nearly all of its pages, each with its own keys."""
    with ExitStack() as stack:
        started = [stack.enter_context(Worker()) for _ in range(NUM_READERS)]
        for number, reader in enumerate(started):
            rng = np.random.default_rng([2, number])
            reader.open(path, "r")
            for _ in range(-(-num_rows // (1 << 18))):  # e**-4 of the pages are missed
                reader.request("read", str(path), rng.integers(0, 2**62, 1 << 16))
        yield started


@pytest.mark.parametrize(
    "weight_bytes", [1 << 25, pytest.param(1 << 31, marks=pytest.mark.slow)], ids=["32 MiB", "2 GiB"]
)
def test_eight_readers_use_the_memory_of_one(tmp_path: Path, weight_bytes: int) -> None:
    num_rows = weight_bytes // (4 * DIM)
    size, path = fill(tmp_path / "t", num_rows), tmp_path / "t"
    assert size == weight_bytes
    with readers(path, num_rows) as started:
        found: list[dict[str, int]] = [reader.request("maps", str(path / "weight"), *KINDS) for reader in started]
        total = {kind: sum(maps[kind] for maps in found) for kind in KINDS}
    sizes = {kind: round(n / size, 3) for kind, n in total.items()}
    print(f"{NUM_READERS} readers of {size >> 20} MiB of weights, in sizes of the table: {sizes}")
    assert all(maps["Rss"] >= 0.9 * size for maps in found), "a reader has not read the table"
    assert total["Rss"] >= 0.9 * NUM_READERS * size
    assert 0.9 * size <= total["Pss"] <= 1.05 * size
    assert total["Anonymous"] == total["Private_Dirty"] == 0


def test_canary_copies_are_noticed(tmp_path: Path) -> None:
    """A reader with a private copy of the table would show anonymous memory of that size."""
    fill(tmp_path / "t", 1 << 14)
    with hashemb.open(tmp_path / "t") as table:
        before = own_memory()
        copy = np.array(np.tile(table.weight, (64, 1)))  # too large for memory that was freed before
        assert own_memory() - before >= 0.9 * copy.nbytes


def own_memory() -> int:
    with open(f"/proc/{os.getpid()}/smaps_rollup", encoding="ascii") as file:
        values: dict[str, Any] = dict(line.split(":") for line in file.readlines()[1:])
    return int(values["Anonymous"].split()[0]) * 1024
