"""Replicas: apply deltas to a table, and follow a directory to which a trainer writes them.

`follow` keeps no state between calls: the replica holds its own position, and the directory holds the deltas to apply.
It may therefore be stopped or killed at any time, run by cron, or called by a server between requests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import numpy as np

from hashemb import _arguments as arguments
from hashemb._files import (
    STORAGE_DTYPES,
    History,
    TableMeta,
    create_table,
    read_history,
    read_meta,
    rows_per_block,
    table_directory,
)
from hashemb._points import DeltaInfo, DeltaReader, delta_info
from hashemb.errors import CorruptTableError, DeltaError, FormatError
from hashemb.optim import SGD
from hashemb.table import EmbeddingTable

__all__ = ["FollowStatus", "apply_delta", "follow"]


def apply_delta(
    table: EmbeddingTable | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaInfo:
    """Apply a delta to a replica, which takes it from the delta's start to its end.

    Parameters
    ----------
    table : EmbeddingTable open "r+", or path of a table
        A table given by path is open only during the call. A full delta (`export_delta` with ``since=None``) applies
        to a table without updates, any other to a table that is at the delta's parent: a copy of the snapshot, or a
        replica that has the deltas before it.
    path : str or path-like
        The delta file.
    progress : callable, optional
        Called with the number of blocks written so far and the total.

    Returns
    -------
    DeltaInfo
        The delta. The table now has its `step` and `lr`.

    Raises
    ------
    DeltaError
        The delta cannot be applied to this table: `reason` gives the cause, the message the numbers.
    CorruptTableError, FormatError, FileNotFoundError
        The delta is damaged, is not a delta, or does not exist.
    ValueError
        A weight is too large for the table's dtype.
    NoSpaceError
        The file system is full. The table's rows are unchanged.
    ReadOnlyTableError, ClosedTableError

    Notes
    -----
    The whole file is checked before the first byte is written. Weights are converted to the table's dtype, rounded to
    nearest even. Optimiser state that the delta lacks is left unchanged, and state for which the table has no file is
    ignored. The call is atomic: after an interruption the table is marked (`hashemb.open` warns) and accepts only the
    same delta, which completes it. Processes that read the table see rows as they are written, as with a trainer.
    The file is read twice.

    Examples
    --------
    >>> import tempfile, hashemb, numpy as np
    >>> place = tempfile.mkdtemp()
    >>> options = {"num_embeddings": 1000, "embedding_dim": 4}
    >>> with hashemb.create(place + "/source", **options) as source:
    ...     source.update([7], np.ones((1, 4), np.float32))
    ...     delta = source.export_delta(None, place + "/0.delta")
    ...     expected = source.lookup([7])
    >>> with hashemb.create(place + "/replica", **options) as replica:
    ...     applied = hashemb.apply_delta(replica, place + "/0.delta")
    ...     bool((replica.lookup([7]) == expected).all()), applied.num_blocks
    (True, 1)
    """
    with DeltaReader(arguments.path_string(path)) as delta:
        delta.check()
        if isinstance(table, EmbeddingTable):
            return table._apply_delta(delta, progress)
        with EmbeddingTable(arguments.path_string(table, "table"), "r+") as opened:
            return opened._apply_delta(delta, progress)


# ---- following ----


@dataclass(frozen=True)
class FollowStatus:
    """Result of `follow`.

    Attributes
    ----------
    applied : tuple of DeltaInfo
        Deltas applied by this call, in order.
    sequence, step : int or None
        Position of the replica: the number of its last delta or snapshot, and the source's step at that time. None
        for a replica that has neither.
    pending : int
        Number of deltas in the directory that are newer than that. Full deltas, which start a new replica, count only
        if this one has no position yet.
    lag_s : float
        Seconds since the oldest pending delta was taken, or 0 if none is pending: how long the replica has been
        behind, by the clocks of both machines.
    gap : int or None
        Number of the first missing delta without which pending ones cannot be applied.
    skipped : dict
        Files that are not complete deltas (yet) or belong to another table, as name -> reason. The next call tries
        them again.
    """

    applied: tuple[DeltaInfo, ...]
    sequence: int | None
    step: int | None
    pending: int
    lag_s: float
    gap: int | None
    skipped: dict[str, str]


def follow(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    on_applied: Callable[[DeltaInfo], None] | None = None,
) -> FollowStatus:
    """Bring a replica up to date with the deltas (``*.delta``) in a directory. Call it repeatedly.

    Parameters
    ----------
    path : str or path-like
        The replica. If it does not exist, it is created from a full delta, with the delta's dtype, and with optimiser
        state only if the delta has it. It may also be a copy of a snapshot.
    directory : str or path-like
        Directory of the deltas. Names do not matter: deltas are applied in the order of their parents. Files that are
        still being copied are left for the next call; those that have been applied may be removed.
    on_applied : callable, optional
        Called with each delta once it is applied.

    Returns
    -------
    FollowStatus

    Raises
    ------
    FileNotFoundError
        `directory` does not exist.
    DeltaError
        The replica cannot continue: `reason` is "trained" (it has been updated itself), "interrupted" (a delta was
        partly applied and is not in the directory) or "incompatible"; or there is no replica yet, and the directory
        holds deltas of several tables ("foreign").
    NoSpaceError, OSError

    Notes
    -----
    A call with nothing to do reads the headers of the files, some 0.3 ms each, and changes nothing. Readers of the
    replica in other processes need not reopen it.

    Examples
    --------
    >>> import tempfile, hashemb, numpy as np
    >>> place = tempfile.mkdtemp()
    >>> with hashemb.create(place + "/source", num_embeddings=1000, embedding_dim=4) as source:
    ...     delta = source.export_delta(None, place + "/0.delta")
    ...     source.update([7], np.ones((1, 4), np.float32))
    ...     delta = source.export_delta(delta, place + "/1.delta")
    >>> status = hashemb.follow(place + "/replica", place)
    >>> len(status.applied), status.sequence, status.step, status.pending
    (2, 1, 1, 0)
    """
    path, directory = arguments.path_string(path), arguments.path_string(directory, "directory")
    found = _Directory(directory)
    source, history = _source(path, found)
    mine = {file: info for file, info in found.deltas.items() if info.table.id == source}
    for file in found.deltas.keys() - mine.keys():
        found.skipped[os.path.basename(file)] = f"is of table {found.deltas[file].table.id}, the replica of {source}"
    applied = _apply_all(path, _plan(history, mine), found, on_applied)
    return _status(_standing(path)[0], list(mine.values()), tuple(applied), found.skipped)


class _Directory:
    """The deltas in a directory, by path, and the files that look like a delta but are not one, by name."""

    def __init__(self, directory: str) -> None:
        self.deltas: dict[str, DeltaInfo] = {}
        self.skipped: dict[str, str] = {}
        for name in sorted(os.listdir(directory)):
            file = os.path.join(directory, name)
            if not name.endswith(".delta") or name.startswith(".") or os.path.isdir(file):
                continue
            try:
                self.deltas[file] = delta_info(file)
            except FormatError as error:  # also raised for what is not a regular file
                self.skipped[name] = str(error)
            except FileNotFoundError:  # removed since the listing
                continue


def _source(path: str, found: _Directory) -> tuple[str | None, History]:
    """Return the id of the table that the replica follows, or will follow, and the replica's history."""
    history, meta = _standing(path)
    if meta and (history.source or history.points):
        return history.source or meta.id, history
    infos = found.deltas.values()
    sources = sorted({info.table.id for info in infos if info.parent is None} or {info.table.id for info in infos})
    if meta and meta.id in sources:
        return meta.id, history
    if len(sources) > 1:
        raise DeltaError(f"{path}: a new replica: of which of {len(sources)} tables, {', '.join(sources)}?", "foreign")
    return (sources[0] if sources else None), history


