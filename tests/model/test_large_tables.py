"""Rows beyond 2^31, byte offsets beyond 2^32 and 2^35, and tables of 2^40 bytes: sparse files, but real arithmetic."""

from __future__ import annotations

import os

import numpy as np
import pytest

import hashemb
from hashemb import reference

ROWS, DIM, ROW_BYTES = 2**33, 16, 64


def stored_row(path, row, name="weight", row_bytes=ROW_BYTES):
    """Return the bytes of a row, read from the file without the library."""
    fd = os.open(path / f"{name}.npy", os.O_RDONLY)
    try:
        return np.frombuffer(os.pread(fd, row_bytes, 4096 + row * row_bytes), np.float32)
    finally:
        os.close(fd)


def test_rows_and_bytes_past_every_power(tmp_path):
    """Check one Adagrad step against the formula, at the byte where the row is according to the format."""
    path, keys = tmp_path / "big", np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 4000)
    grads = np.random.default_rng(2).normal(size=(4000, DIM)).astype(np.float32)
    rows = reference.rows(keys.astype(np.uint64), num_embeddings=ROWS)[:, 0]
    assert (rows > 2**31).mean() > 0.5
    assert (rows * ROW_BYTES > 2**35).mean() > 0.5
    assert len(np.unique(rows)) == 4000
    with hashemb.create(path, num_embeddings=ROWS, embedding_dim=DIM, optimizer=hashemb.Adagrad(lr=0.1)) as table:
        np.testing.assert_array_equal(table.rows(keys), rows)
        start = reference.initial_rows(rows, embedding_dim=DIM, init=table.init)
        np.testing.assert_array_equal(table.lookup(keys), start)
        table.update(keys, grads)
    accumulator = np.zeros_like(grads)
    expected = reference.adagrad_step(start, grads, accumulator, np.float32(0.1), hashemb.Adagrad(lr=0.1))
    with hashemb.open(path) as table:
        np.testing.assert_array_equal(table.lookup(keys), expected)
        assert table.stats(exact=True).rows_touched == 4000
    for i in np.argsort(rows)[[0, 1, 2000, -2, -1]]:
        np.testing.assert_array_equal(stored_row(path, int(rows[i])), expected[i])
        np.testing.assert_array_equal(stored_row(path, int(rows[i]), "accumulator"), accumulator[i])
        for neighbour in {rows[i] - 1, rows[i] + 1} - set(rows):
            assert not stored_row(path, int(neighbour)).any()


def test_disk_use_follows_rows_touched(tmp_path):
    """A random row of a sparse table costs at most one page per file."""
    with hashemb.create(tmp_path / "t", num_embeddings=ROWS, embedding_dim=DIM) as table:
        empty = table.stats().disk_bytes
        assert empty < 64 << 10
        for num_rows in (500, 1000):
            table.update(np.arange(num_rows), np.ones((num_rows, DIM), np.float32))
            grown = table.stats().disk_bytes - empty
            assert num_rows * 4096 < grown < num_rows * 5 * 4096


@pytest.mark.parametrize("shape", [(2**34, 16), (2**36, 16), (1, 2**24), (2**41 + 1, 1), (3, 5)])
def test_creation_takes_no_blocks(tmp_path, shape):
    rows, dim = shape
    optimizer = hashemb.SGD(lr=0.5)
    with hashemb.create(tmp_path / "t", num_embeddings=rows, embedding_dim=dim, optimizer=optimizer) as table:
        assert hashemb.info(tmp_path / "t").disk_bytes < 64 << 10
        assert hashemb.info(tmp_path / "t").logical_bytes > rows * dim * 4
        keys = np.array([0, 5, 2**63], np.uint64)
        before = table.lookup(keys)
        table.update(keys[:1], np.ones((1, dim), np.float32))
        assert (table.lookup(keys)[0] == before[0] - np.float32(0.5)).all()


def test_impossible_sizes_are_refused_with_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"need a file of \d+ bytes, more than 2\*\*63 - 1"):
        hashemb.create(tmp_path / "t", num_embeddings=2**62, embedding_dim=16)
    with pytest.raises(OSError, match=r"cannot hold a file of \d{10,} bytes"):
        hashemb.create(tmp_path / "t", num_embeddings=2**55, embedding_dim=16)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_million_random_keys(tmp_path):
    """This takes about 9 GB of disk and a few minutes; it prints the cost of a touched row."""
    keys = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, 1_000_000)
    with hashemb.create(tmp_path / "big", num_embeddings=ROWS, embedding_dim=DIM) as table:
        for part in np.array_split(keys, 10):
            table.update(part, np.ones((len(part), DIM), np.float32))
        trained = table.lookup(keys)
    with hashemb.open(tmp_path / "big") as table:
        stats = table.stats(exact=True)
        np.testing.assert_array_equal(table.lookup(keys), trained)
    assert stats.rows_touched == len(np.unique(reference.rows(keys.astype(np.uint64), num_embeddings=ROWS)))
    print(f"{stats.rows_touched} rows, {stats.disk_bytes / stats.rows_touched:.0f} bytes of disk a row")
    assert stats.disk_bytes < stats.rows_touched * 3 * 4096
