"""On tmpfs reading a hole allocates a page. If none is left, this raises NoSpaceError and never causes a SIGBUS.

Each case runs in a forked child, so that a signal is noticed.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

import numpy as np
import pytest
from disks import fill, mounted

import hashemb
from hashemb.errors import NoSpaceError

N, DIM = 2**20, 16
OPTIONS = {"num_embeddings": N, "embedding_dim": DIM}
KEYS = np.arange(3000)
GRADS = np.random.default_rng(1).normal(size=(KEYS.size, DIM)).astype(np.float32)
BAGS = np.arange(0, KEYS.size + 1, 10)
OPTIMIZERS = {
    "adagrad": hashemb.Adagrad(lr=0.1),
    "decay": hashemb.Adagrad(lr=0.1, weight_decay=0.01),
    "sgd": hashemb.SGD(lr=0.1),
}


@pytest.fixture
def tmpfs(tmp_path):
    yield from mounted("tmpfs", 48, tmp_path)


def in_child(function, *args):
    """Call the function in a fork; a signal or an exception there fails the test."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}; below 0 it is a signal"


def use(table, what):
    """Make one call and return its result."""
    if what == "lookup":
        return table.lookup(KEYS)
    if what == "pooled":
        return table.lookup(KEYS, offsets=BAGS, pooling="mean")
    if what == "update":
        table.update(KEYS, GRADS)
    else:
        table.update(KEYS, GRADS[: BAGS.size - 1], offsets=BAGS)
    return table.lookup(KEYS)


def use_full_and_freed(disk, options, mode, what):
    """Check that a call on a full disk raises an error and changes nothing, and gives the right answer with space."""
    with hashemb.create(disk.parent / "elsewhere", **options) as twin:
        twin.update(KEYS[:5], GRADS[:5])
        expected = use(twin, what)
    with hashemb.open(disk / "t", mode) as table:
        ballast = fill(disk)
        for _ in range(2):
            with pytest.raises(NoSpaceError, match="no space left"):
                use(table, what)
        assert table.step == 1
        np.testing.assert_array_equal(table.lookup(KEYS[:5]), twin_lookup(disk, KEYS[:5]))
        ballast.unlink()
        np.testing.assert_array_equal(use(table, what), expected)


def twin_lookup(disk, keys):
    """Return the values of rows whose pages exist, from a copy, because the table itself is under test."""
    with hashemb.open(disk.parent / "copy") as copy:
        return copy.lookup(keys)


@pytest.mark.parametrize(
    ("what", "mode"), [("lookup", "r"), ("lookup", "r+"), ("pooled", "r"), ("update", "r+"), ("pooled update", "r+")]
)
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_reading_holes(tmpfs, kind, what, mode):
    options = {**OPTIONS, "optimizer": OPTIMIZERS[kind], "num_hashes": 2 if kind == "sgd" else 1}
    with hashemb.create(tmpfs / "t", **options) as table:
        table.update(KEYS[:5], GRADS[:5])
        table.snapshot(tmpfs.parent / "copy")
    in_child(use_full_and_freed, tmpfs, options, mode, what)


def look_around(disk):
    """On a full disk, counting rows and updating existing rows need no page; a snapshot to it raises NoSpaceError."""
    with hashemb.open(disk / "t", "r+") as table:
        fill(disk)
        assert table.stats(exact=True).rows_touched == 5
        with pytest.raises(NoSpaceError):
            table.snapshot(disk / "s")
        table.update(KEYS[:5], GRADS[:5])
        assert table.step == 2
    assert sorted(os.listdir(disk)) == ["ballast", "t"]


def test_scans_take_no_pages(tmpfs):
    with hashemb.create(tmpfs / "t", **{**OPTIONS, "num_embeddings": 2**28}) as table:
        table.update(KEYS[:5], GRADS[:5])
        before = table.stats().disk_bytes
        assert table.stats(exact=True).rows_touched == 5
        table.snapshot(tmpfs.parent / "s")
        assert table.stats().disk_bytes - before <= 4096  # history.json; 1 MiB of epochs is a hole
    in_child(look_around, tmpfs)


def test_rows_that_are_there_need_no_space(tmpfs):
    """With a full disk and a fully allocated table, nothing fails."""
    keys = np.arange(500)
    with hashemb.create(tmpfs / "t", num_embeddings=1000, embedding_dim=DIM) as table:
        for _ in range(2):
            table.update(keys, GRADS[:500])
        expected = table.lookup(keys)
        fill(tmpfs)
        np.testing.assert_array_equal(table.lookup(keys), expected)
        table.update(keys, GRADS[:500])
        assert table.step == 3


def test_a_tmpfs_without_a_limit(tmp_path):
    """With size=0 the file system reports no blocks at all."""
    for disk in mounted("tmpfs", 0, tmp_path):
        with hashemb.create(disk / "t", **OPTIONS) as table:
            table.update(KEYS, GRADS)
            assert np.isfinite(table.lookup(KEYS)).all()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_snapshot_to_a_full_disk_disturbs_no_writer(tmp_path, kind):
    """The snapshot fails in the call that requested it; every update of a concurrent writer succeeds."""
    keys = np.arange(20_000)
    grads = np.ones((keys.size, DIM), np.float32)
    options = {**OPTIONS, "optimizer": hashemb.SGD(lr=0.1)}
    for disk in mounted(kind, 24, tmp_path):
        with hashemb.create(tmp_path / "t", **options) as table, hashemb.open(tmp_path / "t", "r+") as writer:
            table.update(keys, grads)
            stop, failed = threading.Event(), []

            def write(writer=writer, stop=stop, failed=failed):
                try:
                    while not stop.is_set():
                        writer.update(keys, grads)
                except BaseException as error:
                    failed.append(error)

            thread = threading.Thread(target=write)
            thread.start()
            try:
                for _ in range(3):
                    with pytest.raises(NoSpaceError, match="no space left"):
                        table.snapshot(disk / "s")
            finally:
                stop.set()
                thread.join()
            assert failed == []
            assert sorted(set(os.listdir(disk)) - {"lost+found"}) == []
            table.snapshot(tmp_path / "s")
            with hashemb.open(tmp_path / "s") as copy:
                np.testing.assert_array_equal(copy.lookup(keys), table.lookup(keys))
