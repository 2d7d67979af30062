"""An open table: its files, mapped, and its locks.

It knows names, sizes and byte ranges; it knows nothing of rows as vectors. Invariants: a page of a table is written
only after the file system has promised space for it, and after a snapshot in progress has what it held; readers map
everything read-only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import mmap
import os
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _core, _huge_pages, _recovery
from hashemb._directory import (
    boot_id,
    disk_bytes,
    read_control,
    read_file,
    read_history,
    read_meta,
    remove_if_there,
    remove_leftovers,
    space_errors,
)
from hashemb._format import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    DATA_OFFSET_BYTES,
    FileSpec,
    check_npy_header,
)
from hashemb._locks import Lock, after_fork_in_child
from hashemb._mapping import HUGE_PAGE_BYTES, map_file
from hashemb._saving import SAVING_FILE, SaveTarget
from hashemb.errors import CorruptTableError, FormatError, HashembError, ReadOnlyTableError

Array = npt.NDArray[Any]

_FALLOC_KEEP_SIZE = 1
_SYS_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


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
        self.meta = read_meta(path)
        read_control(path)
        self.recovered: str | None = None
        self._fds: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._extents: dict[str, _huge_pages.Extents] = {}
        self.arrays: dict[str, Array] = {}
        self._dirty = self._joined = self.asks_for_huge_pages = False
        self.target: SaveTarget | None = None
        after_fork_in_child(self)
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
            self.asks_for_huge_pages = bool(specs)
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
        block_bytes, blocks_fd = self.block_bytes(spec), self._fds["blocks"]
        return _huge_pages.Extents(self._address(name), spec.file_bytes, block_bytes, blocks_fd, always=always)

    def _address(self, name: str) -> int:
        data: int = self.arrays[name].ctypes.data
        return data - DATA_OFFSET_BYTES

    def block_bytes(self, spec: FileSpec) -> int:
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

    # -- the writers' lock, shared by all writers while they have the table open --

    def _join_writers(self) -> None:
        self._fds["lock"] = fd = self._open("lock")
        is_alone = _core.lock(fd, fcntl.F_WRLCK, _core.LOCK_WRITERS, False)
        if not is_alone:
            _core.lock(fd, fcntl.F_RDLCK, _core.LOCK_WRITERS, True)
        self._check_in_place(fd)
        if is_alone:
            self._take_over()
            _core.lock(fd, fcntl.F_RDLCK, _core.LOCK_WRITERS, True)
        self._unseal()
        self._joined = True

    def _check_in_place(self, lock_fd: int) -> None:
        """Whoever puts another table in this one's place holds the lock meanwhile: it may come to us only then."""
        try:
            found: os.stat_result | None = os.stat(os.path.join(self.path, "lock"))
        except FileNotFoundError:
            found = None
        if found is None or not os.path.samestat(found, os.fstat(lock_fd)):
            raise HashembError(f"{self.path}: was moved or replaced while it was being opened: open it again")

    def _take_over(self) -> None:
        """Alone with the table: how its last writer left it, and what a killed snapshot left behind."""
        control = self.control
        self.recovered = _recovery.how_left(control)
        if self.recovered == "rebooted":
            marks = self.arrays["blocks"]
            _recovery.mark_what_is_there(control, marks, self._fds, self.meta, self._filename("blocks"))
            _recovery.reserve_what_is_marked(self._fds["blocks"], self.meta, self._allocate)
            if not self._is_being_applied():
                # A block may be newer than its epoch says, so that deltas could miss it. In the middle of applying a
                # delta only that delta's blocks can be, and it will be applied again.
                remove_if_there(os.path.join(self.path, "history.json"))
        remove_leftovers(self.path, SAVING_FILE)
        self._unseal(boot_id=boot_id().encode(), saving=0, gate_closing=0, opened=1)

    def _is_being_applied(self) -> bool:
        try:
            return read_history(self.path).applying is not None
        except FormatError:  # damaged, and about to be removed
            return False

    def _unseal(self, **fields: Any) -> None:
        _recovery.unseal(self.control, self._maps["control"], **fields)

    def _leave_writers(self) -> None:
        """The last writer to close syncs everything and then, only then, says that the table is clean."""
        if _core.lock(self._fds["lock"], fcntl.F_WRLCK, _core.LOCK_WRITERS, False):
            if self._dirty:
                self.flush()
            _recovery.seal(self.arrays["control"], self._maps["control"])

    def fd(self, name: str) -> int:
        """The open file of an array, by name without `.npy`."""
        return self._fds[name]

    def tmpfs_fd(self) -> int:
        """The weights' open file on tmpfs, where also reads take space; -1 elsewhere."""
        fd = self._fds["weight"]
        return fd if _huge_pages.is_tmpfs(fd) else -1

    def lock_fd(self) -> int:
        """The table's lock, which this process has for itself; a forked child joins the writers when it first asks."""
        fd = self._fds["lock"]
        if not self._joined:
            _core.lock(fd, fcntl.F_RDLCK, _core.LOCK_WRITERS, True)
            self._unseal()
            self._joined = True
        return fd

    def new_lock(self) -> Lock:
        """The same file opened once more: what locks the one excludes the other."""
        return Lock(f"/proc/self/fd/{self._fds['lock']}")

    def after_fork(self) -> None:
        """In the child."""
        if "lock" in self._fds:
            inherited = self._fds["lock"]
            self._fds["lock"] = os.open(f"/proc/self/fd/{inherited}", os.O_RDWR | os.O_CLOEXEC)
            os.close(inherited)
        self._joined, self.target = False, None

    # -- writing --

    def reserve(self, blocks: Array) -> None:
        """Makes room for `blocks` (ascending) in every file, then marks them as written in the current epoch.

        On `NoSpaceError` nothing is marked and no data has changed; the same call may be made again.
        """
        self._dirty = True
        if self.tmpfs_fd() >= 0:  # where reading a hole takes a page too
            self._reserve_array("blocks", blocks, 4)
        new = blocks[self.arrays["blocks"][blocks] == 0]  # others have had their room since their first write
        if new.size:
            for name, spec in self.meta.row_files.items():
                self._reserve_array(name, new, self.block_bytes(spec))
            self._reserve_array("blocks", new, 4)
        self._mark(blocks)
        if new.size:
            for extents in self._extents.values():
                extents.collapse_written(new)

    def _mark(self, blocks: Array) -> None:
        epoch, marks = int(self.control["epoch"][0]), self.arrays["blocks"]
        saving = self._saving()
        _core.mark_blocks(marks, blocks, epoch, saving)

    def save_rows(self, core: _core.Core) -> None:
        """Saves the rows that a planned update is about to change, if a snapshot in progress still wants them.

        To be called once more when that is done, while there is a `target`: it is let go of.
        """
        saving = self._saving()
        if saving is not None:
            core.save_rows(saving)

    def _saving(self) -> _core.Saving | None:
        """Where a snapshot in progress wants rows saved, as its owner wrote down before it began; None if none does."""
        until = int(self.control["saving"][0])
        if not until or self.control["save_failed"][0] == until or not self._is_being_saved():
            self.target = None
            return None
        try:
            if self.target is None or self.target.until != until:
                wanted = json.loads(read_file(os.path.join(self.path, SAVING_FILE)))
                if wanted["until"] != until:  # of the next owner, who is about to begin; the one before it died
                    return None
                directory, names, since = wanted["directory"], wanted["names"], wanted["since"]
                self.target = self.save_target(directory, names, since, until, owner=False)
                if int(self.control["saving"][0]) != until:
                    self.target.discard()
                    return None
            return self.target.saving
        except OSError as error:
            self._give_up_saving(error.errno or errno.EIO)
            return None

    def save_target(self, directory: str, names: list[str], since: int, until: int, *, owner: bool) -> SaveTarget:
        """The half-made files of a snapshot of this table, open for saving."""
        return SaveTarget(self.meta, self.arrays, self.new_lock(), directory, names, since, until, owner=owner)

    def _give_up_saving(self, code: int) -> None:
        """The snapshot has failed, which its owner reports; the table goes on. Said before a block is marked."""
        self.control["save_errno"] = code
        self.control["save_failed"] = self.control["saving"]

    def _is_being_saved(self) -> bool:
        """Whether the owner of the snapshot in progress is alive: it holds its lock."""
        fd = self._fds["lock"]
        if not _core.lock(fd, fcntl.F_RDLCK, _core.LOCK_SNAPSHOT, False):
            return True
        _core.lock(fd, fcntl.F_UNLCK, _core.LOCK_SNAPSHOT, False)
        return False

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

    def _allocate(self, name: str, begin: int, num_bytes: int, unit_bytes: int = mmap.PAGESIZE) -> None:
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
            with space_errors(self._filename(name)):
                raise OSError(code, os.strerror(code), self._filename(name))

    def _filename(self, name: str) -> str:
        return os.path.join(self.path, f"{name}.npy")

    def flush(self) -> None:
        """Syncs all arrays to disk, then the control page. No-op on a read-only table."""
        if not self.writable:
            return
        self._dirty = False  # first: an update meanwhile makes it dirty again
        try:
            for name in self.meta.files:
                self._maps[name].flush()
            self._maps["control"].flush()
        except BaseException:
            self._dirty = True
            raise

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
        """Idempotent. Mappings stay as long as somebody holds a view of them.

        Where the table cannot be synced that is raised; it is closed all the same, and not marked clean.
        """
        joined, self._joined = self._joined, False
        try:
            if joined:
                self._leave_writers()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self.target = None
        self.arrays, self._extents = {}, {}
        if hasattr(self, "control"):
            del self.control
        for mapped in self._maps.values():
            with suppress(BufferError):  # a caller still holds table.weight; the mapping goes with the view
                mapped.close()
        self._maps = {}
        while self._fds:
            os.close(self._fds.popitem()[1])
