"""The mapped files of an open table: they are opened, checked, mapped, synced and closed here.

Readers map everything read-only. Pages are written by the core, after `space` has reserved room for them and a snapshot
in progress has saved their content.

Files are mapped at addresses that the kernel can back with 2 MiB pages: congruent to the file offset modulo 2 MiB. ext4
aligns a mapping by itself, tmpfs doesn't, and Python's `mmap` takes no address. Address space is therefore reserved
first, as an anonymous `mmap` object, and the file is mapped over part of it: the object owns the file's mapping, unmaps
it when it is closed, and refuses to close while there are views of it.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._files.directory import Directory
from hashemb._files.format import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    DATA_OFFSET_BYTES,
    FileSpec,
    TableMeta,
    check_npy_header,
)
from hashemb._open_file import OpenFile
from hashemb.errors import CorruptTableError, ReadOnlyTableError

__all__ = ["HUGE_PAGE_BYTES", "Array", "MappedFiles", "map_file"]

Array = npt.NDArray[Any]

HUGE_PAGE_BYTES = 1 << 21  # the huge page for pages of 4 KiB, on x86-64 and ARM; elsewhere the alignment does no harm

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux; the mmap module has the second since Python 3.13
_MAP_FAILED = ctypes.c_void_p(-1).value
_SYS_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class MappedFiles:
    """The files of one open table, by name without `.npy`.

    Parameters
    ----------
    directory : Directory
        Through which all files are opened; closed by `close`.
    meta : TableMeta
    writable : bool
        Whether to map read-write.

    Attributes
    ----------
    arrays : dict of ndarray
        The table's arrays, and "control" as 4096 bytes.
    control : ndarray of shape (1,)
        The control page as a record.
    maps : dict of mmap
    files : dict of OpenFile
    """

    def __init__(self, directory: Directory, meta: TableMeta, *, writable: bool) -> None:
        self.path, self.directory, self.meta, self.writable = directory.path, directory, meta, writable
        self.files: dict[str, OpenFile] = {}
        self.maps: dict[str, mmap.mmap] = {}
        self.arrays: dict[str, Array] = {}
        self._starts: dict[str, int] = {}

    def map_all(self) -> None:
        """Open and map the arrays and the control page."""
        for name, spec in self.meta.files.items():
            self.arrays[name] = self._map_array(name, spec)
        page = self._map("control", "control", CONTROL_BYTES)
        self.arrays["control"] = np.frombuffer(page, np.uint8)
        self.control = np.frombuffer(page, CONTROL_DTYPE)

    def open(self, filename: str) -> OpenFile:
        """Open one of the files, for writing if the table is."""
        try:
            return self.directory.open(filename, os.O_RDWR if self.writable else os.O_RDONLY)
        except FileNotFoundError:
            raise CorruptTableError(f"{self.path}: expected a file {filename}, found none") from None
        except OSError as error:
            if self.writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise ReadOnlyTableError(
                    f"{self.path}: {filename} cannot be opened for writing ({error.strerror}); open with mode=\"r\""
                ) from None
            raise

    def _map(self, name: str, filename: str, expected_bytes: int) -> mmap.mmap:
        file = self.files[name] = self.open(filename)
        size = os.fstat(file.fd).st_size
        if size != expected_bytes:
            raise CorruptTableError(
                f"{os.path.join(self.path, filename)}: expected {expected_bytes} bytes, found {size}"
            )
        try:
            self.maps[name], self._starts[name] = map_file(file.fd, size, self.writable)
        except OSError as error:
            message = f"{size} bytes do not fit the address space that is left ({error.strerror})"
            raise OSError(error.errno, message, os.path.join(self.path, filename)) from None
        return self.maps[name]

    def _map_array(self, name: str, spec: FileSpec) -> Array:
        filename = f"{name}.npy"
        mapped = self._map(name, filename, spec.file_bytes)
        header = os.pread(self.fd(name), DATA_OFFSET_BYTES, 0)
        check_npy_header(header, spec, os.path.join(self.path, filename))
        mapped.madvise(mmap.MADV_RANDOM)
        begin = self._starts[name] + DATA_OFFSET_BYTES
        return np.frombuffer(mapped, spec.dtype, math.prod(spec.shape), begin).reshape(spec.shape)

    def fd(self, name: str) -> int:
        """Return the descriptor of an open file."""
        return self.files[name].fd

    def start(self, name: str) -> int:
        """Return where a file begins within its mapping, see `map_file`."""
        return self._starts[name]

    def address(self, name: str) -> int:
        """Return the address of an array file's first byte."""
        data: int = self.arrays[name].ctypes.data
        return data - DATA_OFFSET_BYTES

    def resident_bytes(self) -> int | None:
        """Return the bytes of the files in the page cache; None if the kernel cannot tell (Linux < 6.5)."""
        pages = 0
        for file in self.files.values():
            span, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
            if _libc.syscall(_SYS_CACHESTAT, file.fd, ctypes.byref(span), ctypes.byref(counts), 0):
                return None
            pages += counts[0]
        return pages * mmap.PAGESIZE

    def close(self) -> None:
        """Close the files and the directory. Mappings stay as long as there are views."""
        while self.files:
            self.files.popitem()[1].close()
        self.directory.close()


# ---- mapping one file ----


def map_file(fd: int, size_bytes: int, writable: bool) -> tuple[mmap.mmap, int]:
    """Return a shared mapping of the whole file, and the offset in it at which the file begins.

    The offset is 0 for files below 2 MiB, and where no address space can be reserved (strict overcommit).
    Raise `OSError` if the file cannot be mapped; nothing remains mapped then.
    """
    prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    space = _reserve_address_space(size_bytes + HUGE_PAGE_BYTES, prot) if size_bytes >= HUGE_PAGE_BYTES else None
    if space is None:
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, prot), 0
    try:
        begin: int = np.frombuffer(space, np.uint8).ctypes.data
        offset = -begin % HUGE_PAGE_BYTES
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(begin + offset, size_bytes, prot, flags, fd, 0) == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    except BaseException:
        space.close()
        raise
    return space, offset


def _reserve_address_space(size_bytes: int, prot: int) -> mmap.mmap | None:
    """Reserve address space with the `prot` of the file's mapping, so that a read-only object gives such buffers."""
    try:
        return mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, prot)
    except OSError:
        return None
