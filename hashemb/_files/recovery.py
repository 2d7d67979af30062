"""How a table was left, and what the next writer has to put right; the page `control` sealed and unsealed.

The page says, durably, that a writer has the table before anything of it is written, and that none has after all is on
disk: so a table that a power failure may have damaged never looks clean, whichever of its pages survive, whole or torn.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._files import blocks as _blocks
from hashemb._files.directory import boot_id
from hashemb._files.format import TableMeta, seal_control

__all__ = ["how_left", "mark_what_is_there", "reserve_what_is_marked", "seal", "unseal"]

Array = npt.NDArray[Any]


def how_left(control: Array) -> str | None:
    """ "killed" or "rebooted" where the last writer did not close the table, see `TableFiles.recovered`."""
    if control["clean"][0]:
        return None
    return "killed" if control["boot_id"][0].decode("ascii", "replace") == boot_id() else "rebooted"


def unseal(control: Array, mapped: mmap.mmap, **fields: Any) -> None:
    """Takes the check sum back, sets `fields`, and says that a writer has come; each on disk before the next.

    A kill may come in between, a page may be torn, and a reader look at any time.
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
    """Once everything else is on disk."""
    sealed = np.frombuffer(seal_control(page.tobytes()), np.uint8)
    for part in (slice(-8), slice(-8, None)):  # the check sum last: it vouches for the rest
        page[part] = sealed[part]
        mapped.flush()


def mark_what_is_there(control: Array, marks: Array, fds: dict[str, int], meta: TableMeta, filename: str) -> None:
    """After a power failure: rows may have reached the disk before their block's mark, and marks before the epoch.

    Blocks of which any file has data are marked as of the latest epoch; `marks` are the table's blocks.npy, `filename`.
    Reads the marks and the files' extents, no rows.
    """
    epochs = [int(part.max()) for _, part in _blocks.epoch_chunks(fds["blocks"], meta.num_blocks)]
    control["epoch"] = epoch = max([int(control["epoch"][0]), *epochs])
    for name, spec in meta.row_files.items():
        for first, end in _blocks.spans_of_data(fds[name], meta, spec):
            epochs_there = marks[first:end].copy()
            if not epochs_there.all():
                epochs_there[epochs_there == 0] = epoch
                _blocks.write_rows(fds["blocks"], first, epochs_there, filename)


def reserve_what_is_marked(blocks_fd: int, meta: TableMeta, allocate: Callable[[str, int, int], None]) -> None:
    """After a power failure a marked block may lack the space that writers rely on. `NoSpaceError` if there is none.

    `allocate(name, begin, num_bytes)` makes room for bytes of an array.
    """
    for first, epochs in _blocks.epoch_chunks(blocks_fd, meta.num_blocks):
        for _, block, count in _blocks.runs(first + np.flatnonzero(epochs)):
            for name, spec in meta.row_files.items():
                size = _blocks.block_bytes(meta, spec)
                allocate(name, block * size, count * size)
