"""Huge pages for a table's files: the decision to ask the kernel for them, the request, and their number.

All requests are advice: where the kernel ignores them, a table works as it does without.
docs/explanation/performance.md describes what is requested and why; decisions/0006 has the measurements.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._core import OpenFile
from hashemb._files.format import DATA_OFFSET_BYTES
from hashemb._files.mapping import HUGE_PAGE_BYTES

__all__ = ["Extents", "advise", "free_bytes", "huge_page_bytes", "is_tmpfs", "write_back_limit_bytes"]

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1
_TMPFS_MAGIC = 0x01021994
_COLLAPSES_PER_CALL = 64  # each takes 1 to 3 ms; the limit is higher if a call has written more extents
_LOOKS_PER_EXTENT = 16
_WORTH_COLLAPSING = 4  # blocks of an extent per written block: collapsing earlier copies fewer pages
_PAGEMAP_SCAN, _PAGE_IS_HUGE = 0xC0606610, 1 << 6  # Linux 6.7
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def is_tmpfs(fd: int) -> bool:
    """Return whether the file is on tmpfs, where nothing is written back and huge pages have to be collapsed."""
    result = (ctypes.c_long * 64)()  # struct statfs has 120 bytes and begins with f_type
    return _libc.fstatfs(fd, result) == 0 and result[0] == _TMPFS_MAGIC


def advise(address: int, num_bytes: int) -> None:
    """Ask for 2 MiB pages at the first access to each extent; this has to precede that access."""
    _libc.madvise(address, num_bytes, _MADV_HUGEPAGE)


# ---- limits for huge pages ----


def free_bytes(fd: int) -> int:
    """Return the free space on the file system of a file."""
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize


def write_back_limit_bytes(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Return the dirty bytes at which the kernel starts to write back, in the machine or our tightest cgroup.

    The kernel does not write back a table of at most this size by itself. The result is 0 if it cannot be read.
    """
    try:
        with open(f"{proc}/vmstat", encoding="ascii") as file:
            pages = next(int(line.split()[1]) for line in file if line.startswith("nr_dirty_background_threshold "))
        percent = int(_text(f"{proc}/sys/vm/dirty_background_ratio"))
        limits = [limit * percent // 100 for limit in _memory_limits(proc, cgroups)]
    except (OSError, ValueError, StopIteration):
        return 0
    return min([pages * mmap.PAGESIZE, *limits])


def _memory_limits(proc: str, cgroups: str) -> Iterator[int]:
    """Yield memory.max of our cgroup (version 2) and of its ancestors, where visible and set."""
    with open(f"{proc}/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        paths = [line.rstrip("\n")[3:] for line in file if line.startswith("0::")]
    for path in paths:
        group = os.path.normpath(path)  # begins with /.. if the cgroup is outside our cgroup namespace
        while True:
            with suppress(FileNotFoundError):  # the root has no such file
                text = _text(f"{cgroups}/{group}/memory.max")
                if text != "max":
                    yield int(text)
            if group == "/":
                break
            group = os.path.dirname(group)


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


# ---- tmpfs: collapsing existing pages ----


class Extents:
    """The 2 MiB extents of one row file on tmpfs, each collapsed into a huge page at most once by this process.

    Without `always`, an extent is collapsed when a quarter of its blocks have been written, so that a sparse table
    remains sparse.

    Parameters
    ----------
    address : int
        Address at which the file is mapped. Huge pages are possible only if it is a multiple of 2 MiB.
    file_bytes, block_bytes : int
        Size of the row file and of a block in it.
    blocks_fd : int
        Descriptor of blocks.npy, which is read, as access through its mapping would allocate a page for a hole.
    always : bool
        Whether to collapse every extent that holds any block.
    """

    def __init__(self, address: int, file_bytes: int, block_bytes: int, blocks_fd: int, *, always: bool) -> None:
        self._address, self._able = address, address % HUGE_PAGE_BYTES == 0
        self._block_bytes, self._blocks_fd, self._always = block_bytes, blocks_fd, always
        self._num_extents = file_bytes // HUGE_PAGE_BYTES
        self._tried = np.zeros(self._num_extents + 1, np.bool_)
        self._tried[-1] = True  # a partial extent at the end cannot be a huge page
        self._ends = np.zeros(self._num_extents, np.int32)
        #: Number of first and last bytes of blocks to be written before it is worth counting the written blocks.
        self._worth_a_look = 2 * HUGE_PAGE_BYTES // block_bytes // _LOOKS_PER_EXTENT
        self._within_block = np.array([*range(0, block_bytes, HUGE_PAGE_BYTES), block_bytes - 1])

    def collapse_present(self, fd: int) -> None:
        """Collapse every extent of the file that has any page."""
        extent = 0
        while extent < self._num_extents and self._able:
            try:
                extent = os.lseek(fd, extent * HUGE_PAGE_BYTES, os.SEEK_DATA) // HUGE_PAGE_BYTES
            except OSError:  # ENXIO: no more data
                return
            if extent < self._num_extents:
                self._collapse(extent)
            extent += 1

    def collapse_written(self, blocks: npt.NDArray[Any]) -> None:
        """Collapse the extents that are now full enough; `blocks` (ascending) have just been written."""
        if not self._able:
            return
        extents, ends = self._touched(blocks)
        if not self._always:
            written = blocks.size * self._block_bytes // HUGE_PAGE_BYTES
            extents = self._due(extents, ends, max(_COLLAPSES_PER_CALL, written))
        for extent in extents.tolist():
            if self._always or self._is_worth_it(extent):
                self._collapse(extent)

    def _touched(self, blocks: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the untried extents that overlap the blocks, and the number of block starts and ends in each."""
        begins = DATA_OFFSET_BYTES + blocks.astype(np.int64) * self._block_bytes
        extents = ((begins[:, None] + self._within_block) // HUGE_PAGE_BYTES).ravel()
        extents = np.minimum(extents, self._num_extents)
        first = np.flatnonzero(np.append(True, extents[1:] != extents[:-1]))
        ends = np.append(first[1:], extents.size) - first
        untried = ~self._tried[extents[first]]
        return extents[first[untried]], ends[untried]

    def _due(self, extents: npt.NDArray[Any], ends: npt.NDArray[Any], at_most: int) -> npt.NDArray[Any]:
        """Return the extents that have grown enough since they were last counted: the `at_most` with most growth."""
        self._ends[extents] += ends
        due = self._ends[extents] >= self._worth_a_look
        extents, ends = extents[due], ends[due]
        if extents.size > at_most:
            extents = extents[np.argpartition(-ends, at_most)[:at_most]]
        self._ends[extents] = 0
        return extents

    def _is_worth_it(self, extent: int) -> bool:
        begin = extent * HUGE_PAGE_BYTES - DATA_OFFSET_BYTES
        first, end = max(0, begin) // self._block_bytes, -(-(begin + HUGE_PAGE_BYTES) // self._block_bytes)
        data = os.pread(self._blocks_fd, 4 * (end - first), DATA_OFFSET_BYTES + 4 * first)
        epochs = np.frombuffer(data, np.uint32)
        return _WORTH_COLLAPSING * int(np.count_nonzero(epochs)) >= epochs.size

    def _collapse(self, extent: int) -> None:
        self._tried[extent] = True
        address = self._address + extent * HUGE_PAGE_BYTES
        if _libc.madvise(address, HUGE_PAGE_BYTES, _MADV_COLLAPSE) and ctypes.get_errno() == errno.EINVAL:
            self._able = False  # a kernel before 6.1, or one that declines for other reasons


# ---- counting ----


def huge_page_bytes(begin: int, end: int) -> int | None:
    """Return the bytes in an address range that this process maps with huge pages; None on kernels before 6.7."""
    regions = (ctypes.c_uint64 * (3 * 256))()  # struct page_region: start, end, categories
    total = 0
    try:
        pagemap = OpenFile("/proc/self/pagemap")
    except OSError:
        return None
    try:
        while begin < end:
            scan = (ctypes.c_uint64 * 12)(96, 0, begin, end, 0, ctypes.addressof(regions), 256, 0, 0, _PAGE_IS_HUGE)
            scan[11] = _PAGE_IS_HUGE  # struct pm_scan_arg: category_anyof_mask is 0, return_mask
            found = fcntl.ioctl(pagemap.fd, _PAGEMAP_SCAN, scan)
            total += sum(regions[3 * i + 1] - regions[3 * i] for i in range(found))
            begin = scan[4]  # walk_end
    except OSError:
        return None
    finally:
        pagemap.close()
    return total
