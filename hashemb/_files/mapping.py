"""Maps files at addresses that the kernel can back with 2 MiB pages: congruent to the file offset modulo 2 MiB.

ext4 aligns a mapping by itself, tmpfs doesn't, and Python's `mmap` takes no address. Address space is therefore
reserved first, as an anonymous `mmap` object, and the file is mapped over part of it: the object owns the file's
mapping, unmaps it when it is closed, and refuses to close while there are views of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

__all__ = ["HUGE_PAGE_BYTES", "map_file"]

HUGE_PAGE_BYTES = 1 << 21  # the huge page for pages of 4 KiB, on x86-64 and ARM; elsewhere the alignment does no harm

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux; the mmap module has the second since Python 3.13
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


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
