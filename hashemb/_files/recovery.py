"""Recovery: how the last writer left a table, what the next one has to repair, and sealing of the page `control`.

The page records durably that a writer has the table open before anything is written, and that none has after everything
is on disk. A table that a power failure may have damaged therefore never looks clean, whichever of its pages survive,
complete or torn.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

from hashemb._files import blocks as _blocks
from hashemb._files.arrays import Array
from hashemb._files.directory import boot_id
from hashemb._files.format import TableMeta, seal_control

__all__ = ["mark_blocks_with_data", "previous_end", "reserve_marked_blocks", "seal", "unseal"]


def previous_end(control: Array) -> str | None:
    """Return "killed" or "rebooted" if the last writer did not close the table; see `TableFiles.recovered`."""
    if control["clean"][0]:
        return None
    return "killed" if control["boot_id"][0].decode("ascii", "replace") == boot_id() else "rebooted"


def unseal(control: Array, mapped: mmap.mmap, **fields: Any) -> None:
    """Clear the checksum, set `fields`, and mark the table as open for writing, each on disk before the next.

    The order matters: the process may be killed in between, a page may be torn, and others may read it at any time.
    """
    if control["checksum"][0]:
        control["checksum"] = 0
        mapped.flush()
    for name, value in fields.items():
        control[name] = value
    if control["clean"][0]:
        control["clean"] = 0
        mapped.flush()


def seal(page: Array, mapped: mmap.mmap) -> None:
    """Mark the table as clean, with a checksum. Everything else must be on disk already."""
    sealed = np.frombuffer(seal_control(page.tobytes()), np.uint8)
    for part in (slice(-8), slice(-8, None)):  # the checksum comes last, as it covers the rest
        page[part] = sealed[part]
        mapped.flush()


def mark_blocks_with_data(control: Array, marks: Array, fds: dict[str, int], meta: TableMeta, filename: str) -> None:
    """Mark all blocks that hold data, after a power failure.

    Rows may have reached the disk before their block's mark, and marks before the epoch. Blocks with data in any file
    are marked with the latest epoch; `marks` is the table's blocks.npy, at `filename`. The function reads the marks
    and the files' extents, but no rows.
    """
    epochs = [int(part.max()) for _, part in _blocks.epoch_chunks(fds["blocks"], meta.num_blocks)]
    control["epoch"] = epoch = max([int(control["epoch"][0]), *epochs])
    for name, spec in meta.row_files.items():
        for first, end in _blocks.spans_of_data(fds[name], meta, spec):
            epochs_there = marks[first:end].copy()
            if not epochs_there.all():
                epochs_there[epochs_there == 0] = epoch
                _blocks.write_rows(fds["blocks"], first, epochs_there, filename)


def reserve_marked_blocks(blocks_fd: int, meta: TableMeta, allocate: Callable[[str, int, int], None]) -> None:
    """Reserve space for marked blocks, which may lack it after a power failure; raise `NoSpaceError` on a full disk.

    `allocate(name, begin, num_bytes)` reserves space for bytes of an array.
    """
    for first, epochs in _blocks.epoch_chunks(blocks_fd, meta.num_blocks):
        for _, block, count in _blocks.runs(first + np.flatnonzero(epochs)):
            for name, spec in meta.row_files.items():
                size = _blocks.block_bytes(meta, spec)
                allocate(name, block * size, count * size)
