"""Readers: batches, files, compression, options. Malformed lines and the other formats are tested in separate files."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from criteo_lines import compress, criteo_rows, expected_keys, read_all, same, tsv, write

import hashemb
from hashemb.ctr.data import CRITEO_SCHEMA, Batch, open_reader
from hashemb.ctr.data import criteo_source as _criteo

pytest.importorskip("pyarrow")

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HASHEMB_DATA", ROOT.parent / "shared" / "data"))
CRITEO_HEAD = DATA / "criteo" / "head10000.tsv.gz"
GOOD = criteo_rows(3, seed=5)


def test_criteo_keys_follow_the_documented_rule(tmp_path: Path) -> None:
    rows = criteo_rows(200)
    batch, reader = read_all(write(tmp_path / "a.tsv", tsv(rows)))
    assert reader.schema == CRITEO_SCHEMA
    assert np.array_equal(batch.keys, expected_keys(rows))
    assert batch.labels is not None
    assert batch.labels.dtype == np.float32
    assert batch.labels.tolist() == [float(row[0]) for row in rows]
    assert 0 < batch.labels.sum() < 200  # the rows have both labels, and missing and negative integers
    assert {"", "-1"} <= {row[1] for row in rows}


def test_compression_changes_nothing(tmp_path: Path) -> None:
    data = tsv(criteo_rows(300))
    plain, _ = read_all(write(tmp_path / "a.tsv", data))
    for name, stored in [
        ("a.tsv.gz", gzip.compress(data)),
        ("a.tsv.zst", compress(data, "zstd")),
        ("a.tsv.bz2", compress(data, "bz2")),
        ("two-members.tsv.gz", gzip.compress(data[:5000]) + gzip.compress(data[5000:])),
        ("no-suffix", gzip.compress(data)),
        ("crlf.tsv", data.replace(b"\n", b"\r\n")),
        ("no-final-newline.tsv", data[:-1]),
        ("bom.tsv", b"\xef\xbb\xbf" + data),
    ]:
        batch, reader = read_all(write(tmp_path / name, stored))
        assert same(batch, plain), name
        assert reader.report.rows_bad == 0
        assert reader.bytes_read == reader.bytes_total == len(stored)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 299, 300, 301, 5000])
def test_batches_run_on_across_files(tmp_path: Path, batch_size: int) -> None:
    rows = criteo_rows(300)
    whole, _ = read_all(write(tmp_path / "whole.tsv", tsv(rows)))
    cuts = [0, 1, 1, 180, 300]
    parts = [write(tmp_path / f"{i}.tsv", tsv(rows[cuts[i] : cuts[i + 1]])) for i in range(4)]
    batch, reader = read_all(parts, batch_size=batch_size)
    assert same(batch, whole)
    assert reader.report.rows_good == 300


@pytest.mark.parametrize("start", [0, 1, 99, 150, 299, 300, 1000])
def test_start_equals_reading_and_dropping(tmp_path: Path, start: int) -> None:
    rows = criteo_rows(300)
    data = tsv(rows[:100]) + b"bad\n" + tsv(rows[100:])
    paths = [write(tmp_path / "a.tsv", data), write(tmp_path / "b.tsv", data)]
    whole, _ = read_all(paths)
    batch, reader = read_all(paths, start=start, batch_size=64)
    assert whole.labels is not None
    assert same(batch, Batch(whole.labels[start:] if start < 600 else None, whole.keys[start:]))
    assert reader.report.rows_good == 600
    assert reader.report.rows_bad == 2


def test_going_on_where_a_reader_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", tsv(criteo_rows(300)))
    whole, _ = read_all(path)
    with open_reader(path, batch_size=64) as reader:
        first = [next(reader), next(reader)]
        stands_at = reader.report.rows_good
    rest, _ = read_all(path, start=stands_at)
    assert np.array_equal(np.concatenate([*(b.keys for b in first), rest.keys]), whole.keys)
    assert list(reader) == []  # closed


def test_lines_without_label(tmp_path: Path) -> None:
    rows = criteo_rows(50)
    labelled, _ = read_all(write(tmp_path / "a.tsv", tsv(rows)))
    batch, reader = read_all(write(tmp_path / "b.tsv", tsv(row[1:] for row in rows)))
    assert batch.labels is None
    assert reader.label is None
    assert np.array_equal(batch.keys, labelled.keys)
    with pytest.raises(ValueError, match=r"a\.tsv has labels and .*b\.tsv has none"):
        read_all([tmp_path / "a.tsv", tmp_path / "b.tsv"])
    gap = tsv([rows[0][1:]]) + b"\n" + tsv([rows[1][1:]])
    batch, reader = read_all(write(tmp_path / "gap.tsv", gap))
    assert np.array_equal(batch.keys, labelled.keys[:2])
    assert [(bad.line, bad.reason) for bad in reader.report.bad_lines] == [(2, "empty line")]
    mixed = tsv([*rows, rows[0][1:]])
    assert read_all(write(tmp_path / "c.tsv", mixed))[1].report.bad_lines[0].reason == "expected 40 columns, found 39"


def test_blocks_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = criteo_rows(120)
    data = tsv(rows[:60]) + b"x\t\n" + tsv(rows[60:]) + b"1\t2\n"
    path = write(tmp_path / "a.tsv", data)
    whole, reader = read_all(path)
    for block_bytes in (1, 100, 1000, 20_000):
        monkeypatch.setattr(_criteo, "_BLOCK_BYTES", block_bytes)
        batch, other = read_all(path)
        assert same(batch, whole)
        assert other.report == reader.report
        assert [bad.line for bad in other.report.bad_lines] == [61, 122]


@pytest.mark.skipif(not CRITEO_HEAD.exists(), reason="the head of the Criteo file is not here")
def test_real_criteo_lines(tmp_path: Path) -> None:
    batch, reader = read_all(CRITEO_HEAD)
    assert (reader.report.rows_good, reader.report.rows_bad) == (10_000, 0)
    assert batch.labels is not None
    assert batch.labels.mean() == pytest.approx(0.2182)
    assert batch.keys.shape == (10_000, 39)
    with gzip.open(CRITEO_HEAD) as file:
        data = file.read()
    assert same(read_all(write(tmp_path / "plain", data))[0], batch)
    assert same(read_all(write(tmp_path / "a.zst", compress(data, "zstd")))[0], batch)
    rows = [line.split("\t") for line in data.decode().splitlines()[:50]]
    assert np.array_equal(batch.keys[:50], expected_keys(rows))


def test_empty_files(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.tsv", b"")
    for path in (empty, write(tmp_path / "e.gz", gzip.compress(b"")), write(tmp_path / "e.csv", b""), [empty, empty]):
        batch, reader = read_all(path)
        assert len(batch.keys) == 0
        assert reader.field_names == []
    good = write(tmp_path / "good.tsv", tsv(GOOD))
    assert len(read_all([empty, good, empty])[0].keys) == 3


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.tsv.zst", "a.csv.gz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_compression_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    rows = [["label", *CRITEO_SCHEMA], *criteo_rows(2000)] if ".csv" in name else criteo_rows(2000)
    plain = tsv(rows).replace(b"\t", b",") if ".csv" in name else tsv(rows)
    data = bytearray(gzip.compress(plain) if name.endswith("gz") else compress(plain, "zstd"))
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    path = write(tmp_path / name, bytes(data[:-200] if damage == "truncated" else data))
    with pytest.raises(ValueError, match=f"{name}: not readable as (gzip|zstd) data"):
        read_all(path)


def test_misnamed_compression(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv.gz", tsv(GOOD))
    with pytest.raises(ValueError, match=r"a\.tsv\.gz: named as gzip data, but it starts with the bytes b'"):
        open_reader(path)


@pytest.mark.parametrize("data", [tsv(GOOD), gzip.compress(tsv(GOOD)), b"label,a\n1,2\n0,3\n", b""])
def test_standard_input_and_pipes(tmp_path: Path, data: bytes) -> None:
    program = (
        "from hashemb.ctr.data.readers import open_reader\n"
        "reader = open_reader('-')\n"
        "total = sum(int(b.keys.sum()) for b in reader) % 2**64\n"
        "print(total, reader.report.rows_good, reader.bytes_total, reader.bytes_read)"
    )
    result = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
    batch, reader = read_all(write(tmp_path / "a", data))
    expected = f"{int(batch.keys.sum()) % 2**64} {reader.report.rows_good} None {len(data)}"
    assert result.stdout.decode().strip() == expected
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    through_pipe, reader = read_all(pipe)
    writer.join()
    assert same(through_pipe, batch)
    assert reader.bytes_total is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"format": "tsv"}, "format must be one of auto, criteo, csv, parquet, libsvm, libffm, vw, got 'tsv'"),
        ({"label": "click"}, "a Criteo file has no column 'click' for the label"),
        ({"numeric": ["C1"]}, "a Criteo file has no integer column 'C1'"),
        ({"schema": {}}, "the schema names no fields"),
        ({"schema": {"C1": "hex"}}, "field 'C1': kind must be one of string, integer, count, float, got 'hex'"),
        ({"schema": {"C1": "string"}, "numeric": ["C1"]}, "give numeric= or schema=, not both"),
        ({"schema": {"C1": "string"}, "categorical": ["C1"]}, "give categorical= or schema=, not both"),
        ({"numeric": ["I1"], "categorical": ["I1"]}, "'I1' is named as numeric and as categorical"),
        ({"categorical": ["x"]}, "a Criteo file has no column 'x'"),
        ({"positive": "yes"}, "the label of a Criteo file is 0 or 1, not 'yes'"),
        ({"label_values": ("a", "a")}, "label_values must be two different values, got"),
        ({"schema": {"C1": "string", "user": "string"}}, r"no column 'user' \(1 of 2 fields are missing\); it has I1"),
        ({"schema": {"C1": "count"}}, "column 'C1' holds string values and can't be read as count"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.tsv", tsv(GOOD))
    with pytest.raises(ValueError, match=message):
        open_reader(path, **options)


def test_paths_are_checked_first(tmp_path: Path) -> None:
    good = write(tmp_path / "a.tsv", tsv(GOOD))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tsv"):
        open_reader([good, tmp_path / "nowhere.tsv"])
    with pytest.raises(ValueError, match="no paths given"):
        open_reader([])
    with pytest.raises(ValueError, match=r"b: neither Criteo lines nor CSV with a header, nor libsvm, .* with format="):
        open_reader(write(tmp_path / "b", b"hello\nworld\n"))


def test_schema_chooses_and_orders_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", tsv(criteo_rows(20)))
    whole, _ = read_all(path)
    batch, reader = read_all(path, schema={"C2": "string", "I1": "integer", "I2": "count"})
    assert reader.field_names == ["C2", "I1", "I2"]
    names = list(CRITEO_SCHEMA)
    assert np.array_equal(batch.keys[:, [0, 2]], whole.keys[:, [names.index("C2"), names.index("I2")]])
    raw = [int(row[1]) if row[1] else None for row in criteo_rows(20)]
    assert np.array_equal(batch.keys[:, 1], hashemb.hash_keys(raw, field="I1"))


def test_parquet_takes_the_memory_of_a_few_batches_not_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hashemb.ctr.data import parquet_source as _parquet

    monkeypatch.setattr(_parquet, "_BATCH_VALUES", 4 * 8192)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**62, (3, 160_000)).astype(str)
    table = pa.table({"label": rng.integers(0, 2, 160_000), **dict(zip("abc", values, strict=True))})
    pq.write_table(table, tmp_path / "t", row_group_size=8192)
    del table
    before, taken = pa.total_allocated_bytes(), []
    with open_reader(tmp_path / "t", format="parquet", batch_size=4096) as reader:
        for _ in reader:
            taken.append(pa.total_allocated_bytes())
    assert len(taken) == 40
    assert max(taken) - before < 8e6, "the file has 8.8 MB, a row group .45 of them"
