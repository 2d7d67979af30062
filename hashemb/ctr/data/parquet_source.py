"""Parquet files; the types of the columns determine the kinds of the fields."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np

from hashemb._packages import require
from hashemb.ctr.data.batches import Batch
from hashemb.ctr.data.columns import Fault, Options
from hashemb.ctr.data.fields import Kind
from hashemb.ctr.data.kinds import looks_like_count
from hashemb.ctr.data.labels import find_label, first_label_values, parse_labels
from hashemb.ctr.data.readahead import read_ahead
from hashemb.ctr.data.source import Block, Reject, check_distinct, infer_schema

__all__ = ["ParquetSource"]

_SNIFF_ROWS = 1 << 14
_BATCH_ROWS, _BATCH_VALUES = 1 << 15, 1 << 21  # upper limits of a batch; PyArrow is fastest with long ones
_PROBE_BYTES = 1 << 14  # read size for probing each column
_SMALL_DICTIONARY_BYTES = 1 << 17


class ParquetSource:
    """A Parquet file. Booleans are read as integers 0 and 1."""

    format = "parquet"

    def __init__(self, path: str, options: Options) -> None:
        self.name = path
        parquet = require("pyarrow.parquet")
        with parquet.ParquetFile(path, buffer_size=_PROBE_BYTES) as file:
            names = _small_dictionaries(file)
        # Pre-buffering would keep every row group that has been read until the file is closed.
        self._file = parquet.ParquetFile(path, read_dictionary=names, pre_buffer=False)
        check_distinct(path, self._file.schema_arrow.names)
        self._size = os.path.getsize(path)
        self._rows_read = 0
        types = {field.name: field.type for field in self._file.schema_arrow}
        self.label = find_label(path, list(types), self._first_values, options.label, options.schema or {})
        first_labels = None if self.label is None or options.schema else self._first_values(self.label)
        self.label_values = first_label_values(path, self.label, first_labels, options)
        if options.schema is not None:
            types = {name: type_ for name, type_ in types.items() if name in options.schema}
        kinds = {name: _kind(path, name, type_) for name, type_ in types.items() if name != self.label}
        if options.schema is None:
            kinds |= {name: "count" for name, kind in kinds.items() if kind == "integer" and self._is_count(name)}
        self.schema = infer_schema(path, kinds, self.label, options, text=False)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far, estimated from the share of its rows."""
        return self._size * self._rows_read // max(int(self._file.metadata.num_rows), 1)

    def accepts(self, field: str, kind: Kind) -> bool:
        """Return whether the column `field` can be read as `kind`: integers can be ids or counts."""
        own = self.schema[field]
        return kind == own or {kind, own} == {"integer", "count"}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def batches(self, schema: dict[str, Kind], reject: Reject) -> Iterator[Batch]:
        """Yield the good rows in order, reduced to the fields of `schema`; pass the others to `reject`.

        A separate thread decodes the next rows while the previous ones are hashed.
        """
        wanted = [*schema, *([] if self.label is None else [self.label])]
        with closing(read_ahead(self._record_batches(wanted))) as decoded:
            for batch in decoded:
                yield self._batch(batch, schema, reject)

    def _batch(self, batch: Any, schema: dict[str, Kind], reject: Reject) -> Batch:
        labels, faults = None, list[Fault]()
        if self.label is not None:
            labels, faults = parse_labels(batch.column(self.label), self.label_values)
        for row, reason in faults:
            reject(self._rows_read + 1 + row, reason)
        self._rows_read += batch.num_rows
        columns = {name: _canonical(batch.column(name)) for name in schema}
        return Block(labels, columns).batch(schema, without=(row for row, _ in faults))

    def _record_batches(self, columns: list[str]) -> Iterator[Any]:
        rows = min(_BATCH_ROWS, max(1, _BATCH_VALUES // len(columns)))
        yield from self._file.iter_batches(rows, columns=columns, use_threads=True)

    def _is_count(self, column: str) -> bool:
        values = self._first_values(column)
        is_plain = require("pyarrow").types.is_integer(values.type)  # neither a dictionary nor booleans
        return is_plain and looks_like_count(values, self._size)

    def _first_values(self, column: str) -> Any:
        batch = next(self._file.iter_batches(_SNIFF_ROWS, columns=[column]), None)
        return require("pyarrow").nulls(0) if batch is None else batch.column(0)


def _small_dictionaries(file: Any) -> list[str]:
    """Find the text columns whose first row group is dictionary-encoded with a dictionary of moderate size.

    In these columns each value is hashed once per batch. Larger dictionaries would cost more than the text itself.
    """
    if not file.metadata.num_row_groups:
        return []
    # PyArrow aborts the process when asked for a column's damaged metadata; a reader of the column raises instead.
    next(file.iter_batches(1, row_groups=[0], use_threads=False), None)
    chunks = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    return [
        chunk.path_in_schema
        for chunk in chunks
        if chunk.physical_type == "BYTE_ARRAY"
        and chunk.has_dictionary_page
        and 0 < chunk.data_page_offset - chunk.dictionary_page_offset <= _SMALL_DICTIONARY_BYTES
    ]


def _kind(path: str, column: str, type_: Any) -> Kind | None:
    types = require("pyarrow").types
    if types.is_dictionary(type_):
        type_ = type_.value_type
    if types.is_null(type_):
        return None
    if types.is_integer(type_) or types.is_boolean(type_):
        return "integer"
    if types.is_floating(type_):
        return "float"
    if _is_text(type_):
        return "string"
    raise ValueError(
        f"{path}: column {column!r} has the type {type_}; fields are integers, booleans, floats, strings or bytes"
    )


def _is_text(type_: Any) -> bool:
    return str(type_).removeprefix("large_").partition("[")[0] in (
        "string", "string_view", "binary", "binary_view", "fixed_size_binary"
    )  # fmt: skip


def _canonical(column: Any) -> Any:
    """Convert the column to a type that `fields.encode` accepts, with null for the empty string."""
    pa, pc = require("pyarrow"), require("pyarrow.compute")
    type_ = column.type
    if pa.types.is_dictionary(type_):
        values = column.dictionary
        if not values.null_count and _canonical(values) is values:
            return column
        return _canonical(column.dictionary_decode())
    if pa.types.is_boolean(type_):
        return column.cast(pa.int64())
    if pa.types.is_null(type_):
        return pa.nulls(len(column), pa.string())
    if not _is_text(type_):
        return column
    if not str(type_).startswith(("string", "binary", "large_")) or "view" in str(type_):
        column = column.cast(pa.large_string() if "string" in str(type_) else pa.large_binary())
    if not _has_empty(column):
        return column
    return pc.if_else(pc.equal(pc.binary_length(column), 0), pa.scalar(None, column.type), column)


def _has_empty(column: Any) -> bool:
    """Return whether any non-null value is empty. For 32,768 values NumPy takes a sixth of PyArrow's time."""
    if not len(column):
        return False
    validity, offsets, _ = column.buffers()
    rows = slice(column.offset, column.offset + len(column))
    ends = np.frombuffer(offsets, np.int64 if str(column.type).startswith("large_") else np.int32)
    empty = ends[rows] == ends[rows.start + 1 : rows.stop + 1]
    if column.null_count:
        empty &= np.unpackbits(np.frombuffer(validity, np.uint8), count=rows.stop, bitorder="little")[rows].view(bool)
    return bool(empty.any())
