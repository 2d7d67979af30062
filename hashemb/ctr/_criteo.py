r"""Criteo's text format: tab-separated lines without a header, label, 13 integers, 26 categories; empty = missing.

Blocks of whole lines go through Arrow's CSV parser. A block in which anything is odd is first sifted line by
line, which is slower but knows the number of every bad line; what remains goes the same way. So a row's keys
don't depend on its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb.ctr._extras import require
from hashemb.ctr._source import Block, Options, Reject, shown
from hashemb.ctr._streams import Stream, line_blocks
from hashemb.ctr.fields import CRITEO_LABEL, CRITEO_SCHEMA, Kind, Schema

__all__ = ["MAX_LINE_BYTES", "CriteoSource", "count_good_lines", "line_fault"]

MAX_LINE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
_SNIFF_LINES = 100
_TAB = b"\t"
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1

# What Arrow's parser would let pass although the format does not allow it: blanks around an integer and 0x….
# Also NUL, and a carriage return, which Arrow takes for the end of a line.
_ODD_BYTES = (b"\0", b"\r", b" ", b"x", b"X")

_COLUMNS = {True: [CRITEO_LABEL, *CRITEO_SCHEMA], False: list(CRITEO_SCHEMA)}
_INTEGER_NAMES = [name for name, kind in CRITEO_SCHEMA.items() if kind == "count"]
_INTEGER = re.compile(rb"-?[0-9]+")
_PLAIN_LINE = {
    labelled: re.compile(
        (rb"[01]\t" if labelled else b"") + rb"(?:-?[0-9]{1,18})?\t" * 13 + rb"\t".join([rb"[^\t\r\n\0]*"] * 26)
    )
    for labelled in (True, False)
}


class CriteoSource:
    """A stream of Criteo lines; whether they have a label is what most of the first 100 lines say."""

    def __init__(self, stream: Stream, options: Options) -> None:
        if options.label not in (None, CRITEO_LABEL) and options.schema is None:
            raise ValueError(f"{stream.name}: a Criteo file has no column {options.label!r} for the label")
        unknown = [name for name in options.numeric if name not in _INTEGER_NAMES]
        if unknown:
            raise ValueError(f"{stream.name}: a Criteo file has no integer column {unknown[0]!r}")
        self.name = stream.name
        self.schema: dict[str, Kind] = dict(CRITEO_SCHEMA)
        self._stream = stream
        self._labelled = _has_labels(stream.peek(_SNIFF_LINES * 512))
        self.label = CRITEO_LABEL if self._labelled else None

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as stored, that have been taken so far."""
        return self._stream.bytes_read

    def accepts(self, field: str, kind: Kind) -> bool:
        """Whether the column `field` can be read as `kind`."""
        return kind in (("count", "integer") if CRITEO_SCHEMA[field] == "count" else ("string",))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def blocks(self, schema: Schema, reject: Reject) -> Iterator[Block]:
        """The good rows in order, reduced to the fields of `schema`; the others go to `reject`."""
        first_line = 1
        for block in line_blocks(self._stream, block_bytes=_BLOCK_BYTES, max_line_bytes=MAX_LINE_BYTES):
            ends = _line_ends(block)
            table = self._parse(block) if _looks_plain(block, ends) else None
            if table is None:
                good = _sift(block, first_line, self._labelled, reject)
                table = self._parse(good) if good else None
                if good and table is None:
                    raise AssertionError(f"{self.name}: a good line near line {first_line} failed to parse")
            first_line += len(ends)
            if table is not None:
                yield self._to_block(table, schema)

    def _parse(self, block: bytes) -> Any:
        """A table of the block's lines, or None if one of them is bad. All columns are parsed, needed or not."""
        pa, csv = require("pyarrow"), require("pyarrow.csv")
        types = {name: pa.int64() if kind == "count" else pa.string() for name, kind in CRITEO_SCHEMA.items()}
        try:
            table = csv.read_csv(
                pa.BufferReader(block),
                read_options=csv.ReadOptions(
                    column_names=_COLUMNS[self._labelled], use_threads=False, block_size=len(block) + 1
                ),
                parse_options=csv.ParseOptions(
                    delimiter="\t", quote_char=False, double_quote=False, ignore_empty_lines=False
                ),
                convert_options=csv.ConvertOptions(
                    column_types={CRITEO_LABEL: pa.bool_(), **types},
                    null_values=[""],
                    true_values=["1"],
                    false_values=["0"],
                    strings_can_be_null=True,
                ),
            )
        except pa.ArrowInvalid:
            return None
        return None if self._labelled and table.column(0).null_count else table

    def _to_block(self, table: Any, schema: Schema) -> Block:
        columns = {name: table.column(name).combine_chunks() for name in schema}
        labels = table.column(0).to_numpy().astype(np.float32) if self._labelled else None
        return Block(labels, columns)


