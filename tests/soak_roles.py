"""The five processes of the soak (soak.py): two exact writers, a reader, a maker of snapshots and a follower of deltas.

Each runs until the stop flag of the board is set, sleeps to keep to its share of a processor, and ends with an error as
soon as a check fails. Gradients are small whole numbers of either sign, so that with SGD, learning rate 1 and zero
initial rows, every row is the negative sum of its gradients, exact in float32 in any order.
"""

from __future__ import annotations

import itertools
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb

NUM_ROWS, DIM = 1 << 18, 16  # 16 MiB
NUM_KEYS = 100_000
SIZES = (30, 1000, 20_000)  # batch sizes
LIMIT = 1 << 23  # sums stay within the exact integers of float32
FAILURE = "failure-{}.txt"


@dataclass(frozen=True)
class Board:
    """Shared memory: stop, pause (requested of the writers by the follower), and the progress of each process."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            self.path.write_bytes(bytes(8 * 32))

    @cached_property
    def cells(self) -> npt.NDArray[np.int64]:
        return np.memmap(self.path, np.int64, "r+")

    def __getitem__(self, name: str) -> Any:
        """Return a view of one or two cells, to be read and written in place."""
        names = ("stop", "pause", "lookups", "verified", "compared", "applied", "is_paused", "batches")
        first = 2 * names.index(name)
        return self.cells[first : first + (2 if name in ("is_paused", "batches") else 1)]


def create(path: Path) -> hashemb.EmbeddingTable:
    return hashemb.create(
        path, num_embeddings=NUM_ROWS, embedding_dim=DIM, optimizer=hashemb.SGD(lr=1.0), init=hashemb.Zeros()
    )


def soak_keys(table: hashemb.EmbeddingTable) -> npt.NDArray[np.int64]:
    """Return keys that share no row."""
    candidates = np.arange(2 * NUM_KEYS)
    _, first = np.unique(table.rows(candidates), return_index=True)
    return candidates[np.sort(first)][:NUM_KEYS]


def paced(board: Board, pace: float) -> Iterator[int]:
    """Count rounds until the stop flag is set; sleep after each so that rounds take the fraction `pace` of the time."""
    stop = board["stop"]
    for number in itertools.count():
        if stop[0]:
            return
        began = time.monotonic()
        yield number
        wake = time.monotonic() + (time.monotonic() - began) * (1 / pace - 1)
        while not stop[0] and (left := wake - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def write(root: Path, board: Board, pace: float, number: int) -> None:
    """Update the table and keep the expected sums of the writer's own batches; reopen the table from time to time."""
    rng = np.random.default_rng([1, number])
    hashemb.set_num_threads(1 + number)
    table = hashemb.open(root / "table", "r+", isolation="exact")
    keys, sums = soak_keys(table), np.zeros((NUM_KEYS, DIM), np.int32)
    for turn in paced(board, pace):
        while board["pause"][0] and not board["stop"][0]:
            board["is_paused"][number] = 1
            time.sleep(0.001)
        board["is_paused"][number] = 0
        chosen = rng.integers(0, NUM_KEYS, rng.choice(SIZES))
        grads = rng.integers(-2, 3, (chosen.size, DIM)).astype(np.int32)
        table.update(keys[chosen], grads.astype(np.float32))
        np.add.at(sums, chosen, grads)
        board["batches"][number] += 1
        if turn % 500 == 499:
            table.close()
            table = hashemb.open(root / "table", "r+", isolation="exact")
    table.close()
    assert np.abs(sums).max() < LIMIT
    np.save(root / f"sums-{number}.npy", sums)


def read(root: Path, board: Board, pace: float) -> None:
    """Look rows up; whatever the writers are doing, every value is a whole number."""
    rng = np.random.default_rng(2)
    table = hashemb.open(root / "table", "r")
    keys, offsets = soak_keys(table), np.arange(0, 10_001, 10)
    for turn in paced(board, pace):
        chosen = keys[rng.integers(0, NUM_KEYS, 10_000)]
        table.prefetch(chosen)
        vectors = table.lookup(chosen)
        assert (vectors == np.rint(vectors)).all(), "a look-up gave what nobody has written"
        table.lookup(chosen, offsets=offsets, pooling="mean")
        table.stats()
        board["lookups"][0] += 1
        if turn % 100 == 99:
            table.close()
            table = hashemb.open(root / "table", "r")
    table.close()


def save(root: Path, board: Board, pace: float) -> None:
    """Take snapshots and verify each; keep the last two."""
    kept: list[Path] = []
    with hashemb.open(root / "table", "r+") as table:
        for turn in paced(board, pace):
            path = root / f"snapshot-{turn}"
            table.snapshot(path, extra={"turn": turn})
            problems = hashemb.verify(path)
            assert not problems, f"{path}: {problems}"
            assert hashemb.info(path).snapshot.extra == {"turn": turn}  # type: ignore[union-attr]
            board["verified"][0] += 1
            kept.append(path)
            if len(kept) > 2:
                shutil.rmtree(kept.pop(0))


def follow(root: Path, board: Board, pace: float) -> None:
    """Export deltas and follow them; every fifth time the writers pause and the replica must equal its source."""
    deltas, replica = root / "deltas", root / "replica"
    deltas.mkdir(exist_ok=True)
    last: hashemb.DeltaInfo | None = None
    with hashemb.open(root / "table", "r+") as table:
        for turn in paced(board, pace):
            compares = turn % 5 == 4
            if compares:
                pause(board)
            last = table.export_delta(last, deltas / f"{turn:08}.delta", state=True)
            status = hashemb.follow(replica, deltas)
            assert status.pending == 0, status
            assert status.sequence == last.sequence, (status, last)
            board["applied"][0] += len(status.applied)
            if compares and not board["stop"][0]:
                compare(table, replica)
                board["compared"][0] += 1
            board["pause"][0] = 0
            for old in sorted(deltas.iterdir())[:-1]:
                old.unlink()


def pause(board: Board) -> None:
    """Wait until both writers are between two batches, or the soak ends."""
    board["pause"][0] = 1
    while not board["is_paused"].all() and not board["stop"][0]:
        time.sleep(0.001)


def compare(table: hashemb.EmbeddingTable, replica: Path) -> None:
    with hashemb.open(replica, "r") as other:
        differing = np.flatnonzero((table.weight != other.weight).any(axis=1))
        assert not differing.size, f"{differing.size} rows of the replica differ from its source, first {differing[:5]}"


def run_role(role: str, root: Path, pace: float) -> None:
    """Run one process; an error is written to a file and ends the soak."""
    roles: dict[str, Callable[[Path, Board, float], None]] = {
        "writer 0": lambda *args: write(*args, number=0),
        "writer 1": lambda *args: write(*args, number=1),
        "reader": read,
        "snapshots": save,
        "deltas": follow,
    }
    board = Board(root / "board")
    warnings.simplefilter("error")
    try:
        roles[role](root, board, pace)
    except BaseException:
        (root / FAILURE.format(role)).write_text(traceback.format_exc(), encoding="utf-8")
        board["stop"][0] = 1
        raise


ROLES = ("writer 0", "writer 1", "reader", "snapshots", "deltas")