def _standing(path: str) -> tuple[History, TableMeta | None]:
    """Return the replica's history and metadata, or an empty history and None if there is no replica."""
    if not os.path.lexists(path):
        return History(), None
    with table_directory(path) as directory:
        meta = read_meta(directory)
        return read_history(directory, meta.id), meta


def _plan(history: History, mine: dict[str, DeltaInfo]) -> list[str]:
    """Return the files to apply, in order, from the replica's position to the newest delta that can be reached."""
    by_id = {info.id: file for file, info in mine.items()}
    start, first = history.last.id if history.last else None, []
    if history.applying:
        if history.applying not in by_id:
            raise DeltaError(f"delta {history.applying} was applied in part and is not in the directory", "interrupted")
        start, first = history.applying, [by_id[history.applying]]
    leads_nowhere: set[str] = set()
    for info in sorted(mine.values(), key=lambda info: info.sequence, reverse=True):
        chain: list[DeltaInfo] = []
        step: DeltaInfo | None = info
        while step is not None and step.id != start and step.id not in leads_nowhere:
            chain.append(step)
            if step.parent == start:
                return first + [by_id[info.id] for info in reversed(chain)]
            step = mine[by_id[step.parent]] if step.parent in by_id else None
        leads_nowhere.update(info.id for info in chain)
    return first


