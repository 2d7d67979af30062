"""The writers of a table: the lock that they share while they have it open, and the flag that says they closed it.

The first writer repairs what the last one left; the last writer syncs everything and only then marks the table clean.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from hashemb import _core, _sharing
from hashemb._files import recovery as _recovery
from hashemb._files.arrays import MappedFiles
from hashemb._files.directory import HISTORY_FILE, boot_id, read_history, remove_leftovers
from hashemb._files.locks import Lock, open_again
from hashemb._files.saving import SAVING_FILE
from hashemb._files.seats import SEATS_FILE, abandoned_rows, take_seat
from hashemb._files.space import Space
from hashemb.errors import FormatError, HashembError

__all__ = ["Writers"]


class Writers:
    """The share of one open table in its writers' lock.

    Parameters
    ----------
    mapped : MappedFiles
    space : Space
    calls : Calls
        The calls in progress on the table.

    Attributes
    ----------
    recovered : {None, "killed", "rebooted"}
    suspects : ndarray of int64
        See `TableFiles`.
    """

    def __init__(self, mapped: MappedFiles, space: Space, calls: _sharing.Calls) -> None:
        self._mapped, self._space, self._calls = mapped, space, calls
        self.recovered: str | None = None
        self.suspects = np.empty(0, np.int64)
        self._joined = False

    def join(self) -> None:
        """Open the lock file and join; the caller has just opened the table."""
        lock = self._mapped.files["lock"] = self._mapped.open("lock")
        self._lock_stat = os.fstat(lock.fd)
        place = _sharing.LOCK_WRITERS
        with _sharing.Hold(lock, self._calls, place, "open", wait=False, then=fcntl.F_RDLCK) as is_alone:
            if not is_alone:
                _sharing.wait_for_lock(lock.fd, fcntl.F_RDLCK, place, self._calls, "open")
            self._check_in_place()
            if is_alone:
                self._take_over()
            self._unseal()
        self._joined = True

    def _check_in_place(self) -> None:
        """Check that the table is still at its path: a process that replaces it holds the lock until it is done."""
        path = self._mapped.path
        try:
            found: os.stat_result | None = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self._mapped.directory.fd)):
            raise HashembError(f"{path}: was moved or replaced while it was being opened: open it again")

    def _take_over(self) -> None:
        """Repair what the last writer and a killed snapshot left. The caller must be the only writer."""
        mapped = self._mapped
        meta, directory = mapped.meta, mapped.directory
        self.recovered = _recovery.previous_end(mapped.control)
        if self.recovered == "rebooted":
            fds = {name: mapped.fd(name) for name in meta.files}
            filename = directory.filename("blocks.npy")
            _recovery.mark_blocks_with_data(mapped.control, mapped.arrays["blocks"], fds, meta, filename)
            _recovery.reserve_marked_blocks(fds["blocks"], meta, self._space.allocate)
            if not self._is_being_applied():
                # A block may be newer than its epoch indicates, so that deltas could miss it. While a delta is being
                # applied this holds only for that delta's blocks, and it will be applied again.
                directory.remove(HISTORY_FILE)
            directory.remove(SEATS_FILE)
        self.suspects = abandoned_rows(directory, meta.num_embeddings)
        remove_leftovers(directory, SAVING_FILE)
        self._unseal(boot_id=boot_id().encode(), saving=0, gate_closing=0, opened=1)

    def _is_being_applied(self) -> bool:
        try:
            return read_history(self._mapped.directory, self._mapped.meta.id).applying is not None
        except FormatError:  # damaged or from another table, and about to be removed
            return False

    def _unseal(self, **fields: Any) -> None:
        _recovery.unseal(self._mapped.control, self._mapped.maps["control"], **fields)

    def bind(self, core: _core.Core) -> None:
        """Give the core this process's lock of the table and a seat; a forked child joins the writers first."""
        files = self._mapped.files
        if "lock" not in files:
            files["lock"] = open_again(self._mapped.directory, self._lock_stat)
        fd = files["lock"].fd
        if not self._joined:
            _sharing.wait_for_lock(fd, fcntl.F_RDLCK, _sharing.LOCK_WRITERS, self._calls, "update")
            self._unseal()
            self._joined = True
        core.join(fd, take_seat(self._mapped.directory, fd))

    def new_lock(self) -> Lock:
        """Open the lock file once more, for locks that exclude those taken through other descriptors."""
        return Lock(open_again(self._mapped.directory, self._lock_stat))

    def after_fork(self) -> None:
        """Drop the parent's lock in a forked child."""
        self._joined = False
        files = self._mapped.files
        if "lock" in files:
            files.pop("lock").close()
            with suppress(OSError, HashembError):  # the error is raised when the lock is needed
                files["lock"] = open_again(self._mapped.directory, self._lock_stat)

    def leave(self, sync: Callable[[], None]) -> None:
        """Leave the writers, if joined. The last one calls `sync` if the table is dirty, and marks it as clean."""
        joined, self._joined = self._joined, False
        if not joined:
            return
        mapped = self._mapped
        with _sharing.Hold(mapped.files["lock"], self._calls, _sharing.LOCK_WRITERS, "close", wait=False) as is_last:
            if is_last:
                if self._calls.dirty:
                    sync()
                mapped.directory.remove(SEATS_FILE)
                _recovery.seal(mapped.arrays["control"], mapped.maps["control"])
