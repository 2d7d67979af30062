"""Tables shared by processes: each sees what the others write, unwritten rows cost nothing, and forks work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_forked_child, wait_for
from worker import Worker, mapped_bytes

import hashemb
from hashemb import reference

SMAPS_KINDS = ("Rss", "Shared_Dirty", "Private_Dirty", "Anonymous")


@pytest.fixture(scope="module")
def other() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.emb"


def create(path: Path, **changes: Any) -> hashemb.EmbeddingTable:
    options: dict[str, Any] = {"num_embeddings": 2**20, "embedding_dim": 16, "init": hashemb.Uniform(0.5)}
    return hashemb.create(path, **options | changes)


# ---- one copy ----


def test_a_second_process_sees_rows_at_once(path: Path, other: Worker) -> None:
    """Updates are visible in both directions, through handles that stay open, without a flush."""
    keys = np.arange(1000)
    with create(path) as table:
        other.open(path, "r+")
        for _ in range(3):
            table.update(keys, np.ones((1000, 16), np.float32))
            np.testing.assert_array_equal(other.call(path, "r+", "lookup", keys), table.lookup(keys))
            before = table.lookup(keys)
            other.call(path, "r+", "update", keys, np.full((1000, 16), -2.0, np.float32))
            after = table.lookup(keys)
            assert (after > before).all()
            np.testing.assert_array_equal(other.call(path, "r+", "lookup", keys), after)
        other.close(path)
        assert table.step == 6


def test_step_and_rate_are_shared(path: Path, other: Worker) -> None:
    with create(path, optimizer=hashemb.SGD(lr=1.0), init=hashemb.Zeros()) as table:
        other.open(path, "r+")
        table.lr = 0.25
        assert other.call(path, "r+", "lr") == 0.25
        other.call(path, "r+", "lr=", 0.5)
        table.update([1], np.ones((1, 16), np.float32))
        assert other.call(path, "r+", "step") == 1
        np.testing.assert_array_equal(other.call(path, "r+", "lookup", [1]), np.full((1, 16), -0.5, np.float32))
        other.close(path)
        assert hashemb.info(path).lr == 0.5


def test_a_reader_sees_a_table_made_and_trained_elsewhere(path: Path, other: Worker) -> None:
    with create(path) as table:
        keys = hashemb.reference.hash_keys(["ann", "bob", "eve"])
        table.update(keys, np.ones((3, 16), np.float32))
        expected = table.lookup(keys)
        np.testing.assert_array_equal(other.call(path, "r", "lookup", keys), expected)
    np.testing.assert_array_equal(other.call(path, "r", "lookup", keys), expected)
    with pytest.raises(hashemb.errors.ReadOnlyTableError, match="open read-only"):
        other.call(path, "r", "update", keys, np.ones((3, 16), np.float32))


# ---- unwritten rows ----


def blocks_on_disk(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_blocks for file in path.iterdir()}


def file_system(path: Path) -> str:
    return subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, check=True, text=True).stdout.strip()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_an_untouched_row_reads_as_its_init_and_dirties_no_page(path: Path, other: Worker, mode: Any) -> None:
    keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 20_000)
    create(path, seed=5, num_embeddings=2**24).close()
    before = blocks_on_disk(path)
    with hashemb.open(path, mode) as table:
        found = table.lookup(keys)
        expected = reference.initial_rows(table.rows(keys), embedding_dim=16, init=table.init, seed=5)
        np.testing.assert_array_equal(found, expected)
        other.open(path, mode)
        np.testing.assert_array_equal(other.call(path, mode, "lookup", keys), found)
        for pages in (
            mapped_bytes(str(path / "weight"), *SMAPS_KINDS),
            other.request("maps", str(path / "weight"), *SMAPS_KINDS),
        ):
            assert pages["Rss"] >= 4096 * 10_000, "the rows were not read through the mapping"
            assert pages["Shared_Dirty"] == pages["Private_Dirty"] == pages["Anonymous"] == 0
        other.close(path)
        assert not table.weight[np.unique(table.rows(keys))].any()
    if file_system(path) != "tmpfs":  # it allocates a page for a hole as soon as it is read through a mapping
        assert blocks_on_disk(path) == before


def test_canary_a_write_dirties_pages_and_takes_blocks(path: Path) -> None:
    keys = np.arange(5000)
    with create(path, num_embeddings=2**24, huge_pages=False) as table:
        before = blocks_on_disk(path)
        table.update(keys, np.ones((5000, 16), np.float32))
        pages = mapped_bytes(str(path / "weight"), *SMAPS_KINDS)
        assert pages["Shared_Dirty"] + pages["Private_Dirty"] >= 4096 * 1000
        table.flush()
        assert blocks_on_disk(path)["weight.npy"] - before["weight.npy"] >= 8 * 1000


# ---- many processes at once ----


def train(path: str, first: int, steps: int) -> None:
    """Train keys first … first + 99, with one gradient of ones per step; to be run in a child process."""
    with hashemb.open(path, "r+") as table:
        for _ in range(steps):
            table.update(np.arange(first, first + 100), np.ones((100, 4), np.float32))


def test_writers_of_different_rows_do_not_disturb_each_other(path: Path) -> None:
    """Three processes train a table so large that their keys share no row; every step and row is accounted for."""
    spawn = multiprocessing.get_context("spawn")
    starts = [1000, 2000, 3000]
    with create(path, embedding_dim=4, optimizer=hashemb.SGD(lr=1.0), init=hashemb.Zeros()) as table:
        keys = np.concatenate([np.arange(start, start + 100) for start in starts])
        assert len(np.unique(table.rows(keys))) == 300
        processes = [spawn.Process(target=train, args=(str(path), start, 200)) for start in starts]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        np.testing.assert_array_equal(table.lookup(keys), np.full((300, 4), -200.0, np.float32))
        assert table.step == 600
        assert table.stats(exact=True).rows_touched == 300


def test_a_reader_beside_a_writer_sees_only_values_that_were_written(path: Path) -> None:
    """Every element is a whole number, and none decreases: a row may be between two steps, but never garbage."""
    spawn = multiprocessing.get_context("spawn")
    keys = np.arange(1000, 1100)
    with create(path, embedding_dim=4, optimizer=hashemb.SGD(lr=1.0), init=hashemb.Zeros()) as table:
        writer = spawn.Process(target=train, args=(str(path), 1000, 20_000))
        writer.start()
        last, distinct = np.zeros((100, 4), np.float32), 0
        while writer.is_alive():
            now = table.lookup(keys)
            assert (now == np.round(now)).all()
            assert ((now <= last) & (now >= -20_000)).all()
            distinct += bool((now != last).any())
            last = now
        writer.join()
        assert writer.exitcode == 0
        assert distinct > 10, "the reader saw too little of the writing"
        np.testing.assert_array_equal(table.lookup(keys), np.full((100, 4), -20_000.0, np.float32))


def test_a_killed_writer_leaves_a_table_that_works(path: Path) -> None:
    """After SIGKILL between or within updates, rows are whole numbers, counters agree, and the next writer works."""
    spawn = multiprocessing.get_context("spawn")
    keys = np.arange(1000, 1100)
    create(path, embedding_dim=4, optimizer=hashemb.SGD(lr=1.0), init=hashemb.Zeros()).close()
    writer = spawn.Process(target=train, args=(str(path), 1000, 10**9))
    writer.start()
    wait_for(lambda: hashemb.info(path).step > 50)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    with hashemb.open(path, "r+") as table:
        steps, rows = table.step, table.lookup(keys)
        assert (rows == np.round(rows)).all()
        assert ((rows == -steps) | (rows == 1 - steps)).all(), "more than the last batch is missing"
        table.update(keys, np.ones((100, 4), np.float32))
        np.testing.assert_array_equal(table.lookup(keys), rows - 1)
        assert table.step == steps + 1


# ---- fork ----


@pytest.mark.usefixtures("restore_threads")
def test_a_forked_child_works(path: Path) -> None:
    """After the parent's threads have run, the child has none of them, and must neither hang nor miss a row."""
    keys, grads = np.arange(50_000), np.ones((50_000, 16), np.float32)
    hashemb.set_num_threads(4)
    with create(path) as table:
        table.update(keys, grads)
        before = table.lookup(keys)

        def child() -> None:
            assert hashemb.get_num_threads() == 1
            np.testing.assert_array_equal(table.lookup(keys), before)
            table.update(keys, grads)
            hashemb.set_num_threads(3)
            table.update(keys, grads)
            with hashemb.open(path) as again:
                np.testing.assert_array_equal(again.lookup(keys), table.lookup(keys))
            table.close()

        in_forked_child(child)
        assert hashemb.get_num_threads() == 4
        assert table.step == 3
        assert (table.lookup(keys) < before).all()
        table.update(keys, grads)
    with hashemb.open(path) as table:
        assert table.step == 4


def test_a_fork_during_an_update_of_another_thread_works(path: Path) -> None:
    """The child must not wait for a lock that a thread of its parent holds."""
    keys, grads = np.arange(20_000), np.ones((20_000, 16), np.float32)
    stop = threading.Event()
    with create(path) as table:

        def keep_updating() -> None:
            while not stop.is_set():
                table.update(keys, grads)

        thread = threading.Thread(target=keep_updating)
        thread.start()
        try:
            for _ in range(5):
                in_forked_child(lambda: table.update(keys[:10], grads[:10]))
        finally:
            stop.set()
            thread.join()


def test_canary_a_child_that_fails_is_noticed() -> None:
    def fail() -> None:
        raise AssertionError("on purpose")

    with pytest.raises(AssertionError, match="the forked child failed"):
        in_forked_child(fail)
    with pytest.raises(pytest.fail.Exception, match="hangs"):
        in_forked_child(lambda: time.sleep(30), timeout_s=0.2)
