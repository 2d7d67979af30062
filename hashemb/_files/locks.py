"""Locks and forks: a child that kept its parent's lock files open would hold the locks after the parent is killed.

Locks belong to an open file (csrc/locks.c), which a forked child shares. In the child, therefore, all of them are
closed before anything else runs, and a table opens its own.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Protocol

from hashemb._files.directory import Directory
from hashemb._open_file import OpenFile
from hashemb.errors import HashembError

__all__ = ["Lock", "after_fork_in_child", "open_again"]


class _Forkable(Protocol):
    def after_fork(self) -> None: ...


_forkables: weakref.WeakSet[_Forkable] = weakref.WeakSet()


def after_fork_in_child(item: _Forkable) -> None:
    """Register `item.after_fork()` to be called in every child that is forked while `item` is alive."""
    _forkables.add(item)


class Lock:
    """A table's lock file, opened for separate locks. Closing it releases them, and a forked child does not have them.

    Attributes
    ----------
    fd : int
        File descriptor, valid while the file is open.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file, self.fd = file, file.fd
        after_fork_in_child(self)

    def close(self) -> None:
        self._file.close()

    def after_fork(self) -> None:
        self.close()


def open_again(directory: Directory, known: os.stat_result) -> OpenFile:
    """Open the lock file of an open table, identified by its `os.fstat`, for separate locks.

    Raise `HashembError` if the directory no longer has this lock file: locks on another would not exclude anything.
    """
    with suppress(FileNotFoundError):
        file = directory.open("lock", os.O_RDWR)
        if os.path.samestat(os.fstat(file.fd), known):
            return file
        file.close()
    raise HashembError(
        f"{directory.path}: the table was removed, or its lock file was replaced, while it was open: snapshots, deltas "
        "and writing from a forked process need it; open the table again where it is now"
    )


def _in_child() -> None:
    for item in list(_forkables):
        item.after_fork()


os.register_at_fork(after_in_child=_in_child)
