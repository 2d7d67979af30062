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
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._files.arrays import HUGE_PAGE_BYTES, MappedFiles
from hashemb._files.directory import disk_bytes
from hashemb._files.format import DATA_OFFSET_BYTES, FileSpec
from hashemb._files.space import block_bytes
from hashemb._open_file import OpenFile

__all__ = ["Extents", "HugePages", "is_tmpfs"]

_MADV_COLLAPSE = 25  # Linux 6.1
_TMPFS_MAGIC = 0x01021994
_COLLAPSES_PER_CALL = 64  # each takes 1 to 3 ms; the limit is higher if a call has written more extents
_LOOKS_PER_EXTENT = 16
_WORTH_COLLAPSING = 4  # blocks of an extent per written block: collapsing earlier copies fewer pages
_PAGEMAP_SCAN, _PAGE_IS_HUGE = 0xC0606610, 1 << 6  # Linux 6.7
_libc = ctypes.CDLL(None, use_errno=True)


def is_tmpfs(fd: int) -> bool:
    """Return whether the file is on tmpfs, where nothing is written back and huge pages have to be collapsed."""
    result = (ctypes.c_long * 64)()  # struct statfs has 120 bytes and begins with f_type
    return _libc.fstatfs(fd, result) == 0 and result[0] == _TMPFS_MAGIC


class HugePages:
    """The huge pages of one open table.

    Attributes
    ----------
    asked : bool
        Whether the kernel was asked to map huge pages at the first access.
    """

    def __init__(self, mapped: MappedFiles) -> None:
        self._mapped, self.asked = mapped, False
        self._extents: dict[str, Extents] = {}

    def ask(self, *, always: bool) -> None:
        """Ask before the first access, when a table on disk gets huge pages; on tmpfs extents are collapsed later."""
        mapped = self._mapped
        specs = {name: spec for name, spec in mapped.meta.row_files.items() if spec.file_bytes >= HUGE_PAGE_BYTES}
        on_tmpfs = bool(specs) and is_tmpfs(mapped.fd("weight"))
        if always or (specs and not on_tmpfs and self._may_become_dense()):
            self.asked = bool(specs)
            for name, spec in specs.items():
                with suppress(OSError):
                    mapped.maps[name].madvise(mmap.MADV_HUGEPAGE, mapped.start(name), spec.file_bytes)
        if on_tmpfs:
            aligned = {name: spec for name, spec in specs.items() if mapped.address(name) % HUGE_PAGE_BYTES == 0}
            self._extents = {name: self._make_extents(name, spec, always) for name, spec in aligned.items()}
        if on_tmpfs and always:
            for name, extents in self._extents.items():
                extents.collapse_present(mapped.fd(name))

    def _may_become_dense(self) -> bool:
        """Return whether the whole table, without holes, fits the kernel's limit for dirty pages and the disk."""
        room_bytes = disk_bytes(self._mapped.directory) + free_bytes(self._mapped.fd("weight"))
        return self._mapped.meta.logical_bytes <= min(room_bytes, write_back_limit_bytes())

    def _make_extents(self, name: str, spec: FileSpec, always: bool) -> Extents:
        mapped = self._mapped

        def collapse(begin: int, num_bytes: int) -> None:
            mapped.maps[name].madvise(_MADV_COLLAPSE, mapped.start(name) + begin, num_bytes)

        size, blocks_fd = block_bytes(mapped.meta, name), mapped.fd("blocks")
        return Extents(collapse, spec.file_bytes, size, blocks_fd, always=always)

    def collapse_written(self, blocks: npt.NDArray[Any]) -> None:
        """On tmpfs, collapse the extents that are now full enough; `blocks` (ascending) have just been written."""
        for extents in self._extents.values():
            extents.collapse_written(blocks)

    def mapped_bytes(self) -> int | None:
        """Return the bytes of the arrays that this process maps with huge pages; None if the kernel cannot tell."""
        total = 0
        for name, spec in self._mapped.meta.files.items():
            begin = self._mapped.address(name)
            found = huge_page_bytes(begin, begin + spec.file_bytes)
            if found is None:
                return None
            total += found
        return total


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
    collapse : callable
        ``collapse(begin, num_bytes)`` collapses bytes of the file, and raises `OSError` if the kernel declines.
    file_bytes, block_bytes : int
        Size of the row file and of a block in it.
    blocks_fd : int
        Descriptor of blocks.npy, which is read, as access through its mapping would allocate a page for a hole.
    always : bool
        Whether to collapse every extent that holds any block.
    """

    def __init__(
        self,
        collapse: Callable[[int, int], None],
        file_bytes: int,
        block_bytes: int,
        blocks_fd: int,
        *,
        always: bool,
    ) -> None:
        self._collapse_bytes, self._able = collapse, True
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
        try:
            self._collapse_bytes(extent * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a kernel before 6.1, or one that declines for other reasons
                self._able = False


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
