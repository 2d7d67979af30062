"""One pass over the content of a table's array files, which checks each block against checksums and invariants.

Invariants: holes are not read, and each written block is read once; memory use stays within some blocks; a block that a
writer changes meanwhile is not reported (epochs only grow, and a block's epoch grows before its data changes).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hashemb._files import DATA_OFFSET_BYTES, Bytes, Numbers, TableMeta, data_extents
from hashemb._files import blocks as _blocks
from hashemb._points.problems import Progress, Report

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]


class Sink(Protocol):
    """Receiver of the data that a scan has read, in the order of blocks."""

    def epochs(self, first: int, epochs: npt.NDArray[np.uint32]) -> None: ...
    def blocks(self, name: str, blocks: Numbers, data: Bytes) -> None: ...


@dataclass(frozen=True)
class Covered:
    """The blocks that checksums.npy covers: those with epochs up to `epoch`, or all written ones if it is None."""

    epoch: int | None

    def cover(self, epochs: npt.NDArray[np.uint32]) -> Mask:
        return np.ones(epochs.size, np.bool_) if self.epoch is None else epochs <= self.epoch


@dataclass(frozen=True)
class Limits:
    """Limits from the control page: no block is newer, no row has paid more decay, and every block with data is marked.

    None of these is certain after a power failure, until the next writer has repaired the table.
    """

    epoch: int = 2**32 - 1
    decay_total: float = -np.inf
    all_marked: bool = False


class UnreadableError(Exception):
    """An array file, by name without `.npy`, could not be read, with the error that was raised."""

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(name, error)
        self.name, self.error = name, error


def _guarded(name: str, found: Iterator[T]) -> Iterator[T]:
    try:
        yield from found
    except OSError as error:
        raise UnreadableError(name, error) from error


class Scan:
    """One pass over the array files of a table.

    Parameters
    ----------
    directory : str
    meta : TableMeta
    names : list of str
        Names of the arrays to check, without `.npy`: those whose size is right. They must include "blocks".
    report : Report
    limits : callable
        Function that returns the current `Limits`.
    covered : Covered or None
        Blocks covered by checksums; requires "checksums" among the names.
    sink : Sink, optional

    Attributes
    ----------
    num_blocks : int
        Number of written blocks seen.
    content_hash : str
        The hash of `SnapshotInfo.content_hash`, if there are checksums.
    """

    def __init__(
        self,
        directory: str,
        meta: TableMeta,
        names: list[str],
        report: Report,
        limits: Callable[[], Limits],
        *,
        covered: Covered | None = None,
        sink: Sink | None = None,
    ) -> None:
        self._directory, self._meta, self._names, self._report = directory, meta, names, report
        self._limits, self._covered, self._sink = limits, covered, sink
        self._specs = {"checksums": _blocks.checksum_spec(meta), **meta.files}
        self._columns = {name: column for column, name in enumerate(meta.row_files)}
        self._digest = hashlib.sha256()
        self.num_blocks, self._fds = 0, {"": -1}

    @property
    def content_hash(self) -> str:
        return self._digest.hexdigest()

    def run(self, progress: Progress | None = None) -> None:
        """Scan; raise `UnreadableError` if a file cannot be read. Errors of sink and progress are passed through."""
        with _blocks.OpenArrays(self._directory, self._names) as self._fds:
            total, done = self._count_written() if progress else 0, 0
            for chunk in self._chunks():
                done += self._check_chunk(chunk * _blocks.CHUNK_BLOCKS)
                if progress:
                    progress(min(done, total), total)

    def _count_written(self) -> int:
        chunks = _guarded("blocks", _blocks.epoch_chunks(self._fds["blocks"], self._meta.num_blocks))
        return sum(int(np.count_nonzero(epochs)) for _, epochs in chunks)

    def _chunks(self) -> Iterator[int]:
        """Yield the chunks in which any file has data, ascending."""
        per_file = [
            _guarded(name, data_chunk_numbers(fd, self._unit_bytes(name), self._specs[name].file_bytes))
            for name, fd in self._fds.items()
        ]
        last = -1
        for chunk in heapq.merge(*per_file):
            if chunk > last:
                yield chunk
            last = chunk

    def _unit_bytes(self, name: str) -> int:
        """Return the number of bytes of the array that belong to one block."""
        spec = self._specs[name]
        if name in self._columns:
            return _blocks.block_bytes(self._meta, spec)
        return np.dtype(spec.dtype).itemsize * (spec.shape[1] if len(spec.shape) > 1 else 1)

    def _read(self, name: str, blocks: Numbers) -> Bytes:
        try:
            return _blocks.read_units(self._fds[name], self._unit_bytes(name), self._specs[name].file_bytes, blocks)
        except OSError as error:
            raise UnreadableError(name, error) from error

    # -- one chunk of blocks --

    def _check_chunk(self, first: int) -> int:
        """Check the chunk that begins with block `first`; return how many of its blocks have been written."""
        numbers = np.arange(first, min(first + _blocks.CHUNK_BLOCKS, self._meta.num_blocks))
        epochs = self._read("blocks", numbers).view(np.uint32)[:, 0]
        sums = self._read("checksums", numbers).view(np.uint64) if "checksums" in self._names else None
        self._check_epochs(numbers, epochs)
        if self._sink:
            self._sink.epochs(first, epochs)
        if sums is not None:
            _blocks.update_content_hash(self._digest, first, epochs, sums)
        written = np.flatnonzero(epochs)
        for part in _blocks.groups(self._meta, written):
            for name, column in self._columns.items():
                if name in self._names:
                    self._check_written(name, numbers[part], epochs[part], None if sums is None else sums[part, column])
        for name in self._names:
            if name != "blocks":
                self._check_unwritten(name, first, epochs)
        self.num_blocks += written.size
        return written.size

    def _check_epochs(self, numbers: Numbers, epochs: npt.NDArray[np.uint32]) -> None:
        late, limit = np.flatnonzero(epochs > (last := self._limits().epoch)), f"epochs up to {last}"
        pairs = ((limit, f"epoch {epochs[i]} of block {numbers[i]}") for i in late.tolist())
        self._report.add_many("blocks.npy", limit, late.size, pairs)

    def _unchanged(self, blocks: Numbers, epochs: npt.NDArray[np.uint32]) -> Mask:
        """Return which blocks still have the epochs read before their data; all of them, if blocks cannot change."""
        if self._covered and self._covered.epoch is None:
            return np.ones(blocks.size, np.bool_)
        now: Mask = self._read("blocks", blocks).view(np.uint32)[:, 0] == epochs
        return now

    # -- blocks that have been written --

    def _check_written(
        self, name: str, blocks: Numbers, epochs: npt.NDArray[np.uint32], sums: npt.NDArray[np.uint64] | None
    ) -> None:
        data = self._read(name, blocks)
        if self._sink:
            self._sink.blocks(name, blocks, data)
        vouched = np.zeros(blocks.size, np.bool_)
        if sums is not None and self._covered:
            vouched = self._covered.cover(epochs)
            self._check_sums(name, blocks[vouched], epochs[vouched], sums[vouched], data[vouched])
        if not vouched.all():
            self._check_values(name, blocks[~vouched], epochs[~vouched], data[~vouched])

    def _check_sums(
        self,
        name: str,
        blocks: Numbers,
        epochs: npt.NDArray[np.uint32],
        sums: npt.NDArray[np.uint64],
        data: Bytes,
    ) -> None:
        found = _blocks.checksums(data)
        bad = np.flatnonzero(found != sums)
        bad = bad[self._unchanged(blocks[bad], epochs[bad])]
        pairs = ((f"check sum {sums[i]:#018x} of {self._place(blocks[i])}", f"{found[i]:#018x}") for i in bad.tolist())
        self._report.add_many(f"{name}.npy", "blocks that agree with checksums.npy", bad.size, pairs)

    def _place(self, block: Any) -> str:
        first = int(block) * self._meta.block_rows
        last = min(first + self._meta.block_rows, self._meta.num_embeddings) - 1
        return f"block {block} (rows {first} to {last})"

    def _check_values(self, name: str, blocks: Numbers, epochs: npt.NDArray[np.uint32], data: Bytes) -> None:
        rule, good = _RULES[name]
        values = data.view(self._specs[name].dtype)
        wrong = ~good(values, self._limits())
        bad = np.flatnonzero(wrong.any(axis=1))
        bad = bad[self._unchanged(blocks[bad], epochs[bad])]
        places = ((i, int(wrong[i].argmax())) for i in bad.tolist())
        pairs = ((rule, f"{_shown(values[i, j])} in {self._row(name, blocks[i], j)}") for i, j in places)
        self._report.add_many(f"{name}.npy", f"blocks of {rule}", bad.size, pairs)

    def _row(self, name: str, block: Any, element: int) -> str:
        per_row = int(np.prod(self._specs[name].shape[1:], dtype=np.int64))
        return f"row {int(block) * self._meta.block_rows + element // per_row}"

    # -- blocks that have not been written --

    def _check_unwritten(self, name: str, first: int, epochs: npt.NDArray[np.uint32]) -> None:
        """Check that unwritten blocks are zero. Only parts that are not holes are read: reserved space, or damage."""
        if not self._limits().all_marked:
            return
        size, file_bytes, done = self._unit_bytes(name), self._specs[name].file_bytes, 0
        begin = DATA_OFFSET_BYTES + first * size
        extents = data_extents(self._fds[name], begin, min(begin + epochs.size * size, file_bytes))
        for low, high in _guarded(name, extents):
            start, done = max(done, (low - begin) // size), -(-(high - begin) // size)
            idle = np.flatnonzero(epochs[start:done] == 0) + start + first
            for part in _blocks.groups(self._meta, idle):
                self._check_zero(name, part)

    def _check_zero(self, name: str, blocks: Numbers) -> None:
        data = self._read(name, blocks)
        words = data.view(np.uint64) if data.shape[1] % 8 == 0 else data
        bad = np.flatnonzero(words.any(axis=1))
        bad = bad[self._unchanged(blocks[bad], np.zeros(bad.size, np.uint32))]
        rule = "only zeros in blocks never written"
        pairs = ((rule, f"{np.count_nonzero(data[i])} other bytes in {self._place(blocks[i])}") for i in bad.tolist())
        self._report.add_many(f"{name}.npy", rule, bad.size, pairs)


def data_chunk_numbers(fd: int, unit_bytes: int, file_bytes: int) -> Iterator[int]:
    """Yield the chunks of blocks that are not all hole in an array file with `unit_bytes` per block, ascending."""
    chunk_bytes, done = unit_bytes * _blocks.CHUNK_BLOCKS, 0
    for begin, stop in data_extents(fd, DATA_OFFSET_BYTES, file_bytes):
        first = max((begin - DATA_OFFSET_BYTES) // chunk_bytes, done)
        done = max((stop - 1 - DATA_OFFSET_BYTES) // chunk_bytes + 1, done)
        yield from range(first, done)


# ---- valid values: name -> (description of the rule, function that returns which values satisfy it) ----


def _finite(values: npt.NDArray[Any], limits: Limits) -> Mask:
    is_bfloat16 = values.dtype == np.uint16
    good: Mask = (values & 0x7F80) != 0x7F80 if is_bfloat16 else np.isfinite(values)
    return good


def _sum_of_squares(values: npt.NDArray[Any], limits: Limits) -> Mask:
    good: Mask = np.isfinite(values) & (values >= 0)
    return good


def _paid(values: npt.NDArray[Any], limits: Limits) -> Mask:
    """Return which values are valid: a row has paid exactly some running total, and totals only fall."""
    good: Mask = (values >= limits.decay_total) & (values <= 0)
    return good


_RULES: dict[str, tuple[str, Callable[[npt.NDArray[Any], Limits], Mask]]] = {
    "weight": ("finite weights", _finite),
    "accumulator": ("finite sums of squares, 0 or more", _sum_of_squares),
    "n": ("finite sums of squares, 0 or more", _sum_of_squares),
    "z": ("finite values", _finite),
    "paid": ("values between the table's decay total and 0", _paid),
}


def _shown(value: Any) -> str:
    return f"bits {int(value):#06x}" if isinstance(value, np.uint16) else f"{float(value)!r}"
