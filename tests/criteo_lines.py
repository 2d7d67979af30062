"""Helpers for tests of Criteo's format: make, write and read lines, and hash them by the documented rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb.ctr.data import CRITEO_SCHEMA, Batch, Reader, open_reader

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]


def criteo_rows(num_rows: int, seed: int = 0) -> list[list[str]]:
    """Make rows of Criteo's shape, with some integers negative or huge and some values missing."""
    rng = np.random.default_rng(seed)
    counts = np.floor(np.exp(rng.normal(2, 2, (num_rows, 13)))).astype(int) - 2
    ids = rng.integers(0, 2**32, (num_rows, 26)) >> rng.integers(0, 28, 26)
    missing = rng.random((num_rows, 39)) < 0.2
    rows = []
    for label, ints, cats, gone in zip(rng.integers(0, 2, num_rows), counts, ids, missing, strict=True):
        values = [str(x) for x in ints] + [f"{x:08x}" for x in cats]
        rows.append([str(label), *("" if g else v for v, g in zip(values, gone, strict=True))])
    return rows


def tsv(rows: Iterable[Sequence[str]]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def expected_keys(rows: Sequence[Sequence[str]]) -> npt.NDArray[np.uint64]:
    """Compute the keys by the documented rule, one value at a time, with the public hash only."""
    out = np.empty((len(rows), 39), np.uint64)
    for i, row in enumerate(rows):
        for j, (name, text) in enumerate(zip(CRITEO_SCHEMA, row[1:], strict=True)):
            value: Any = text or None
            if value is not None and name in INTEGERS:
                value = int(value.lstrip("0") or 0)  # int() refuses more than 4,300 digits
                if value > 2:
                    value = int(np.floor(np.log(value) ** 2))
            out[i, j] = hashemb.hash_keys([value], field=name)[0]
    return out


def read_all(paths: Any, **options: Any) -> tuple[Batch, Reader]:
    """Read all batches as one; return it and the exhausted reader."""
    with open_reader(paths, **options) as reader:
        batches = list(reader)
        assert all(batch.keys.flags.c_contiguous and batch.keys.dtype == np.uint64 for batch in batches)
        assert [len(batch.keys) for batch in batches[:-1]] == [options.get("batch_size", 4096)] * (len(batches) - 1)
    if not batches:
        return Batch(None, np.empty((0, len(reader.field_names)), np.uint64)), reader
    labels = [batch.labels for batch in batches if batch.labels is not None]
    assert len(labels) in (0, len(batches))
    return Batch(np.concatenate(labels) if labels else None, np.concatenate([b.keys for b in batches])), reader


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def compress(data: bytes, codec: str) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def same(a: Batch, b: Batch) -> bool:
    labels = (a.labels is None and b.labels is None) or np.array_equal(a.labels, b.labels)  # type: ignore[arg-type]
    return labels and np.array_equal(a.keys, b.keys)
