"""Deltas of a table: export the changes since a point in time, check such a file, and apply it to a replica.

A delta is one file of whole blocks. It names the point that it starts from, and can only be applied to a table that is
at that point. Applying is atomic by way of the table's history: while it records `applying`, only the same delta is
accepted, and applying that delta again from the beginning completes an interrupted one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _sharing
from hashemb._files import (
    STORAGE_DTYPES,
    FileSpec,
    History,
    Point,
    SnapshotInfo,
    TableFiles,
    TableMeta,
    building_directory,
    check_free,
    create_arrays,
    new_id,
    read_history,
    read_snapshot_info,
    sync_directory,
    write_history,
)
from hashemb._files import blocks as _blocks
from hashemb._points.delta_file import DeltaInfo, DeltaReader, Group, Progress, arrays_to_export, write_delta
from hashemb._points.half import convert_rows
from hashemb._points.snapshot import SavedPoint, save_point, whole_history
from hashemb._rules import MAX_EPOCH
from hashemb.errors import DeltaError, FormatError, HashembError
from hashemb.optim import Optimizer, with_rate

__all__ = ["DeltaInfo", "Since", "apply_to", "check_delta", "delta_info", "export_to"]

Since = str | os.PathLike[str] | SnapshotInfo | DeltaInfo | None

_RESERVED_TOGETHER = 1 << 16


# ---- reading ----


def delta_info(path: str | os.PathLike[str]) -> DeltaInfo:
    """Return the description of a delta file. Only the header is read, which takes microseconds.

    Raises
    ------
    FileNotFoundError
    FormatError
        The file is not a delta, or has a newer format.
    CorruptTableError
        The header is damaged, or the file is incomplete.
    """
    with DeltaReader(os.fspath(path)) as delta:
        return delta.info


def check_delta(path: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
    """Read all of a delta file and return its problems as messages; an empty list if every byte is as written."""
    try:
        with DeltaReader(os.fspath(path)) as delta:
            delta.check(progress)
    except FormatError as error:
        return [str(error)]
    return []


# ---- exporting ----


def export_to(
    files: TableFiles, since: Since, path: str, *, state: bool, dtype: str | None, progress: Progress | None
) -> DeltaInfo:
    """Implement `EmbeddingTable.export_delta`."""
    dtype = _export_dtype(files.meta, state, dtype)
    start_id, parent = _id_of(since), check_free(path)
    names = arrays_to_export(files.meta, state=state)
    with files.calls, building_directory(path) as building, (turn := files.turn("export_delta")):
        history = whole_history(files)
        start = None if start_id is None else _find(history, start_id, files.path)
        create_arrays(building, {name: files.meta.files[name] for name in (*names, "blocks")})
        point = save_point(files, turn.fd, building, names, since=start.epoch if start else 0)
        with _blocks.OpenArrays(building, [*names, "blocks"]) as fds:
            info = _describe(files.meta, history, start, point, dtype, state, _count(fds["blocks"], files.meta))
            finished = building.filename("delta")
            info = write_delta(finished, info, _saved_groups(fds, files.meta, names, dtype), progress)
        write_history(files.directory, history.append(info.point))
        os.rename(finished, path)
        try:
            sync_directory(parent)
        except BaseException:
            with suppress(OSError):
                os.rename(path, finished)  # the building directory is removed
            raise
    return info


def _export_dtype(meta: TableMeta, state: bool, dtype: str | None) -> str:
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, STORAGE_DTYPES))} or None, got {dtype!r}")
    if state and dtype not in (None, meta.dtype):
        raise ValueError(f"state=True keeps the table's dtype {meta.dtype!r}, to train on with: got dtype={dtype!r}")
    return dtype or meta.dtype


def _id_of(since: Since) -> str | None:
    """Return the id of the snapshot or delta that `since` refers to."""
    if since is None or isinstance(since, (SnapshotInfo, DeltaInfo)):
        return None if since is None else since.id
    if not isinstance(since, (str, os.PathLike)):
        raise TypeError(f"since must be None, a path, a SnapshotInfo or a DeltaInfo, got {type(since).__name__}")
    path = os.fspath(since)
    if not os.path.isdir(path):
        return delta_info(path).id
    snapshot = read_snapshot_info(path)
    if snapshot is None:
        raise ValueError(f"{path}: since must be a snapshot or a delta, this directory was not made by snapshot()")
    return snapshot.id


def _find(history: History, id: str, path: str) -> Point:
    point = history.find(id)
    if point is None:
        span = f"{history.points[0].sequence} to {history.points[-1].sequence}" if history.points else "none"
        raise ValueError(
            f"{path}: point {id} is not among the {len(history.points)} in the table's history (numbers {span}): it is "
            "of another table, too old, or was forgotten when the machine restarted; since=None exports everything"
        )
    return point


def _describe(
    meta: TableMeta, history: History, start: Point | None, point: SavedPoint, dtype: str, state: bool, num_blocks: int
) -> DeltaInfo:
    page = point.page
    return DeltaInfo(
        id=new_id(),
        parent=start.id if start else None,
        sequence=history.next_sequence(),
        parent_sequence=start.sequence if start else -1,
        table=replace(meta, id=history.source or meta.id),
        dtype=dtype,
        state=state,
        from_epoch=start.epoch if start else 0,
        to_epoch=point.epoch,
        step=int(page["step"]),
        lr=float(page["lr"]),
        decay_total=float(page["decay_total"]),
        rows_touched=int(page["rows_touched"]),
        created=point.created,
        num_blocks=num_blocks,
    )


def _count(blocks_fd: int, meta: TableMeta) -> int:
    return sum(int(np.count_nonzero(epochs)) for _, epochs in _blocks.epoch_chunks(blocks_fd, meta.num_blocks))


def _saved_groups(fds: dict[str, int], meta: TableMeta, names: list[str], dtype: str) -> Iterator[Group]:
    """Yield the saved blocks, with the weights converted to the delta's dtype."""
    for first, epochs in _blocks.epoch_chunks(fds["blocks"], meta.num_blocks):
        for numbers in _blocks.groups(meta, np.flatnonzero(epochs) + first):
            data = {name: _blocks.read_blocks(fds[name], meta, meta.files[name], numbers) for name in names}
            weight = convert_rows(_rows(data["weight"], meta.files["weight"]), meta.dtype, dtype)
            data["weight"] = weight.view(np.uint8).reshape(numbers.size, -1)
            yield numbers, data


