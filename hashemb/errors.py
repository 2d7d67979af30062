"""The exceptions that hashemb defines.

Wrong arguments raise `TypeError` or `ValueError` and a missing table raises `FileNotFoundError`, as is usual in
Python; the classes here are for errors specific to tables. Their messages include the numbers.
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
    """The path is not a hashemb table, or has a newer format than this version can read."""


class CorruptTableError(FormatError):
    """The table is damaged: the message names the file, what was expected and what was found."""


class ReadOnlyTableError(HashembError):
    """A write was requested on a table that was opened with mode "r" or whose files cannot be written."""


class ClosedTableError(HashembError):
    """The table has been closed."""


class TableBusyError(HashembError):
    """A signal handler or callback called a table during another call of its thread that has to return first.

    Examples are `close` during any long call, a snapshot or delta during another one, and any change during
    `apply_delta`: the thread would wait for itself. Nothing has been changed, and the call in progress continues.
    """


class DeltaError(HashembError):
    """The delta cannot be applied to this table. None of it was written.

    Attributes
    ----------
    reason : str
        "applied" (the table has it already), "gap" (earlier deltas are missing), "older" (the table has a later one),
        "base" (it starts a new table), "foreign" (it belongs to another table, or to another branch of this table's
        history), "trained" (the table was updated since its last delta), "interrupted" (another delta was partly
        applied and has to be completed first), or "incompatible" (geometry, seed, initialiser, number of hashes,
        weight decay or optimiser differ).
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DeltaError], tuple[str, str]]:
        """Pickle the constructor's arguments."""
        return type(self), (str(self), self.reason)


class NoSpaceError(HashembError, OSError):
    """The file system is full. The call that raised this wrote nothing to the table."""

    def __init__(self, message: str, filename: str | os.PathLike[str] | None = None) -> None:
        super().__init__(errno.ENOSPC, message, None if filename is None else os.fspath(filename))

    def __reduce__(self) -> tuple[type[NoSpaceError], tuple[str | None, str | None]]:
        """Pickle the constructor's arguments, as worker processes pass this error to others."""
        return type(self), (self.strerror, self.filename)


class MissingExtraError(HashembError, ImportError):
    """An optional dependency is not installed; the message names the extra that provides it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}: install it with  pip install 'hashemb[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Pickle the constructor's arguments, from which the message is built."""
        return type(self), (self.package, self.extra)
