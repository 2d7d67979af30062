"""Where a snapshot in progress wants rows saved: how its owner and the writers of the table find and fill it.

Its owner writes SAVING_FILE into the table before it begins; it names the half-made directory beside the snapshot's
place-to-be. The protocol itself is in csrc/save.c.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import numpy as np

from hashemb import _core
from hashemb._files.directory import Directory
from hashemb._files.format import DATA_OFFSET_BYTES, TableMeta
from hashemb._files.locks import Lock

__all__ = ["BITS_FILE", "LOG_PREFIX", "SAVING_FILE", "SaveTarget", "bits_bytes", "open_announced"]

SAVING_FILE = "saving.json"  # in the table
BITS_FILE, LOG_PREFIX = "rows.bits", "rows.log."  # in the half-made directory


class SaveTarget:
    """The half-made files of a snapshot, open for saving what the table held in the epochs `since` < epoch <= `until`.

    Beside array files for `names` and blocks.npy its directory holds BITS_FILE, a bit per row, and the logs of rows
    that writers leave there (csrc/save.c), one for each. Only the owner of the snapshot opens the array files: space
    is free once the last who has a file open lets go of it, and a writer may be long in doing so.
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
        self.saving = _core.Saving(
            files, blocks, control, bits, others, lock, since, until, DATA_OFFSET_BYTES, shift
        )

    def _open(self, filename: str, flags: int = 0) -> _core.OpenFile:
        return self._directory.open(filename, flags | os.O_RDWR)

    def discard(self) -> None:
        """For one that came too late: all is saved, and nobody will look for the log."""
        self._directory.remove(self._log)


def open_announced(wanted: dict[str, Any]) -> Directory:
    """The half-made directory that SAVING_FILE names; `OSError` if another stands at its path by now."""
    directory = Directory(wanted["directory"])
    if wanted.get("identity", directory.identity()) != directory.identity():  # older versions note none
        raise OSError(errno.ESTALE, "the directory of a snapshot in progress has been replaced", directory.path)
    return directory


def bits_bytes(meta: TableMeta) -> int:
    """Size of BITS_FILE: whole stripes."""
    return -(-meta.num_blocks // _core.STRIPE_BLOCKS) * _core.STRIPE_BLOCKS * meta.block_rows // 8
