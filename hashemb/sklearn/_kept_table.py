"""A table that an object holds: either shared, at a path, or private, in a directory that is removed with the object.

The object stores a path and opens the table when it is used, so it can be pickled: a shared table by its path, a
private one with its contents.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
import zlib
from typing import Any, Literal

import hashemb

__all__ = ["KeptTable", "table_options"]

_CREATE_OPTIONS = ("num_embeddings", "embedding_dim", "dtype", "optimizer", "init", "num_hashes", "seed")
_TABLE_NAME = "table.emb"
_CHECKPOINT_NAME = "checkpoint.delta"


def table_options(table: hashemb.EmbeddingTable | hashemb.TableInfo) -> dict[str, Any]:
    """Return the arguments with which `hashemb.create` makes an empty table like this one."""
    return {name: getattr(table, name) for name in _CREATE_OPTIONS}


class KeptTable:
    """A reference to a table by its path; the table is opened at the first use. It is safe in several threads.

    Parameters
    ----------
    path : str
        Path of a table.
    owned : str, optional
        Directory to remove with this object, in the process that created the object (not in its forks).

    Examples
    --------
    >>> kept = KeptTable.create({"num_embeddings": 100, "embedding_dim": 2})
    >>> kept.open("r+").update([7], [[1.0, 1.0]])
    >>> copy = KeptTable.unpack(kept.pack())
    >>> bool((copy.open().lookup([7]) == kept.open().lookup([7])).all()), copy.path != kept.path
    (True, True)
    """

    def __init__(self, path: str, *, owned: str | None = None) -> None:
        self.path = path
        self._owned = owned
        self._table: hashemb.EmbeddingTable | None = None
        self._lock = threading.Lock()
        self._finalizer = None if owned is None else weakref.finalize(self, _remove, owned, os.getpid())

    @classmethod
    def create(cls, options: dict[str, Any], *, beside: str | None = None) -> KeptTable:
        """Create an empty private table in a new directory, which is temporary or next to the path `beside`."""
        if beside is None:
            owned = tempfile.mkdtemp(prefix="hashemb-")
        else:
            parent, name = os.path.split(os.path.abspath(beside))
            owned = tempfile.mkdtemp(prefix=f".{name}-", dir=parent)
        kept = cls(os.path.join(owned, _TABLE_NAME), owned=owned)
        kept._table = hashemb.create(kept.path, **options)
        return kept

    @property
    def is_private(self) -> bool:
        """Whether the table is removed with this object."""
        return self._owned is not None

    def open(self, mode: Literal["r", "r+"] = "r") -> hashemb.EmbeddingTable:
        """Return the open table; once opened for writing, it stays writable."""
        with self._lock:
            if self._table is None or (mode == "r+" and self._table.mode == "r"):
                self._table = hashemb.open(self.path, mode)  # the old one closes when no longer in use
            return self._table

    def close(self) -> None:
        """Close the table; the next use opens it again."""
        with self._lock:
            table, self._table = self._table, None
        if table is not None:
            table.close()

    def publish(self, path: str) -> None:
        """Move a private table to `path` atomically; it is no longer private afterwards.

        Raises
        ------
        OSError
            Something exists at `path`, or `path` is on another file system.
        """
        self.open("r+").flush()
        self.close()
        os.rename(self.path, path)
        self.path, finalizer = path, self._finalizer
        self._owned = self._finalizer = None
        if finalizer is not None:
            finalizer()

    def checkpoint(self) -> None:
        """Save the contents of a private table; a shared table cannot be restored and is not saved."""
        if self._owned is None:
            return
        path = os.path.join(self._owned, _CHECKPOINT_NAME)
        if os.path.exists(path):
            os.unlink(path)
        self._save(path)

    def at_checkpoint(self, *, beside: str | None = None) -> KeptTable:
        """Return a private table with the contents of the last checkpoint, or this table if there is none."""
        path = os.path.join(self._owned or "", _CHECKPOINT_NAME)
        if self._owned is None or not os.path.exists(path):
            return self
        kept = KeptTable.create(table_options(self.open()), beside=beside)
        hashemb.apply_delta(kept.open("r+"), path)
        return kept

    def _save(self, path: str) -> None:
        """Write the table's contents, including optimiser state, to one new file."""
        self.open("r+").export_delta(None, path, state=True)

    def pack(self) -> dict[str, Any]:
        """Compress the table in memory, in time and space linear in the number of blocks ever written."""
        with tempfile.TemporaryDirectory(prefix="hashemb-") as place:
            path = os.path.join(place, "all.delta")
            self._save(path)
            with open(path, "rb") as file:
                content = zlib.compress(file.read(), 1)
        return {"options": table_options(self.open()), "content": content}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> KeptTable:
        """Create a private table with the contents of the packed one."""
        kept = cls.create(packed["options"])
        with tempfile.TemporaryDirectory(prefix="hashemb-") as place:
            path = os.path.join(place, "all.delta")
            with open(path, "wb") as file:
                file.write(zlib.decompress(packed["content"]))
            hashemb.apply_delta(kept.open("r+"), path)
        return kept


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
