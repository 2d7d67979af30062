"""The target of a snapshot in progress: how its owner and the writers of the table find and fill it.

The owner writes SAVING_FILE into the table before it begins. The file names the building directory next to the
snapshot's destination. The protocol itself is in csrc/save.c.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hashemb import _sharing
from hashemb._files.arrays import MappedFiles
from hashemb._files.directory import Directory
from hashemb._files.format import DATA_OFFSET_BYTES, TableMeta
from hashemb._files.locks import Lock
from hashemb._open_file import OpenFile
from hashemb.errors import HashembError

__all__ = ["BITS_FILE", "LOG_PREFIX", "SAVING_FILE", "SaveTarget", "SavingForOthers", "bits_bytes", "open_announced"]

SAVING_FILE = "saving.json"  # in the table
BITS_FILE, LOG_PREFIX = "rows.bits", "rows.log."  # in the building directory


class SaveTarget:
    """The open files of a snapshot in progress, which saves blocks written in the epochs `since` < epoch <= `until`.

    In addition to array files for `names` and blocks.npy, its directory holds BITS_FILE, with a bit per row, and one
    log of rows for each writer (csrc/save.c). Only the owner of the snapshot opens the array files: space is freed when
    the last descriptor is closed, and a writer may keep one open for long.
    """

    def __init__(
        self,
        meta: TableMeta,
        arrays: dict[str, Any],
        lock: Lock,
        directory: Directory,
        names: list[str],
        since: int,
        until: int,
        *,
        owner: bool,
    ) -> None:
        self.until, self._directory = until, directory
        self._log = f"{LOG_PREFIX}{os.getpid()}.{os.urandom(8).hex()}"
        files = [(arrays[name], self._open(f"{name}.npy") if owner else None) for name in names]
        log_flags = os.O_CREAT | os.O_EXCL | os.O_APPEND
        others = self._open("blocks.npy"), self._open(BITS_FILE), self._open(self._log, log_flags)
        bits = np.frombuffer(mmap.mmap(others[1].fd, bits_bytes(meta)), np.uint64)
        shift, blocks, control = meta.block_rows.bit_length() - 1, arrays["blocks"], arrays["control"]
        self.saving = _sharing.Saving(
            files, blocks, control, bits, others, lock, since, until, DATA_OFFSET_BYTES, shift
        )

    def _open(self, filename: str, flags: int = 0) -> OpenFile:
        return self._directory.open(filename, flags | os.O_RDWR)

    def discard(self) -> None:
        """Remove the log of a writer that joined too late: everything is saved, and no process will read the log."""
        self._directory.remove(self._log)


class SavingForOthers:
    """A writer's part in the snapshots that any process takes of its table: where to save rows before changing them.

    Parameters
    ----------
    mapped : MappedFiles
    new_lock : callable
        Opens the table's lock file once more.

    Attributes
    ----------
    target : SaveTarget or None
        The target used last, until `release_finished`.
    """

    def __init__(self, mapped: MappedFiles, new_lock: Callable[[], Lock]) -> None:
        self._mapped, self._new_lock = mapped, new_lock
        self.target: SaveTarget | None = None

    def open_target(self, directory: Directory, names: list[str], since: int, until: int, *, owner: bool) -> SaveTarget:
        """Open the files of a snapshot of this table in progress, for saving rows."""
        mapped = self._mapped
        return SaveTarget(
            mapped.meta, mapped.arrays, self._new_lock(), directory, names, since, until, owner=owner
        )

    def saving(self) -> _sharing.Saving | None:
        """Return where to save rows for the snapshot in progress, as recorded by its owner; None if there is none."""
        until, target = int(self._mapped.control["saving"][0]), self.target
        if not until or (target is not None and target.until == until):
            return target.saving if until and target else None
        try:
            self.target = target = self._open(until)
            code = 0 if target else errno.ESRCH  # its owner is dead
        except (OSError, HashembError, ValueError, KeyError, TypeError) as error:
            target, code = None, getattr(error, "errno", None) or errno.EIO
        if target is None:  # the snapshot has failed, which its owner reports; training continues
            self._mapped.control["save_errno"] = code
            self._mapped.control["save_failed"] = until
            return None
        return target.saving

    def _open(self, until: int) -> SaveTarget | None:
        wanted = json.loads(self._mapped.directory.read(SAVING_FILE))
        if wanted["until"] != until:  # written by the next owner, which is about to begin; the previous one died
            return None
        target = self.open_target(open_announced(wanted), wanted["names"], wanted["since"], until, owner=False)
        if int(self._mapped.control["saving"][0]) != until:
            target.discard()
            return None
        return target

    def release_finished(self) -> None:
        """Release the target if its snapshot has finished: its space is freed only then."""
        target = self.target  # another thread or a signal handler may change it at any time
        if target is not None and int(self._mapped.control["saving"][0]) != target.until:
            self.target = None


def open_announced(wanted: dict[str, Any]) -> Directory:
    """Open the building directory that SAVING_FILE names; raise `OSError` if another is at its path by now."""
    directory = Directory(wanted["directory"])
    if wanted.get("identity", directory.identity()) != directory.identity():  # older versions do not record it
        raise OSError(errno.ESTALE, "the directory of a snapshot in progress has been replaced", directory.path)
    return directory


def bits_bytes(meta: TableMeta) -> int:
    """Return the size of BITS_FILE, which holds whole stripes."""
    return -(-meta.num_blocks // _sharing.STRIPE_BLOCKS) * _sharing.STRIPE_BLOCKS * meta.block_rows // 8
