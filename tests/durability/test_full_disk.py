"""A full file system raises NoSpaceError before any part of a batch is written, and never causes a SIGBUS."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from disks import fill, mounted

import hashemb
from hashemb import _core
from hashemb._files import space as _space
from hashemb.errors import NoSpaceError

OPTIONS = {"num_embeddings": 2**22, "embedding_dim": 16, "optimizer": hashemb.Adagrad(lr=0.1)}


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request, tmp_path):
    yield from mounted(request.param, 16, tmp_path)


@pytest.fixture(params=["tmpfs", "ext4"])
def larger_disk(request, tmp_path):
    yield from mounted(request.param, 64, tmp_path)


@pytest.fixture
def ext4(tmp_path):
    yield from mounted("ext4", 64, tmp_path)


def test_update_on_a_full_disk(small_disk):
    """The whole update is refused; after space is freed, the same call gives the usual result."""
    keys, grads = np.arange(1000), np.random.default_rng(1).normal(size=(1000, 16)).astype(np.float32)
    with hashemb.create(small_disk / "t", **OPTIONS) as table:
        table.update(keys[:50], grads[:50])
        assert table.stats(exact=True).rows_touched == 50
        before, step, vectors = table.weight[table.rows(keys)].copy(), table.step, table.lookup(keys)
        ballast = fill(small_disk)
        with pytest.raises(NoSpaceError, match="no space left"):
            table.update(keys, grads)
        np.testing.assert_array_equal(table.weight[table.rows(keys)], before)
        assert table.step == step
        np.testing.assert_array_equal(table.lookup(keys), vectors)
        table.update(keys[:50], grads[:50])  # rows whose space is allocated
        ballast.unlink()
        table.update(keys, grads)
        assert table.stats(exact=True).rows_touched == len(np.unique(table.rows(keys)))


def test_create_on_a_full_disk(small_disk):
    fill(small_disk)
    with pytest.raises(NoSpaceError, match="no space left") as caught:
        hashemb.create(small_disk / "t", **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) in (["ballast"], ["ballast", "lost+found"], ["lost+found", "ballast"])


def test_kernels_without_populate_use_fallocate(tmp_path, monkeypatch):
    """Linux before 5.14 has no MADV_POPULATE_WRITE: the rows are the same, and space is still reserved."""
    asked = []

    def refuse(array, blocks, block_bytes):
        asked.append(len(blocks))
        return errno.EINVAL

    monkeypatch.setattr(_core, "populate_blocks", refuse)
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        table._core.asks_for_room = True
        table.update(np.arange(10), np.ones((10, 16), np.float32))
        assert asked == 3 * [10, *10 * [1]]  # in each file first all together, then one by one
        assert table.stats().disk_bytes >= 3 * 10 * 4096


def test_update_on_a_full_disk_with_huge_pages(larger_disk):
    """On ext4 a row takes 2 MiB of each file; on tmpfs a full disk only prevents collapsing pages."""
    keys, grads = np.arange(10), np.random.default_rng(1).normal(size=(10, 16)).astype(np.float32)
    with hashemb.create(larger_disk / "t", huge_pages=True, **OPTIONS) as table:
        table.update(keys[:3], grads[:3])
        if table.stats().huge_page_bytes == 0:
            pytest.skip("files here get no huge pages")
        before, vectors = table.weight[table.rows(keys)].copy(), table.lookup(keys)
        ballast = fill(larger_disk)
        with pytest.raises(NoSpaceError, match="no space left"):
            table.update(keys, grads)
        np.testing.assert_array_equal(table.weight[table.rows(keys)], before)
        assert table.step == 1
        table.update(keys[:3], grads[:3])
        ballast.unlink()
        table.update(keys, grads)
        assert (table.lookup(keys) != vectors).any(axis=1).all()


def read_only_huge_folios(path, keys):
    """Read unwritten rows through huge pages, which leaves folios of 2 MiB over holes in the page cache."""
    with hashemb.open(path, huge_pages=True) as reader:
        reader.lookup(keys)
        for array in reader.state.values():
            assert np.isfinite(array[reader.rows(keys)]).all()
        return reader.stats().huge_page_bytes


def test_update_beside_huge_pages_of_others(ext4):
    """A process without huge pages can find them in the page cache, where a store then needs 2 MiB of space."""
    keys, grads = np.arange(4), np.ones((4, 16), np.float32)
    with hashemb.create(ext4 / "t", huge_pages=False, **OPTIONS) as table:
        table.update(keys[:1], grads[:1])
        if not read_only_huge_folios(ext4 / "t", keys):
            pytest.skip("files here get no huge pages")
        ballast = fill(ext4)
        os.truncate(ballast, ballast.stat().st_size - (1 << 20))  # space for pages, not for folios
        for some in (keys[1:2], keys):
            with pytest.raises(NoSpaceError, match=r"no space left.*weight\.npy"):
                table.update(some, grads[: some.size])
        assert not table.weight[table.rows(keys[1:])].any()
        assert table.step == 1
        ballast.unlink()
        table.update(keys, grads)
        assert table.weight[table.rows(keys)].all()


def answers(*errors):
    """Return a `populate_blocks` whose calls fail with these errors in turn, and which then works."""
    left, real = list(errors), _core.populate_blocks

    def populate(array, blocks, block_bytes):
        return left.pop(0) if left else real(array, blocks, block_bytes)

    return populate


@pytest.fixture
def allocated(monkeypatch):
    """Record (first byte, bytes) of each fallocate."""
    calls, real = [], _space._libc.fallocate

    def fallocate(fd, mode, offset, length):
        calls.append((offset, length))
        return real(fd, mode, offset, length)

    monkeypatch.setattr(_space._libc, "fallocate", fallocate)
    return calls


def test_what_is_allocated_when_populating_fails(tmp_path, monkeypatch, allocated):
    """Each block is allocated; only if populating it still fails, the 2 MiB around it are, within the file."""
    with hashemb.create(tmp_path / "t", huge_pages=False, **OPTIONS) as table:
        size = (tmp_path / "t" / "weight.npy").stat().st_size
        monkeypatch.setattr(_core, "populate_blocks", answers(errno.EFAULT))
        table._files.claim(np.array([0, 1, 65535], np.uint64))
        assert allocated == [(4096, 4096), (8192, 4096), (size - 4096, 4096)]
        assert np.flatnonzero(table._files.arrays["blocks"]).tolist() == [0, 1, 65535]
        allocated.clear()
        monkeypatch.setattr(_core, "populate_blocks", answers(errno.EFAULT, 0, errno.EFAULT))
        table._files.claim(np.array([2, 600], np.uint64))
        assert allocated == [(12288, 4096), (601 * 4096, 4096), (2 << 20, 2 << 20)]


@pytest.mark.parametrize(("code", "raised"), [(errno.EFAULT, errno.EIO), (errno.ENOMEM, errno.ENOMEM)])
def test_pages_that_cannot_be_had_at_all(tmp_path, monkeypatch, code, raised):
    """If there is space but faults fail (broken disk or memory), an error is raised and nothing is marked."""
    message = r"block \d+ of 4096 bytes cannot be made writable.*accumulator\.npy"
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        table._core.asks_for_room = True
        monkeypatch.setattr(_core, "populate_blocks", answers(0, code, code, code))
        with pytest.raises(OSError, match=message) as caught:
            table.update([1], np.ones((1, 16), np.float32))
        assert caught.value.errno == raised
        assert not isinstance(caught.value, NoSpaceError)
        assert table.step == 0
        assert not table._files.arrays["blocks"].any()
        table.update([1], np.ones((1, 16), np.float32))
        assert table.step == 1


def test_full_disk_seen_by_fallocate(tmp_path, monkeypatch):
    """The slow path names the file and leaves the table unchanged."""

    def full(fd, mode, offset, length):
        _space.ctypes.set_errno(errno.ENOSPC)
        return -1

    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        table._core.asks_for_room = True
        monkeypatch.setattr(_core, "populate_blocks", lambda *args: errno.EFAULT)
        monkeypatch.setattr(_space._libc, "fallocate", full)
        with pytest.raises(NoSpaceError, match=r"no space left.*weight\.npy"):
            table.update([1], np.ones((1, 16), np.float32))
        assert table.step == 0
        assert not table.weight[table.rows([1])].any()
