"""Points in time of a table while writers continue: snapshots, and the data of deltas.

The method is copy before first write. `save_point` closes the gate that every batch holds open, so that no batch is
half done; it notes the epoch E, tells writers to save rows written up to E, raises the epoch and opens the gate, all
within microseconds. From then on each writer appends every row that it is about to change to its own log, once, unless
`save_point`, which passes over all blocks, has already copied the row (csrc/save.c). At the end `save_point` writes the
rows of the logs back to the copy. A writer that cannot save a row reports it and continues: the snapshot fails, not the
training.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashemb import _sharing
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
from hashemb._points.problems import Progress
from hashemb.errors import DeltaError

__all__ = [
    "Progress",
    "SavedPoint",
    "interrupted_delta",
    "save_point",
    "take_snapshot",
    "whole_history",
]


_STRIPES_PER_CALL = 16  # between two reports of progress, and between two checks for interrupts


@dataclass(frozen=True)
class SavedPoint:
    """The moment that a snapshot or delta holds: its epoch, its time, and the control page."""

    epoch: int
    created: float
    control: bytes

    @property
    def page(self) -> Any:
        return np.frombuffer(self.control, CONTROL_DTYPE)[0]


def whole_history(files: TableFiles) -> History:
    """Return the table's history, for a caller that has its turn; raise `DeltaError` if a delta was partly applied."""
    history = read_history(files.directory, files.meta.id)
    if history.applying:
        raise DeltaError(
            f"{files.path}: delta {history.applying} was applied in part, as whoever applied it was interrupted: "
            "apply it again first",
            "interrupted",
        )
    return history


def interrupted_delta(files: TableFiles) -> str | None:
    """Return the id of a delta that was partly applied to the table and that no process is applying now, or None."""
    if not read_history(files.directory, files.meta.id).applying:
        return None
    with files.directory.open("lock") as lock:
        alone = _sharing.lock(lock.fd, fcntl.F_RDLCK, _sharing.LOCK_SNAPSHOT, False)
        return read_history(files.directory).applying if alone else None


def take_snapshot(
    files: TableFiles, path: str, *, extra: dict[str, Any] | None = None, progress: Progress | None = None
) -> SnapshotInfo:
    """Implement `EmbeddingTable.snapshot`."""
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
        for log in _logs(building):  # an empty log, created by a writer that joined after everything was saved
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
    page["epoch"] = point.epoch + 1  # rows written from now on are not in the snapshot
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
    """Save the blocks written after epoch `since`, for the arrays `names`, to the array files in `directory`.

    The caller has its turn (`TableFiles.turn`), with `turn_fd` as the lock file. blocks.npy in `directory` records the
    blocks that were saved, and their epochs. The files are not synced.
    """
    control, path = files.control, os.path.abspath(directory.path)
    control["saving"] = 0  # clear the request of a snapshot whose owner was killed
    until = int(control["epoch"][0])  # distinguishes this request from one left by a killed owner
    wanted = {"directory": path, "identity": directory.identity(), "names": names, "since": since, "until": until}
    directory.create(BITS_FILE, b"", bits_bytes(files.meta), sync=False)
    try:
        files.directory.replace(SAVING_FILE, json.dumps(wanted).encode())
        page = _sharing.begin_point(files.arrays["control"], turn_fd)
        point = SavedPoint(until, time.time(), page)
        try:
            with space_errors(path):
                target = files.saves.open_target(directory, names, since, point.epoch, owner=True)
                _copy_blocks(files, target.saving, progress)
            _check_writers(files, point.epoch, path)
        finally:
            control["saving"] = 0
    finally:
        files.directory.remove(SAVING_FILE)
    _put_back_rows(directory, files.meta, names)
    directory.remove(BITS_FILE)
    return point


def _copy_blocks(files: TableFiles, saving: _sharing.Saving, progress: Progress | None) -> None:
    """Copy stripes downwards (see csrc/save.c), except those with a hole for epochs: on tmpfs reading takes a page."""
    spans = list(_blocks.spans_of_epochs(files.fd("blocks"), files.meta.num_blocks, _sharing.STRIPE_BLOCKS))
    done, total = 0, sum(last - first for first, last in spans)
    for first, last in reversed(spans):
        for end in range(last, first, -_STRIPES_PER_CALL):
            files.calls.check()
            begin = max(first, end - _STRIPES_PER_CALL)
            saving.copy_stripes(begin, end)
            done += end - begin
            if progress:
                progress(done * _sharing.STRIPE_BLOCKS, total * _sharing.STRIPE_BLOCKS)


def _put_back_rows(directory: Directory, meta: TableMeta, names: list[str]) -> None:
    """Write the rows that writers logged over the copies of blocks in which they had already been changed."""
    rows = {name: np.dtype((spec.dtype, spec.shape[1:])) for name, spec in meta.row_files.items() if name in names}
    entry = np.dtype([("row", "<u8"), *((name, rows[name]) for name in names)])
    with _blocks.OpenArrays(directory, ["blocks"]) as fds:
        for log in _logs(directory):
            try:
                file = directory.open(log, os.O_RDWR)
            except FileNotFoundError:  # an empty log of a writer that joined after everything was saved, and has left
                continue
            with file:
                for saved in _blocks.read_records(file.fd, entry):
                    epochs = _blocks.read_epochs(fds["blocks"], meta, saved["row"] // meta.block_rows)
                    _write_rows(directory, meta, names, saved[epochs != 0])
                os.truncate(file.fd, 0)  # otherwise the writer would free the space during a batch
                directory.remove(log)


def _logs(directory: Directory) -> list[str]:
    return [entry.name for entry in directory.entries() if entry.name.startswith(LOG_PREFIX)]


def _write_rows(directory: Directory, meta: TableMeta, names: list[str], saved: Any) -> None:
    """Write rows through mappings: their blocks have been copied, so the pages are allocated."""
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


# ---- checksums ----


def write_checksums(directory: Directory, meta: TableMeta) -> tuple[int, str]:
    """Fill in checksums.npy of a table at rest; return its number of written blocks and their content hash."""
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
