"""Reserving space in a table's files before anything is written: a store without space would raise a signal.

Space is first requested by faulting pages in, which the core does for a batch by itself. This module is used after that
has failed: with allocation, it finds out what fits on a disk that is nearly full.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from hashemb import _core
from hashemb._files import blocks as _blocks
from hashemb._files.arrays import HUGE_PAGE_BYTES, Array
from hashemb._files.directory import space_errors
from hashemb._files.format import DATA_OFFSET_BYTES, TableMeta
from hashemb._open_file import OpenFile

__all__ = ["Space", "block_bytes"]

_FALLOC_KEEP_SIZE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def block_bytes(meta: TableMeta, name: str) -> int:
    """Return the bytes of a block in one of the array files, by name without `.npy`."""
    return 4 if name == "blocks" else _blocks.block_bytes(meta, meta.files[name])


class Space:
    """Space of an open table's array files.

    Parameters
    ----------
    path : str
        Path of the table, for messages.
    meta : TableMeta
    arrays : dict of ndarray
        The mapped arrays by name without `.npy`.
    files : dict of OpenFile
        The files of the arrays.
    """

    def __init__(self, path: str, meta: TableMeta, arrays: dict[str, Array], files: dict[str, OpenFile]) -> None:
        self._path, self._meta, self._arrays, self._files = path, meta, arrays, files

    def reserve(self, blocks: Array) -> None:
        """Reserve space for `blocks` (ascending) in every file.

        If it raises `NoSpaceError`, no data has changed and the call can be repeated.
        """
        for name in (*self._meta.row_files, "blocks"):
            self.reserve_array(name, blocks)

    def reserve_array(self, name: str, blocks: Array) -> None:
        """Fault the blocks in for writing, which reserves their space: all together or, if that fails, one by one."""
        size = block_bytes(self._meta, name)
        if _core.populate_blocks(self._arrays[name], blocks, size):
            for i in range(blocks.size):
                self._reserve_block(name, blocks[i : i + 1], size)

    def _reserve_block(self, name: str, block: Array, size: int) -> None:
        """Allocate space and fault one block in.

        If the page cache has 2 MiB folios, from this process or another, a fault needs the space of the whole folio.
        """
        error = 0
        for unit_bytes in (mmap.PAGESIZE, HUGE_PAGE_BYTES):
            self.allocate(name, int(block[0]) * size, size, unit_bytes)
            error = _core.populate_blocks(self._arrays[name], block, size)
            if error in (0, errno.EINVAL):  # EINVAL: a kernel before 5.14 cannot populate
                return
        code = errno.EIO if error == errno.EFAULT else error
        message = f"block {block[0]} of {size} bytes cannot be made writable ({os.strerror(error)})"
        raise OSError(code, message, self._filename(name))

    def allocate(self, name: str, begin: int, num_bytes: int, unit_bytes: int = mmap.PAGESIZE) -> None:
        """Allocate bytes of the array, rounded outwards to units of the file."""
        first = (DATA_OFFSET_BYTES + begin) // unit_bytes * unit_bytes
        end = -(-(DATA_OFFSET_BYTES + begin + num_bytes) // unit_bytes) * unit_bytes
        self._allocate_bytes(name, first, min(end, self._meta.files[name].file_bytes) - first)

    def _allocate_bytes(self, name: str, begin: int, num_bytes: int) -> None:
        while _libc.fallocate(self._files[name].fd, _FALLOC_KEEP_SIZE, begin, num_bytes):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code == errno.EOPNOTSUPP:  # this file system cannot reserve space: see docs/explanation/durability.md
                return
            with space_errors(self._filename(name)):
                raise OSError(code, os.strerror(code), self._filename(name))

    def _filename(self, name: str) -> str:
        return os.path.join(self._path, f"{name}.npy")
