"""Actors for test_chaos.py, which can be killed at any moment, and a judge of the states in which they may leave rows.

The actors work on two tables:

- `own`, hogwild, Adagrad: every key has one writer, whose batches are replayed, so that weights are known to the bit.
- `shared`, exact, SGD with learning rate 1: all writers add to the same rows.

Gradients are small whole numbers, so that the accumulators of `own` (sums of squares) and the negated weights of
`shared` are counters, exact in float32 in any order. A batch is a pure function of (round, writer, number). Each batch
also increments one key that only its writer uses, its clock, which tells how many of its batches a snapshot contains.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb

Counts = npt.NDArray[np.int64]

NUM_WRITERS, NUM_READERS = 3, 2
NUM_ROWS, DIM = 1 << 18, 8
NUM_KEYS = 4000  # per writer in `own`, for all writers together in `shared`
SIZES = (20, 400, 3000, 9000)  # batch sizes; the largest use three threads
TABLES = ("own", "shared")
OPTIONS: dict[str, dict[str, Any]] = {
    "own": {"optimizer": hashemb.Adagrad(lr=0.1), "init": hashemb.Uniform(0.5)},
    "shared": {"optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()},
}
ISOLATION: dict[str, Any] = {"own": "hogwild", "shared": "exact"}


def create_tables(root: Path) -> None:
    for name in TABLES:
        hashemb.create(root / name, num_embeddings=NUM_ROWS, embedding_dim=DIM, **OPTIONS[name]).close()


def distinct_keys(table: hashemb.EmbeddingTable) -> Counts:
    """Return keys that share no row: a part for each writer in `own`, then the clocks."""
    candidates = np.arange(20_000)
    _, first = np.unique(table.rows(candidates), return_index=True)
    return candidates[np.sort(first)][: NUM_WRITERS * (NUM_KEYS + 1)]


# ---- communication between the processes: a file of counters, mapped by all ----


@dataclass(frozen=True)
class Board:
    """Shared counters. done[writer, table]: batches applied; turns: loops of readers, maker and follower; stop."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            self.path.write_bytes(bytes(8 * 32))

    def _cells(self, first: int, count: int) -> Counts:
        return np.memmap(self.path, np.int64, "r+", 8 * first, (count,))

    @property
    def done(self) -> Counts:
        return self._cells(0, NUM_WRITERS * len(TABLES)).reshape(NUM_WRITERS, len(TABLES))

    @property
    def turns(self) -> Counts:
        return self._cells(16, NUM_READERS + 2)

    @property
    def stop(self) -> Counts:
        return self._cells(24, 1)


# ---- actors ----


def batch_of(round_number: int, writer: int, number: int, table: int) -> tuple[Counts, npt.NDArray[np.float32]]:
    """Return indices into `distinct_keys` and the gradient of each, (n, DIM); the last one is the writer's clock."""
    rng = np.random.default_rng([round_number, writer, number, table])
    size = int(rng.choice(SIZES))
    chosen = rng.integers(0, NUM_KEYS, size) + (writer * NUM_KEYS if TABLES[table] == "own" else 0)
    grads = np.append(rng.integers(0, 4, (size, DIM)), np.ones((1, DIM)), axis=0).astype(np.float32)
    return np.append(chosen, NUM_WRITERS * NUM_KEYS + writer), grads


def write(root: Path, round_number: int, writer: int, num_threads: int) -> None:
    """Update both tables in turn; occasionally close and reopen one, or flush it."""
    hashemb.set_num_threads(num_threads)
    board, tables = Board(root / "board"), [open_for_writing(root, name) for name in TABLES]
    done, stop, keys = board.done, board.stop, distinct_keys(tables[0])
    for number in itertools.count():
        for i, name in enumerate(TABLES):
            chosen, grads = batch_of(round_number, writer, number, i)
            tables[i].update(keys[chosen], grads)
            done[writer, i] = number + 1
            if number % 20 == 5 * writer + 3:
                tables[i].flush()
            if number % 20 == 5 * writer + 4:
                tables[i].close()
                tables[i] = open_for_writing(root, name)
        if stop[0]:
            break
    for table in tables:
        table.close()


def open_for_writing(root: Path, name: str) -> hashemb.EmbeddingTable:
    return hashemb.open(root / name, "r+", isolation=ISOLATION[name])


