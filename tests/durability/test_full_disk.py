"""A full file system is a NoSpaceError before anything of the batch is written, never a SIGBUS."""

from __future__ import annotations

import errno
import os
import subprocess

import numpy as np
import pytest

import hashemb
from hashemb import _core, _storage
from hashemb.errors import NoSpaceError

OPTIONS = {"num_embeddings": 2**22, "embedding_dim": 16, "optimizer": hashemb.Adagrad(lr=0.1)}


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request, tmp_path):
    """A mounted file system of 16 MiB."""
    target = tmp_path / "disk"
    target.mkdir()
    if request.param == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(target)]]
    else:
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, 16 << 20)
        commands = [["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(target)]]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip(f"{command[0]} is not installed")
        if done.returncode:
            pytest.skip(f"this user may not mount file systems: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def fill(directory):
    """Takes all space that is left; returns the files to remove."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return ballast


def test_update_on_a_full_disk(small_disk):
    """Refused whole, and after space is freed the same call gives what it would have given."""
    keys, grads = np.arange(1000), np.random.default_rng(1).normal(size=(1000, 16)).astype(np.float32)
    with hashemb.create(small_disk / "t", **OPTIONS) as table:
        table.update(keys[:50], grads[:50])
        assert table.stats(exact=True).rows_touched == 50  # on tmpfs, also takes the pages of blocks.npy
        before, step, vectors = table.weight[table.rows(keys)].copy(), table.step, table.lookup(keys)
        ballast = fill(small_disk)
        with pytest.raises(NoSpaceError, match="no space left"):
            table.update(keys, grads)
        np.testing.assert_array_equal(table.weight[table.rows(keys)], before)
        assert table.step == step
        np.testing.assert_array_equal(table.lookup(keys), vectors)
        table.update(keys[:50], grads[:50])  # rows that have their space
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
    """Linux before 5.14 knows no MADV_POPULATE_WRITE: the same rows, and space is still reserved."""
    asked = []

    def refuse(array, blocks, block_bytes):
        asked.append(len(blocks))
        return errno.EINVAL

    monkeypatch.setattr(_core, "populate_blocks", refuse)
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        table.update(np.arange(10), np.ones((10, 16), np.float32))
        assert asked == [10, 10, 10]
        assert table.stats().disk_bytes >= 3 * 10 * 4096


def test_full_disk_seen_by_fallocate(tmp_path, monkeypatch):
    """The slow way names the file and leaves the table as it was."""

    def full(fd, mode, offset, length):
        _storage.ctypes.set_errno(errno.ENOSPC)
        return -1

    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        monkeypatch.setattr(_core, "populate_blocks", lambda *args: errno.EFAULT)
        monkeypatch.setattr(_storage._libc, "fallocate", full)
        with pytest.raises(NoSpaceError, match=r"no space left.*weight\.npy"):
            table.update([1], np.ones((1, 16), np.float32))
        assert table.step == 0
        assert not table.weight[table.rows([1])].any()
