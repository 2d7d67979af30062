"""An open table, put together from its parts: mapped files, huge pages, space, the writers' lock, and saving.

It handles names, sizes and byte ranges, not rows as vectors. A page of a table is written only after the file system
has reserved space for it and a snapshot in progress has saved its content.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _core, _sharing
from hashemb._files import blocks as _blocks
from hashemb._files.arrays import Array, MappedFiles
from hashemb._files.directory import disk_bytes, read_control, read_meta, table_directory
from hashemb._files.huge_pages import HugePages, is_tmpfs
from hashemb._files.locks import Lock, after_fork_in_child
from hashemb._files.saving import SavingForOthers
from hashemb._files.space import Space
from hashemb._files.writers import Writers
from hashemb.errors import ClosedTableError

__all__ = ["TableFiles"]


class TableFiles:
    """The files of one open table.

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
    calls : Calls
        The calls in progress on the table.
    recovered : str or None
        Set if the last writer did not close the table: "killed" (the process ended, and all its pages are present) or
        "rebooted" (the machine restarted, and unflushed updates may be lost).
    suspects : ndarray of int64
        Rows that killed processes were writing; see seats.py.
    saves : SavingForOthers
    """

    def __init__(self, path: str, *, writable: bool, huge_pages: bool | None = None) -> None:
        self.path, self.writable = path, writable
        self.directory = table_directory(path)
        self.meta = read_meta(self.directory)
        read_control(self.directory, self.meta)
        self.recovered: str | None = None
        self.suspects = np.empty(0, np.int64)
        self._mapped = MappedFiles(self.directory, self.meta, writable=writable)
        self.arrays = self._mapped.arrays
        self._huge = HugePages(self._mapped)
        after_fork_in_child(self)
        try:
            self._mapped.map_all()
            self._assemble()
            if huge_pages is not False:
                self._huge.ask(always=huge_pages is True)
            if writable:
                self._writers.join()
                self.recovered, self.suspects = self._writers.recovered, self._writers.suspects
        except BaseException:
            self.close()
            raise
        if self.recovered == "rebooted":
            message = "was not closed cleanly before the machine restarted: updates since its last flush may be lost"
            warnings.warn(f"{path} {message} or incomplete", RuntimeWarning, stacklevel=4)  # the caller of `open`

    def _assemble(self) -> None:
        status = os.fstat(self.fd("control"))
        self.control = self._mapped.control
        self.space = Space(self.path, self.meta, self.arrays, self._mapped.files)
        calls = _sharing.Calls(self.path, (status.st_dev, status.st_ino))
        self._writers = Writers(self._mapped, self.space, calls)
        self.saves = SavingForOthers(self._mapped, self._writers.new_lock)
        self.calls = calls

    @property
    def asks_for_huge_pages(self) -> bool:
        """Whether a first access maps a huge page."""
        return self._huge.asked

    def fd(self, name: str) -> int:
        """Return the descriptor of an array's open file, by name without `.npy`."""
        return self._mapped.fd(name)

    def tmpfs_fd(self) -> int:
        """Return the descriptor of the weights' file on tmpfs, where reads take space too; -1 elsewhere."""
        fd = self.fd("weight")
        return fd if is_tmpfs(fd) else -1

    def join(self, core: _core.Core) -> None:
        """Give the core this process's lock of the table and a seat; a forked child joins the writers first."""
        self._writers.bind(core)

    def new_lock(self) -> Lock:
        """Open the lock file once more, for locks that exclude those taken through other descriptors."""
        return self._writers.new_lock()

    def turn(self, call: str) -> _sharing.Hold:
        """Return a context manager that lets one process at a time take or apply points; its death ends the turn."""
        return _sharing.Hold(self.new_lock(), self.calls, _sharing.LOCK_SNAPSHOT, call)

    def after_fork(self) -> None:
        """Reset locks and calls in a forked child."""
        self.calls.after_fork()
        self.saves.target = None
        self._writers.after_fork()

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
                    saving = self.saves.saving()
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
            self.saves.release_finished()
            if fresh.size:
                self._huge.collapse_written(fresh)

    def flush(self) -> None:
        """Sync all arrays to disk, then the control page. This does nothing on a read-only table."""
        if self.writable:
            self._sync(self.calls.check)

    def _sync(self, before_each: Callable[[], None] = lambda: None) -> None:
        self.calls.dirty = False  # comes first: an update meanwhile sets it again
        try:
            for name in (*self.meta.files, "control"):
                before_each()
                self._mapped.maps[name].flush()
        except BaseException:
            self.calls.dirty = True
            raise

    # -- measuring --

    def count_rows(self) -> int:
        """Count the rows that have been written, by reading every block ever written."""
        rows, count = self.meta.block_rows, 0
        weight = self.arrays["weight"].view(np.uint16 if self.meta.dtype != "float32" else np.uint32)
        for blocks in self._written_blocks():
            for block in blocks.tolist():
                count += int(weight[block * rows : (block + 1) * rows].any(axis=1).sum())
        return count

    def written_blocks(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the blocks that have been written, ascending."""
        return np.concatenate([np.empty(0, np.int64), *self._written_blocks()])

    def _written_blocks(self) -> Iterator[npt.NDArray[np.int64]]:
        for first, epochs in _blocks.epoch_chunks(self.fd("blocks"), self.meta.num_blocks):
            self.calls.check()
            yield first + np.flatnonzero(epochs)

    def sizes(self) -> dict[str, Any]:
        """Return the sizes in `hashemb.stats.TableStats`; None where the kernel cannot tell (see there)."""
        return {
            "logical_bytes": self.meta.logical_bytes,
            "disk_bytes": disk_bytes(self.directory),
            "resident_bytes": self._mapped.resident_bytes(),
            "huge_page_bytes": self._huge.mapped_bytes(),
        }

    # -- closing --

    def close(self) -> None:
        """Wait for other threads and close; closing again has no effect. Mappings stay as long as there are views.

        An error in syncing the table is raised, but the table is closed all the same and not marked clean.
        """
        if not hasattr(self, "calls"):  # opening has failed early
            self._mapped.close()
            return
        with _sharing.Closing(self.calls):
            try:
                self._writers.leave(self._sync)
            finally:
                self.saves.target = None
                self._mapped.close()
