"""The exceptions that hashemb raises on purpose.

Wrong arguments are a `TypeError` or a `ValueError`, a missing table a `FileNotFoundError`, as everywhere in
Python; the classes here are for what only a table can suffer. All of them carry the numbers in their message.
"""

from __future__ import annotations

import errno
import os

__all__ = [
    "ClosedTableError",
    "CorruptTableError",
    "DeltaError",
    "FormatError",
    "HashembError",
    "MissingExtraError",
    "NoSpaceError",
    "ReadOnlyTableError",
    "TableBusyError",
]


class HashembError(Exception):
    """Base class of every error defined by hashemb."""


class FormatError(HashembError):
    """The path is not a hashemb table, or was written in a newer format than this version reads."""


class CorruptTableError(FormatError):
    """The table is damaged: the message names the file, what was expected and what was found."""


class ReadOnlyTableError(HashembError):
    """A write was asked of a table opened with mode "r", or of one on files that cannot be written."""


class ClosedTableError(HashembError):
    """The table has been closed."""


class TableBusyError(HashembError):
    """A signal handler or callback called a table in the middle of a call of the same thread that has to return first.

    Such are `close` during any long call, a snapshot or delta during another, and any change during `apply_delta`: they
    would wait for themselves. Nothing has been changed, and the call in progress goes on.
    """


class DeltaError(HashembError):
    """A delta that this table cannot take. Nothing of it was written.

    Attributes
    ----------
    reason : str
        "applied" (the table has it already), "gap" (deltas before it are missing), "older" (the table stands at a
        later one), "base" (it begins a new table), "foreign" (it is of another table, or of another branch of this
        table's history), "trained" (the table was updated since its last delta), "interrupted" (another delta has been
        applied in part, and comes first), or "incompatible" (another geometry, seed, initialiser, number of hashes,
        weight decay or optimiser).
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DeltaError], tuple[str, str]]:
        """Pickle by the constructor's arguments."""
        return type(self), (str(self), self.reason)


class NoSpaceError(HashembError, OSError):
    """The file system is full. Nothing of the call that raised this was written to the table."""

    def __init__(self, message: str, filename: str | os.PathLike[str] | None = None) -> None:
        super().__init__(errno.ENOSPC, message, None if filename is None else os.fspath(filename))

    def __reduce__(self) -> tuple[type[NoSpaceError], tuple[str | None, str | None]]:
        """Pickle by the constructor's arguments: workers raise this across processes."""
        return type(self), (self.strerror, self.filename)


class MissingExtraError(HashembError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}: install it with  pip install 'hashemb[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Pickle by the constructor's arguments, of which the message is made."""
        return type(self), (self.package, self.extra)
