"""create, open, info: the three ways to a table."""

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
    """What `info` reads without mapping the table; fields as for `create`, and the state of the moment.

    `clean` says that the last writer has closed the table; `snapshot` is None for a table that was not made as one.
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
    """Creates a table and opens it read-write.

    Parameters
    ----------
    path : str or path-like
        Directory to create; its parent must exist.
    num_embeddings : int
        Rows, any number from 1; 10 to 20 % more rows than keys is no rule here: see `TableStats.collision_rate`.
    embedding_dim : int
        Floats in a row, any number from 1.
    dtype : {"float32", "float16", "bfloat16"}
        Storage; look-ups return and updates compute in float32, half precision is rounded stochastically.
    optimizer : Adagrad, RowWiseAdagrad, SGD or FTRL
        Default ``Adagrad(lr=0.01)``.
    init : Uniform, Normal or Zeros
        Value of rows not yet written. Default ``Uniform(scale=0.01)``.
    num_hashes : int
        Rows per key, 1 to 16; a key's vector is their sum. Each of them makes an update's whole step: divide the
        learning rate by `num_hashes` to move the sum as one row would move.
    seed : int
        Of row hashing, initial values and rounding; 0 to 2**64 - 1.
    exist_ok : bool
        Open the table if `path` already holds one made with the same arguments.
    isolation, huge_pages
        As for `open`; not stored in the table.

    Returns
    -------
    EmbeddingTable

    Raises
    ------
    FileExistsError
        `path` exists (with `exist_ok`: and is a table made with other arguments is a `ValueError`).
    NoSpaceError
        The file system is full.
    ValueError, TypeError
        For arguments out of range.

    Notes
    -----
    O(1) in the size of the table: the files are holes until rows are written. The directory appears complete or
    not at all.

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
    """Opens a table, in milliseconds at any size.

    Parameters
    ----------
    path : str or path-like
    mode : {"r", "r+"}
        "r": shared and read-only, sees writers' rows at once. "r+": shared and read-write.
    isolation : {"hogwild", "exact"}
        Between this writer and others: "hogwild" takes no locks, and where two processes update the same row at
        the same moment one of the updates may be lost, element by element. "exact" loses none among writers that
        all ask for it: the result is that of their batches one after the other, in the order of their steps.
    huge_pages : bool, optional
        Whether this process asks for pages of 2 MiB: a random row then takes about three fifths of the time.
        They hold, and `flush` writes, the neighbours of a touched row too. Default: on disk, if the whole table
        fits both the space left and what the kernel lets become dirty before it writes; on tmpfs,
        the parts of which a quarter has been written.
        True: always, which makes a sparse table dense; False: never. `TableStats.huge_page_bytes` says what came of it.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    FormatError
        It is no table, or of a newer format.
    CorruptTableError
        It is damaged: the message says which file, what was expected and what was found.
    ReadOnlyTableError
        Mode "r+" on files that cannot be written.
    TypeError
        `huge_pages` is none of True, False and None.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f'mode must be "r" or "r+", got {mode!r}; new tables are made by hashemb.create')
    path, huge_pages = arguments.path_string(path), arguments.flag_or_none("huge_pages", huge_pages)
    isolation = arguments.isolation(isolation)
    _directory.read_history(path)  # an error here comes before a writer marks the table as opened
    table = EmbeddingTable(path, mode, isolation=isolation, huge_pages=huge_pages)
    try:
        applying = interrupted_delta(table._open_files())
        if applying:
            warnings.warn(
                f"{path}: delta {applying} was applied in part, as whoever applied it was interrupted: rows from "
                "before and after it stand side by side; apply it again",
                RuntimeWarning,
                stacklevel=2,
            )
    except BaseException:
        table.close()
        raise
    return table


def info(path: str | os.PathLike[str]) -> TableInfo:
    """The table's metadata and state, read without mapping it. Errors as for `open`."""
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
