"""CSV with a header, through Arrow's parser: quoted delimiters and line breaks, any column names.

CSV has no types, so the kind of a column is inferred from its first values (`_infer_kind`) and then holds for the
whole column: a row with a later value that does not fit is bad. Every column is parsed as text first, because a failed
conversion inside Arrow's parser would end the stream without identifying the row.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._packages import require
from hashemb._text import shown
from hashemb.ctr.data.batches import Batch
from hashemb.ctr.data.columns import Options
from hashemb.ctr.data.fields import Kind, Schema
from hashemb.ctr.data.kinds import looks_like_count
from hashemb.ctr.data.labels import find_label, first_label_values, is_missing, parse_labels
from hashemb.ctr.data.source import Block, Reject, check_distinct, first_per_row, infer_schema
from hashemb.ctr.data.streams import Stream

__all__ = ["CsvSource"]

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 20
_FIRST_LOOK = 100  # values that are checked first, which settles most columns of text
_NUMBER_ENDS = "0123456789.fyFY"  # includes the ends of inf and infinity, which Arrow reads

# Invalid UTF-8 is replaced by this noncharacter: Arrow's parser gives up on the whole stream if it cannot decode a
# ragged row, while only one row should be rejected.
_NOT_UTF8 = "\ufdd0"


class CsvSource:
    """A stream of CSV records below a header."""

    format = "csv"

    def __init__(self, stream: Stream, options: Options) -> None:
        self.name = stream.name
        self._stream = stream
        head = stream.peek(_HEAD_BYTES)
        self._delimiter = _delimiter(head)
        sample = self._sample(head)
        self._names: list[str] = sample.column_names
        columns = {name: sample.column(name).combine_chunks() for name in self._names}
        self.label = find_label(self.name, self._names, columns.__getitem__, options.label, options.schema or {})
        first_labels = None if self.label is None else columns[self.label]
        self.label_values = first_label_values(self.name, self.label, first_labels, options)
        size = stream.size_bytes
        kinds = {name: _infer_kind(column, size) for name, column in columns.items() if name != self.label}
        self.schema = infer_schema(self.name, kinds, self.label, options, text=True)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as stored, that have been read so far."""
        return self._stream.bytes_read

    def accepts(self, field: str, kind: Kind) -> bool:
        """Return whether the column `field` can be read as `kind`: text can be read as any kind."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def batches(self, schema: dict[str, Kind], reject: Reject) -> Iterator[Batch]:
        """Yield the good rows in order, reduced to the fields of `schema`; pass the others to `reject`."""
        text = _Utf8Guard(self._stream)
        numbers = _RecordNumbers(expected=len(self._names))
        source = require("pyarrow").PythonFile(text, mode="r")
        records = self._open(source, self._names, numbers.on_ragged, _BLOCK_BYTES)
        try:
            yield from self._parse(records, schema, text, numbers, reject)
        finally:
            text.stop()
            with suppress(Exception):
                for _ in records:  # drain, so that Arrow's thread is not in a read when Python exits
                    pass

    def _parse(
        self, records: Any, schema: Schema, text: _Utf8Guard, numbers: _RecordNumbers, reject: Reject
    ) -> Iterator[Batch]:
        for batch in records:
            rows, faults = numbers.advance(batch.num_rows)
            block, row_faults = self._convert(batch, schema, check_utf8=text.damaged)
            faults += [(int(rows[row]), reason) for row, reason in row_faults]
            for line, reason in sorted(faults):
                reject(line, reason)
            yield block.batch(schema, without=(row for row, _ in row_faults))
        for line, reason in numbers.advance(0)[1]:
            reject(line, reason)

    def _convert(self, batch: Any, schema: Schema, *, check_utf8: bool) -> tuple[Block, list[tuple[int, str]]]:
        """Convert a batch to the types of `schema`; return it with the fault of each bad row."""
        faults = list(_utf8_faults(batch)) if check_utf8 else []
        columns, labels = {}, None
        if self.label is not None:
            labels, label_faults = parse_labels(batch.column(self.label), self.label_values)
            faults += label_faults
        for name, kind in schema.items():
            columns[name], column_faults = _convert(name, batch.column(name), kind)
            faults += column_faults
        return Block(labels, columns), first_per_row(faults)

    def _sample(self, head: bytes) -> Any:
        """Parse the complete records in `head` as a table of text."""
        if len(head) == _HEAD_BYTES:  # its last record is cut off
            head = head[: head.rfind(b"\n") + 1] or head
        pa, data = require("pyarrow"), _marked(head.decode("utf-8", "surrogateescape"))
        names = self._open(pa.BufferReader(data), [], _skip, len(data) + 1).schema.names
        self._check_names(names, is_utf8=data == head)
        return self._open(pa.BufferReader(data), names, _skip, len(data) + 1).read_all()

    def _check_names(self, names: Sequence[str], *, is_utf8: bool) -> None:
        check_distinct(self.name, names)
        for name in names:
            found = shown(name.replace(_NOT_UTF8, "\ufffd"))
            if "\0" in name:
                raise ValueError(f"{self.name}: a NUL byte in the header, column {found}: is it text, and in UTF-8?")
            if not is_utf8 and _NOT_UTF8 in name:
                convert = "convert the file, for example with  iconv -f WINDOWS-1252 -t UTF-8"
                raise ValueError(f"{self.name}: not UTF-8 in the header, column {found}: {convert}")

    def _open(self, source: Any, names: Sequence[str], on_ragged: Callable[[Any], str], block_bytes: int) -> Any:
        """Open Arrow's streaming reader, with the columns `names` as text and the empty string as null."""
        pa, csv = require("pyarrow"), require("pyarrow.csv")
        return csv.open_csv(
            source,
            read_options=csv.ReadOptions(use_threads=False, block_size=block_bytes),
            parse_options=csv.ParseOptions(
                delimiter=self._delimiter,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=on_ragged,
            ),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )


def _utf8_faults(batch: Any) -> Iterator[tuple[int, str]]:
    for name in batch.schema.names:
        damaged = require("pyarrow.compute").match_substring(batch.column(name), _NOT_UTF8).fill_null(False)
        for row in np.flatnonzero(damaged.to_numpy(zero_copy_only=False)):
            yield int(row), f"not UTF-8 in column {name}"


def _marked(text: str) -> bytes:
    """Encode text that was decoded with "surrogateescape", replacing every byte that was not UTF-8 by `_NOT_UTF8`."""
    return re.sub("[\udc80-\udcff]", _NOT_UTF8, text).encode()


def _skip(row: Any) -> str:
    return "skip"


class _Utf8Guard:
    """A stream that replaces every byte that is not UTF-8 by `_NOT_UTF8`, so that the rest can be parsed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._reading = threading.Lock()
        self._stopped = False
        self.damaged = False

    @property
    def closed(self) -> bool:
        """Whether the underlying stream is closed."""
        return self._stream.closed

    def readable(self) -> bool:
        """Return True, as PyArrow requires."""
        return True

    def stop(self) -> None:
        """End the stream after the current read in Arrow's thread."""
        with self._reading:
            self._stopped = True

    def read(self, size: int) -> bytes:
        """Return about `size` bytes; b"" at the end."""
        with self._reading:
            return b"" if self._stopped else self._read(size)

    def _read(self, size: int) -> bytes:
        text = ""
        while not text:
            data = self._stream.read(size)
            if data.isascii() and data and not self._decoder.getstate()[0]:
                return data
            text = self._decoder.decode(data, final=not data)
            if not data:
                break
        try:
            return text.encode()
        except UnicodeEncodeError:
            self.damaged = True
            return _marked(text)