def _apply_all(
    path: str, files: list[str], found: _Directory, on_applied: Callable[[DeltaInfo], None] | None
) -> list[DeltaInfo]:
    """Apply the files up to the first one that turns out to be incomplete."""
    applied: list[DeltaInfo] = []
    if not files:
        return applied
    if not os.path.lexists(path):
        with suppress(FileExistsError):  # another follower was faster
            create_table(path, _replica_meta(found.deltas[files[0]]))
    with EmbeddingTable(path, "r+") as table:
        for file in files:
            delta = _open_whole(file, found)
            if delta is None:
                break
            with delta:
                if _apply_unless_applied(table, delta):
                    applied.append(delta.info)
                    if on_applied:
                        on_applied(delta.info)
    return applied


def _open_whole(file: str, found: _Directory) -> DeltaReader | None:
    try:
        with ExitStack() as stack:
            delta = stack.enter_context(DeltaReader(file))
            delta.check()
            stack.pop_all()
            return delta
    except (CorruptTableError, FileNotFoundError) as error:
        found.skipped[os.path.basename(file)] = str(error)
        return None


def _apply_unless_applied(table: EmbeddingTable, delta: DeltaReader) -> bool:
    try:
        table._apply_delta(delta)
    except DeltaError as error:
        if error.reason != "applied":  # by another follower
            raise
        return False
    return True


def _replica_meta(info: DeltaInfo) -> TableMeta:
    """Return the metadata of a replica: the delta's dtype, and optimiser state only if the delta has it."""
    if info.state:
        return info.table
    row_bytes = info.table.embedding_dim * np.dtype(STORAGE_DTYPES[info.dtype]).itemsize
    optimizer = SGD(lr=info.lr, weight_decay=info.table.optimizer.weight_decay)
    return replace(info.table, dtype=info.dtype, optimizer=optimizer, block_rows=rows_per_block(row_bytes))


def _status(
    history: History, deltas: list[DeltaInfo], applied: tuple[DeltaInfo, ...], skipped: dict[str, str]
) -> FollowStatus:
    last = history.last
    pending = [info for info in deltas if last is None or (info.parent and info.sequence > last.sequence)]
    oldest = min((info.created for info in pending), default=None)
    return FollowStatus(
        applied=applied,
        sequence=last.sequence if last else None,
        step=last.step if last else None,
        pending=len(pending),
        lag_s=0.0 if oldest is None else max(0.0, time.time() - oldest),
        gap=_gap(last.id if last else None, pending),
        skipped=skipped,
    )


def _gap(position: str | None, pending: list[DeltaInfo]) -> int | None:
    """Return the number of the first missing delta."""
    reachable = {position, *(info.id for info in pending)}
    return min((info.parent_sequence for info in pending if info.parent not in reachable), default=None)
