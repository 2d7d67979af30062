r"""Criteo's text format: tab-separated lines without a header, label, 13 integers, 26 categories; empty = missing.

The tokeniser in C parses blocks of whole lines and returns every line that is unusual. This module checks those lines
one by one, which is slower but yields a reason for each bad line. The few that turn out to be good, such as a line with
an integer of 19 digits, are encoded through Arrow columns like every other format. A row's keys therefore do not depend
on its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import mmh3
import numpy as np
import numpy.typing as npt

from hashemb._packages import require
from hashemb._text import shown
from hashemb.ctr.data import _tokens
from hashemb.ctr.data.batches import Batch
from hashemb.ctr.data.columns import LabelValues, Options
from hashemb.ctr.data.fields import CRITEO_LABEL, CRITEO_SCHEMA, CountBuckets, Kind, Schema, encode
from hashemb.ctr.data.source import Reject
from hashemb.ctr.data.streams import Stream, line_blocks

__all__ = ["MAX_LINE_BYTES", "CriteoSource", "count_good_lines", "line_fault"]

MAX_LINE_BYTES: int = _tokens.MAX_CRITEO_LINE_BYTES
_BLOCK_BYTES = 1 << 17  # a block and its keys fit easily into a second-level cache
_SNIFF_LINES = 100
_TAB = b"\t"
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1

_COLUMNS = {True: [CRITEO_LABEL, *CRITEO_SCHEMA], False: list(CRITEO_SCHEMA)}
_INTEGER_NAMES = [name for name, kind in CRITEO_SCHEMA.items() if kind == "count"]
_INTEGER = re.compile(rb"-?[0-9]+")

Rows = npt.NDArray[np.int64]


class CriteoSource:
    """A stream of Criteo lines; most of the first 100 lines determine whether there is a label."""

    format = "criteo"

    def __init__(self, stream: Stream, options: Options) -> None:
        if options.label not in (None, CRITEO_LABEL) and options.schema is None:
            raise ValueError(f"{stream.name}: a Criteo file has no column {options.label!r} for the label")
        if options.positive not in (None, "1"):
            raise ValueError(f"{stream.name}: the label of a Criteo file is 0 or 1, not {options.positive!r}")
        unknown = [name for name in options.numeric if name not in _INTEGER_NAMES]
        if unknown:
            raise ValueError(f"{stream.name}: a Criteo file has no integer column {unknown[0]!r}")
        absent = [name for name in options.categorical if name not in CRITEO_SCHEMA]
        if absent:
            raise ValueError(f"{stream.name}: a Criteo file has no column {absent[0]!r}")
        self.name = stream.name
        self.schema: dict[str, Kind] = dict(CRITEO_SCHEMA)
        self.schema |= {name: "integer" for name in options.categorical if name in _INTEGER_NAMES}
        self._stream = stream
        self._labelled = _has_labels(stream.peek(_SNIFF_LINES * 512))
        self.label = CRITEO_LABEL if self._labelled else None
        self.label_values: LabelValues | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as stored, that have been read so far."""
        return self._stream.bytes_read

    def accepts(self, field: str, kind: Kind) -> bool:
        """Return whether the column `field` can be read as `kind`."""
        return kind in (("count", "integer") if CRITEO_SCHEMA[field] == "count" else ("string",))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def batches(self, schema: dict[str, Kind], reject: Reject) -> Iterator[Batch]:
        """Yield the good rows in order, reduced to the fields of `schema`; pass the others to `reject`."""
        tokenizer = _tokenizer(schema)
        first_line = 1
        for block in line_blocks(self._stream, block_bytes=_BLOCK_BYTES, max_line_bytes=MAX_LINE_BYTES):
            labels, keys, odd, num_lines = tokenizer.tokenize(block, self._labelled)
            batch = Batch(labels if self._labelled else None, keys)
            yield self._settle(block, batch, odd, first_line, schema, reject) if len(odd) else batch
            first_line += num_lines

    def _settle(self, block: bytes, batch: Batch, odd: Rows, first_line: int, schema: Schema, reject: Reject) -> Batch:
        """Fill in the rows of the unusual lines that are good, and drop the others."""
        good: list[bytes] = []
        good_rows, bad_rows = list[int](), list[int]()
        for number, begin, row in odd.tolist():
            line = block[begin : block.index(b"\n", begin)]
            fault = line_fault(line, labelled=self._labelled)
            if fault is None:
                good.append(line)
                good_rows.append(row)
            else:
                reject(first_line + number, fault)
                bad_rows += [row] * (row >= 0)
        if good:
            lines = [line.split(_TAB) for line in good]
            batch.keys[good_rows] = _keys_of([line[self._labelled :] for line in lines], schema)
            if batch.labels is not None:
                batch.labels[good_rows] = [line[0] == b"1" for line in lines]
        if not bad_rows:
            return batch
        keys = np.delete(batch.keys, bad_rows, axis=0)
        return Batch(None if batch.labels is None else np.delete(batch.labels, bad_rows), keys)


def _tokenizer(schema: Schema) -> _tokens.CriteoTokenizer:
    place = {name: index for index, name in enumerate(schema)}
    columns = [
        (place.get(name, -1), mmh3.hash(name, 0, signed=False), schema.get(name) == "count") for name in CRITEO_SCHEMA
    ]
    buckets = CountBuckets.all()
    return _tokens.CriteoTokenizer(columns, len(schema), buckets.small, buckets.first, buckets.octave)


def _keys_of(lines: list[list[bytes]], schema: Schema) -> npt.NDArray[np.uint64]:
    """Encode lines that are known to be good through Arrow columns, the slow path."""
    pa = require("pyarrow")
    columns = {}
    for name, texts in zip(CRITEO_SCHEMA, zip(*lines, strict=True), strict=True):
        if CRITEO_SCHEMA[name] == "count":
            columns[name] = pa.array([_integer(text) if text else None for text in texts], pa.int64())
        else:
            columns[name] = pa.array([text or None for text in texts], pa.binary())
    return encode(columns, schema)


def line_fault(line: bytes, *, labelled: bool = True) -> str | None:
    """Return why `line` (without its line break) is not a Criteo line; None if it is one."""
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
    if len(field.lstrip(b"-0")) > 19 or not _INT64_MIN <= _integer(field) <= _INT64_MAX:
        return f"{name} is outside the range of 64-bit integers: {shown(field)}"
    return None


def _integer(text: bytes) -> int:
    """Parse an integer -?[0-9]+; Python rejects more than 4,300 digits, including leading zeros."""
    magnitude = int(text.lstrip(b"-").lstrip(b"0") or b"0")
    return -magnitude if text.startswith(b"-") else magnitude


def _has_labels(head: bytes) -> bool:
    widths = [line.count(_TAB) + 1 for line in head.split(b"\n")[:_SNIFF_LINES]]
    return widths.count(40) >= widths.count(39)


def count_good_lines(head: bytes) -> int:
    """Count the Criteo lines, with or without a label, among the first 100 lines of `head`."""
    lines = head.replace(b"\r\n", b"\n").split(b"\n")[:_SNIFF_LINES]
    return sum(line_fault(line) is None or line_fault(line, labelled=False) is None for line in lines)