def line_fault(line: bytes, *, labelled: bool = True) -> str | None:
    """Why `line` (without its line break) is not a Criteo line; None if it is one."""
    names = _COLUMNS[labelled]
    if not line:
        return "empty line"
    if len(line) > MAX_LINE_BYTES:
        return f"line is longer than {MAX_LINE_BYTES} bytes"
    fields = line.split(b"\t")
    if len(fields) != len(names):
        return f"expected {len(names)} columns, found {len(fields)}"
    for byte, what in ((b"\0", "a NUL byte"), (b"\r", "a carriage return")):
        if byte in line:
            return f"{what} in column {names[line.count(_TAB, 0, line.index(byte))]}"
    try:
        line.decode()
    except UnicodeDecodeError as error:
        column = names[line.count(_TAB, 0, error.start)]
        return f"not UTF-8: byte 0x{line[error.start]:02x} in column {column}"
    if labelled and fields[0] not in (b"0", b"1"):
        return f"label must be 0 or 1, found {shown(fields[0])}"
    faults = (_integer_fault(name, field) for name, field in zip(_INTEGER_NAMES, fields[labelled:], strict=False))
    return next((fault for fault in faults if fault), None)


def _integer_fault(name: str, field: bytes) -> str | None:
    if not field:
        return None
    if not _INTEGER.fullmatch(field):
        return f"{name} must be an integer, found {shown(field)}"
    digits = field.lstrip(b"-").lstrip(b"0")
    if len(digits) > 19 or not _INT64_MIN <= int(field) <= _INT64_MAX:
        return f"{name} is outside the range of 64-bit integers: {shown(field)}"
    return None


def _line_ends(block: bytes) -> npt.NDArray[np.intp]:
    return np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))


def _looks_plain(block: bytes, ends: npt.NDArray[np.intp]) -> bool:
    """Whether Arrow's verdict on the block can be trusted; ordinary Criteo data always passes."""
    line_bytes = np.diff(ends, prepend=-1) - 1
    return (
        bool(line_bytes.min() > 0)
        and bool(line_bytes.max() <= MAX_LINE_BYTES)
        and not block.startswith(b"\xef\xbb\xbf")
        and not any(byte in block for byte in _ODD_BYTES)
    )


def _sift(block: bytes, first_line: int, labelled: bool, reject: Reject) -> bytes:
    """The good lines of the block; the others go to `reject`."""
    plain = _PLAIN_LINE[labelled].fullmatch
    utf8 = _is_utf8(block)
    good = []
    for number, line in enumerate(block[:-1].split(b"\n"), first_line):
        if len(line) <= MAX_LINE_BYTES and utf8 and plain(line):
            good.append(line)
        elif fault := line_fault(line, labelled=labelled):
            reject(number, fault)
        else:
            good.append(line)
    return b"\n".join(good)


def _is_utf8(block: bytes) -> bool:
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has_labels(head: bytes) -> bool:
    widths = [line.count(_TAB) + 1 for line in head.split(b"\n")[:_SNIFF_LINES]]
    return widths.count(40) >= widths.count(39)


def count_good_lines(head: bytes) -> int:
    """How many of the first 100 lines of `head` are Criteo lines, with or without a label."""
    lines = head.replace(b"\r\n", b"\n").split(b"\n")[:_SNIFF_LINES]
    return sum(line_fault(line) is None or line_fault(line, labelled=False) is None for line in lines)
