"""Read files of impressions as batches of labels and hashed keys, streaming, in bounded memory.

All formats share one path: a `Source` yields its good rows, hashed, in pieces of any size, and batches are cut
across pieces and files. Each source decides which of its lines are malformed; such a line is never repaired and
always counted.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import Union, get_args

from hashemb.ctr.data.batches import Batch, rebatch
from hashemb.ctr.data.columns import LabelValues, Options
from hashemb.ctr.data.damage import naming_the_file
from hashemb.ctr.data.fields import Kind, Schema, check_schema
from hashemb.ctr.data.formats import Format, open_source_of
from hashemb.ctr.data.read_report import BadLine, ReadReport
from hashemb.ctr.data.source import Reject, Source
from hashemb.ctr.data.streams import STDIN, file_size

__all__ = ["BadLine", "Batch", "Format", "ReadReport", "Reader", "open_reader"]

Path = Union[str, "os.PathLike[str]"]

_KEPT_BYTES = 1 << 26  # of the parsed examples that `look_ahead` keeps


def open_reader(
    paths: Path | Sequence[Path],
    *,
    format: Format = "auto",
    label: str | None = None,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    schema: Schema | None = None,
    positive: str | None = None,
    label_values: Sequence[str] | None = None,
    batch_size: int = 4096,
    strict: bool = False,
    start: int = 0,
) -> Reader:
    r"""Open files of impressions for reading in batches.

    Parameters
    ----------
    paths : path or sequence of paths
        Files to read one after another, as one stream; they may differ in format as long as they have the same
        fields. ``"-"`` is standard input (text formats only). Text may be compressed with gzip, zstd or bzip2.
    format : {"auto", "criteo", "csv", "parquet", "libsvm", "libffm", "vw"}
        ``"criteo"``: tab-separated, no header, label, I1..I13, C1..C26; 39 columns when there is no label.
        ``"csv"``: with a header; separated by commas, tabs, semicolons or bars. ``"vw"``: Vowpal Wabbit's text. The
        last three give ragged batches. ``"auto"`` infers the format from a known suffix, else from the content.
    label : str, optional
        Column that holds the label. By default the column named ``label`` or ``click`` (in any case), else the first
        column if its first values are all 0/1 or false/true; without any of these, `Batch.labels` is None.
    numeric, categorical : sequence of str
        Integer columns to bucketize as counts, as in Criteo's data, and columns to read as ids. The kind of other
        integer columns is inferred from their first values (see docs/reference/data-files.md); most are ids.
    schema : mapping of str to {"string", "integer", "count", "float"}, optional
        Fields to read, in this order, and their kinds; other columns are ignored, and the label may be missing. Pass
        the `Reader.schema` that a model was trained with to get the same keys from any file. By default all
        columns except the label are read, each with the kind inferred from its type (in CSV, from its first values).
        In libffm and vw the schema numbers the fields, and new fields are added to it as they appear.
    positive : str, optional
        The label value that means 1. By default 1 if the values are 0 and 1, else the one that sorts second.
    label_values : sequence of two str, optional
        The label values that mean 0 and 1: the `Reader.label_values` that a model was trained with.
    batch_size : int
        Rows in each batch; only the last batch may be shorter.
    strict : bool
        Raise at the first malformed row instead of counting it in `Reader.report` and skipping it.
    start : int
        Number of good rows to skip. The batches are cut as if the files began after these rows.

    Returns
    -------
    Reader

    Raises
    ------
    FileNotFoundError
        A path does not exist. All paths are checked before anything is read.
    ValueError
        The format is not recognised, a column is missing or does not fit the schema, or the label has more than two
        values. While reading: a file is damaged, files differ in whether they have labels or in the form of their
        batches, or (with `strict`) a row is malformed.
    MissingExtraError
        PyArrow is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "clicks.csv")
    >>> _ = path.write_text("click,user,site\n1,7,a.com\n0,8,\nx,9,b.com\n")
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
    if schema is not None and (numeric or categorical):
        option = "numeric" if numeric else "categorical"
        raise ValueError(f"give {option}= or schema=, not both: a schema specifies which fields are counts")
    both = sorted(set(numeric) & set(categorical))
    if both:
        raise ValueError(f"{both[0]!r} is named as numeric and as categorical")
    for name in names:
        if name != STDIN:
            os.stat(name)
    options = Options(
        label=label,
        numeric=tuple(numeric),
        categorical=tuple(categorical),
        schema=None if schema is None else check_schema(schema),
        label_values=None if label_values is None else _two(label_values),
        positive=positive,
    )
    return Reader(names, format, options, batch_size=batch_size, strict=strict, start=start)


def _two(values: Sequence[str]) -> LabelValues:
    if isinstance(values, str) or len(values) != 2 or values[0] == values[1]:
        raise ValueError(f"label_values must be two different values, got {values!r}")
    return str(values[0]), str(values[1])


