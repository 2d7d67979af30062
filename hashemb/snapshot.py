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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashemb import _blocks, _core
from hashemb._directory import (
    boot_id,
    create_arrays,
    finish_table,
    new_directory,
    read_history,
    remove_if_there,
    replace_file,
    space_errors,
    sync_file,
    write_file,
    write_history,
)
from hashemb._format import CONTROL_DTYPE, TableMeta, id_bytes, seal_control
from hashemb._locks import Lock
from hashemb._saving import BITS_FILE, LOG_PREFIX, SAVING_FILE, bits_bytes
from hashemb._storage import TableFiles
from hashemb.errors import DeltaError
from hashemb.lineage import History, SnapshotInfo, check_extra, new_id

__all__ = [
    "Progress",
    "SavedPoint",
    "interrupted_delta",
    "one_at_a_time",
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


@contextmanager
def one_at_a_time(files: TableFiles) -> Iterator[Lock]:
    """Only one process takes or applies points in time of a table; others wait. Its death ends it."""
    lock = files.new_lock()
    try:
        _core.lock(lock.fd, fcntl.F_WRLCK, _core.LOCK_SNAPSHOT, True)
        files.control["saving"] = 0  # what somebody was killed at, writers need no longer save
        yield lock
    finally:
        lock.close()


def whole_history(files: TableFiles) -> History:
    """The table's history, for a caller that has the table to itself; `DeltaError` if a delta was applied in part."""
    history = read_history(files.path)
    if history.applying:
        raise DeltaError(
            f"{files.path}: delta {history.applying} was applied in part, as whoever applied it was interrupted: "
            "apply it again first",
            "interrupted",
        )
    return history


def interrupted_delta(path: str) -> str | None:
    """Id of a delta that was applied to the table in part, and that nobody is applying now."""
    if not read_history(path).applying:
        return None
    fd = os.open(os.path.join(path, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        alone = _core.lock(fd, fcntl.F_RDLCK, _core.LOCK_SNAPSHOT, False)
        return read_history(path).applying if alone else None
    finally:
        os.close(fd)


def take_snapshot(
    files: TableFiles, path: str, *, extra: dict[str, Any] | None = None, progress: Progress | None = None
) -> SnapshotInfo:
    """See `EmbeddingTable.snapshot`."""
    extra, meta = check_extra(extra), files.meta
    with new_directory(path) as building, one_at_a_time(files) as lock:
        history = whole_history(files)
        create_arrays(building, {**meta.files, "checksums": _blocks.checksum_spec(meta)})
        point = save_point(files, lock, building, list(meta.row_files), progress=progress)
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
            remove_if_there(log)
        finish_table(building, meta, _control_of_copy(point, info.id))
        write_file(os.path.join(building, "history.json"), history.encode())
        write_file(os.path.join(building, "snapshot.json"), info.encode())
        for name in (*meta.files, "checksums"):
            sync_file(os.path.join(building, f"{name}.npy"))
        write_history(files.path, history)
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
    files: TableFiles, lock: Lock, directory: str, names: list[str], *, since: int = 0, progress: Progress | None = None
) -> SavedPoint:
    """Saves the blocks written after epoch `since`, of the arrays `names`, to array files that `directory` holds.

    The caller has the table to itself (`one_at_a_time`) by `lock`. blocks.npy there says which blocks are saved, and
    their epochs. Not synced.
    """
    control, bits = files.control, os.path.join(directory, BITS_FILE)
    until = int(control["epoch"][0])  # which a writer tells it by from what a killed one before it wanted
    wanted = {"directory": os.path.abspath(directory), "names": names, "since": since, "until": until}
    announcement = os.path.join(files.path, SAVING_FILE)
    write_file(bits, b"", bits_bytes(files.meta), sync=False)
    try:
        replace_file(announcement, json.dumps(wanted).encode())
        point = _begin(files, lock)
        try:
            with space_errors(directory):
                target = files.save_target(directory, names, since, point.epoch, owner=True)
                _copy_blocks(files, target.saving, progress)
            _check_writers(files, point.epoch, directory)
        finally:
            control["saving"] = 0
    finally:
        remove_if_there(announcement)
    _put_back_rows(directory, files.meta, names)
    remove_if_there(bits)
    return point


def _begin(files: TableFiles, lock: Lock) -> SavedPoint:
    """The moment itself: no batch is in flight between closing the gate and opening it."""
    page, control = files.arrays["control"], files.control
    _core.close_gate(page, lock.fd)
    try:
        epoch = int(control["epoch"][0])
        if epoch >= 2**32 - 1:
            raise OverflowError(f"{files.path}: epochs are 32 bits, and {epoch} points in time were taken of the table")
        point = SavedPoint(epoch, time.time(), page.tobytes())
        control["save_failed"] = control["save_errno"] = 0
        control["saving"] = epoch
        control["epoch"] = epoch + 1
    finally:
        _core.open_gate(page, lock.fd)
    return point


def _copy_blocks(files: TableFiles, saving: _core.Saving, progress: Progress | None) -> None:
    """Downwards: see csrc/save.c. Stripes whose epochs are a hole are left out: on tmpfs a look would take a page."""
    spans = list(_blocks.spans_of_epochs(files.fd("blocks"), files.meta.num_blocks, _core.STRIPE_BLOCKS))
    done, total = 0, sum(last - first for first, last in spans)
    for first, last in reversed(spans):
        for end in range(last, first, -_STRIPES_PER_CALL):
            begin = max(first, end - _STRIPES_PER_CALL)
            saving.copy_stripes(begin, end)
            done += end - begin
            if progress:
                progress(done * _core.STRIPE_BLOCKS, total * _core.STRIPE_BLOCKS)


def _put_back_rows(directory: str, meta: TableMeta, names: list[str]) -> None:
    """What writers had logged of rows, over copies of blocks in which the rows had been changed already."""
    rows = {name: np.dtype((spec.dtype, spec.shape[1:])) for name, spec in meta.row_files.items() if name in names}
    entry = np.dtype([("row", "<u8"), *((name, rows[name]) for name in names)])
    with _blocks.OpenArrays(directory, ["blocks"]) as fds:
        for log in _logs(directory):
            with suppress(FileNotFoundError):  # empty, of a writer who came when all was saved, and went
                for saved in _blocks.read_records(log, entry):
                    epochs = _blocks.read_epochs(fds["blocks"], meta, saved["row"] // meta.block_rows)
                    _write_rows(directory, meta, names, saved[epochs != 0])
                os.truncate(log, 0)  # or its space would be freed by the writer, amid a batch
                os.unlink(log)


def _logs(directory: str) -> list[str]:
    return [entry.path for entry in os.scandir(directory) if entry.name.startswith(LOG_PREFIX)]


def _write_rows(directory: str, meta: TableMeta, names: list[str], saved: Any) -> None:
    """By mappings: the blocks have been copied, so that the pages are there."""
    for name in names:
        spec = meta.row_files[name]
        with _blocks.mapped_array(os.path.join(directory, f"{name}.npy"), spec) as array:
            array[saved["row"]] = saved[name]


def _check_writers(files: TableFiles, epoch: int, directory: str) -> None:
    if int(files.control["save_failed"][0]) != epoch:
        return
    code = int(files.control["save_errno"][0])
    with space_errors(directory):
        raise OSError(code, f"a writer of the table could not save a row to it: {os.strerror(code)}", directory)


# ---- check sums ----


def write_checksums(directory: str, meta: TableMeta) -> tuple[int, str]:
    """Fills in checksums.npy of a table at rest; returns how many blocks it has, and their content hash."""
    filename, count, digest = os.path.join(directory, "checksums.npy"), 0, hashlib.sha256()
    with _blocks.OpenArrays(directory, [*meta.row_files, "blocks"]) as fds:
        out = os.open(filename, os.O_RDWR | os.O_CLOEXEC)
        try:
            for first, epochs in _blocks.epoch_chunks(fds["blocks"], meta.num_blocks):
                written = np.flatnonzero(epochs)
                sums = np.zeros((epochs.size, len(meta.row_files)), np.uint64)
                for part in _blocks.groups(meta, written):
                    for column, (name, spec) in enumerate(meta.row_files.items()):
                        data = _blocks.read_blocks(fds[name], meta, spec, part + first)
                        sums[part, column] = _blocks.checksums(data)
                _blocks.write_rows(out, first, sums, filename)
                _blocks.update_content_hash(digest, first, epochs, sums)
                count += written.size
        finally:
            os.close(out)
    return count, digest.hexdigest()
