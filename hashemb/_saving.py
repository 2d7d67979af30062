"""Where a snapshot in progress wants rows saved: how its owner and the writers of the table find and fill it.

Its owner writes SAVING_FILE into the table before it begins; it names the half-made directory beside the snapshot's
place-to-be. The protocol itself is in csrc/save.c.
"""

from __future__ import annotations

import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import numpy as np

from hashemb import _core
from hashemb._format import DATA_OFFSET_BYTES, TableMeta
from hashemb._locks import Lock

__all__ = ["BITS_FILE", "LOG_PREFIX", "SAVING_FILE", "SaveTarget", "bits_bytes"]

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
        directory: str,
        names: list[str],
        since: int,
        until: int,
        *,
        owner: bool,
    ) -> None:
        self.until, self._lock = until, lock
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fds = [self._directory]
        weakref.finalize(self, _close_all, self._fds)
        files = [(arrays[name], self._open(f"{name}.npy") if owner else -1) for name in names]
        blocks_fd, bits_fd = self._open("blocks.npy"), self._open(BITS_FILE)
        self._log = f"{LOG_PREFIX}{os.getpid()}.{os.urandom(8).hex()}"
        log_fd = self._open(self._log, os.O_CREAT | os.O_EXCL | os.O_APPEND)
        bits = np.frombuffer(mmap.mmap(bits_fd, bits_bytes(meta)), np.uint64)
        fds = (blocks_fd, bits_fd, log_fd, lock.fd)
        shift = meta.block_rows.bit_length() - 1
        blocks, control = arrays["blocks"], arrays["control"]
        self.saving = _core.Saving(files, blocks, control, bits, fds, since, until, DATA_OFFSET_BYTES, shift)

    def _open(self, filename: str, flags: int = 0) -> int:
        self._fds.append(os.open(filename, flags | os.O_RDWR | os.O_CLOEXEC, 0o666, dir_fd=self._directory))
        return self._fds[-1]

    def discard(self) -> None:
        """For one that came too late: all is saved, and nobody will look for the log."""
        with suppress(FileNotFoundError):
            os.unlink(self._log, dir_fd=self._directory)


def bits_bytes(meta: TableMeta) -> int:
    """Size of BITS_FILE: whole stripes."""
    return -(-meta.num_blocks // _core.STRIPE_BLOCKS) * _core.STRIPE_BLOCKS * meta.block_rows // 8


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
