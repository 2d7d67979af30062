"""Blocks of a table's array files by number: they are read and written in runs, without a mapping, and holes are kept.

Snapshots, deltas and checks process files this way: reading a hole takes no page, a full disk is an error and not
a signal, and memory use stays within a chunk.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _hashing, _sharing
from hashemb._files.directory import Directory, data_extents, opened, space_errors
from hashemb._files.format import DATA_OFFSET_BYTES, FileSpec, TableMeta
from hashemb._open_file import OpenFile

Numbers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

CHUNK_BLOCKS = 1 << 16  # blocks whose epochs are processed together; also the chunk of a content hash
GROUP_BYTES = 1 << 23  # bytes of a file held in memory together


def block_bytes(meta: TableMeta, spec: FileSpec) -> int:
    """Return the bytes of a whole block in one of the row files; the table's last block may have fewer."""
    return math.prod(spec.shape[1:]) * np.dtype(spec.dtype).itemsize * meta.block_rows


def checksum_spec(meta: TableMeta) -> FileSpec:
    """Return the spec of checksums.npy: one per block and row file, in the order of `row_files`; 0 if never written."""
    return FileSpec((meta.num_blocks, len(meta.row_files)), "<u8")


def runs(blocks: Numbers) -> Iterator[tuple[int, int, int]]:
    """Yield (position in `blocks`, first block, number of blocks) of each run of neighbours; `blocks` is ascending."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    ends = np.append(starts, blocks.size)[1:]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield start, int(blocks[start]), end - start


def blocks_per_group(meta: TableMeta) -> int:
    """Return the number of blocks whose data in any one row file is held in memory together."""
    return max(1, GROUP_BYTES // max(block_bytes(meta, spec) for spec in meta.row_files.values()))


def groups(meta: TableMeta, blocks: Numbers) -> Iterator[Numbers]:
    """Yield `blocks` in parts whose data is held in memory together."""
    per_group = blocks_per_group(meta)
    for i in range(0, blocks.size, per_group):
        yield blocks[i : i + per_group]


# ---- epochs ----


def spans_of_epochs(blocks_fd: int, num_blocks: int, unit_blocks: int) -> Iterator[tuple[int, int]]:
    """Yield the units of `unit_blocks` blocks whose epochs are not all hole, as ranges (first, end), ascending."""
    end, unit_bytes, done = DATA_OFFSET_BYTES + 4 * num_blocks, 4 * unit_blocks, 0
    for begin, stop in data_extents(blocks_fd, DATA_OFFSET_BYTES, end):
        first = max((begin - DATA_OFFSET_BYTES) // unit_bytes, done)
        done = max((stop - 1 - DATA_OFFSET_BYTES) // unit_bytes + 1, done)
        if first < done:
            yield first, done


def epoch_chunk_numbers(blocks_fd: int, num_blocks: int) -> Iterator[int]:
    """Yield the chunks of blocks.npy that are not all hole, ascending."""
    for first, end in spans_of_epochs(blocks_fd, num_blocks, CHUNK_BLOCKS):
        yield from range(first, end)


def epoch_chunks(blocks_fd: int, num_blocks: int) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """Yield (first block, epochs) of the chunks of blocks.npy in which any block has been written, ascending."""
    end, chunk_bytes = DATA_OFFSET_BYTES + 4 * num_blocks, 4 * CHUNK_BLOCKS
    for chunk in epoch_chunk_numbers(blocks_fd, num_blocks):
        at = DATA_OFFSET_BYTES + chunk * chunk_bytes
        epochs = np.frombuffer(read_at(blocks_fd, min(chunk_bytes, end - at), at), np.uint32)
        if epochs.any():
            yield chunk * CHUNK_BLOCKS, epochs


def update_content_hash(digest: Any, first: int, epochs: npt.NDArray[np.uint32], sums: npt.NDArray[np.uint64]) -> None:
    """Add a chunk to a snapshot's content hash; see `SnapshotInfo.content_hash`."""
    written = np.flatnonzero(epochs)
    for part in ((written + first).astype("<u8"), epochs[written].astype("<u4"), sums[written].astype("<u8")):
        digest.update(part.tobytes())


def read_epochs(blocks_fd: int, meta: TableMeta, blocks: Any) -> npt.NDArray[np.uint32]:
    """Return the epochs of these blocks, which may be in any order."""
    distinct, where = np.unique(blocks.astype(np.int64), return_inverse=True)
    low, high = int(distinct[0]), int(distinct[-1]) + 1
    if high - low > 64 * distinct.size:  # far apart: read each by itself
        data = b"".join(read_at(blocks_fd, 4, DATA_OFFSET_BYTES + 4 * block) for block in distinct.tolist())
        found = np.frombuffer(data, np.uint32)
    else:
        data = bytes(read_at(blocks_fd, 4 * (high - low), DATA_OFFSET_BYTES + 4 * low))
        found = np.frombuffer(data, np.uint32)[distinct - low]
    epochs: npt.NDArray[np.uint32] = found[where]
    return epochs


