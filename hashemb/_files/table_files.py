"""An open table: its mapped files and its locks.

The module handles names, sizes and byte ranges, not rows as vectors. Invariants: a page of a table is written only
after the file system has reserved space for it and a snapshot in progress has saved its content; readers map everything
read-only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _core, _sharing
from hashemb._files import huge_pages as _huge_pages
from hashemb._files import recovery as _recovery
from hashemb._files.directory import (
    HISTORY_FILE,
    Directory,
    boot_id,
    disk_bytes,
    read_control,
    read_history,
    read_meta,
    remove_leftovers,
    table_directory,
)
from hashemb._files.format import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    DATA_OFFSET_BYTES,
    FileSpec,
    check_npy_header,
)
from hashemb._files.locks import Lock, after_fork_in_child, open_again
from hashemb._files.mapping import HUGE_PAGE_BYTES, map_file
from hashemb._files.saving import SAVING_FILE, SaveTarget, open_announced
from hashemb._files.seats import SEATS_FILE, abandoned_rows, take_seat
from hashemb._files.space import Space, block_bytes
from hashemb._open_file import OpenFile
from hashemb.errors import ClosedTableError, CorruptTableError, FormatError, HashembError, ReadOnlyTableError

Array = npt.NDArray[Any]

_SYS_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)


class TableFiles:
    """The mapped files of one open table.

    Parameters
    ----------
    path : str
    writable : bool
        Whether to map read-write, and share the writers' lock that guards the clean flag.
    huge_pages : bool or None
        Whether to ask for huge pages: never (False), always (True), or where the defaults of `hashemb.open` allow
        it (None).

    Attributes
    ----------
    directory : Directory
        Open directory through which all files are accessed: a table that is moved, or replaced at its path, continues
        with its own files.
    meta : TableMeta
    arrays : dict of ndarray
        The table's arrays by file name without `.npy`, and "control" as 4096 bytes.
    control : ndarray of shape (1,)
        The control page as a record.
    recovered : str or None
        Set if the last writer did not close the table: "killed" (the process ended, and all its pages are present) or
        "rebooted" (the machine restarted, and unflushed updates may be lost).
    suspects : ndarray of int64
        Rows that killed processes were writing; see seats.py.
    """

    def __init__(self, path: str, *, writable: bool, huge_pages: bool | None = None) -> None:
        self.path, self.writable = path, writable
        self.directory = table_directory(path)
        self.meta = read_meta(self.directory)
        read_control(self.directory, self.meta)
        self.recovered: str | None = None
        self.suspects = np.empty(0, np.int64)
        self._files: dict[str, OpenFile] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._extents: dict[str, _huge_pages.Extents] = {}
        self.arrays: dict[str, Array] = {}
        self.space = Space(path, self.meta, self.arrays, self._files)
        self._joined = self.asks_for_huge_pages = False
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
        status = os.fstat(self.fd("control"))
        self.calls = _sharing.Calls(self.path, (status.st_dev, status.st_ino))

    def _open(self, filename: str) -> OpenFile:
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

    def _map(self, name: str, filename: str, expected_bytes: int) -> tuple[mmap.mmap, int]:
        file = self._files[name] = self._open(filename)
        size = os.fstat(file.fd).st_size
        if size != expected_bytes:
            raise CorruptTableError(
                f"{os.path.join(self.path, filename)}: expected {expected_bytes} bytes, found {size}"
            )
        try:
            self._maps[name], offset = map_file(file.fd, size, self.writable)
        except OSError as error:
            message = f"{size} bytes do not fit the address space that is left ({error.strerror})"
            raise OSError(error.errno, message, os.path.join(self.path, filename)) from None
        return self._maps[name], offset

    def _map_array(self, name: str, spec: FileSpec) -> Array:
        filename = f"{name}.npy"
        mapped, offset = self._map(name, filename, spec.file_bytes)
        header = os.pread(self.fd(name), DATA_OFFSET_BYTES, 0)
        check_npy_header(header, spec, os.path.join(self.path, filename))
        mapped.madvise(mmap.MADV_RANDOM)
        flat = np.frombuffer(mapped, spec.dtype, math.prod(spec.shape), offset + DATA_OFFSET_BYTES)
        return flat.reshape(spec.shape)

    # -- huge pages --

    def _ask_for_huge_pages(self, *, always: bool) -> None:
        """Ask before the first access, when a table on disk gets huge pages; on tmpfs extents are collapsed later."""
        specs = {name: spec for name, spec in self.meta.row_files.items() if spec.file_bytes >= HUGE_PAGE_BYTES}
        on_tmpfs = bool(specs) and _huge_pages.is_tmpfs(self.fd("weight"))
        if always or (specs and not on_tmpfs and self._may_lose_its_holes()):
            self.asks_for_huge_pages = bool(specs)
            for name, spec in specs.items():
                _huge_pages.advise(self._address(name), spec.file_bytes)
        if on_tmpfs:
            self._extents = {name: self._make_extents(name, spec, always) for name, spec in specs.items()}
        if on_tmpfs and always:
            for name, extents in self._extents.items():
                extents.collapse_present(self.fd(name))

    def _may_lose_its_holes(self) -> bool:
        """Return whether the whole table fits the kernel's limit for dirty pages and the space on the disk."""
        room_bytes = disk_bytes(self.directory) + _huge_pages.free_bytes(self.fd("weight"))
        return self.meta.logical_bytes <= min(room_bytes, _huge_pages.write_back_limit_bytes())

    def _make_extents(self, name: str, spec: FileSpec, always: bool) -> _huge_pages.Extents:
        size, blocks_fd = block_bytes(self.meta, name), self.fd("blocks")
        return _huge_pages.Extents(self._address(name), spec.file_bytes, size, blocks_fd, always=always)

    def _address(self, name: str) -> int:
        data: int = self.arrays[name].ctypes.data
        return data - DATA_OFFSET_BYTES

    def huge_page_bytes(self) -> int | None:
        """Return the bytes of the arrays that this process maps with huge pages; None if the kernel cannot tell."""
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
        lock = self._files["lock"] = self._open("lock")
        self._lock_stat = os.fstat(lock.fd)
        place = _sharing.LOCK_WRITERS
        with _sharing.Hold(lock, self.calls, place, "open", wait=False, then=fcntl.F_RDLCK) as is_alone:
            if not is_alone:
                _sharing.wait_for_lock(lock.fd, fcntl.F_RDLCK, place, self.calls, "open")
            self._check_in_place()
            if is_alone:
                self._take_over()
            self._unseal()
        self._joined = True

    def _check_in_place(self) -> None:
        """Check that the table is still at its path: a process that replaces it holds the lock until it is done."""
        try:
            found: os.stat_result | None = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self.directory.fd)):
            raise HashembError(f"{self.path}: was moved or replaced while it was being opened: open it again")

    def _take_over(self) -> None:
        """Repair what the last writer and a killed snapshot left. The caller must be the only writer."""
        control = self.control
        self.recovered = _recovery.how_left(control)
        if self.recovered == "rebooted":
            marks = self.arrays["blocks"]
            filename = self.directory.filename("blocks.npy")
            fds = {name: self.fd(name) for name in self.meta.files}
            _recovery.mark_what_is_there(control, marks, fds, self.meta, filename)
            _recovery.reserve_what_is_marked(fds["blocks"], self.meta, self.space.allocate)
            if not self._is_being_applied():
                # A block may be newer than its epoch indicates, so that deltas could miss it. While a delta is being
                # applied this holds only for that delta's blocks, and it will be applied again.
                self.directory.remove(HISTORY_FILE)
            self.directory.remove(SEATS_FILE)
        self.suspects = abandoned_rows(self.directory, self.meta.num_embeddings)
        remove_leftovers(self.directory, SAVING_FILE)
        self._unseal(boot_id=boot_id().encode(), saving=0, gate_closing=0, opened=1)

    def _is_being_applied(self) -> bool:
        try:
            return read_history(self.directory, self.meta.id).applying is not None
        except FormatError:  # damaged or from another table, and about to be removed
            return False

    def _unseal(self, **fields: Any) -> None:
        _recovery.unseal(self.control, self._maps["control"], **fields)

    def _leave_writers(self) -> None:
        """Leave the writers; the last one to close syncs everything and only then marks the table as clean."""
        with _sharing.Hold(self._files["lock"], self.calls, _sharing.LOCK_WRITERS, "close", wait=False) as is_last:
            if is_last:
                if self.calls.dirty:
                    self._sync()
                self.directory.remove(SEATS_FILE)
                _recovery.seal(self.arrays["control"], self._maps["control"])

    def fd(self, name: str) -> int:
        """Return the descriptor of an array's open file, by name without `.npy`."""
        return self._files[name].fd

    def tmpfs_fd(self) -> int:
        """Return the descriptor of the weights' file on tmpfs, where reads take space too; -1 elsewhere."""
        fd = self.fd("weight")
        return fd if _huge_pages.is_tmpfs(fd) else -1

    def join(self, core: _core.Core) -> None:
        """Give the core this process's lock of the table and a seat; a forked child joins the writers first."""
        if "lock" not in self._files:
            self._files["lock"] = open_again(self.directory, self._lock_stat)
        fd = self.fd("lock")
        if not self._joined:
            _sharing.wait_for_lock(fd, fcntl.F_RDLCK, _sharing.LOCK_WRITERS, self.calls, "update")
            self._unseal()
            self._joined = True
        core.join(fd, take_seat(self.directory, fd))

    def new_lock(self) -> Lock:
        """Open the lock file once more, for locks that exclude those taken through other descriptors."""
        return Lock(open_again(self.directory, self._lock_stat))

    def turn(self, call: str) -> _sharing.Hold:
        """Return a context manager that lets one process at a time take or apply points; its death ends the turn."""
        return _sharing.Hold(self.new_lock(), self.calls, _sharing.LOCK_SNAPSHOT, call)

    def after_fork(self) -> None:
        """Reset locks and calls in a forked child."""
        self.calls.after_fork()
        self._joined, self.target = False, None
        if "lock" in self._files:
            self._files.pop("lock").close()
            with suppress(OSError, HashembError):  # the error is raised when the lock is needed
                self._files["lock"] = open_again(self.directory, self._lock_stat)

    # -- writing --

    def claim(self, blocks: Array) -> None:
        """Reserve space for those `blocks` (ascending) never written before, and mark all with the current epoch."""
        marks = self.arrays["blocks"]
        if self.tmpfs_fd() >= 0:  # where reading a hole takes a page too
            self.space.reserve_array("blocks", blocks)
        fresh = blocks[marks[blocks] == 0]
        if fresh.size:
            self.space.reserve(fresh)
        marks[blocks] = self.control["epoch"][0]
        self.calls.dirty = True

    def apply(self, core: _core.Core, plan: _core.Plan, need: int, *, exact: bool) -> None:
        """Provide what a batch occasionally needs, without holding any lock, and then apply it."""
        saving, has_room = None, False
        with self.calls:
            while need:
                if need == _core.NEEDS_JOIN:
                    self.join(core)
                elif need == _core.NEEDS_SAVING:
                    saving = self.saving()
                else:
                    self.space.reserve(plan.fresh_blocks)
                    has_room = True
                need = core.apply(plan, exact, saving, has_room)

    def after_batch(self, fresh: Array) -> None:
        """Do the work that can wait until a batch has been applied; `fresh` are the blocks (ascending) it wrote first.

        This releases the target of a finished snapshot, whose space is freed only then, and on tmpfs collapses extents
        that are now full enough.
        """
        with suppress(ClosedTableError), self.calls:
            target = self.target  # another thread or a signal handler may change it at any time
            if target is not None and int(self.control["saving"][0]) != target.until:
                self.target = None
            for extents in self._extents.values() if fresh.size else ():
                extents.collapse_written(fresh)

    def saving(self) -> _sharing.Saving | None:
        """Return where to save rows for the snapshot in progress, as recorded by its owner; None if there is none.

        The result is kept as `target`; see `after_batch`.
        """
        until, target = int(self.control["saving"][0]), self.target
        if not until or (target is not None and target.until == until):
            return target.saving if until and target else None
        try:
            self.target = target = self._open_target(until)
            code = 0 if target else errno.ESRCH  # its owner is dead
        except (OSError, HashembError, ValueError, KeyError, TypeError) as error:
            target, code = None, getattr(error, "errno", None) or errno.EIO
        if target is None:  # the snapshot has failed, which its owner reports; training continues
            self.control["save_errno"] = code
            self.control["save_failed"] = until
            return None
        return target.saving

    def _open_target(self, until: int) -> SaveTarget | None:
        wanted = json.loads(self.directory.read(SAVING_FILE))
        if wanted["until"] != until:  # written by the next owner, which is about to begin; the previous one died
            return None
        target = self.save_target(open_announced(wanted), wanted["names"], wanted["since"], until, owner=False)
        if int(self.control["saving"][0]) != until:
            target.discard()
            return None
        return target

    def save_target(self, directory: Directory, names: list[str], since: int, until: int, *, owner: bool) -> SaveTarget:
        """Open the files of a snapshot of this table in progress, for saving rows."""
        return SaveTarget(self.meta, self.arrays, self.new_lock(), directory, names, since, until, owner=owner)

    def flush(self) -> None:
        """Sync all arrays to disk, then the control page. This does nothing on a read-only table."""
        if self.writable:
            self._sync(self.calls.check)

    def _sync(self, before_each: Callable[[], None] = lambda: None) -> None:
        self.calls.dirty = False  # comes first: an update meanwhile sets it again
        try:
            for name in (*self.meta.files, "control"):
                before_each()
                self._maps[name].flush()
        except BaseException:
            self.calls.dirty = True
            raise

    # -- measuring --

    def resident_bytes(self) -> int | None:
        """Return the bytes of the table's files in the page cache; None if the kernel cannot tell (Linux < 6.5)."""
        pages = 0
        for file in self._files.values():
            span, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
            if _libc.syscall(_SYS_CACHESTAT, file.fd, ctypes.byref(span), ctypes.byref(counts), 0):
                return None
            pages += counts[0]
        return pages * mmap.PAGESIZE

    # -- closing --

    def close(self) -> None:
        """Wait for other threads and close; closing again has no effect. Mappings stay as long as there are views.

        An error in syncing the table is raised, but the table is closed all the same and not marked clean.
        """
        if not hasattr(self, "calls"):  # opening has failed early
            self._release()
            return
        with _sharing.Closing(self.calls):
            self._release()

    def _release(self) -> None:
        joined, self._joined = self._joined, False
        try:
            if joined:
                self._leave_writers()
        finally:
            self.target = None
            while self._files:
                self._files.popitem()[1].close()
            self.directory.close()
