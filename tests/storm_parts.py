"""What the processes of the storm (storm.py) share: their roles and settings, a board in shared memory, and checks."""

from __future__ import annotations

import gc
import math
import mmap
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hashemb
from hashemb import errors

DIM = 8
SIZES = {3: 8, 30: 6, 1000: 4, 10_000: 2, 50_000: 1}  # number of keys in a batch: weight
#: The actions of handlers and their weights.
HANDLERS = {
    "nothing": 14, "raise": 20, "update": 24, "lookup": 16, "lr": 8, "stats": 4, "flush": 3, "close": 4, "snapshot": 2,
    "export": 2,
}  # fmt: skip
LOOP = {"update": 70, "lookup": 20, "snapshot": 1, "delta": 3, "flush": 1, "stats": 3, "prefetch": 3, "close": 1}
STORM, IDLE, FINISH = 0, 1, 2  # phases
MAX_DEPTH = 3  # of nested handlers
NUM_BUCKETS = 96  # of the histogram of times: four per octave, starting at a microsecond
BUSY: Any = getattr(errors, "TableBusyError", ())


@dataclass(frozen=True)
class Role:
    """The setup of a worker: the isolation of its table, the library's threads, and whether it has a second thread."""

    isolation: str
    num_threads: int
    has_thread: bool = False


ROLES = [Role("hogwild", 1), Role("exact", 1), Role("hogwild", 3, has_thread=True), Role("exact", 3)]


class Board:
    """Shared memory: the phase, and the reports of each worker."""

    FIELDS = ("signals", "beats", "last_beat_ns", "is_idle", "has_failed", "longest_held_ns", "signals_before")

    def __init__(self, path: Path, num_workers: int) -> None:
        row = len(self.FIELDS) + NUM_BUCKETS
        if not path.exists():
            path.write_bytes(bytes(8 * (1 + num_workers * row)))
        with open(path, "r+b") as file:
            cells = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64)
        self.phase, rows = cells[:1], cells[1:].reshape(num_workers, row)
        self.held = rows[:, len(self.FIELDS) :]
        self.by_name = {name: rows[:, i] for i, name in enumerate(self.FIELDS)}

    def __getitem__(self, name: str) -> Any:
        return self.by_name[name]


def bucket_of(held_ns: int) -> int:
    return min(NUM_BUCKETS - 1, int(4 * math.log2(max(1.0, held_ns / 1e3))))


def is_closed(table: Any) -> bool:
    try:
        table.step  # noqa: B018
    except errors.ClosedTableError:
        return True
    return False


def create(path: Path) -> hashemb.EmbeddingTable:
    return hashemb.create(path, num_embeddings=1 << 16, embedding_dim=DIM, optimizer=hashemb.Adagrad(lr=0.05))


def expect(is_so: bool, message: str) -> None:
    if not is_so:
        raise AssertionError(message)


def expect_clean(path: Path) -> None:
    problems = hashemb.verify(path)
    expect(not problems, f"{path}: {problems}")


def descriptors() -> Counter[str]:
    """Count the open descriptors of this process by name."""
    names: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            names[os.readlink(f"/proc/self/fd/{number}")] += 1
    return names


def left_open(opened: Counter[str]) -> list[str]:
    """Return the descriptors opened since `opened`, after releasing those in reference cycles of exceptions."""
    gc.collect()
    return sorted((descriptors() - opened).elements())
