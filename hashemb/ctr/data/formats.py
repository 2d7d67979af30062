"""Formats of files: each one's name, how it is recognised, and the source that reads it."""

from __future__ import annotations

import codecs
import os
from typing import Literal, cast, get_args

from hashemb.ctr.data.columns import Options
from hashemb.ctr.data.criteo_source import CriteoSource, count_good_lines
from hashemb.ctr.data.csv_source import CsvSource
from hashemb.ctr.data.damage import naming_the_file
from hashemb.ctr.data.parquet_source import ParquetSource
from hashemb.ctr.data.source import Source
from hashemb.ctr.data.sparse_source import ExampleFormat, ExampleSource, recognise
from hashemb.ctr.data.streams import Stream, without_compression_suffix

__all__ = ["Format", "open_source_of"]

Format = Literal["auto", "criteo", "csv", "parquet", "libsvm", "libffm", "vw"]

_PARQUET_SUFFIXES = (".parquet", ".pq")
_PARQUET_MAGIC = b"PAR1"
_SUFFIXES: dict[str, Format] = {
    ".csv": "csv", ".libsvm": "libsvm", ".svm": "libsvm", ".svmlight": "libsvm", ".libffm": "libffm", ".ffm": "libffm",
    ".vw": "vw",
}  # fmt: skip
_SNIFF_BYTES = 1 << 16
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_source_of(path: str, format: Format, options: Options) -> Source | None:
    """Open the source of one path; return None if the file is empty."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return None
    if format == "parquet" or (format == "auto" and path.lower().endswith(_PARQUET_SUFFIXES)):
        return _parquet_source(path, options)
    stream = Stream(path)
    try:
        head = stream.peek(_SNIFF_BYTES)
        if not head:
            stream.close()
            return None
        if format == "auto" and head.startswith(_PARQUET_MAGIC):
            stream.close()
            return _parquet_source(path, options)
        _check_encoding(stream.name, head)
        kind = _sniff(stream.name, head) if format == "auto" else format
        with naming_the_file(stream.name, kind):
            return _text_source(stream, kind, options)
    except BaseException:
        stream.close()
        raise


def _parquet_source(path: str, options: Options) -> Source:
    with naming_the_file(path, "parquet"):
        return ParquetSource(path, options)


def _check_encoding(name: str, head: bytes) -> None:
    if head.startswith(_UTF16_MARKS):
        raise ValueError(f"{name}: the text is UTF-16: convert it to UTF-8, for example with  iconv -f UTF-16 -t UTF-8")


def _text_source(stream: Stream, format: Format, options: Options) -> Source:
    if format == "criteo":
        return CriteoSource(stream, options)
    if format in get_args(ExampleFormat):
        return ExampleSource(stream, cast(ExampleFormat, format), options)
    return CsvSource(stream, options)


def _sniff(name: str, head: bytes) -> Format:
    """Infer the text format of a file that begins with `head`."""
    named = _SUFFIXES.get(os.path.splitext(without_compression_suffix(name))[1].lower())
    if named is not None:
        return named
    if count_good_lines(head):
        return "criteo"
    examples = recognise(head)
    if examples is not None:
        return examples
    header = head.split(b"\n", 1)[0]
    if any(mark in header for mark in (b",", b"\t", b";", b"|")):
        return "csv"
    raise ValueError(
        f"{name}: neither Criteo lines nor CSV with a header, nor libsvm, libffm or Vowpal Wabbit text; "
        "specify the format with format="
    )
