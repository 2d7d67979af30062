"""The rows that killed writers were writing are reported; see _files/seats.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import hashemb
from hashemb._files import seats as _seats
from hashemb._files.directory import Directory

DIM, ROWS = 64, 3000
SPAWN = multiprocessing.get_context("spawn")


def write_for_ever(path: str) -> None:
    """Train forever by SGD with learning rate 1 on gradients of -1: all elements of a row stay equal."""
    with hashemb.open(path, "r+", isolation="exact") as table:
        keys = np.arange(ROWS)
        _, first = np.unique(table.rows(keys), return_index=True)
        keys, grads = keys[first], -np.ones((first.size, DIM), np.float32)
        while True:
            table.update(keys, grads)


def kill_a_writer(path: Path, after_s: float) -> None:
    process = SPAWN.Process(target=write_for_ever, args=(str(path),))
    process.start()
    step = hashemb.info(path).step
    while hashemb.info(path).step < step + 3:
        time.sleep(0.002)
    time.sleep(after_s)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def torn(table: hashemb.EmbeddingTable) -> set[int]:
    weight = table.weight
    return set(np.flatnonzero((weight != weight[:, :1]).any(axis=1)).tolist())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "t"
    options = {"optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}
    hashemb.create(path, num_embeddings=ROWS, embedding_dim=DIM, **options).close()
    return path


def test_a_row_torn_by_a_kill_is_among_the_suspects(path: Path) -> None:
    with hashemb.open(path) as reader:
        for number in range(8):
            kill_a_writer(path, 0.003 * number)
            with Directory(str(path)) as directory:
                found = set(_seats.abandoned_rows(directory, ROWS).tolist())
            assert len(found) <= (number + 1) * hashemb.get_num_threads()
            assert torn(reader) <= found
    with hashemb.open(path, "r+") as table:
        assert table.recovered == "killed"
        assert set(table.suspects.tolist()) == found
        assert found, "eight kills, and nobody was writing a row"
    assert not (path / _seats.SEATS_FILE).exists()
    with hashemb.open(path, "r+") as table:
        assert table.recovered is None
        assert table.suspects.size == 0


def test_verify_names_suspects_where_it_is_asked_to(path: Path) -> None:
    for number in range(20):
        kill_a_writer(path, 0.001 * number)
        problems = hashemb.verify(path, suspects=True)
        if problems:
            break
    assert hashemb.verify(path) == []
    assert "which a killed process was writing" in problems[0].found
    assert problems[0].file.endswith("inflight")


def test_writers_that_live_are_no_suspects(path: Path) -> None:
    process = SPAWN.Process(target=write_for_ever, args=(str(path),))
    process.start()
    try:
        while hashemb.info(path).step < 3:
            time.sleep(0.002)
        for _ in range(50):
            assert hashemb.verify(path, suspects=True) == []
    finally:
        process.kill()
        process.join(60)


def test_every_writer_has_a_seat_of_its_own_and_a_child_takes_another(path: Path) -> None:
    keys, grads = np.arange(10), np.ones((10, DIM), np.float32)
    with hashemb.open(path, "r+") as one, hashemb.open(path, "r+") as two:
        lines = [table._core.in_flight for table in (one, two)]  # type: ignore[union-attr]
        lines[0][0, 0] = 1
        assert lines[1][0, 0] == 0
        pid = os.fork()
        if pid == 0:
            one.update(keys, grads)
            one._core.in_flight[0, 0] = 2  # type: ignore[union-attr, index]
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert [int(line[0, 0]) for line in lines] == [1, 0]
        with Directory(str(path)) as directory:
            assert _seats.abandoned_rows(directory, ROWS).tolist() == [1]
