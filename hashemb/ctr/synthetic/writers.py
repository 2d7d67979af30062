"""Write files of impressions, as Parquet or tab-separated text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hashemb._packages import require
from hashemb.ctr.data import CRITEO_SCHEMA

__all__ = ["SUFFIXES", "open_writer"]

Write = Callable[[dict[str, Any]], None]

_TSV_CODECS = {".tsv": None, ".tsv.gz": "gzip", ".tsv.zst": "zstd"}
SUFFIXES = (".parquet", *_TSV_CODECS)


@contextmanager
def open_writer(path: Path, name: str) -> Iterator[Write]:
    """Provide a function that appends columns to the file `path`, in the format given by the suffix of `name`."""
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"{name}: the suffix must be one of {', '.join(SUFFIXES)}")
    with (_parquet(path) if suffix == ".parquet" else _tsv(path, _TSV_CODECS[suffix])) as write:
        yield write


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    pa, parquet = require("pyarrow"), require("pyarrow.parquet")
    fields = [("label", pa.int8())]
    for name, kind in CRITEO_SCHEMA.items():
        fields.append((name, pa.int32() if kind == "count" else pa.dictionary(pa.int32(), pa.string())))
    schema = pa.schema(fields)
    with parquet.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
        yield lambda columns: writer.write_table(pa.table(columns, schema))


@contextmanager
def _tsv(path: Path, codec: str | None) -> Iterator[Write]:
    pa, csv = require("pyarrow"), require("pyarrow.csv")
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")

    def write(columns: dict[str, Any]) -> None:
        plain = {
            name: column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
            for name, column in columns.items()
        }
        csv.write_csv(pa.table(plain), stream, options)

    file = pa.OSFile(str(path), "wb")
    with file, file if codec is None else pa.CompressedOutputStream(file, codec) as stream:
        yield write
