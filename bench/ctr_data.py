"""The same impressions in the format of each tool: Criteo's text, Parquet, and Vowpal Wabbit's text.

Vowpal Wabbit's text has one namespace per field, named by one letter, as its options for namespace pairs require.
Counts are put into the same buckets as by our reader, and missing values are left out, as is usual in that format.
"""

from __future__ import annotations

import gzip
import itertools
import os
import pathlib
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashemb.ctr.data import CRITEO_LABEL, CRITEO_SCHEMA, bucketize_counts
from hashemb.ctr.synthetic import ImpressionStream, truth_path

NAMESPACES = string.ascii_letters[: len(CRITEO_SCHEMA)]
_BLOCK_ROWS = 1 << 17


@dataclass(frozen=True)
class Rows:
    """The first `count` rows of a dataset, in every format."""

    directory: pathlib.Path
    count: int

    @property
    def text(self) -> pathlib.Path:
        """Path of the rows in Criteo's format."""
        return self.directory / f"{self.count}.tsv"

    @property
    def parquet(self) -> pathlib.Path:
        return self.directory / f"{self.count}.parquet"

    @property
    def vw(self) -> pathlib.Path:
        return self.directory / f"{self.count}.vw"

    def labels(self) -> np.ndarray:
        """Return the labels, float32 of shape (count,)."""
        with self.text.open("rb") as file:
            return np.array([line[:1] == b"1" for line in file], np.float32)

    def head(self, count: int) -> Rows:
        """Return the first `count` of these rows, writing them unless they exist."""
        part = Rows(self.directory, count)
        if not part.vw.exists():
            for source, target in ((self.text, part.text), (self.vw, part.vw)):
                with source.open("rb") as file, target.open("wb") as out:
                    out.writelines(itertools.islice(file, count))
            write_parquet(part)
        return part


def generate(directory: str | os.PathLike[str], count: int, seed: int = 0) -> Rows:
    """Write `count` impressions of the generated stream."""
    rows = Rows(pathlib.Path(directory), count)
    ImpressionStream(seed=seed).write(rows.text, 0, count)
    write_parquet(rows)
    write_vw(rows)
    return rows


def best_logloss(rows: Rows) -> float:
    """Return the log loss of the true probabilities on the rows' labels: the lowest loss that can be expected."""
    labels, truth = rows.labels(), np.load(truth_path(rows.text)).astype(np.float64)
    return float(-np.mean(np.where(labels == 1.0, np.log(truth), np.log1p(-truth))))


def criteo_head(directory: str | os.PathLike[str]) -> Rows | None:
    """Return the first 10,000 rows of Criteo's file, if they are in `$HASHEMB_DATA` (or ../shared/data)."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    source = pathlib.Path(os.environ.get("HASHEMB_DATA", beside)) / "criteo" / "head10000.tsv.gz"
    if not source.exists():
        return None
    rows = Rows(pathlib.Path(directory), 10_000)
    rows.directory.mkdir(exist_ok=True)
    with gzip.open(source, "rb") as file, rows.text.open("wb") as out:
        shutil.copyfileobj(file, out)
    write_parquet(rows)
    write_vw(rows)
    return rows


def write_parquet(rows: Rows) -> None:
    """Write the columns label, I1 … I13 as int32 and C1 … C26 as text, as programs without Arrow do; zstd.

    Each row group has a dictionary of its own rows only: from Arrow dictionaries, the writer would store the dictionary
    of the whole file in each row group.
    """
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    for table in tables(rows):
        plain = [pa.string() if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
        table = table.cast(pa.schema(zip(table.column_names, plain, strict=True)))
        writer = writer or parquet.ParquetWriter(
            rows.parquet, table.schema, compression="zstd", compression_level=1, store_schema=False
        )
        writer.write_table(table)
    assert writer is not None
    writer.close()


def tables(rows: Rows) -> Iterator[Any]:
    """Read the text as Arrow tables of `_BLOCK_ROWS` rows."""
    import pyarrow as pa
    from pyarrow import csv

    dictionary = pa.dictionary(pa.int32(), pa.string())
    types = {name: pa.int32() if kind == "count" else dictionary for name, kind in CRITEO_SCHEMA.items()}
    reader = csv.read_csv(
        rows.text,
        read_options=csv.ReadOptions(column_names=[CRITEO_LABEL, *CRITEO_SCHEMA]),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(
            column_types={CRITEO_LABEL: pa.int8(), **types}, strings_can_be_null=True, null_values=[""]
        ),
    )
    reader = reader.unify_dictionaries()
    for start in range(0, reader.num_rows, _BLOCK_ROWS):
        yield reader.slice(start, _BLOCK_ROWS)


def write_vw(rows: Rows) -> None:
    """Write a line ``1 |a 4 |b 0 … |n 68fd1e64``, or ``-1 …``, for each row."""
    import pyarrow.compute as pc

    with rows.vw.open("wb") as out:
        for table in tables(rows):
            labels = pc.if_else(pc.equal(table[CRITEO_LABEL], 1), "1", "-1")
            letters = zip(CRITEO_SCHEMA, NAMESPACES, strict=True)
            tokens = [token_column(table[name], name, letter) for name, letter in letters]
            lines = pc.binary_join_element_wise(labels, *tokens, " ", null_handling="skip")
            out.write("\n".join(lines.to_pylist()).encode() + b"\n")


def token_column(column: Any, name: str, letter: str) -> Any:
    """Format each value as ``|a 4``; null where it is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if CRITEO_SCHEMA[name] == "count":
        numbers = bucketize_counts(pc.fill_null(column, 0).to_numpy())
        column = pa.chunked_array([pa.array(numbers, mask=pc.is_null(column).to_numpy())])
    return pc.binary_join_element_wise(f"|{letter}", column.cast(pa.string()), " ")
