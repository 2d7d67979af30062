"""CSV and Parquet: column types, the label, values of the wrong type, and the same keys in every format."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from criteo_lines import CATEGORIES, INTEGERS, criteo_rows, read_all, same, tsv, write

import hashemb
from hashemb.ctr.data import CRITEO_SCHEMA, open_reader
from hashemb.ctr.data import csv_source as _csv
from hashemb.ctr.data.fields import bucketize_floats
from hashemb.ctr.data.parquet_source import _has_empty

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MIXED = b'''\
site,click,user,age,score,empty,"odd, name"
a.com,1,17,33,0.5,,x
"b,c.com",0,18,34,-2.25,,"two
lines"
,1,,,,,
"say ""hi""",0,-5,7,1e3,,y
'''
MIXED_SCHEMA = {
    "site": "string", "user": "integer", "age": "integer", "score": "float", "empty": "string", "odd, name": "string",
}  # fmt: skip


def keys_of(values: list[Any], field: str) -> list[int]:
    return [int(key) for key in hashemb.hash_keys(values, field=field)]


def test_csv_with_columns_of_every_kind(tmp_path: Path) -> None:
    batch, reader = read_all(write(tmp_path / "a.csv", MIXED))
    assert reader.schema == MIXED_SCHEMA
    assert reader.label == "click"
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1, 0]
    scores = bucketize_floats([0.5, -2.25, 1e3]).tolist()
    for j, (name, values) in enumerate(
        {
            "site": ["a.com", "b,c.com", None, 'say "hi"'],
            "user": [17, 18, None, -5],
            "age": [33, 34, None, 7],
            "score": [scores[0], scores[1], None, scores[2]],
            "empty": [None] * 4,
            "odd, name": ["x", "two\nlines", None, "y"],
        }.items()
    ):
        assert batch.keys[:, j].tolist() == keys_of(values, name), name


def test_numeric_columns_are_bucketed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", MIXED)
    batch, reader = read_all(path, numeric=["age"])
    assert reader.schema == MIXED_SCHEMA | {"age": "count"}
    assert batch.keys[:, 2].tolist() == keys_of([12, 12, None, 3], "age")
    for name, message in (
        ("site", "numeric= takes columns of numbers, and 'site' holds string values"),
        ("click", "no column 'click', which numeric= names"),
        ("nobody", "no column 'nobody', which numeric= names; it has site, user, age"),
    ):
        with pytest.raises(ValueError, match=message):
            open_reader(path, numeric=[name])


@pytest.mark.parametrize(
    ("header", "first", "options", "label"),
    [
        ("label,a", "1,5", {}, "label"),
        ("a,Click", "5,0", {}, "Click"),
        ("click,label", "1,0", {}, "label"),
        ("y,a", "1,5", {}, "y"),
        ("y,a", "true,5", {}, "y"),
        ("user,a", "7,5", {}, None),
        ("a,y", "5,1", {"label": "y"}, "y"),
        ("a,b", "1,5", {"schema": {"a": "integer"}}, None),
        ("a,b", "1,5", {"schema": {"a": "integer"}, "label": "b"}, "b"),
        ("a,b", "1,5", {"schema": {"a": "integer"}, "label": "y"}, None),
    ],
)
def test_which_column_is_the_label(
    tmp_path: Path, header: str, first: str, options: dict[str, Any], label: str | None
) -> None:
    write(tmp_path / "a.csv", f"{header}\n{first}\n".encode())
    names, values = header.split(","), [[v == "true" if v == "true" else int(v)] for v in first.split(",")]
    parquet.write_table(pa.table(dict(zip(names, values, strict=True))), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with open_reader(tmp_path / name, **options) as reader:
            assert reader.label == label


def test_label_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", MIXED)
    with pytest.raises(ValueError, match=r"a\.csv: no column 'y' for the label; it has site, click, user"):
        open_reader(path, label="y")
    with pytest.raises(ValueError, match="'user' is named as the label and as a field of the schema"):
        open_reader(path, label="user", schema={"user": "integer"})
    with pytest.raises(ValueError, match="no column besides the label 'label'"):
        open_reader(write(tmp_path / "b.csv", b"label\n1\n"), format="csv")


BAD_CSV = b"""\
label,user,site
1,5,a
0,six,b
2,7,c
,8,d
1,9
1,10,e,f
0,99999999999999999999,g
0,11,\xff
1,12,"ok
still ok"
0,0x10,h
"""


@pytest.mark.parametrize("block_bytes", [40, 1 << 20])
def test_malformed_csv_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """The header is record 1, and a quoted line break does not start a record."""
    monkeypatch.setattr(_csv, "_BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "a.csv", BAD_CSV)
    batch, reader = read_all(path, schema={"user": "integer", "site": "string"})
    assert [(bad.line, bad.reason) for bad in reader.report.bad_lines] == [
        (3, "user must be an integer of 64 bits, found 'six'"),
        (4, "label must be 0 or 1, found '2'"),
        (5, "label must be 0 or 1, found nothing"),
        (6, "expected 3 columns, found 2"),
        (7, "expected 3 columns, found 4"),
        (8, "user must be an integer of 64 bits, found '99999999999999999999'"),
        (9, "not UTF-8 in column site"),
        (11, "user must be an integer of 64 bits, found '0x10'"),
    ]
    assert reader.report.rows_good == 2
    assert batch.keys[:, 0].tolist() == keys_of([5, 12], "user")
    assert batch.keys[:, 1].tolist() == keys_of(["a", "ok\nstill ok"], "site")
    with pytest.raises(ValueError, match=r"a\.csv:3: user must be an integer of 64 bits, found 'six'"):
        read_all(path, schema={"user": "integer", "site": "string"}, strict=True)


def test_ragged_records_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"label,a\n" + b"1\n" * 30 + b"1,2\n" + b"1,2,3\n" * 5)
    batch, reader = read_all(path)
    assert len(batch.keys) == 1
    assert reader.report.rows_bad == 35
    assert [bad.line for bad in reader.report.bad_lines] == list(range(2, 22))


def test_a_kind_holds_for_the_whole_file_and_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of another type after the inspected rows is refused; with a schema it can be read."""
    monkeypatch.setattr(_csv, "_HEAD_BYTES", 64)
    a = write(tmp_path / "a.csv", b"label,user\n" + b"1,17\n" * 30 + b"0,u18\n")
    b = write(tmp_path / "b.csv", b"label,user\n0,u19\n1,20\n")
    batch, reader = read_all([a, b])
    assert reader.schema == {"user": "integer"}
    assert [str(bad) for bad in reader.report.bad_lines] == [
        f"{a}:32: user must be an integer of 64 bits, found 'u18'",
        f"{b}:2: user must be an integer of 64 bits, found 'u19'",
    ]
    assert batch.keys[-1, 0] == hashemb.hash_keys([20], field="user")[0]
    batch, reader = read_all([a, b], schema={"user": "string"})
    assert reader.report.rows_bad == 0
    assert batch.keys[:, 0].tolist() == keys_of(["17"] * 30 + ["u18", "u19", "20"], "user")


def test_bytes_that_are_not_utf8_at_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that are split by a read are decoded whole; a noncharacter in valid input is data."""
    monkeypatch.setattr(_csv, "_BLOCK_BYTES", 33)
    good = "label,site\n" + "".join(f"1,ü€😀{i}\ufdd0\n" for i in range(20))
    batch, reader = read_all(write(tmp_path / "a.csv", good.encode()))
    assert reader.report.rows_bad == 0
    assert batch.keys[:, 0].tolist() == keys_of([f"ü€😀{i}\ufdd0" for i in range(20)], "site")
    bad = good.replace("\ufdd0", "").encode() + b"0,\xe2\x82\n0,\xf0\n0,ok\n0\xff,x\n1,\xc3"
    batch, reader = read_all(write(tmp_path / "b.csv", bad))
    assert [bad.line for bad in reader.report.bad_lines] == [22, 23, 25, 26]
    assert len(batch.keys) == 21


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"label,a,a\n1,2,3\n", "a.csv: two columns are named 'a'"),
        (b'label,a\n1,"x\n' + b"1,2\n" * 600_000, r"a.csv: not readable as CSV \(a quote that is never closed\?\)"),
        (b'"label,a\n1,2\n', "a.csv: not readable as CSV"),
    ],
)
def test_files_that_are_no_csv(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_all(write(tmp_path / "a.csv", data))


def test_tab_separated_with_header(tmp_path: Path) -> None:
    comma, _ = read_all(write(tmp_path / "a.csv", b"label,user,site\n1,5,a\n0,6,b\n"))
    tab, reader = read_all(write(tmp_path / "a.tsv", b"label\tuser\tsite\n1\t5\ta\n0\t6\tb\n"))
    assert same(comma, tab)
    assert reader.schema == {"user": "integer", "site": "string"}


def criteo_columns(rows: list[list[str]]) -> dict[str, Any]:
    texts = list(zip(*rows, strict=True))
    columns = {"label": pa.array([int(text) for text in texts[0]])}
    columns |= {n: pa.array([int(t) if t else None for t in ts]) for n, ts in zip(INTEGERS, texts[1:14], strict=True)}
    return columns | {n: pa.array([t or None for t in ts]) for n, ts in zip(CATEGORIES, texts[14:], strict=True)}


def test_the_same_data_has_the_same_keys_in_every_format(tmp_path: Path) -> None:
    """This includes categories that look like a number, are empty instead of null, or are dictionary-encoded."""
    rows = criteo_rows(300)
    for i, row in enumerate(rows):
        row[14] = f"{i % 10:08d}"  # C1: all digits
        row[15] = f"{i % 10}e{i % 7}00000"  # C2: looks like a float
    truth, _ = read_all(write(tmp_path / "a.tsv", tsv(rows)))
    header = [["label", *CRITEO_SCHEMA]]
    table = pa.table(criteo_columns(rows))
    empty = {n: table[n].fill_null("") if n in CATEGORIES else table[n] for n in table.column_names}
    encoded = {n: table[n].dictionary_encode() if n in CATEGORIES else table[n] for n in table.column_names}
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(pa.table(empty), tmp_path / "b.parquet", row_group_size=77)
    parquet.write_table(pa.table(encoded), tmp_path / "c.pq", row_group_size=100)
    write(tmp_path / "a.csv", tsv(header + rows).replace(b"\t", b","))
    write(tmp_path / "b.csv", tsv(header + rows))
    (tmp_path / "c.pq").rename(tmp_path / "no-suffix")
    for name in ("a.parquet", "b.parquet", "no-suffix", "a.csv", "b.csv"):
        batch, reader = read_all(tmp_path / name)
        assert same(batch, truth), name
        assert reader.schema == CRITEO_SCHEMA
        assert reader.bytes_read == reader.bytes_total
    mixed, _ = read_all([tmp_path / "a.tsv", tmp_path / "a.csv", tmp_path / "a.parquet"])
    assert np.array_equal(mixed.keys, np.tile(truth.keys, (3, 1)))


def test_parquet_types(tmp_path: Path) -> None:
    table = {
        "label": pa.array([1.0, 0.0, None, 0.5]),
        "small": pa.array([1, -1, 3, 4], pa.int8()),
        "big": pa.array([2**63, 5, 6, 7], pa.uint64()),
        "flag": pa.array([True, None, False, True]),
        "half": pa.array(np.array([0.5, 1.5, 2, 3], np.float16)),
        "large": pa.array(["a", "", "c", "d"], pa.large_string()),
        "raw": pa.array([b"a", b"\xff", b"", None], pa.binary()),
        "fixed": pa.array([b"ab", b"cd", b"ef", b"gh"], pa.binary(2)),
        "view": pa.array(["a", None, "c", "d"], pa.string()),
        "nothing": pa.nulls(4),
        "codes": pa.array([7, 7, 8, 9]).dictionary_encode(),
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    batch, reader = read_all(tmp_path / "a.parquet")
    assert [(bad.line, bad.reason) for bad in reader.report.bad_lines] == [
        (3, "label must be 0 or 1, found nothing"),
        (4, "label must be 0 or 1, found '0.5'"),
    ]
    halves = bucketize_floats([0.5, 1.5]).tolist()
    expected = {
        "small": [1, -1], "big": [2**63, 5], "flag": [1, None], "half": halves, "large": ["a", None],
        "raw": [b"a", b"\xff"], "fixed": [b"ab", b"cd"], "view": ["a", None], "nothing": [None] * 2, "codes": [7, 7],
    }  # fmt: skip
    assert reader.field_names == list(expected)
    for j, (name, values) in enumerate(expected.items()):
        assert batch.keys[:, j].tolist() == keys_of(values, name), name


@pytest.mark.parametrize("kind", ["string", "binary", "large_string", "large_binary", "dictionary", "long"])
def test_the_empty_string_is_missing_in_parquet(tmp_path: Path, kind: str) -> None:
    """This holds among nulls, anywhere in a batch divided anywhere, and in columns without nulls or empty strings."""
    rng = np.random.default_rng(0)
    for values in (["", None, "a", "b"], [None, "a"], ["", "a"], ["a", "b"], [""], [None, "x" * 50, "y" * 900, ""]):
        texts = [values[i] for i in rng.integers(0, len(values), 200)]
        if kind == "long":  # the file has no dictionary
            texts = [text and f"{text}{i}" for i, text in enumerate(texts)]
        column = pa.array(texts, pa.string() if kind in ("dictionary", "long") else getattr(pa, kind)())
        table = pa.table({"label": [0, 1] * 100, "x": column.dictionary_encode() if kind == "dictionary" else column})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70, use_dictionary=kind != "long")
        batch, _ = read_all(tmp_path / "a.parquet", schema={"x": "string"})
        assert batch.keys[:, 0].tolist() == keys_of([text or None for text in texts], "x")


def test_nulls_with_bytes_beneath_are_not_empty_strings() -> None:
    """Arrow does not specify the bytes under a null: here as many nulls have bytes as values have none."""
    data = pa.array(["", "ab", "", "cd"]).buffers()
    for present, expected in (((1, 0, 1, 0), True), ((0, 1, 0, 1), False), ((1, 0, 0, 1), True)):
        validity = pa.py_buffer(np.packbits(present, bitorder="little"))
        column = pa.Array.from_buffers(pa.string(), 4, [validity, *data[1:]])
        assert _has_empty(column) is expected
        assert _has_empty(column[2:]) is bool(present[2])


def test_the_thread_that_decodes_parquet_ends(tmp_path: Path) -> None:
    """It ends with the reader, exhausted or not, and the reader raises its exceptions."""
    table = pa.table({"label": [0, 1] * 50_000, "x": np.arange(100_000)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10_000, compression="none", use_dictionary=False)
    before = threading.active_count()
    for num_batches in (0, 1, 7):
        with open_reader(tmp_path / "a.parquet", batch_size=5000) as reader:
            for _ in range(num_batches):
                assert next(reader).num_examples == 5000
        assert threading.active_count() == before
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    with parquet.ParquetFile(tmp_path / "a.parquet") as file:
        begin = file.metadata.row_group(9).column(1).data_page_offset
    damaged[begin : begin + 30] = bytes([0xFF]) * 30
    with (
        open_reader(write(tmp_path / "b.parquet", bytes(damaged)), batch_size=5000) as reader,
        pytest.raises(ValueError, match=r"b\.parquet: not readable as Parquet"),
    ):
        list(reader)
    assert 1 < reader.report.rows_good // 5000 <= 18
    assert threading.active_count() == before


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    when = pa.array([0, 1], pa.timestamp("ms"))
    parquet.write_table(pa.table({"label": [0, 1], "when": when, "ad": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'when' has the type timestamp\[ms\]; fields are integers"):
        open_reader(tmp_path / "a.parquet")
    assert len(read_all(tmp_path / "a.parquet", schema={"ad": "integer"})[0].keys) == 2
    with pytest.raises(ValueError, match="column 'ad' holds integer values and can't be read as string"):
        open_reader(tmp_path / "a.parquet", schema={"ad": "string"})
    data = (tmp_path / "a.parquet").read_bytes()
    for name, damaged in (("b.parquet", data[:-20]), ("c.parquet", b"label,a\n1,2\n")):
        with pytest.raises(ValueError, match=f"{name}: not readable as Parquet"):
            open_reader(write(tmp_path / name, damaged))
    assert read_all(write(tmp_path / "d.parquet", b""))[1].report.rows_good == 0


@pytest.mark.parametrize("start", [0, 100, 150, 301])
def test_start_in_csv_and_parquet(tmp_path: Path, start: int) -> None:
    rows = criteo_rows(300)
    parquet.write_table(pa.table(criteo_columns(rows)), tmp_path / "a.parquet", row_group_size=70)
    write(tmp_path / "a.csv", tsv([["label", *CRITEO_SCHEMA], *rows]).replace(b"\t", b","))
    for path in (tmp_path / "a.parquet", tmp_path / "a.csv"):
        whole, _ = read_all(path)
        rest, reader = read_all(path, start=start, batch_size=32)
        assert np.array_equal(rest.keys, whole.keys[start:])
        assert reader.report.rows_good == 300


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    path = write(tmp_path / "a.csv", MIXED)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(hashemb.errors.MissingExtraError, match=r"this needs pyarrow.*hashemb\[ctr\]"):
        open_reader(path)
