"""Writers, readers, makers of snapshots, deltas and tables, and followers of deltas are killed at random moments, round
after round on the same two tables. After each round, every row is in a state that is possible at the moment of a kill,
and no process waits for a killed one.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos import (
    NUM_WRITERS,
    TABLES,
    Actors,
    Ledger,
    batch_of,
    check_own_to_the_bit,
    counters,
    create_tables,
    distinct_keys,
    what_is_left,
)
from processes import wait_for

import hashemb

PATIENCE_S = 60.0
MADE = ("snapshot", "new", "after", "deltas", "replica")


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_chaos(tmp_path: Path, rounds: int) -> None:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hashemb"])
    rng = np.random.default_rng(rounds)
    create_tables(tmp_path)
    with hashemb.open(tmp_path / "own") as table:
        keys = distinct_keys(table)
    killed = {"writer": 0, "reader": 0, "maker": 0, "follower": 0}
    for number in range(rounds):
        ledgers = [
            Ledger(i, number, counters(tmp_path / name, keys), hashemb.info(tmp_path / name).step)
            for i, name in enumerate(TABLES)
        ]
        shutil.copytree(tmp_path / "own", tmp_path / "own-before")
        actors = play(context, tmp_path, number, rng)
        done = np.array(actors.board.done)
        for name in actors.killed:
            killed[name.split()[0]] += 1
        cut_short = {int(name.split()[1]) for name in actors.killed if name.startswith("writer")}
        judge(tmp_path, ledgers, keys, done, cut_short)
        check_own_to_the_bit(tmp_path, number, keys, done[:, 0], cut_short)
        clean_up(tmp_path)
    print(f"{rounds} rounds, killed: {killed}")
    assert all(killed.values())


def play(context: Any, root: Path, number: int, rng: np.random.Generator) -> Actors:
    """Play one round: all actors work, some are killed, and the others must make progress."""
    actors = Actors(context, root, number, rng)
    try:
        wait_for(lambda: bool(actors.failures()) or min(actors.progress().values()) >= 1, PATIENCE_S)
        names = rng.permutation(sorted(actors.processes))[: rng.integers(1, len(actors.processes) + 1)].tolist()
        if number % 3 == 0:  # the maker is one of seven, but usually in the middle of something
            names = ["maker", *(name for name in names if name != "maker")]
        actors.kill(names, rng)
        before = actors.progress()
        wait_for(
            lambda: bool(actors.failures()) or all(n > before[name] + 2 for name, n in actors.progress().items()),
            PATIENCE_S,
        )
        actors.finish(PATIENCE_S)
        failures = actors.failures()
        assert not failures, "\n".join(failures)
    finally:
        actors.destroy()
    return actors


def judge(root: Path, ledgers: list[Ledger], keys: Any, done: Any, cut_short: set[int]) -> None:
    """Check the tables, the finished snapshots, and a new snapshot, which must equal the table bit for bit."""
    for i, name in enumerate(TABLES):
        ledgers[i].check(root / name, keys, done[:, i], cut_short, is_cut=False)
        with hashemb.open(root / name, "r+") as table:
            assert table.recovered in (None, "killed")
            table.snapshot(root / f"after-{name}")
            with hashemb.open(root / f"after-{name}") as taken:
                np.testing.assert_array_equal(taken.weight, table.weight)
                for state, array in table.state.items():
                    np.testing.assert_array_equal(taken.state[state], array)
        for snapshot in sorted(root.glob(f"snapshot-{name}-*")):
            assert hashemb.info(snapshot).snapshot.extra == {"number": int(snapshot.name.split("-")[-1])}
            ledgers[i].check(snapshot, keys, done[:, i], cut_short, is_cut=True)
        judge_replica(root, name, ledgers[i], keys, done[:, i], cut_short)
    for path in root.iterdir():
        if not path.name.startswith(("board", ".", "deltas-")):
            verify(path)


def judge_replica(root: Path, name: str, ledger: Ledger, keys: Any, done: Any, cut_short: set[int]) -> None:
    """Check a replica: the finished deltas bring it to a moment of the table, and one more to the table."""
    replica, deltas = root / f"replica-{name}", root / f"deltas-{name}"
    finished = sorted(deltas.glob("*.delta"))
    if finished:
        hashemb.follow(replica, deltas)
        ledger.check(replica, keys, done, cut_short, is_cut=True)
    with hashemb.open(root / name, "r+") as table:
        table.export_delta(finished[-1] if finished else None, deltas / "last.delta", state=True)
        hashemb.follow(replica, deltas)
        with hashemb.open(replica) as followed:
            np.testing.assert_array_equal(followed.weight, table.weight)
            for state, array in table.state.items():
                np.testing.assert_array_equal(followed.state[state], array)


def verify(path: Path) -> None:
    """Check that everything with the name of a table is a complete table."""
    with hashemb.open(path) as table:
        assert np.isfinite(table.weight).all()
    names = {entry.name for entry in os.scandir(path)}
    if "snapshot.json" in names:
        assert not [name for name in names if name.startswith("rows.")], "what writers saved was not put away"
    if hasattr(hashemb, "verify"):
        assert hashemb.verify(path) == []


def clean_up(root: Path) -> None:
    """Check that leftovers of killed makers are unlocked and, if old enough, removed by the next `create`."""
    for path in (*(p for kind in MADE for p in root.glob(f"{kind}-*")), root / "own-before"):
        shutil.rmtree(path)
    for name in what_is_left(root):
        os.utime(root / name, (0, 0))
        wanted = name[1:].split(".")[0]
        hashemb.create(root / wanted, num_embeddings=10, embedding_dim=1).close()
        shutil.rmtree(root / wanted)
    assert what_is_left(root) == []
    names = {entry.name for table in TABLES for entry in os.scandir(root / table)}
    strangers = names - {f"{n}.npy" for n in ("weight", "accumulator", "blocks")}
    assert strangers == {"meta.json", "control", "lock", "history.json"}


# ---- the judge can fail ----


@pytest.mark.parametrize("table", range(len(TABLES)))
def test_canary_a_lost_or_doubled_batch_is_noticed(tmp_path: Path, table: int) -> None:
    create_tables(tmp_path)
    shutil.copytree(tmp_path / "own", tmp_path / "own-before")
    path, done = tmp_path / TABLES[table], np.array([2, 1, 0])
    with hashemb.open(path, "r+") as opened:
        keys = distinct_keys(opened)
        ledger = Ledger(table, 0, counters(path, keys), 0)
        for writer, number in ((0, 0), (0, 1), (1, 0)):
            chosen, grads = batch_of(0, writer, number, table)
            opened.update(keys[chosen], grads)
    for is_cut in (False, True):
        ledger.check(path, keys, done, set(), is_cut=is_cut)
        ledger.check(path, keys, done - [1, 0, 0], {0}, is_cut=is_cut)
    with pytest.raises(AssertionError, match="no legal state"):
        ledger.check(path, keys, done - [1, 0, 0], set(), is_cut=False)
    with pytest.raises(AssertionError, match="no legal state"):
        ledger.check(path, keys, done + np.array([0, 0, 1]), {0}, is_cut=False)
    with hashemb.open(path, "r+") as opened:
        opened.update(keys[:1], np.ones((1, 8), np.float32))
    with pytest.raises(AssertionError, match=r"no legal state|\("):
        ledger.check(path, keys, done, set(range(NUM_WRITERS)), is_cut=True)
