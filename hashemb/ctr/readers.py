"""Files of impressions -> batches of labels and hashed keys, streaming, in bounded memory.

Every format goes the same way: a `Source` gives blocks of good rows as Arrow columns, `fields.encode` hashes
them, and the batches run on across blocks and files. What a malformed line looks like is up to the source; it is
never mended, always counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Union, get_args

import numpy as np
import numpy.typing as npt

from hashemb.ctr._criteo import CriteoSource, count_good_lines
from hashemb.ctr._csv import CsvSource
from hashemb.ctr._parquet import ParquetSource
from hashemb.ctr._report import BadLine, ReadReport
from hashemb.ctr._source import Block, Options, Reject, Source
from hashemb.ctr._streams import STDIN, Stream
from hashemb.ctr.fields import Kind, Schema, check_schema, encode

__all__ = ["BadLine", "Batch", "ReadReport", "Reader", "open_reader"]

Format = Literal["auto", "criteo", "csv", "parquet"]
Path = Union[str, "os.PathLike[str]"]

_PARQUET_SUFFIXES = (".parquet", ".pq")
_PARQUET_MAGIC = b"PAR1"
_SNIFF_BYTES = 1 << 16


class Batch(NamedTuple):
    """Consecutive rows of the input.

    Attributes
    ----------
    labels : ndarray of float32, shape (n,), or None
        0 or 1; None when the source has no label column.
    keys : ndarray of uint64, shape (n, num_fields), or (nnz,) with offsets
        C-contiguous; column j belongs to ``reader.field_names[j]`` and is salted by that name.
    offsets : ndarray of int64, shape (n + 1,), or None
        Ragged examples: example i has the keys ``keys[offsets[i]:offsets[i + 1]]``.
    values : ndarray of float32, of the shape of keys, or None
        Feature values; None: all 1.
    fields : ndarray of int32, shape (nnz,), or None
        Ragged examples: field number of each key.
    weights : ndarray of float32, shape (n,), or None
        Importance of the examples; None: all 1.
    """

    labels: npt.NDArray[np.float32] | None
    keys: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.int64] | None = None
    values: npt.NDArray[np.float32] | None = None
    fields: npt.NDArray[np.int32] | None = None
    weights: npt.NDArray[np.float32] | None = None


def open_reader(
    paths: Path | Sequence[Path],
    *,
    format: Format = "auto",
    label: str | None = None,
    numeric: Sequence[str] = (),
    schema: Schema | None = None,
    batch_size: int = 4096,
    strict: bool = False,
    start: int = 0,
) -> Reader:
    """Open files of impressions for reading in batches.

    Parameters
    ----------
    paths : path or sequence of paths
        Read one after another, as one stream; they may differ in format as long as they have the same fields.
        ``"-"`` is standard input (text formats only). Text may be compressed with gzip or zstd.
    format : {"auto", "criteo", "csv", "parquet"}
        ``"criteo"``: tab-separated, no header, label, I1..I13, C1..C26; 39 columns when there is no label.
        ``"csv"``: with a header; comma- or tab-separated. ``"auto"`` goes by suffix for Parquet and CSV, and by
        content for everything else.
    label : str, optional
        Column that holds the label: 0/1, false/true. By default the column named ``label`` or ``click`` (in any
        case), else the first column if its first values are all labels; without any of these, `Batch.labels` is None.
    numeric : sequence of str
        Columns of integers to bucket as counts, as Criteo's are; other integers are hashed as ids.
    schema : mapping of str to {"string", "integer", "count", "float"}, optional
        Fields to read, in this order, and how; other columns are ignored, and the label may be missing. Give the
        `Reader.schema` that a model was trained with to get the same keys from any file. By default: all
        columns but the label, each with the kind that its type (in CSV: its first values) suggests.
    batch_size : int
        Rows in each batch; only the last is shorter.
    strict : bool
        Raise at the first malformed row, instead of counting it in `Reader.report` and going on.
    start : int
        Good rows to skip. The batches are those of a reader that drops them, but they are not hashed.

    Returns
    -------
    Reader

    Raises
    ------
    FileNotFoundError
        A path does not exist. All of them are checked before anything is read.
    ValueError
        The format is not recognised, a column is missing or does not fit the schema; while reading: a file is
        damaged, files disagree on whether there are labels, or (with `strict`) a row is malformed.
    MissingExtraError
        PyArrow is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "clicks.csv")
    >>> _ = path.write_text("click,user,site\\n1,7,a.com\\n0,8,\\nx,9,b.com\\n")
    >>> with open_reader(path, batch_size=10) as reader:
    ...     for batch in reader:
    ...         print(batch.labels, batch.keys.shape, batch.keys.dtype)
    [1. 0.] (2, 2) uint64
    >>> reader.field_names, reader.report.rows_bad, reader.report.bad_lines[0].reason
    (['user', 'site'], 1, "label must be 0 or 1, found 'x'")
    """
    names = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not names:
        raise ValueError("no paths given")
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    if schema is not None and numeric:
        raise ValueError("give numeric= or schema=, not both: a schema says which fields are counts")
    for name in names:
        if name != STDIN:
            os.stat(name)
    options = Options(label, tuple(numeric), None if schema is None else check_schema(schema))
    return Reader(names, format, options, batch_size=batch_size, strict=strict, start=start)


class Reader:
    """Iterator over the batches of one or more files, made by `open_reader`; also a context manager.

    Attributes
    ----------
    report : ReadReport
        Rows good and bad so far, and the first bad ones.
    schema : dict of str to str
        Kind of each field, in the order of the key columns. It can be stored as JSON and given to `open_reader`.
    label : str or None
        Column that the labels of the file last opened come from; None if it has none. Give it to `open_reader`
        together with `schema`, which turns guessing off.
    bytes_total : int or None
        Size of all files as stored; None if one is standard input or a pipe.
    """

    def __init__(
        self, paths: Sequence[str], format: Format, options: Options, *, batch_size: int, strict: bool, start: int
    ) -> None:
        self.report = ReadReport()
        sizes = [size for path in paths if (size := _file_size(path)) is not None]
        self.bytes_total = sum(sizes) if len(sizes) == len(paths) else None
        self._format = format
        self._options = options
        self._strict = strict
        self._bytes_done = 0
        self._source: Source | None = None
        self.label = options.label
        self._has_labels: tuple[str, bool] | None = None
        self._paths = list(paths)
        self.schema: dict[str, Kind] = dict(options.schema or {})
        self._batches = _rebatch(self._parts(start), batch_size)
        try:
            self._open_next()
        except BaseException:
            self.close()
            raise

    @property
    def field_names(self) -> list[str]:
        """Names of the fields, in the order of the key columns; empty if all files are."""
        return list(self.schema)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as stored, taken so far; parsing runs a little ahead of the batches."""
        return self._bytes_done + (self._source.bytes_read if self._source else 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.report.rows_good += len(batch.keys)
        return batch

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open. The reader is at its end afterwards."""
        self._batches = iter(())
        self._paths.clear()
        self._close_source()

    def _close_source(self) -> None:
        if self._source is not None:
            self._bytes_done += self._source.bytes_read
            self._source.close()
            self._source = None

    def _open_next(self) -> None:
        """Open the next file that is not empty, if there is one; the first fixes the schema."""
        while self._paths and self._source is None:
            self._source = _open_source(self._paths.pop(0), self._format, self._options)
        if self._source is None:
            return
        self.label = self._source.label
        if not self.schema:
            self.schema = self._source.schema
            if not self.schema:
                raise ValueError(f"{self._source.name}: no column besides the label {self._source.label!r}")
            self._options = Options(self._options.label or self._source.label, (), self.schema)
        _check_fields(self._source, self.schema)

    def _parts(self, start: int) -> Iterator[Batch]:
        """The rows after the first `start`, hashed, in pieces of any size."""
        while self._source is not None:
            source = self._source
            for block in source.blocks(self.schema, self._rejecter(source.name)):
                self._check_labels(source.name, block)
                skipped = min(start, block.num_rows)
                start -= skipped
                self.report.rows_good += skipped
                if skipped < block.num_rows:
                    keys = encode(block.columns, self.schema)[skipped:]
                    yield Batch(None if block.labels is None else block.labels[skipped:], keys)
            self._close_source()
            self._open_next()

    def _rejecter(self, name: str) -> Reject:
        return lambda line, reason: self.report.reject(BadLine(name, line, reason), strict=self._strict)

    def _check_labels(self, name: str, block: Block) -> None:
        has_labels = block.labels is not None
        if self._has_labels is None:
            self._has_labels = name, has_labels
        first, expected = self._has_labels
        if has_labels != expected:
            with_, without = (name, first) if has_labels else (first, name)
            raise ValueError(f"{with_} has labels and {without} has none")


def _open_source(path: str, format: Format, options: Options) -> Source | None:
    """The source of one path; None if it is empty."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return None
    if format == "parquet" or (format == "auto" and path.lower().endswith(_PARQUET_SUFFIXES)):
        return ParquetSource(path, options)
    stream = Stream(path)
    try:
        head = stream.peek(_SNIFF_BYTES)
        if not head:
            stream.close()
            return None
        if format == "auto" and head.startswith(_PARQUET_MAGIC):
            stream.close()
            return ParquetSource(path, options)
        kind = _sniff(stream.name, head) if format == "auto" else format
        return CriteoSource(stream, options) if kind == "criteo" else CsvSource(stream, options)
    except BaseException:
        stream.close()
        raise


def _file_size(path: str) -> int | None:
    """Bytes of a regular file; None for standard input and pipes, which tell only at their end."""
    if path == STDIN:
        return None
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _sniff(name: str, head: bytes) -> Literal["criteo", "csv"]:
    """The text format of a file that begins with `head`."""
    csv_name = os.path.splitext(name.removesuffix(".gz").removesuffix(".zst"))[1].lower() == ".csv"
    if not csv_name and count_good_lines(head):
        return "criteo"
    header = head.split(b"\n", 1)[0]
    if csv_name or b"," in header or b"\t" in header:
        return "csv"
    raise ValueError(f"{name}: neither Criteo lines nor CSV with a header; say which with format=")


def _check_fields(source: Source, schema: Schema) -> None:
    missing = [field for field in schema if field not in source.schema]
    if missing:
        raise ValueError(
            f"{source.name}: no column {missing[0]!r} ({len(missing)} of {len(schema)} fields are missing); "
            f"it has {', '.join(source.schema)}"
        )
    for field, kind in schema.items():
        if not source.accepts(field, kind):
            raise ValueError(
                f"{source.name}: column {field!r} holds {source.schema[field]} values and can't be read as {kind}"
            )


def _rebatch(parts: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """The same rows in batches of `batch_size`; the last one may be shorter."""
    waiting: list[Batch] = []
    num_waiting = 0
    for part in parts:
        waiting.append(part)
        num_waiting += len(part.keys)
        if num_waiting >= batch_size:
            whole = _join(waiting)
            cut = num_waiting - num_waiting % batch_size
            for first in range(0, cut, batch_size):
                yield _slice(whole, first, first + batch_size)
            waiting, num_waiting = [_slice(whole, cut, num_waiting)], num_waiting - cut
    if num_waiting:
        yield _join(waiting)


def _join(batches: list[Batch]) -> Batch:
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(np.concatenate(labels) if labels else None, np.concatenate([batch.keys for batch in batches]))


def _slice(batch: Batch, first: int, last: int) -> Batch:
    return Batch(None if batch.labels is None else batch.labels[first:last], batch.keys[first:last])
