"""Files mapped at multiples of 2 MiB by `mmap` objects that own their mapping."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashemb._files import arrays as _mapping
from hashemb._files.arrays import HUGE_PAGE_BYTES, map_file


def address_of(mapped: mmap.mmap, offset: int) -> int:
    return int(np.frombuffer(mapped, np.uint8).ctypes.data) + offset


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """Open a file of slightly over 5 MiB whose bytes encode their position."""
    path = tmp_path / "file"
    np.arange((5 << 20) // 8 + 7, dtype=np.uint64).tofile(path)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("writable", [False, True])
def test_a_large_file_is_mapped_at_a_multiple_of_a_huge_page(fd: int, writable: bool) -> None:
    size = os.fstat(fd).st_size
    mapped, offset = map_file(fd, size, writable)
    assert address_of(mapped, offset) % HUGE_PAGE_BYTES == 0
    assert memoryview(mapped).readonly is not writable
    values = np.frombuffer(mapped, np.uint64, size // 8, offset)
    np.testing.assert_array_equal(values, np.arange(size // 8))
    if writable:
        values[-1] = 0
        mapped.flush()
        assert os.pread(fd, 8, size - 8) == bytes(8)
    with pytest.raises(BufferError):
        mapped.close()
    assert values[1] == 1
    del values
    mapped.close()


def test_a_small_file_is_mapped_plainly(fd: int) -> None:
    os.ftruncate(fd, HUGE_PAGE_BYTES - 1)
    mapped, offset = map_file(fd, HUGE_PAGE_BYTES - 1, False)
    assert (offset, len(mapped)) == (0, HUGE_PAGE_BYTES - 1)
    mapped.close()


def test_without_address_space_to_reserve_the_file_is_mapped_plainly(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = os.fstat(fd).st_size
    original = mmap.mmap

    def strict(fileno: int, length: int, *args: Any) -> mmap.mmap:
        if fileno == -1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return original(fileno, length, *args)

    monkeypatch.setattr(_mapping.mmap, "mmap", strict)
    mapped, offset = map_file(fd, size, True)
    assert offset == 0
    assert mapped[8] == 1
    mapped.close()


def address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("num_bytes", [4096, 4 << 20])
def test_what_cannot_be_mapped_is_an_error_and_leaves_nothing(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "file").write_bytes(bytes(num_bytes))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    map_file(fd, num_bytes, False)[0].close()
    before, kept = address_space_bytes(), []
    for _ in range(20):
        with pytest.raises(PermissionError) as caught:
            map_file(fd, num_bytes, True)
        kept.append(caught)  # with its frames
    assert address_space_bytes() < before + 10 * (4 << 20)
    assert {each.value.errno for each in kept} == {errno.EACCES}
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_file(fd, num_bytes, False)