def _rows(data: _blocks.Bytes, spec: FileSpec) -> npt.NDArray[Any]:
    """Return blocks of bytes as rows of an array like `spec`."""
    return data.reshape(-1).view(spec.dtype).reshape(-1, *spec.shape[1:])


# ---- applying ----


def apply_to(files: TableFiles, delta: DeltaReader, progress: Progress | None = None) -> DeltaInfo:
    """Apply a delta that has been checked; see `hashemb.apply_delta`. Raise `DeltaError` if it does not apply."""
    info = delta.info
    _check_compatible(files.meta, info, files.path)
    _check_conversion(files.meta, delta)
    with files.calls, (turn := files.turn("apply_delta")):
        history = read_history(files.directory, files.meta.id)
        _check_position(history, info, files)
        epoch = int(files.control["epoch"][0])
        if epoch >= MAX_EPOCH:
            raise HashembError(f"{files.path}: all {epoch} epochs of the table are used up: it can take no more deltas")
        _reserve(files, delta)
        source = None if info.table.id == files.meta.id else info.table.id
        history = replace(history, applying=info.id, source=source)
        write_history(files.directory, history)
        with _sharing.ClosedGate(turn.fd, files.calls, files.arrays["control"]):
            _write_rows(files, delta, progress)
            _take_counters(files.control, info)
            files.flush()
        write_history(files.directory, history.append(replace(info.point, epoch=epoch)))
    return info


def _check_compatible(meta: TableMeta, info: DeltaInfo, path: str) -> None:
    """Check that the delta's rows mean the same in this table. The dtype and block size may differ."""
    theirs = info.table
    pairs = [
        (name, getattr(meta, name), getattr(theirs, name))
        for name in ("num_embeddings", "embedding_dim", "num_hashes", "seed", "init")
    ]
    pairs.append(("weight_decay", meta.optimizer.weight_decay, theirs.optimizer.weight_decay))
    if info.state and meta.optimizer.state_files:
        pairs.append(("optimizer", _without_rate(meta.optimizer), _without_rate(theirs.optimizer)))
    differing = [f"{name} {mine!r}, the delta's is {other!r}" for name, mine, other in pairs if mine != other]
    if differing:
        raise DeltaError(f"{path}: the delta does not fit this table, which has {'; '.join(differing)}", "incompatible")
    _check_rate(meta, info, path)


def _check_rate(meta: TableMeta, info: DeltaInfo, path: str) -> None:
    """Check the rate: a delta without state may come from another optimiser, with a rate invalid for this one."""
    try:
        with_rate(meta.optimizer, info.lr)
    except ValueError as error:
        raise DeltaError(f"{path}: the table cannot take the delta's learning rate: {error}", "incompatible") from None


def _without_rate(optimizer: Optimizer) -> dict[str, Any]:
    options = {name: value for name, value in asdict(optimizer).items() if name not in ("lr", "alpha")}
    return {"kind": optimizer.kind, **options}


def _check_conversion(meta: TableMeta, delta: DeltaReader) -> None:
    if STORAGE_DTYPES[meta.dtype] != "<f4" and meta.dtype != delta.info.dtype:
        for _, data in delta.groups():
            _table_rows(meta, delta.info, data, "weight")


