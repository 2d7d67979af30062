"""Files, mappings and locks: with _mapping and _huge_pages the only module of the core package that touches the
operating system.

It knows names, sizes and byte ranges; it knows nothing of rows as vectors. Invariants: a table directory appears
whole or not at all; a page of a table is written only after the file system has promised space for it; readers
map everything read-only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _core, _huge_pages
from hashemb._format import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    DATA_OFFSET_BYTES,
    FileSpec,
    TableMeta,
    check_control,
    check_npy_header,
    decode_meta,
    encode_control,
    encode_meta,
    encode_npy_header,
)
from hashemb._mapping import HUGE_PAGE_BYTES, map_file
from hashemb.errors import CorruptTableError, FormatError, NoSpaceError, ReadOnlyTableError

Array = npt.NDArray[Any]

_FALLOC_KEEP_SIZE = 1
_SYS_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def boot_id() -> str:
    """Identifies the running kernel: pages written before it changed may not have reached the disk."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


@contextmanager
def _space_errors(filename: str) -> Iterator[None]:
    """ENOSPC and EDQUOT as `NoSpaceError`, a file too large for the file system as a plain `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"no space left on the file system: {error.strerror}", filename) from None
        raise


# ---- creating ----


def _write_file(path: str, data: bytes, size_bytes: int) -> None:
    """Creates a file of `size_bytes` that begins with `data` and is otherwise a hole."""
    with _space_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _resize(fd, path, size_bytes)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)


def _resize(fd: int, path: str, size_bytes: int) -> None:
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        message = f"this file system cannot hold a file of {size_bytes} bytes ({error.strerror})"
        raise OSError(error.errno, message, path) from None


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_table(path: str, meta: TableMeta) -> None:
    """Makes the directory `path` in one step: built beside it under a temporary name, synced, renamed.

    O(1) in the size of the table: array files are holes behind a 4096-byte header.
    """
    parent = os.path.dirname(os.path.abspath(path))
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "there is already something at this path", path)
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "the directory to create the table in does not exist", parent)
    with _space_errors(path):
        building = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", suffix=".tmp", dir=parent)
    try:
        os.chmod(building, 0o777 & ~_umask())
        for name, spec in meta.files.items():
            _write_file(os.path.join(building, f"{name}.npy"), encode_npy_header(spec), spec.file_bytes)
        control = encode_control(meta.optimizer.lr, boot_id())
        _write_file(os.path.join(building, "control"), control, CONTROL_BYTES)
        _write_file(os.path.join(building, "lock"), b"", 0)
        content = encode_meta(meta)
        _write_file(os.path.join(building, "meta.json"), content, len(content))
        _sync_directory(building)
        os.rename(building, path)
        _sync_directory(parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- reading metadata ----


def _read(path: str, limit_bytes: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, limit_bytes, 0)
    finally:
        os.close(fd)


def read_meta(path: str) -> TableMeta:
    """The table's metadata; `FileNotFoundError`, `FormatError` or `CorruptTableError` if there is none."""
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, "no table at this path", path)
    filename = os.path.join(path, "meta.json")
    try:
        data = _read(filename, 1 << 20)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FormatError(f"{path}: not a hashemb table: it holds no file meta.json") from None
    return decode_meta(data, filename)


def read_control(path: str) -> Any:
    """A copy of the control page, as a record with the fields of `_format.CONTROL_DTYPE`."""
    filename = os.path.join(path, "control")
    try:
        data = _read(filename, CONTROL_BYTES + 1)
    except FileNotFoundError:
        raise CorruptTableError(f"{filename}: expected {CONTROL_BYTES} bytes, found no file") from None
    check_control(data, filename)
    return np.frombuffer(data, CONTROL_DTYPE)[0]


