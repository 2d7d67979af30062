"""Points in time of a table that writers go on writing: snapshots, and what deltas are made of.

Copy before first write. `save_point` closes the gate that every batch holds open, so that no batch is half done; it
notes the epoch E, tells writers that rows written up to E are wanted, raises the epoch and opens the gate:
microseconds. From then on writers append each row that they are about to change to a log of theirs, once, unless
`save_point`, which goes over all blocks, has copied it before (csrc/save.c); at the end it puts the rows of the logs
back. A writer that cannot save a row says so and goes on: then the snapshot fails, not the training.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashemb import _core
from hashemb._files import (
    BITS_FILE,
    CONTROL_DTYPE,
    HISTORY_FILE,
    LOG_PREFIX,
    SAVING_FILE,
    Directory,
    History,
    SnapshotInfo,
    TableFiles,
    TableMeta,
    bits_bytes,
    boot_id,
    check_extra,
    create_arrays,
    finish_table,
    id_bytes,
    new_directory,
    new_id,
    read_history,
    seal_control,
    space_errors,
    write_history,
)
from hashemb._files import blocks as _blocks
from hashemb.errors import DeltaError

__all__ = [
    "Progress",
    "SavedPoint",
    "interrupted_delta",
    "save_point",
    "take_snapshot",
    "whole_history",
]

Progress = Callable[[int, int], None]

_STRIPES_PER_CALL = 16  # between two reports of progress, and two chances to be interrupted


@dataclass(frozen=True)
class SavedPoint:
    """The moment that a snapshot or delta holds: its epoch, when it was, and the control page."""

    epoch: int
    created: float
    control: bytes

    @property
    def page(self) -> Any:
        return np.frombuffer(self.control, CONTROL_DTYPE)[0]


def whole_history(files: TableFiles) -> History:
    """The table's history, for a caller that has the table to itself; `DeltaError` if a delta was applied in part."""
    history = read_history(files.directory, files.meta.id)
    if history.applying:
        raise DeltaError(
            f"{files.path}: delta {history.applying} was applied in part, as whoever applied it was interrupted: "
            "apply it again first",
            "interrupted",
        )
    return history


def interrupted_delta(files: TableFiles) -> str | None:
    """Id of a delta that was applied to the table in part, and that nobody is applying now."""
    if not read_history(files.directory, files.meta.id).applying:
        return None
    with files.directory.open("lock") as lock:
        alone = _core.lock(lock.fd, fcntl.F_RDLCK, _core.LOCK_SNAPSHOT, False)
        return read_history(files.directory).applying if alone else None


def take_snapshot(
    files: TableFiles, path: str, *, extra: dict[str, Any] | None = None, progress: Progress | None = None
) -> SnapshotInfo:
    """See `EmbeddingTable.snapshot`."""
    extra, meta = check_extra(extra), files.meta
    with files.calls, new_directory(path) as building, (turn := files.turn("snapshot")):
        history = whole_history(files)
        create_arrays(building, {**meta.files, "checksums": _blocks.checksum_spec(meta)})
        point = save_point(files, turn.fd, building, list(meta.row_files), progress=progress)
        num_blocks, content_hash = write_checksums(building, meta)
        page = point.page
        info = SnapshotInfo(
            id=new_id(),
            sequence=history.next_sequence(),
            epoch=point.epoch,
            step=int(page["step"]),
            created=point.created,
            lr=float(page["lr"]),
            decay_total=float(page["decay_total"]),
            rows_touched=int(page["rows_touched"]),
            num_blocks=num_blocks,
            content_hash=content_hash,
            extra=extra,
        )
        history = history.append(info.point).of(meta.id)
        for log in _logs(building):  # begun, and left empty, by a writer who came when all was saved
            building.remove(log)
        finish_table(building, meta, _control_of_copy(point, info.id))
        building.create(HISTORY_FILE, history.encode())
        building.create("snapshot.json", info.encode())
        for name in (*meta.files, "checksums"):
            building.sync(f"{name}.npy")
        write_history(files.directory, history)
    return info


def _control_of_copy(point: SavedPoint, id: str) -> bytes:
    data = bytearray(point.control)
    page = np.frombuffer(data, CONTROL_DTYPE)
    page["epoch"] = point.epoch + 1  # what is written from now on is not in the snapshot
    page["saving"] = page["save_failed"] = page["save_errno"] = page["gate_closing"] = 0
    page["snapshot"], page["opened"] = id_bytes(id), 0
    page["boot_id"] = boot_id().encode()
    return seal_control(bytes(data))


# ---- a point in time ----