def read(root: Path, reader: int) -> None:
    """Look rows up in a loop: counters are whole numbers that never decrease, and no call is ever refused."""
    board = Board(root / "board")
    with hashemb.open(root / "own") as own, hashemb.open(root / "shared") as shared:
        keys = distinct_keys(own)
        rows, seen = own.rows(keys), {name: np.zeros((keys.size, DIM)) for name in TABLES}
        while not board.stop[0]:
            now = {"own": own.state["accumulator"][rows].astype(float), "shared": -shared.lookup(keys).astype(float)}
            for name in TABLES:
                assert (now[name] == np.round(now[name])).all(), f"{name}: a counter is no whole number"
                assert (now[name] >= seen[name]).all(), f"{name}: a counter went back"
            seen = now
            assert np.isfinite(own.lookup(keys)).all()
            for name in TABLES:  # like servers that start and stop
                with hashemb.open(root / name) as again:
                    assert again.step >= 0
                    assert hashemb.info(root / name).num_embeddings == NUM_ROWS
                assert np.load(root / name / "weight.npy", mmap_mode="r").shape == (NUM_ROWS, DIM)
            board.turns[reader] += 1


def make(root: Path) -> None:
    """Take snapshots of both tables, export chains of deltas, and create tables, in turn."""
    board = Board(root / "board")
    tables = [open_for_writing(root, name) for name in TABLES]
    last: dict[str, Any] = dict.fromkeys(TABLES)
    for number in itertools.count():
        for name, table in zip(TABLES, tables, strict=True):
            table.snapshot(root / f"snapshot-{name}-{number}", extra={"number": number})
            last[name] = table.export_delta(last[name], root / f"deltas-{name}" / f"{number:03}.delta", state=True)
        with hashemb.create(root / f"new-{number}", num_embeddings=1 << 12, embedding_dim=DIM) as new:
            new.update(np.arange(50), np.ones((50, DIM), np.float32))
        board.turns[NUM_READERS] += 1
        for old in (f"snapshot-{name}-{number - 2}" for name in TABLES):  # keep two of each
            shutil.rmtree(root / old, ignore_errors=True)
        if board.stop[0]:
            break
    for table in tables:
        table.close()


def follow(root: Path) -> None:
    """Keep a replica of each table up to date with its deltas."""
    board = Board(root / "board")
    while not board.stop[0]:
        for name in TABLES:
            hashemb.follow(root / f"replica-{name}", root / f"deltas-{name}")
        board.turns[NUM_READERS + 1] += 1


# ---- the processes of a round ----


def act(root: Path, name: str, work: Any, *args: Any) -> None:
    try:
        work(root, *args)
    except BaseException:
        (root / f"board-{name}").write_text(traceback.format_exc(), encoding="utf-8")
        raise


