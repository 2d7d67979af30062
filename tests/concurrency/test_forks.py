"""Forks of a process whose threads are in the middle of an update, and the death of parent or child."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_forked_child, in_processes

import hashemb

KEYS, DIM = 60_000, 16
GRADS = np.ones((KEYS, DIM), np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    options: dict[str, Any] = {"optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}
    hashemb.create(tmp_path / "t", num_embeddings=2**22, embedding_dim=DIM, **options).close()
    return tmp_path / "t"


@contextmanager
def updating(table: hashemb.EmbeddingTable) -> Iterator[None]:
    """Update the table in a thread without a pause, so that all of its rows are locked nearly all of the time."""
    stop, began = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            table.update(np.arange(KEYS), GRADS)
            began.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert began.wait(60)
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive(), "the parent hangs"


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_child_forked_while_a_thread_holds_row_locks_works(path: Path, num_threads: int) -> None:
    """The child neither hangs on locks of its parent nor releases them; every step of both is counted, none is lost."""
    hashemb.set_num_threads(num_threads)
    children, own = 12, np.arange(KEYS)[:10]

    def child() -> None:
        table.update(own, GRADS[:10])
        with hashemb.open(path, "r+", isolation="exact") as again:
            again.update(own, GRADS[:10])

    with hashemb.open(path, "r+", isolation="exact") as table:
        with updating(table):
            for _ in range(children):
                in_forked_child(child)
        steps = table.step
        np.testing.assert_array_equal(table.lookup(own), np.full((10, DIM), -steps, np.float32))
        np.testing.assert_array_equal(table.lookup([KEYS - 1]), np.full((1, DIM), 2 * children - steps, np.float32))
    assert hashemb.open(path, "r+").recovered is None, "the last writer did not leave a clean table"


@pytest.mark.usefixtures("restore_threads")
def test_a_child_forked_during_a_snapshot_works(path: Path, tmp_path: Path) -> None:
    """The child writes blocks that the parent's snapshot still needs: they are saved, and the snapshot is complete."""
    with hashemb.open(path, "r+") as table:
        table.update(np.arange(KEYS), GRADS)
        forked = []

        def fork(done: int, total: int) -> None:
            if not forked:
                forked.append(in_forked_child(lambda: table.update(np.arange(KEYS), GRADS)))

        info = table.snapshot(tmp_path / "s", progress=fork)
        assert (len(forked), info.step, table.step) == (1, 1, 2)
    with hashemb.open(tmp_path / "s") as taken:
        assert taken.step == 1
        assert taken.stats(exact=True).rows_touched == taken.stats().rows_touched


# ---- the death of the parent ----


def parent(path: str, pipe: Any, uses_it: bool) -> None:
    """Update forever while a forked child lives on; send its process id. The child uses the table if `uses_it`."""
    with hashemb.open(path, "r+", isolation="exact") as table, updating(table):
        ready, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            if uses_it:
                table.update(np.arange(10), GRADS[:10])
            os.write(said, b"!")
            time.sleep(600)
            os._exit(0)
        os.read(ready, 1)
        pipe.send(pid)
        time.sleep(600)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("uses_it", [False, True])
def test_a_killed_parent_leaves_no_lock_to_its_children(path: Path, uses_it: bool) -> None:
    context = multiprocessing.get_context("spawn")
    rng = np.random.default_rng(3)
    for _ in range(3):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=parent, args=(str(path), theirs, uses_it))
        process.start()
        theirs.close()
        assert ours.poll(60)
        child = ours.recv()
        try:
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.join()
            os.kill(child, 0)  # it is alive
            in_processes(write_all, [(str(path),)])
        finally:
            os.kill(child, signal.SIGKILL)
            ours.close()


def write_all(path: str) -> None:
    with hashemb.open(path, "r+", isolation="exact") as table:
        before = table.step
        table.update(np.arange(KEYS), GRADS)
        assert table.step == before + 1
        table.snapshot(f"{path}.{before}")
