"""Many Python threads on one table object: updates are serialised, none is lost, and closing is clean."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import hashemb
from hashemb.errors import ClosedTableError


def run_threads(target, count):
    threads = [threading.Thread(target=target, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_no_update_is_lost_between_threads(tmp_path, num_threads):
    """With unit gradients of SGD on few rows, the sum is exact in float32."""
    keys, before = np.arange(5000) % 16, hashemb.get_num_threads()
    options = {"num_embeddings": 64, "embedding_dim": 4, "optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}
    hashemb.set_num_threads(num_threads)
    try:
        with hashemb.create(tmp_path / "t", **options) as table:

            def train(_):
                for _ in range(5):
                    table.update(keys, np.ones((5000, 4), np.float32))
                    table.lookup(keys)

            run_threads(train, 4)
            assert table.step == 20
            counts = np.bincount(table.rows(keys), minlength=64)
            np.testing.assert_array_equal(table.weight[counts > 0, 0], -20.0 * counts[counts > 0])
    finally:
        hashemb.set_num_threads(before)


def test_closing_under_work_is_a_clear_error(tmp_path):
    """Every thread ends with ClosedTableError, whatever it was doing, and the table is intact."""
    seen = []
    table = hashemb.create(tmp_path / "t", num_embeddings=2**24, embedding_dim=8, huge_pages=False)
    started = threading.Barrier(5)

    def work(i):
        rng = np.random.default_rng(i)
        started.wait()
        try:
            while True:
                keys = rng.integers(0, 2**62, 500)
                table.update(keys, np.ones((500, 8), np.float32))
                table.lookup(keys)
        except ClosedTableError as error:
            seen.append(error)

    def close(_):
        started.wait()
        threading.Event().wait(0.3)
        table.close()

    run_threads(lambda i: close(i) if i == 4 else work(i), 5)
    assert len(seen) == 4
    with hashemb.open(tmp_path / "t", "r+") as again:
        assert again.step > 0
        assert again.stats(exact=True).rows_touched == again.stats().rows_touched
