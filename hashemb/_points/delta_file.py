"""Delta files: their header and layout, and reading and writing them in groups of blocks.

The layout is in docs/reference/format.md. Invariants: every byte of a file is covered by a check; data is checked
before it is returned; memory use stays within a group of blocks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from hashemb._files import (
    MOMENT_RULES,
    SMALL_FILE_BYTES,
    STORAGE_DTYPES,
    FileSpec,
    Point,
    TableMeta,
    dump_line,
    expect_rate,
    load_checked,
    meta_content,
    meta_of_content,
    open_regular,
    space_errors,
)
from hashemb._files import blocks as _blocks
from hashemb._open_file import OpenFile
from hashemb._points.problems import Progress
from hashemb._rules import (
    BOOL,
    COUNTER,
    EPOCH,
    EPOCH_OR_NONE,
    ID,
    MAX_EPOCH,
    OBJECT,
    SHA256,
    Rule,
    Whole,
    check_fields,
    expect,
    one_of,
    optional,
)
from hashemb.errors import CorruptTableError, FormatError

__all__ = ["DeltaInfo", "DeltaReader", "Group", "Progress", "write_delta"]

MAGIC = b"hashembD"
DELTA_FORMAT = 1
ALIGN_BYTES = 4096
_NO_HASH = "0" * 64

#: Rules for the fields of a delta's header.
DELTA_RULES: dict[str, Rule | Whole] = {
    "format": Whole(1, DELTA_FORMAT),
    **MOMENT_RULES,
    "parent": optional(ID),
    "parent_sequence": Whole(-1, MAX_EPOCH),
    "table": OBJECT,
    "dtype": one_of(*STORAGE_DTYPES),
    "state": BOOL,
    "from_epoch": EPOCH_OR_NONE,
    "to_epoch": EPOCH,
    "index_hash": SHA256,
    "arrays": OBJECT,
    "data_bytes": COUNTER,
}

Group = tuple[_blocks.Numbers, dict[str, _blocks.Bytes]]


@dataclass(frozen=True)
class DeltaInfo:
    """Description of a delta, stored in the header of its file.

    Attributes
    ----------
    id : str
        Random id of 32 hexadecimal digits.
    parent : str or None
        Id of the snapshot or delta that it starts from. None for a full delta, which starts from an empty table.
    sequence, parent_sequence : int
        Numbers of the delta and its parent in the source's history; `parent_sequence` is -1 without a parent.
    table : TableMeta
        The source: `num_embeddings`, `embedding_dim`, `dtype`, `optimizer`, `init`, `num_hashes`, `seed`, `id`.
    dtype : {"float32", "float16", "bfloat16"}
        Dtype of the weights in the delta.
    state : bool
        Whether it holds the optimiser's state too.
    from_epoch, to_epoch : int
        It holds the source's blocks written after `from_epoch`, up to and including `to_epoch`.
    step : int
    lr, decay_total : float
    rows_touched : int
        The source's counters at that moment.
    created : float
        Time at which the point was taken, in seconds since 1970.
    num_blocks : int
        Number of blocks in the delta.
    index_hash : str
        SHA-256 of the file's block numbers and of the hashes of its blocks, which cover the rest.
    """

    id: str
    parent: str | None
    sequence: int
    parent_sequence: int
    table: TableMeta
    dtype: str
    state: bool
    from_epoch: int
    to_epoch: int
    step: int
    lr: float
    decay_total: float
    rows_touched: int
    created: float
    num_blocks: int
    index_hash: str = _NO_HASH

    @property
    def point(self) -> Point:
        return Point(self.id, "delta", self.sequence, self.to_epoch, self.step)

    @property
    def arrays(self) -> dict[str, FileSpec]:
        """Shape and dtype of a block in the file, by name of the array."""
        files, rows = self.table.row_files, self.table.block_rows
        specs = {name: FileSpec((rows, *files[name].shape[1:]), files[name].dtype) for name in array_names(self)}
        return {**specs, "weight": FileSpec(specs["weight"].shape, STORAGE_DTYPES[self.dtype])}

    @property
    def data_bytes(self) -> int:
        """Size of the file without its header."""
        return _Layout(self).end

    def encode(self) -> bytes:
        """Return the header: magic, length, JSON, and zeros up to a multiple of 4096 bytes."""
        content = {"format": DELTA_FORMAT, **{field.name: getattr(self, field.name) for field in fields(self)}}
        content["table"] = meta_content(self.table)
        content["arrays"] = {n: {"shape": list(s.shape), "dtype": s.dtype} for n, s in self.arrays.items()}
        content["data_bytes"] = self.data_bytes
        text = dump_line(content)
        return _padded(MAGIC + struct.pack("<Q", len(text)) + text)

    @classmethod
    def decode(cls, data: bytes, filename: str) -> DeltaInfo:
        """Invert `encode`; raise `CorruptTableError` for any other bytes, and `FormatError` for a newer format."""
        text = data[16 : 16 + struct.unpack_from("<Q", data, 8)[0]]
        content = load_checked(text, filename, DELTA_FORMAT, dump_line)
        check_fields(content, DELTA_RULES, filename)
        table = meta_of_content(content["table"], filename, "table.")
        info = cls(**{**{field.name: content[field.name] for field in fields(cls)}, "table": table})
        info.check_values(filename)
        encoded = info.encode()
        if data != encoded:
            raise CorruptTableError(f"{filename}: expected a header of {len(encoded)} other bytes, found {len(data)}")
        return info

    def check_values(self, filename: str) -> None:
        """Raise `CorruptTableError` unless the fields, which are valid one by one, are consistent."""
        num_blocks, sequence = self.table.num_blocks, self.sequence
        if self.state:
            expect(self.dtype == self.table.dtype, filename, f"dtype {self.table.dtype!r} with state", self.dtype)
        expect(self.num_blocks <= num_blocks, filename, f"num_blocks up to the table's {num_blocks}", self.num_blocks)
        expect(self.from_epoch < self.to_epoch, filename, f"from_epoch below {self.to_epoch}", self.from_epoch)
        if self.parent is None:
            expect(self.from_epoch == 0, filename, "from_epoch 0 without a parent", self.from_epoch)
            expect(self.parent_sequence == -1, filename, "parent_sequence -1 without a parent", self.parent_sequence)
        else:
            expect(self.from_epoch >= 1, filename, "from_epoch from 1 with a parent", self.from_epoch)
            is_before = 0 <= self.parent_sequence < sequence
            expect(is_before, filename, f"parent_sequence from 0 and below {sequence}", self.parent_sequence)
        expect_rate(self.table.optimizer, self.lr, filename)


def array_names(info: DeltaInfo) -> list[str]:
    return arrays_to_export(info.table, state=info.state)


def arrays_to_export(meta: TableMeta, *, state: bool) -> list[str]:
    """Return the names of the arrays that look-ups need, and with `state` those of the optimiser's state."""
    return [name for name in meta.row_files if state or name in ("weight", "paid")]


