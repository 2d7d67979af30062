"""Entry points to a table: `create`, `open` and `info`."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

from hashemb import _arguments as arguments
from hashemb._files import SnapshotInfo
from hashemb._files import building as _building
from hashemb._files import directory as _directory
from hashemb._files import format as _format
from hashemb._points import interrupted_delta
from hashemb.init import Initializer
from hashemb.optim import Optimizer
from hashemb.table import EmbeddingTable, Isolation, Mode

__all__ = ["TableInfo", "create", "info", "open"]


@dataclass(frozen=True)
class TableInfo:
    """Metadata and current state of a table, as returned by `info`; most fields are the arguments of `create`.

    `clean` is True if the last writer closed the table; `snapshot` is None for a table that is not a snapshot.
    """

    path: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    optimizer: Optimizer
    init: Initializer
    num_hashes: int
    seed: int
    format: int
    id: str
    created_by: str
    step: int
    lr: float
    rows_touched: int
    logical_bytes: int
    disk_bytes: int
    clean: bool
    snapshot: SnapshotInfo | None


def create(
    path: str | os.PathLike[str],
    *,
    num_embeddings: int,
    embedding_dim: int,
    dtype: str = "float32",
    optimizer: Optimizer | None = None,
    init: Initializer | None = None,
    num_hashes: int = 1,
    seed: int = 0,
    exist_ok: bool = False,
    isolation: Isolation = "hogwild",
    huge_pages: bool | None = None,
) -> EmbeddingTable:
    """Create a table and open it read-write.

    Parameters
    ----------
    path : str or path-like
        Directory to create; its parent must exist.
    num_embeddings : int
        Number of rows, at least 1. No fixed ratio of rows to keys is needed: see `TableStats.collision_rate`.
    embedding_dim : int
        Number of floats in a row, at least 1.
    dtype : {"float32", "float16", "bfloat16"}
        Storage dtype. Look-ups return float32 and updates compute in it; half precision is rounded stochastically.
    optimizer : Adagrad, RowWiseAdagrad, SGD or FTRL
        Default ``Adagrad(lr=0.01)``.
    init : Uniform, Normal or Zeros
        Values of rows not yet written. Default ``Uniform(scale=0.01)``.
    num_hashes : int
        Rows per key, 1 to 16; a key's vector is their sum. Each of the rows takes the whole step of an update: divide
        the learning rate by `num_hashes` to move the sum as far as a single row would move.
    seed : int
        Seed of row hashing, initial values and rounding, 0 to 2**64 - 1.
    exist_ok : bool
        If True, open the table at `path` if it was created with the same arguments.
    isolation, huge_pages
        As for `open`. They are not stored in the table.

    Returns
    -------
    EmbeddingTable

    Raises
    ------
    FileExistsError
        `path` exists and `exist_ok` is False.
    NoSpaceError
        The file system is full.
    ValueError, TypeError
        An argument is out of range, or `exist_ok` is True and the table at `path` has other arguments.

    Notes
    -----
    Creation takes O(1) time and disk space, whatever the size of the table: its files are sparse until rows are
    written. The directory appears complete or not at all.

    Examples
    --------
    >>> import tempfile, hashemb
    >>> table = hashemb.create(tempfile.mkdtemp() + "/ads.emb", num_embeddings=2**30, embedding_dim=16)
    >>> table.lookup([7, -1]).shape
    (2, 16)
    >>> table.close()
    """
    path, huge_pages = arguments.path_string(path), arguments.flag_or_none("huge_pages", huge_pages)
    isolation = arguments.isolation(isolation)
    meta = arguments.table_meta(num_embeddings, embedding_dim, dtype, optimizer, init, num_hashes, seed)
    made = False
    try:
        try:
            _building.create_table(path, meta)
            made = True
        except FileExistsError:
            if not exist_ok:
                raise
            arguments.check_same(path, _directory.read_meta(path), meta)
        return EmbeddingTable(path, "r+", isolation=isolation, huge_pages=huge_pages)
    except BaseException:
        if made:
            _building.take_table_back(path, meta)
        raise


def open(
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    isolation: Isolation = "hogwild",
    huge_pages: bool | None = None,
) -> EmbeddingTable:
    """Open a table, in milliseconds at any size.

    Parameters
    ----------
    path : str or path-like
    mode : {"r", "r+"}
        "r" is shared and read-only, and sees writers' rows at once. "r+" is shared and read-write.
    isolation : {"hogwild", "exact"}
        Isolation between this writer and others. "hogwild" takes no locks; if two processes update the same row at
        the same moment, elements of one update may be lost. "exact" loses no updates among writers that all use it:
        the result is that of their batches applied one after the other, in the order of their steps.
    huge_pages : bool, optional
        Whether this process asks for pages of 2 MiB, with which a random row takes about three fifths of the
        time. A huge page holds, and `flush` writes, the neighbours of a touched row too. True asks for them always,
        which makes a sparse table dense; False never does. By default they are used on disk if the whole table fits
        both the free space and the amount the kernel allows to be dirty before it writes, and on tmpfs for the parts
        of which a quarter has been written. `TableStats.huge_page_bytes` shows the result.

    Raises
    ------
    FileNotFoundError
        `path` does not exist.
    FormatError
        `path` is not a table, or has a newer format.
    CorruptTableError
        The table is damaged: the message names the file, what was expected and what was found.
    ReadOnlyTableError
        `mode` is "r+" and the files cannot be written.
    TypeError, ValueError
        `huge_pages` is not True, False or None; `mode` or `isolation` is not one of the values above.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f'mode must be "r" or "r+", got {mode!r}; new tables are made by hashemb.create')
    path, huge_pages = arguments.path_string(path), arguments.flag_or_none("huge_pages", huge_pages)
    isolation = arguments.isolation(isolation)
    _directory.read_history(path)  # raises before a writer marks the table as opened
    table = EmbeddingTable(path, mode, isolation=isolation, huge_pages=huge_pages)
    try:
        applying = interrupted_delta(table._open_files())
        if applying:
            warnings.warn(
                f"{path}: delta {applying} was applied in part, as the call was interrupted: the table has rows "
                "from before and after it; apply it again",
                RuntimeWarning,
                stacklevel=2,
            )
    except BaseException:
        table.close()
        raise
    return table


def info(path: str | os.PathLike[str]) -> TableInfo:
    """Return a table's metadata and state, read without mapping it. Errors are as for `open`."""
    path = arguments.path_string(path)
    with _directory.table_directory(path) as directory:
        meta, control = _directory.read_meta(directory), _directory.read_control(directory)
        disk_bytes, snapshot = _directory.disk_bytes(directory), _directory.read_snapshot_info(directory)
    return TableInfo(
        path=path,
        num_embeddings=meta.num_embeddings,
        embedding_dim=meta.embedding_dim,
        dtype=meta.dtype,
        optimizer=meta.optimizer,
        init=meta.init,
        num_hashes=meta.num_hashes,
        seed=meta.seed,
        format=_format.FORMAT,
        id=meta.id,
        created_by=meta.created_by,
        step=int(control["step"]),
        lr=float(control["lr"]),
        rows_touched=int(control["rows_touched"]),
        logical_bytes=meta.logical_bytes,
        disk_bytes=disk_bytes,
        clean=bool(control["clean"]),
        snapshot=snapshot,
    )