class _RecordNumbers:
    """Tracks the record number of each row in a batch, because Arrow delivers well-shaped rows without a number."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._next = 2  # the header is record 1
        self._ragged: list[tuple[int, int]] = []  # (record, columns), ascending, not yet passed

    def on_ragged(self, row: Any) -> str:
        """Handle an invalid row for Arrow. An exception here would be lost, so the method only records the row."""
        self._ragged.append((row.number, row.actual_columns))
        return "skip"

    def advance(self, num_rows: int) -> tuple[npt.NDArray[np.int64], list[tuple[int, str]]]:
        """Return the record numbers of the next `num_rows` well-shaped rows, and the ragged rows up to the next one."""
        ragged = np.array([record for record, _ in self._ragged], np.int64)
        shaped_before = ragged - self._next - np.arange(len(ragged))
        passed = int(np.searchsorted(shaped_before, num_rows, side="right"))
        records = np.arange(self._next, self._next + num_rows + passed)
        faults = [(record, f"expected {self._expected} columns, found {n}") for record, n in self._ragged[:passed]]
        self._next += num_rows + passed
        del self._ragged[:passed]
        return np.setdiff1d(records, ragged[:passed], assume_unique=True), faults


def _delimiter(head: bytes) -> str:
    """Return the most frequent of comma, tab, semicolon and bar in the header, outside quoted names."""
    header = re.sub(rb'"[^"]*"', b"", head.split(b"\n", 1)[0])
    return max(",\t;|", key=lambda mark: header.count(mark.encode()))


def _infer_kind(column: Any, file_bytes: int | None) -> Kind | None:
    """Infer the narrowest kind that fits all values of a text column; None if it has no values."""
    if not all(_may_be_number(text) for text in column[:_FIRST_LOOK].to_pylist()):
        return "string"
    integers = _numbers(column, "integer")
    if integers is not None and integers.null_count == len(integers):
        return None
    if integers is not None:
        return "count" if looks_like_count(integers, file_bytes) else "integer"
    return "string" if _numbers(column, "float") is None else "float"


def _may_be_number(text: str | None) -> bool:
    return text is None or is_missing(text) or text.strip()[-1:] in _NUMBER_ENDS


def _convert(name: str, column: Any, kind: Kind) -> tuple[Any, list[tuple[int, str]]]:
    """Convert a text column to `kind`, with null for values that do not fit; return it and the faults of those rows."""
    if kind == "string":
        return column, []
    numbers = _numbers(column, kind)
    if numbers is not None:
        return numbers, []
    type_ = _type(kind)
    what = "a number" if kind == "float" else "an integer of 64 bits"
    good, faults = [], []
    for row, value in enumerate(column.to_pylist()):
        is_given = value is not None and not is_missing(value)
        fits = not is_given or _fits(value.strip(), type_)
        good.append(value.strip() if is_given and fits else None)
        if not fits:
            faults.append((row, f"{name} must be {what}, found {shown(value)}"))
    return require("pyarrow").array(good, require("pyarrow").string()).cast(type_), faults


def _numbers(column: Any, kind: Kind) -> Any:
    """Convert a text column to numbers, with null for missing values; None if another value is not a number."""
    numbers = _cast(column, kind)
    return _cast(_without_missing(column), kind) if numbers is None else numbers


def _without_missing(column: Any) -> Any:
    pa, pc = require("pyarrow"), require("pyarrow.compute")
    codes = column.dictionary_encode()
    texts = codes.dictionary.to_pylist()
    given = pa.array([None if is_missing(text) else text.strip() for text in texts], pa.string())
    return pc.take(given, codes.indices)


def _cast(column: Any, kind: Kind) -> Any:
    """Convert a text column to numbers; None if a value is not a number."""
    if _may_be_hexadecimal(column):
        return None  # Arrow would read 0x10 as 16
    try:
        return column.cast(_type(kind))
    except require("pyarrow").ArrowInvalid:
        return None


def _may_be_hexadecimal(column: Any) -> bool:
    _, offsets, data = column.buffers()
    if data is None or not len(column):
        return False
    ends = np.frombuffer(offsets, np.int32)[[column.offset, column.offset + len(column)]]
    text = data[int(ends[0]) : int(ends[1])].to_pybytes()
    return b"x" in text or b"X" in text


def _type(kind: Kind) -> Any:
    pa = require("pyarrow")
    return pa.float64() if kind == "float" else pa.int64()


def _fits(value: str, type_: Any) -> bool:
    pa = require("pyarrow")
    try:
        pa.scalar(value).cast(type_)
    except pa.ArrowInvalid:
        return False
    return "x" not in value.lower()