def disk_bytes(path: str) -> int:
    """Bytes that the table's files take up on disk (holes take none)."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(path) if entry.is_file())


# ---- an open table ----


class TableFiles:
    """The files of one open table, mapped.

    Parameters
    ----------
    path : str
    writable : bool
        Map read-write, and take part in the writers' lock that guards the clean flag.
    huge_pages : bool or None
        Ask for them never (False), always (True), or where they cost nothing that was not asked for (None).

    Attributes
    ----------
    meta : TableMeta
    arrays : dict of ndarray
        The table's arrays by file name without `.npy`, and "control" as 4096 bytes.
    control : ndarray of shape (1,)
        The control page as a record.
    recovered : str or None
        Where the table was not closed cleanly by its last writer: "killed" (the process ended, its pages are
        all there) or "rebooted" (the machine did, and what was not flushed may be lost).
    """

    def __init__(self, path: str, *, writable: bool, huge_pages: bool | None = None) -> None:
        self.path, self.writable = path, writable
        self._pid = os.getpid()
        self.meta = read_meta(path)
        read_control(path)
        self.recovered: str | None = None
        self._fds: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._extents: dict[str, _huge_pages.Extents] = {}
        self.arrays: dict[str, Array] = {}
        self._dirty = False
        try:
            self._map_all()
            if huge_pages is not False:
                self._ask_for_huge_pages(always=huge_pages is True)
            if writable:
                self._join_writers()
        except BaseException:
            self.close()
            raise

    # -- opening --

    def _map_all(self) -> None:
        for name, spec in self.meta.files.items():
            self.arrays[name] = self._map_array(name, spec)
        buffer, _ = self._map("control", "control", CONTROL_BYTES)
        self.arrays["control"] = np.frombuffer(buffer, np.uint8)
        self.control = np.frombuffer(buffer, CONTROL_DTYPE)

    def _open(self, filename: str) -> int:
        flags = (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            return os.open(os.path.join(self.path, filename), flags)
        except (FileNotFoundError, IsADirectoryError):
            raise CorruptTableError(f"{self.path}: expected a file {filename}, found none") from None
        except OSError as error:
            if self.writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise ReadOnlyTableError(
                    f"{self.path}: {filename} cannot be opened for writing ({error.strerror}); open with mode=\"r\""
                ) from None
            raise

    def _map(self, name: str, filename: str, expected_bytes: int) -> tuple[mmap.mmap, int]:
        fd = self._fds[name] = self._open(filename)
        size = os.fstat(fd).st_size
        if size != expected_bytes:
            raise CorruptTableError(
                f"{os.path.join(self.path, filename)}: expected {expected_bytes} bytes, found {size}"
            )
        try:
            self._maps[name], offset = map_file(fd, size, self.writable)
        except OSError as error:
            message = f"{size} bytes do not fit the address space that is left ({error.strerror})"
            raise OSError(error.errno, message, os.path.join(self.path, filename)) from None
        return self._maps[name], offset

    def _map_array(self, name: str, spec: FileSpec) -> Array:
        filename = f"{name}.npy"
        mapped, offset = self._map(name, filename, spec.file_bytes)
        header = os.pread(self._fds[name], DATA_OFFSET_BYTES, 0)
        check_npy_header(header, spec, os.path.join(self.path, filename))
        mapped.madvise(mmap.MADV_RANDOM)
        flat = np.frombuffer(mapped, spec.dtype, math.prod(spec.shape), offset + DATA_OFFSET_BYTES)
        return flat.reshape(spec.shape)

    # -- huge pages --

    def _ask_for_huge_pages(self, *, always: bool) -> None:
        """Before the first access, which is when a table on disk gets them. One on tmpfs is collapsed as it fills."""
        specs = {name: spec for name, spec in self.meta.row_files.items() if spec.file_bytes >= HUGE_PAGE_BYTES}
        on_tmpfs = bool(specs) and _huge_pages.is_tmpfs(self._fds["weight"])
        if always or (specs and not on_tmpfs and self._may_lose_its_holes()):
            for name, spec in specs.items():
                _huge_pages.advise(self._address(name), spec.file_bytes)
        if on_tmpfs:
            self._extents = {name: self._make_extents(name, spec, always) for name, spec in specs.items()}
        if on_tmpfs and always:
            for name, extents in self._extents.items():
                extents.collapse_present(self._fds[name])

    def _may_lose_its_holes(self) -> bool:
        """Whether the kernel lets the whole table be dirty without writing it, and the disk has room for it."""
        room_bytes = disk_bytes(self.path) + _huge_pages.free_bytes(self._fds["weight"])
        return self.meta.logical_bytes <= min(room_bytes, _huge_pages.write_back_limit_bytes())

    def _make_extents(self, name: str, spec: FileSpec, always: bool) -> _huge_pages.Extents:
        block_bytes, blocks_fd = self._block_bytes(spec), self._fds["blocks"]
        return _huge_pages.Extents(self._address(name), spec.file_bytes, block_bytes, blocks_fd, always=always)

    def _address(self, name: str) -> int:
        data: int = self.arrays[name].ctypes.data
        return data - DATA_OFFSET_BYTES

    def _block_bytes(self, spec: FileSpec) -> int:
        return (spec.file_bytes - DATA_OFFSET_BYTES) // spec.shape[0] * self.meta.block_rows

    def huge_page_bytes(self) -> int | None:
        """Bytes of the arrays that this process maps by huge pages; None where the kernel cannot tell."""
        total = 0
        for name, spec in self.meta.files.items():
            begin = self._address(name)
            found = _huge_pages.huge_page_bytes(begin, begin + spec.file_bytes)
            if found is None:
                return None
            total += found
        return total

    # -- the writers' lock: byte 0 of `lock`, shared by all writers while they have the table open --

    def _lock(self, kind: int, *, wait: bool) -> bool:
        request = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 1, 0)
        try:
            fcntl.fcntl(self._fds["lock"], fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _join_writers(self) -> None:
        self._fds["lock"] = self._open("lock")
        alone = self._lock(fcntl.F_WRLCK, wait=False)
        if alone and not self.control["clean"][0]:
            same_boot = self.control["boot_id"][0].decode("ascii", "replace") == boot_id()
            self.recovered = "killed" if same_boot else "rebooted"
        if alone:
            self.control["boot_id"] = boot_id().encode()
        self.control["clean"] = 0
        self._lock(fcntl.F_RDLCK, wait=True)

    def _leave_writers(self) -> None:
        """The last writer to close syncs everything and then, only then, says that the table is clean."""
        if self._lock(fcntl.F_WRLCK, wait=False):
            if self._dirty:
                self.flush()
            self.control["clean"] = 1
            self._maps["control"].flush()

    # -- writing --

    def reserve(self, blocks: Array) -> None:
        """Makes room for `blocks` (ascending) in every file, then marks them as written in the current epoch.

        On `NoSpaceError` nothing is marked and no data has changed; the same call may be made again.
        """
        self._dirty = True
        for name, spec in self.meta.row_files.items():
            self._reserve_array(name, blocks, self._block_bytes(spec))
        self._reserve_array("blocks", blocks, 4)
        self.arrays["blocks"][blocks] = self.control["epoch"][0]
        for extents in self._extents.values():
            extents.collapse_written(blocks)

    def _reserve_array(self, name: str, blocks: Array, block_bytes: int) -> None:
        """Faults the blocks in for writing, which reserves their space: all together, or else one by one."""
        if _core.populate_blocks(self.arrays[name], blocks, block_bytes):
            for i in range(blocks.size):
                self._reserve_block(name, blocks[i : i + 1], block_bytes)

    def _reserve_block(self, name: str, block: Array, block_bytes: int) -> None:
        """Allocates space and faults one block in. In a page cache of 2 MiB folios, of this process or another, a fault
        needs the space of the whole folio."""
        error = 0
        for unit_bytes in (mmap.PAGESIZE, HUGE_PAGE_BYTES):
            self._allocate(name, int(block[0]) * block_bytes, block_bytes, unit_bytes)
            error = _core.populate_blocks(self.arrays[name], block, block_bytes)
            if error in (0, errno.EINVAL):  # EINVAL: a kernel before 5.14 cannot populate
                return
        code = errno.EIO if error == errno.EFAULT else error
        message = f"block {block[0]} of {block_bytes} bytes cannot be made writable ({os.strerror(error)})"
        raise OSError(code, message, self._filename(name))

    def _allocate(self, name: str, begin: int, num_bytes: int, unit_bytes: int) -> None:
        """Allocates bytes of the array, rounded out to units of the file."""
        first = (DATA_OFFSET_BYTES + begin) // unit_bytes * unit_bytes
        end = -(-(DATA_OFFSET_BYTES + begin + num_bytes) // unit_bytes) * unit_bytes
        self._allocate_bytes(name, first, min(end, self.meta.files[name].file_bytes) - first)

    def _allocate_bytes(self, name: str, begin: int, num_bytes: int) -> None:
        while _libc.fallocate(self._fds[name], _FALLOC_KEEP_SIZE, begin, num_bytes):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code == errno.EOPNOTSUPP:  # no promise of space on this file system: docs/durability.md
                return
            with _space_errors(self._filename(name)):
                raise OSError(code, os.strerror(code), self._filename(name))

    def _filename(self, name: str) -> str:
        return os.path.join(self.path, f"{name}.npy")

    def flush(self) -> None:
        """Syncs all arrays to disk, then the control page. No-op on a read-only table."""
        if not self.writable:
            return
        self._dirty = False
        for name in self.meta.files:
            self._maps[name].flush()
        self._maps["control"].flush()

    def mark_dirty(self) -> None:
        """Called once per update: the last writer's close has something to sync."""
        self._dirty = True

    # -- measuring --

    def resident_bytes(self) -> int | None:
        """Bytes of the table's files in the page cache; None where the kernel cannot tell (Linux < 6.5)."""
        pages = 0
        for fd in self._fds.values():
            span, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
            if _libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(counts), 0):
                return None
            pages += counts[0]
        return pages * mmap.PAGESIZE

    # -- closing --

    def close(self) -> None:
        """Idempotent. Mappings stay as long as somebody holds a view of them."""
        if self.writable and "lock" in self._fds and self._pid == os.getpid():
            self._leave_writers()  # a forked child shares its parent's lock, and leaves it alone
        self.arrays, self._extents = {}, {}
        if hasattr(self, "control"):
            del self.control
        for mapped in self._maps.values():
            with suppress(BufferError):  # a caller still holds table.weight; the mapping goes with the view
                mapped.close()
        self._maps = {}
        while self._fds:
            os.close(self._fds.popitem()[1])
