"""The file `inflight`: the row that each thread of each writer is writing, so that a killed process leaves a note.

A writer has one page of the file to itself, its seat, for as long as it holds the lock on that page's number. Each of
its threads notes the row that it writes, plus 1, in a cache line of its own, and 0 when it is done. A note whose seat's
lock is free was left by a killed process: that row, and no other, may mix elements or state from before and after an
update. Notes last until the last writer closes the table, which removes the file.

No other part of a table depends on the file: where it cannot be created there are no notes.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from hashemb import _sharing
from hashemb._files.directory import Directory
from hashemb.errors import HashembError

__all__ = ["SEATS_FILE", "abandoned_rows", "take_seat"]

SEATS_FILE = "inflight"
_NUM_SEATS, _SEAT_BYTES, _LINE_WORDS = 1024, 4096, 8

Lines = npt.NDArray[np.uint64]


def take_seat(directory: Directory, lock_fd: int) -> Lines | None:
    """Return the mapped lines of a free seat, uint64 (threads, 8), or None if none is available.

    The seat belongs to this writer while it has `lock_fd` open. Seats with notes of killed processes are taken last.
    """
    try:
        file = directory.open(SEATS_FILE, os.O_RDWR | os.O_CREAT)
    except (OSError, HashembError):
        return None
    try:
        fd = file.fd
        if os.fstat(fd).st_size != _NUM_SEATS * _SEAT_BYTES:
            os.ftruncate(fd, _NUM_SEATS * _SEAT_BYTES)
        seat = _free_seat(fd, lock_fd)
        if seat is None:
            return None
        os.pwrite(fd, bytes(_SEAT_BYTES), seat * _SEAT_BYTES)  # allocates space: without it a store is a SIGBUS
        mapped = mmap.mmap(fd, _SEAT_BYTES, offset=seat * _SEAT_BYTES)
        return np.frombuffer(mapped, np.uint64).reshape(-1, _LINE_WORDS)
    except OSError:
        return None
    finally:
        file.close()


def _free_seat(fd: int, lock_fd: int) -> int | None:
    """Lock a seat and return its number: the first one without notes, or else the first free one."""
    with_notes: int | None = None
    for seat in range(_NUM_SEATS):
        if not _sharing.lock(lock_fd, fcntl.F_WRLCK, _sharing.LOCK_SEATS + seat, False):
            continue
        if not any(os.pread(fd, _SEAT_BYTES, seat * _SEAT_BYTES)):
            if with_notes is not None:
                _sharing.lock(lock_fd, fcntl.F_UNLCK, _sharing.LOCK_SEATS + with_notes, False)
            return seat
        if with_notes is None:
            with_notes = seat
        else:
            _sharing.lock(lock_fd, fcntl.F_UNLCK, _sharing.LOCK_SEATS + seat, False)
    return with_notes


def abandoned_rows(directory: Directory, num_embeddings: int) -> npt.NDArray[np.int64]:
    """Return the rows that killed processes were writing, ascending int64. Those of live processes are left out."""
    try:
        file = directory.open(SEATS_FILE)
    except FileNotFoundError:
        return np.empty(0, np.int64)
    with file, directory.open("lock") as lock:
        pages = [_notes(file.fd, lock.fd, seat) for seat in range(os.fstat(file.fd).st_size // _SEAT_BYTES)]
    rows = np.unique(np.concatenate([np.empty(0, np.uint64), *pages]))
    return (rows[(rows > 0) & (rows <= num_embeddings)] - np.uint64(1)).astype(np.int64)


def _notes(fd: int, lock_fd: int, seat: int) -> npt.NDArray[np.uint64]:
    """Return the notes of one seat, or none if its writer is alive."""
    page = np.frombuffer(os.pread(fd, _SEAT_BYTES, seat * _SEAT_BYTES).ljust(_SEAT_BYTES, b"\0"), np.uint64)
    if not page.any() or not _sharing.lock(lock_fd, fcntl.F_RDLCK, _sharing.LOCK_SEATS + seat, False):
        return page[:0]
    _sharing.lock(lock_fd, fcntl.F_UNLCK, _sharing.LOCK_SEATS + seat, False)
    return page[::_LINE_WORDS]