# ---- layout ----


class _Layout:
    """Offsets in bytes from the end of the header: block numbers, hashes, then each array's blocks."""

    def __init__(self, info: DeltaInfo) -> None:
        self.arrays, n = info.arrays, info.num_blocks
        self.block_bytes = {name: _blocks.block_bytes(info.table, spec) for name, spec in self.arrays.items()}
        sizes = [8 * n, 8 * n * len(self.arrays), *(n * size for size in self.block_bytes.values())]
        starts = list(itertools.accumulate((_aligned(size) for size in sizes), initial=0))
        self.hashes, self.data = starts[1], dict(zip(self.arrays, starts[2:-1], strict=True))
        self.index_bytes, self.end = starts[2], starts[-1]


def _aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")


# ---- reading ----


class DeltaReader:
    """Context manager of an open delta file. Opening checks the header and the size, `check` everything else.

    It raises `FileNotFoundError`, `FormatError` (the file is not a delta, or has a newer format) or `CorruptTableError`
    (the file is damaged or incomplete).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open_regular(path)
        header = self._read_header()
        self.info = DeltaInfo.decode(header, path)
        self._begin, self._layout = len(header), _Layout(self.info)
        expected, found = self._begin + self._layout.end, os.fstat(self._file.fd).st_size
        if found != expected:
            raise CorruptTableError(f"{path}: expected {expected} bytes, found {found}")

    def _read_header(self) -> bytes:
        head = os.pread(self._file.fd, 16, 0)
        if len(head) < 16 and MAGIC.startswith(head[:8]):
            raise CorruptTableError(f"{self.path}: expected a header, found {len(head)} bytes")
        if head[:8] != MAGIC:
            raise FormatError(f"{self.path}: not a delta: expected {MAGIC!r}, found {head[:8]!r}")
        length = _aligned(16 + struct.unpack_from("<Q", head, 8)[0])
        if length > SMALL_FILE_BYTES:
            limit = SMALL_FILE_BYTES
            raise CorruptTableError(f"{self.path}: expected a header of at most {limit} bytes, found {length}")
        header = os.pread(self._file.fd, length, 0)
        if len(header) != length:
            raise CorruptTableError(f"{self.path}: expected a header of {length} bytes, found {len(header)}")
        return header

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> DeltaReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def check(self, progress: Progress | None = None) -> None:
        """Read the whole file; raise `CorruptTableError` unless every byte is as written."""
        found = _hash_of(self._file.fd, self._begin, self._layout.index_bytes)
        if found != self.info.index_hash:
            raise CorruptTableError(f"{self.path}: index: expected SHA-256 {self.info.index_hash}, found {found}")
        done = 0
        for numbers, _ in self.groups():
            done += numbers.size
            if progress:
                progress(done, self.info.num_blocks)
        self._check_padding()

    def _check_padding(self) -> None:
        layout, n = self._layout, self.info.num_blocks
        for name, start in layout.data.items():
            end = start + n * layout.block_bytes[name]
            if any(self._read(end, _aligned(end) - end)):
                raise CorruptTableError(f"{self.path}: expected zeros behind byte {self._begin + end}, found others")

    def numbers(self) -> Iterator[_blocks.Numbers]:
        """Yield the numbers of the blocks, ascending, in groups that are processed together; check them each time."""
        per_group, last = _blocks.blocks_per_group(self.info.table), -1
        for first in range(0, self.info.num_blocks, per_group):
            count = min(per_group, self.info.num_blocks - first)
            numbers = np.frombuffer(self._read(8 * first, 8 * count), "<i8")
            if numbers[0] <= last or (np.diff(numbers) <= 0).any() or numbers[-1] >= self.info.table.num_blocks:
                raise CorruptTableError(
                    f"{self.path}: expected ascending numbers below {self.info.table.num_blocks} for blocks "
                    f"{first} to {first + count}, found {numbers[0]} to {numbers[-1]} after {last}"
                )
            last = int(numbers[-1])
            yield numbers

    def groups(self) -> Iterator[Group]:
        """Yield (numbers of blocks, {array: (blocks, bytes of a block)}) after checking the data."""
        layout, first = self._layout, 0
        for numbers in self.numbers():
            width = 8 * len(layout.arrays)
            hashes = np.frombuffer(self._read(layout.hashes + first * width, numbers.size * width), "<u8")
            data = {name: self._read_blocks(name, first, numbers.size) for name in layout.arrays}
            found = np.column_stack([_blocks.checksums(blocks) for blocks in data.values()])
            expected = hashes.reshape(found.shape)
            if (found != expected).any():
                i, j = np.argwhere(found != expected)[0]
                raise CorruptTableError(
                    f"{self.path}: {list(data)[j]} of block {numbers[i]}: expected hash {expected[i, j]:#018x}, "
                    f"found {found[i, j]:#018x}"
                )
            yield numbers, data
            first += numbers.size

    def _read_blocks(self, name: str, first: int, count: int) -> _blocks.Bytes:
        size = self._layout.block_bytes[name]
        data = self._read(self._layout.data[name] + first * size, count * size)
        return np.frombuffer(data, np.uint8).reshape(count, size)

    def _read(self, at: int, size: int) -> bytearray:
        return _blocks.read_at(self._file.fd, size, self._begin + at)


def _hash_of(fd: int, begin: int, size: int) -> str:
    digest, step = hashlib.sha256(), 1 << 20
    for at in range(0, size, step):
        digest.update(_blocks.read_at(fd, min(step, size - at), begin + at))
    return digest.hexdigest()


# ---- writing ----


def write_delta(filename: str, info: DeltaInfo, groups: Iterable[Group], progress: Progress | None = None) -> DeltaInfo:
    """Create the file and sync it; return `info` with its hash. The groups hold `info.num_blocks` blocks in total."""
    layout, begin, done = _Layout(info), len(info.encode()), 0
    with space_errors(filename), OpenFile(filename, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
        os.ftruncate(file.fd, begin + layout.end)
        for numbers, data in groups:
            _write_group(file.fd, layout, begin, done, numbers, data)
            done += numbers.size
            if progress:
                progress(done, info.num_blocks)
        info = DeltaInfo(**{**vars(info), "index_hash": _hash_of(file.fd, begin, layout.index_bytes)})
        _blocks.write_at(file.fd, info.encode(), 0)
        os.fsync(file.fd)
    return info


def _write_group(
    fd: int, layout: _Layout, begin: int, first: int, numbers: _blocks.Numbers, data: dict[str, _blocks.Bytes]
) -> None:
    hashes = np.column_stack([_blocks.checksums(data[name]) for name in layout.arrays]).astype("<u8")
    _blocks.write_at(fd, numbers.astype("<u8").tobytes(), begin + 8 * first)
    _blocks.write_at(fd, hashes.tobytes(), begin + layout.hashes + first * 8 * len(layout.arrays))
    for name, start in layout.data.items():
        _blocks.write_at(fd, data[name].reshape(-1).data, begin + start + first * layout.block_bytes[name])