def _table_rows(meta: TableMeta, info: DeltaInfo, data: dict[str, _blocks.Bytes], name: str) -> npt.NDArray[Any]:
    rows = _rows(data[name], info.arrays[name])
    return convert_rows(rows, info.dtype, meta.dtype) if name == "weight" else rows


def _check_position(history: History, info: DeltaInfo, files: TableFiles) -> None:
    """Raise `DeltaError` unless the table is at the delta's start, or this delta has been partly applied."""
    if history.applying == info.id:
        return
    if history.applying:
        raise DeltaError(
            f"{files.path}: delta {history.applying} was applied in part: it comes before {_named(info)}", "interrupted"
        )
    position, step = history.last, int(files.control["step"][0])
    if position is None:
        if info.parent is not None:
            _refuse_without_position(info, files)
    elif position.id != info.parent:
        _refuse_by_position(history, position, info, files)
    expected = position.step if position else 0
    if step != expected:
        raise DeltaError(
            f"{files.path}: the table has been updated since the point it stands at: expected step {expected}, found "
            f"{step}; {_named(info)} would mix with that",
            "trained",
        )


def _named(info: DeltaInfo) -> str:
    start = f"starts from number {info.parent_sequence}" if info.parent else "holds everything"
    return f"delta number {info.sequence} ({info.id}, {start})"


def _refuse_without_position(info: DeltaInfo, files: TableFiles) -> None:
    missing = f"numbers up to {info.parent_sequence} are missing"
    raise DeltaError(f"{files.path}: the table has no deltas yet, {_named(info)}: {missing}", "gap")


def _refuse_by_position(history: History, position: Point, info: DeltaInfo, files: TableFiles) -> None:
    where, source = f"{files.path}: the table stands at number {position.sequence}", history.source or files.meta.id
    if history.find(info.id):
        raise DeltaError(f"{where} and has {_named(info)} already", "applied")
    if info.table.id != source:
        raise DeltaError(f"{where} of table {source}, {_named(info)} is of table {info.table.id}", "foreign")
    if info.sequence < position.sequence:
        raise DeltaError(f"{where}, {_named(info)} is older", "older")
    if info.parent is None:
        raise DeltaError(f"{where}, {_named(info)}: it is for a new table", "base")
    if history.find(info.parent):
        raise DeltaError(f"{where}, {_named(info)}, which is before that", "older")
    if info.sequence > position.sequence and info.parent_sequence > position.sequence:
        missing = f"numbers above {position.sequence} up to {info.parent_sequence} are missing"
        raise DeltaError(f"{where}, {_named(info)}: {missing}", "gap")
    raise DeltaError(f"{where} ({position.id}), {_named(info)}: of another branch of the table's history", "foreign")


# ---- writing a replica ----


def _reserve(files: TableFiles, delta: DeltaReader) -> None:
    """Reserve space for the whole delta before any of it is written."""
    pending: list[npt.NDArray[np.uint64]] = []
    for numbers in delta.numbers():
        pending.append(_table_blocks(files.meta, delta.info.table, numbers))
        if sum(part.size for part in pending) >= _RESERVED_TOGETHER:
            files.claim(np.unique(np.concatenate(pending)))
            pending = []
    if pending:
        files.claim(np.unique(np.concatenate(pending)))


def _table_blocks(meta: TableMeta, theirs: TableMeta, numbers: _blocks.Numbers) -> npt.NDArray[np.uint64]:
    """Return the blocks of this table that hold the delta's blocks, which may have more or fewer rows."""
    parts = max(1, theirs.block_rows // meta.block_rows)
    firsts = numbers * theirs.block_rows // meta.block_rows
    blocks = (firsts[:, None] + np.arange(parts)).reshape(-1)
    return blocks[blocks < meta.num_blocks].astype(np.uint64)


def _write_rows(files: TableFiles, delta: DeltaReader, progress: Progress | None) -> None:
    meta, info, done = files.meta, delta.info, 0
    wanted = [name for name in info.arrays if name in meta.row_files]
    for numbers, data in delta.groups():
        for name in wanted:
            _write_runs(files.arrays[name], _table_rows(meta, info, data, name), numbers, info.table.block_rows)
        done += numbers.size
        if progress:
            progress(done, info.num_blocks)


def _write_runs(
    array: npt.NDArray[Any], rows: npt.NDArray[Any], numbers: _blocks.Numbers, block_rows: int
) -> None:
    for position, first, count in _blocks.runs(numbers):
        begin, at = first * block_rows, position * block_rows
        size = min(count * block_rows, array.shape[0] - begin)
        array[begin : begin + size] = rows[at : at + size]


def _take_counters(control: npt.NDArray[Any], info: DeltaInfo) -> None:
    control["decay_total"], control["lr"] = info.decay_total, info.lr
    control["rows_touched"], control["step"] = info.rows_touched, info.step
    control["epoch"] += 1