class Reader:
    """Iterator over the batches of one or more files, returned by `open_reader`; also a context manager.

    Attributes
    ----------
    report : ReadReport
        Number of good and bad rows so far, and the first bad rows.
    schema : dict of str to str
        Kind of each field, in the order of the key columns. It can be stored as JSON and passed to `open_reader`.
        Where batches have `Batch.fields`, it grows when a field appears for the first time.
    format : str
        Format of the file last opened; "" if all files are empty.
    label : str or None
        Label column of the file last opened; None if it has no label. Pass it to `open_reader` together with
        `schema`, so that nothing is inferred.
    label_values : tuple of two str, or None
        The values of that column that mean 0 and 1; None: 0 and 1 (and -1 in the ragged formats).
    batch_size : int
        Rows in each batch; it may be changed before the first one.
    bytes_total : int or None
        Total size of the files as stored; None if one is standard input or a pipe.
    """

    def __init__(
        self, paths: Sequence[str], format: Format, options: Options, *, batch_size: int, strict: bool, start: int
    ) -> None:
        self.report = ReadReport()
        sizes = [size for path in paths if (size := file_size(path)) is not None]
        self.bytes_total = sum(sizes) if len(sizes) == len(paths) else None
        self.format = ""
        self._wanted_format = format
        self._options = options
        self._strict = strict
        self._bytes_done = 0
        self._source: Source | None = None
        self.label = options.label
        self.label_values = options.label_values
        self._first: tuple[str, Batch] | None = None
        self._all_paths, self._paths = list(paths), list(paths)
        self.schema: dict[str, Kind] = dict(options.schema or {})
        self.batch_size = batch_size
        self._parsing = self._parts(start)
        self._pieces: Iterator[Batch] = self._parsing
        self._batches: Iterator[Batch] | None = None
        try:
            self._open_next()
        except BaseException:
            self.close()
            raise

    @property
    def field_names(self) -> list[str]:
        """Names of the fields, in the order of the key columns; empty if all files are empty."""
        return list(self.schema)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files, as stored, read so far; parsing runs slightly ahead of the batches."""
        return self._bytes_done + (self._source.bytes_read if self._source else 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = rebatch(self._pieces, self.batch_size)
        batch = next(self._batches)
        self.report.rows_good += batch.num_examples
        return batch

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def look_ahead(self, most: int) -> int | None:
        """Count the good rows before the first batch is read; return None if there are more than `most`.

        The rows parsed here are kept for the batches. The files, which must not be streams, are opened again only if
        their rows take more than 64 MiB, or if one of them is malformed and `strict` is to find it in its turn.
        """
        strict, self._strict = self._strict, False
        try:
            kept, count, is_all_kept = self._keep(most)
        finally:
            self._strict = strict
        if is_all_kept and not (strict and self.report.rows_bad):
            self._pieces = chain(kept, self._pieces)
        else:
            self._start_again()
        return None if count > most else count

    def _keep(self, most: int) -> tuple[list[Batch], int, bool]:
        """Parse more than `most` rows, or all; return them, their number, and whether there was memory for them."""
        kept: list[Batch] = []
        count = num_bytes = 0
        for piece in self._pieces:
            count += piece.num_examples
            num_bytes += piece.num_bytes
            if num_bytes <= _KEPT_BYTES:
                kept.append(piece)
            if count > most:
                break
        return kept, count, num_bytes <= _KEPT_BYTES

    def _start_again(self) -> None:
        """Open the files again at their beginning; the schema and the labels stay as they have been settled."""
        self._close_source()
        self.report, self._bytes_done, self._paths = ReadReport(), 0, list(self._all_paths)
        self._open_next()
        self._pieces = self._parsing = self._parts(0)

    def close(self) -> None:
        """Close the open file. The reader is exhausted afterwards."""
        self._batches = self._pieces = iter(())
        self._paths.clear()
        self._parsing.close()  # waits for Arrow's thread, which must not be in a read when Python exits
        self._close_source()

    def _close_source(self) -> None:
        if self._source is not None:
            self._bytes_done += self._source.bytes_read
            self._source.close()
            self._source = None

    def _open_next(self) -> None:
        """Open the next non-empty file, if there is one; the first one fixes the schema."""
        while self._paths and self._source is None:
            self._source = open_source_of(self._paths.pop(0), self._wanted_format, self._options)
        if self._source is None:
            return
        self.label, self.format = self._source.label, self._source.format
        if self._options.schema is None:
            self.schema, self.label_values = self._source.schema, self._source.label_values
            if not self.schema:
                raise ValueError(f"{self._source.name}: no column besides the label {self._source.label!r}")
            label = self._options.label or self._source.label
            self._options = Options(label=label, schema=self.schema, label_values=self.label_values)
        _check_fields(self._source, self.schema)

    def _parts(self, start: int) -> Generator[Batch, None, None]:
        """Yield the examples after the first `start`, in pieces of any size."""
        while self._source is not None:
            source = self._source
            for part in self._read(source):
                if not part.num_examples:
                    continue
                self._check_form(source.name, part)
                skipped = min(start, part.num_examples)
                start -= skipped
                self.report.rows_good += skipped
                if skipped < part.num_examples:
                    yield part.examples(skipped, part.num_examples) if skipped else part
            self._close_source()
            self._open_next()

    def _read(self, source: Source) -> Iterator[Batch]:
        with naming_the_file(source.name, source.format):
            yield from source.batches(self.schema, self._rejecter(source.name))

    def _rejecter(self, name: str) -> Reject:
        return lambda line, reason: self.report.reject(BadLine(name, line, reason), strict=self._strict)

    def _check_form(self, name: str, part: Batch) -> None:
        """Check that `part` has the same arrays as the first one, so that they can be joined."""
        self._first = self._first or (name, part)
        first_name, first = self._first
        for what, of_first, of_part in (
            ("labels", first.labels, part.labels),
            ("examples of any number of features", first.offsets, part.offsets),
            ("fields of its features", first.fields, part.fields),
            ("importances", first.weights, part.weights),
        ):
            if (of_first is None) != (of_part is None):
                with_, without = (first_name, name) if of_part is None else (name, first_name)
                raise ValueError(f"{with_} has {what} and {without} has none")


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