class Actors:
    """The processes of a round by name ("writer 0" …, "reader 0" …, "maker", "follower"), and which were killed."""

    def __init__(self, context: Any, root: Path, round_number: int, rng: np.random.Generator) -> None:
        self.root, self.board, self.killed = root, Board(root / "board"), set[str]()
        self.processes: dict[str, Any] = {}
        self.board.done[:] = self.board.turns[:] = self.board.stop[:] = 0
        for name in TABLES:
            (root / f"deltas-{name}").mkdir()
        for writer in range(NUM_WRITERS):
            self._start(context, f"writer {writer}", write, round_number, writer, int(rng.integers(1, 4)))
        for reader in range(NUM_READERS):
            self._start(context, f"reader {reader}", read, reader)
        self._start(context, "maker", make)
        self._start(context, "follower", follow)

    def _start(self, context: Any, name: str, work: Any, *args: Any) -> None:
        self.processes[name] = context.Process(target=act, args=(self.root, name, work, *args), daemon=True)
        self.processes[name].start()

    def progress(self) -> dict[str, int]:
        """Return how much each survivor has done so far."""
        done = [int(n) for n in (*self.board.done.min(axis=1), *self.board.turns)]
        every = dict(zip(self.processes, done, strict=True))
        return {name: n for name, n in every.items() if name not in self.killed}

    def failures(self) -> list[str]:
        """Describe the actors that ended with an error or by a signal other than the kill of the test."""
        codes = {name: process.exitcode for name, process in self.processes.items()}
        wanted = {name: (None, 0, -signal.SIGKILL) if name in self.killed else (None, 0) for name in codes}
        wrong = [name for name in codes if codes[name] not in wanted[name]]
        return [f"{name}: exit code {codes[name]}\n{self._said(name)}" for name in wrong]

    def _said(self, name: str) -> str:
        path = self.root / f"board-{name}"
        return path.read_text(encoding="utf-8") if path.exists() else "nothing"

    def kill(self, names: list[str], rng: np.random.Generator) -> None:
        for name in names:
            time.sleep(rng.exponential(0.005))
            self.killed.add(name)
            self.processes[name].kill()
        for name in names:
            self.processes[name].join()

    def finish(self, timeout_s: float) -> None:
        self.board.stop[0] = 1
        for name, process in self.processes.items():
            process.join(timeout_s)
            assert process.exitcode is not None, f"{name} hangs after {sorted(self.killed)} were killed"

    def destroy(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
            process.close()


# ---- the judge ----


def counters(path: Path, keys: Counts) -> Counts:
    """Return the whole numbers that a table of either kind holds for these keys."""
    with hashemb.open(path) as table:
        values = table.state["accumulator"][table.rows(keys)] if table.state else -table.lookup(keys)
    whole = np.round(values).astype(np.int64)
    np.testing.assert_array_equal(values, whole, err_msg=f"{path}: counters that are no whole numbers")
    return whole


class Ledger:
    """The increments of the counters of one table by the batches of a round."""

    def __init__(self, table: int, round_number: int, before: Counts, before_step: int) -> None:
        self.table, self.round, self.before, self.before_step = table, round_number, before, before_step

    def amount(self, writer: int, number: int) -> Counts:
        total = np.zeros(self.before.shape, np.int64)
        chosen, grads = batch_of(self.round, writer, number, self.table)
        np.add.at(total, chosen, grads.astype(np.int64))
        return total**2 if TABLES[self.table] == "own" else total

    def check(self, path: Path, keys: Counts, done: Counts, cut_short: set[int], *, is_cut: bool) -> None:
        """Check that every counter is the sum of whole batches; those of `cut_short` writers may contain one more
        batch, in whole or in part. With `is_cut` the table is from a moment of the round, which the clocks tell,
        otherwise from its end.
        """
        found = counters(path, keys)
        counts = [int(n) for n in done]
        if is_cut:
            clocks = (found - self.before)[NUM_WRITERS * NUM_KEYS :, -1]
            assert all(0 <= clock <= n + 1 for clock, n in zip(clocks, done, strict=True)), (clocks, done)
            counts = [min(int(clock), int(n)) for clock, n in zip(clocks, done, strict=True)]
        expected, open_ends = self.before.copy(), {w for w in cut_short if counts[w] == done[w]}
        for writer, count in enumerate(counts):
            expected += sum((self.amount(writer, number) for number in range(count)), np.zeros_like(expected))
        parts = [self.amount(writer, counts[writer]) for writer in sorted(open_ends)]
        legal = np.zeros(found.shape, bool)
        for chosen in itertools.product((0, 1), repeat=len(parts)):
            legal |= found == expected + sum((c * p for c, p in zip(chosen, parts, strict=True)), 0 * expected)
        bad, at = (~legal).sum(), np.unravel_index(np.argmin(legal), legal.shape)
        state = f"{found[at]} at {at}, batches {counts} make {expected[at]}, cut short {cut_short}"
        assert not bad, f"{path}: {bad} counters in no legal state, the first {state}"
        step = hashemb.info(path).step - self.before_step
        assert sum(counts) <= step <= sum(counts) + len(cut_short), (path, counts, step)


def check_own_to_the_bit(root: Path, round_number: int, keys: Counts, done: Counts, cut_short: set[int]) -> None:
    """Check the weights and accumulators of `own` against its copy from before the round, `own-before`, on which the
    batches of every writer are replayed. Elements of an interrupted batch are as before it, as after it, or have new
    state and the old weight.
    """
    with hashemb.open(root / "own-before", "r+") as replay, hashemb.open(root / "own") as own:
        for writer, count in enumerate(done.tolist()):
            mine = own.rows(np.append(keys[writer * NUM_KEYS : (writer + 1) * NUM_KEYS], keys[writer - NUM_WRITERS]))
            found = own.weight[mine], own.state["accumulator"][mine]
            for number in range(count):
                chosen, grads = batch_of(round_number, writer, number, 0)
                replay.update(keys[chosen], grads)
            legal = same(found, (replay.weight[mine], replay.state["accumulator"][mine]))
            if writer in cut_short:
                old_weight = replay.weight[mine]
                chosen, grads = batch_of(round_number, writer, count, 0)
                replay.update(keys[chosen], grads)
                new = replay.weight[mine], replay.state["accumulator"][mine]
                legal |= same(found, new) | same(found, (old_weight, new[1]))
            assert legal.all(), f"writer {writer}: {(~legal).sum()} elements in no legal state"


def same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> npt.NDArray[np.bool_]:
    return (found[0] == expected[0]) & (found[1] == expected[1])


def what_is_left(root: Path) -> list[str]:
    """Return the hidden directories of killed makers; each is removed when something of the same name is made again."""
    return sorted(entry.name for entry in os.scandir(root) if entry.name.startswith("."))