def save_point(
    files: TableFiles,
    turn_fd: int,
    directory: Directory,
    names: list[str],
    *,
    since: int = 0,
    progress: Progress | None = None,
) -> SavedPoint:
    """Saves the blocks written after epoch `since`, of the arrays `names`, to array files that `directory` holds.

    The caller has its turn (`TableFiles.turn`), of which `turn_fd` is the lock file. blocks.npy there says which blocks
    are saved, and their epochs. Not synced.
    """
    control, path = files.control, os.path.abspath(directory.path)
    control["saving"] = 0  # what somebody was killed at, writers need no longer save
    until = int(control["epoch"][0])  # which a writer tells it by from what a killed one before it wanted
    wanted = {"directory": path, "identity": directory.identity(), "names": names, "since": since, "until": until}
    directory.create(BITS_FILE, b"", bits_bytes(files.meta), sync=False)
    try:
        files.directory.replace(SAVING_FILE, json.dumps(wanted).encode())
        page = _core.begin_point(files.arrays["control"], turn_fd)
        point = SavedPoint(until, time.time(), page)
        try:
            with space_errors(path):
                target = files.save_target(directory, names, since, point.epoch, owner=True)
                _copy_blocks(files, target.saving, progress)
            _check_writers(files, point.epoch, path)
        finally:
            control["saving"] = 0
    finally:
        files.directory.remove(SAVING_FILE)
    _put_back_rows(directory, files.meta, names)
    directory.remove(BITS_FILE)
    return point


def _copy_blocks(files: TableFiles, saving: _core.Saving, progress: Progress | None) -> None:
    """Downwards: see csrc/save.c. Stripes whose epochs are a hole are left out: on tmpfs a look would take a page."""
    spans = list(_blocks.spans_of_epochs(files.fd("blocks"), files.meta.num_blocks, _core.STRIPE_BLOCKS))
    done, total = 0, sum(last - first for first, last in spans)
    for first, last in reversed(spans):
        for end in range(last, first, -_STRIPES_PER_CALL):
            files.calls.check()
            begin = max(first, end - _STRIPES_PER_CALL)
            saving.copy_stripes(begin, end)
            done += end - begin
            if progress:
                progress(done * _core.STRIPE_BLOCKS, total * _core.STRIPE_BLOCKS)


def _put_back_rows(directory: Directory, meta: TableMeta, names: list[str]) -> None:
    """What writers had logged of rows, over copies of blocks in which the rows had been changed already."""
    rows = {name: np.dtype((spec.dtype, spec.shape[1:])) for name, spec in meta.row_files.items() if name in names}
    entry = np.dtype([("row", "<u8"), *((name, rows[name]) for name in names)])
    with _blocks.OpenArrays(directory, ["blocks"]) as fds:
        for log in _logs(directory):
            try:
                file = directory.open(log, os.O_RDWR)
            except FileNotFoundError:  # empty, of a writer who came when all was saved, and went
                continue
            with file:
                for saved in _blocks.read_records(file.fd, entry):
                    epochs = _blocks.read_epochs(fds["blocks"], meta, saved["row"] // meta.block_rows)
                    _write_rows(directory, meta, names, saved[epochs != 0])
                os.truncate(file.fd, 0)  # or its space would be freed by the writer, amid a batch
                directory.remove(log)


def _logs(directory: Directory) -> list[str]:
    return [entry.name for entry in directory.entries() if entry.name.startswith(LOG_PREFIX)]


def _write_rows(directory: Directory, meta: TableMeta, names: list[str], saved: Any) -> None:
    """By mappings: the blocks have been copied, so that the pages are there."""
    for name in names:
        spec = meta.row_files[name]
        with _blocks.mapped_array(directory, name, spec) as array:
            array[saved["row"]] = saved[name]


def _check_writers(files: TableFiles, epoch: int, path: str) -> None:
    if int(files.control["save_failed"][0]) != epoch:
        return
    code = int(files.control["save_errno"][0])
    with space_errors(path):
        raise OSError(code, f"a writer of the table could not save a row to it: {os.strerror(code)}", path)


# ---- check sums ----


def write_checksums(directory: Directory, meta: TableMeta) -> tuple[int, str]:
    """Fills in checksums.npy of a table at rest; returns how many blocks it has, and their content hash."""
    filename, count, digest = directory.filename("checksums.npy"), 0, hashlib.sha256()
    arrays = _blocks.OpenArrays(directory, [*meta.row_files, "blocks"])
    with arrays as fds, directory.open("checksums.npy", os.O_RDWR) as out:
        for first, epochs in _blocks.epoch_chunks(fds["blocks"], meta.num_blocks):
            written = np.flatnonzero(epochs)
            sums = np.zeros((epochs.size, len(meta.row_files)), np.uint64)
            for part in _blocks.groups(meta, written):
                for column, (name, spec) in enumerate(meta.row_files.items()):
                    data = _blocks.read_blocks(fds[name], meta, spec, part + first)
                    sums[part, column] = _blocks.checksums(data)
            _blocks.write_rows(out.fd, first, sums, filename)
            _blocks.update_content_hash(digest, first, epochs, sums)
            count += written.size
    return count, digest.hexdigest()
