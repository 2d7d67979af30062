"""Locks and forks: a child that kept its parent's locks open would keep them when the parent is killed.

Locks belong to an open file (csrc/locks.c), which a forked child shares. So in the child every one is closed before
anything else runs, and a table opens its own.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Lock", "after_fork_in_child"]


class _Forkable(Protocol):
    def after_fork(self) -> None: ...


_forkables: weakref.WeakSet[_Forkable] = weakref.WeakSet()


def after_fork_in_child(item: _Forkable) -> None:
    """Has `item.after_fork()` called in every child that is forked while it lives."""
    _forkables.add(item)


class Lock:
    """A table's lock file, opened for locks of its own; they go when it is closed, and a forked child has none."""

    def __init__(self, path: str) -> None:
        self.fd = -1  # if there is nothing to open
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        after_fork_in_child(self)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def after_fork(self) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _in_child() -> None:
    for item in list(_forkables):
        item.after_fork()


os.register_at_fork(after_in_child=_in_child)