# ---- data ----


def read_records(fd: int, record: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the records of a log in parts. An incomplete record at the end was never finished and is left out."""
    with open(fd, "rb", closefd=False) as file:
        per_part = max(1, (16 << 20) // record.itemsize)
        while len(data := file.read(per_part * record.itemsize)) >= record.itemsize:
            yield np.frombuffer(data, record, len(data) // record.itemsize)


@contextmanager
def mapped_array(directory: Directory, name: str, spec: FileSpec) -> Iterator[npt.NDArray[Any]]:
    """Map an array file for writing to pages that have been written before: for others a full disk is a signal."""
    with directory.open(f"{name}.npy", os.O_RDWR) as opened, open(opened.fd, "r+b", closefd=False) as file:
        array = np.memmap(file, spec.dtype, "r+", DATA_OFFSET_BYTES, spec.shape)
    try:
        yield array
    finally:
        del array


def spans_of_data(fd: int, meta: TableMeta, spec: FileSpec) -> Iterator[tuple[int, int]]:
    """Yield the blocks of a row file that are not all hole, as ascending ranges of at most `CHUNK_BLOCKS`."""
    size = block_bytes(meta, spec)
    for begin, stop in data_extents(fd, DATA_OFFSET_BYTES, spec.file_bytes):
        last = (stop - 1 - DATA_OFFSET_BYTES) // size + 1
        for first in range((begin - DATA_OFFSET_BYTES) // size, last, CHUNK_BLOCKS):
            yield first, min(first + CHUNK_BLOCKS, last)


class OpenArrays:
    """Context manager that opens array files of a directory and yields a dict of their file descriptors by name."""

    def __init__(self, place: str | Directory, names: Iterable[str], flags: int = os.O_RDONLY) -> None:
        self._place, self._names, self._flags = place, names, flags
        self._files: dict[str, OpenFile] = {}

    def __enter__(self) -> dict[str, int]:
        with opened(self._place) as directory:
            for name in self._names:
                self._files[name] = directory.open(f"{name}.npy", self._flags)
        return {name: file.fd for name, file in self._files.items()}

    def __exit__(self, *exc_info: object) -> None:
        while self._files:
            self._files.popitem()[1].close()


def read_blocks(fd: int, meta: TableMeta, spec: FileSpec, blocks: Numbers) -> Bytes:
    """Return the bytes of these blocks (ascending) of a row file, (n, block_bytes); a short last block ends in 0."""
    return read_units(fd, block_bytes(meta, spec), spec.file_bytes, blocks)


def read_units(fd: int, size: int, file_bytes: int, units: Numbers) -> Bytes:
    """Return the bytes of units of an array file that has `size` bytes for each unit."""
    out = np.zeros((units.size, size), np.uint8)
    _sharing.read_units(fd, np.ascontiguousarray(units, np.int64), DATA_OFFSET_BYTES, file_bytes, out)
    return out


def write_blocks(fd: int, meta: TableMeta, spec: FileSpec, blocks: Numbers, data: Bytes, filename: str) -> None:
    """Write blocks as `read_blocks` returned them; raise `NoSpaceError` on a full disk."""
    size = block_bytes(meta, spec)
    flat = np.ascontiguousarray(data).reshape(-1).data
    with space_errors(filename):
        for position, first, count in runs(blocks):
            at = DATA_OFFSET_BYTES + first * size
            wanted = min(count * size, spec.file_bytes - at)
            write_at(fd, flat[position * size : position * size + wanted], at)


def checksums(data: Bytes) -> npt.NDArray[np.uint64]:
    """Return per block the low 64 bits of MurmurHash3 x64-128, seed 0, of its bytes without the trailing zeros."""
    out = np.empty(data.shape[0], np.uint64)
    _hashing.hash_fixed_bytes(data.reshape(-1), data.shape[1], 0, out)
    return out


def write_rows(fd: int, first: int, rows: npt.NDArray[Any], filename: str) -> None:
    """Write rows of an array file from row `first`, leaving pages of 4096 bytes that are all zero as holes."""
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    begin = DATA_OFFSET_BYTES + first * (flat.size // rows.shape[0])
    edge = -begin % 4096
    cuts = [0, *range(edge or 4096, flat.size, 4096), flat.size]
    view = flat.data
    with space_errors(filename):
        for low, high in itertools.pairwise(cuts):
            if flat[low:high].any():
                write_at(fd, view[low:high], begin + low)


def read_at(fd: int, size: int, at: int) -> bytearray:
    """Return `size` bytes of a file from byte `at`; raise `OSError` if the file ends before."""
    out = bytearray(size)
    view = memoryview(out)
    while view:
        done = os.preadv(fd, [view], at)
        if not done:
            raise OSError(f"the file ended at byte {at} while it was read")
        view, at = view[done:], at + done
    return out


def write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` to a file from byte `at`."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
