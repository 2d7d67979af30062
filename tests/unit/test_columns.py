"""Real-world tables: labels of any two values, missing numbers, ids or counts, delimiters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from criteo_lines import read_all, write

import hashemb
from hashemb.ctr.data import bucketize_counts, open_reader
from hashemb.ctr.data import kinds as _kinds
from hashemb.ctr.data.fields import bucketize_floats
from hashemb.ctr.data.labels import choose_label_values

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def keys_of(values: list[Any], field: str) -> list[int]:
    return [int(key) for key in hashemb.hash_keys(values, field=field)]


def table_of(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write a CSV or Parquet file, depending on its name."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
        return path
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in row) for row in rows)]
    return write(path, ("\n".join(lines) + "\n").encode())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        ([">50K", "<=50K", "<=50K"], ("<=50K", ">50K"), [1, 0, 0]),
        ([-1, 1, 1], ("-1", "1"), [0, 1, 1]),
        ([2, 1, 2], ("1", "2"), [1, 0, 1]),
        ([10, 9, 9], ("9", "10"), [1, 0, 0]),
        ([1.5, -2.5, 1.5], ("-2.5", "1.5"), [1, 0, 1]),
        ([0, 1, 1], None, [0, 1, 1]),
        ([1.0, 0.0, 1.0], None, [1, 0, 1]),
        ([True, False, True], None, [1, 0, 1]),
        ([1, 1, 1], None, [1, 1, 1]),
    ],
)
def test_labels_of_two_values(tmp_path: Path, suffix: str, labels: list[Any], values: Any, expected: list[int]) -> None:
    """The value that sorts second is 1; 0 and 1 are used as they are."""
    path = table_of(tmp_path / f"a.{suffix}", {"a": [1, 2, 3], "y": labels})
    batch, reader = read_all(path, label="y")
    assert batch.labels is not None
    assert (batch.labels.tolist(), reader.label_values) == (expected, values)
    if values is not None:
        batch, reader = read_all(path, label="y", positive=values[0])
        assert batch.labels is not None
        assert (batch.labels.tolist(), reader.label_values) == ([1 - y for y in expected], values[::-1])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_values_hold_for_later_files(tmp_path: Path, suffix: str) -> None:
    """The values are fixed by the first file; a third value is a bad row in any file."""
    a = table_of(tmp_path / f"a.{suffix}", {"a": [1, 2], "y": ["yes", "no"]})
    b = table_of(tmp_path / f"b.{suffix}", {"a": [3, 4, 5], "y": ["yes", "maybe", None]})
    batch, reader = read_all([a, b], label="y")
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1]
    assert [bad.reason for bad in reader.report.bad_lines] == [
        "label must be 'no' or 'yes', found 'maybe'", "label must be 'no' or 'yes', found nothing",
    ]  # fmt: skip
    again, _ = read_all(b, label="y", schema=reader.schema, label_values=reader.label_values)
    assert again.labels is not None
    assert again.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", "b", "c"] * 3, {}, r"a\.csv: the label column 'y' has more than two values: 'a', 'b', 'c'"),
        ([0, 1, 2] * 9, {}, "the label column 'y' has more than two values: '0', '1', '2'"),
        (list(range(30)) * 2, {}, "has more than two values: '0', '1', '2', .* and 20 more"),
        (["no"] * 5, {}, "the label column 'y' holds only 'no' so far; two values are needed"),
        (["no", "yes"], {"positive": "ja"}, "holds 'no', 'yes', so 'ja' can't be its positive value of two"),
        ([0, 0], {"positive": "1"}, "holds '0', so '1' can't be its positive value of two"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: list[Any], options: dict[str, Any], message: str) -> None:
    path = table_of(tmp_path / "a.csv", {"a": [5] * len(labels), "y": labels})
    with pytest.raises(ValueError, match=message):
        open_reader(path, label="y", **options)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"1": 500, "0": 400, "oops": 3}, None),
        ({"1": 1, "0": 1, "oops": 1}, None),
        ({"yes": 500, "no": 400, "Yes": 20, " no": 5}, ("no", "yes")),
        ({"yes": 500, "no": 400, "?": 300, None: 100, "NA": 50}, ("no", "yes")),
        ({"1": 10, "1.0": 10, "2": 5}, ("1", "2")),
        ({"no": 5000, "yes": 3}, ("no", "yes")),
        ({"False": 5, "True": 5}, None),
        ({}, None),
    ],
)
def test_which_values_count(counts: dict[Any, int], expected: Any) -> None:
    """Missing labels and rare typos don't count; case, blanks and number formats make no difference."""
    assert choose_label_values("here", counts, None) == expected


MISSING = ["", "NA", "N/A", "nan", "NaN", "?", "null", "None", " "]


@pytest.mark.parametrize("missing", MISSING)
def test_numbers_with_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Markers of missing values count as missing in numeric columns; in text only the empty string does."""
    rows = [("1", "3.5", "x"), (missing, missing, missing), (" 3", "1e3", "y"), ("4", "-2", missing)]
    text = "label,n,f,s\n" + "".join(f"{i % 2},{','.join(row)}\n" for i, row in enumerate(rows))
    for block_bytes in (20, 1 << 20):
        monkeypatch.setattr("hashemb.ctr.data.csv_source._BLOCK_BYTES", block_bytes)
        batch, reader = read_all(write(tmp_path / "a.csv", text.encode()))
        assert reader.schema == {"n": "integer", "f": "float", "s": "string"}
        assert reader.report.rows_bad == 0
        assert batch.keys[:, 0].tolist() == keys_of([1, None, 3, 4], "n")
        a, b, c = bucketize_floats([3.5, 1e3, -2.0]).tolist()
        assert batch.keys[:, 1].tolist() == keys_of([a, None, b, c], "f")
        assert batch.keys[:, 2].tolist() == keys_of(["x", missing or None, "y", missing or None], "s")


def test_holes_beside_values_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"label,n\n1,5\n0,?\n1,x\n0,NA\n1, 6\n")
    batch, reader = read_all(path, schema={"n": "integer"})
    assert batch.keys[:, 0].tolist() == keys_of([5, None, None, 6], "n")
    assert [(bad.line, bad.reason) for bad in reader.report.bad_lines] == [
        (4, "n must be an integer of 64 bits, found 'x'")
    ]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_delimiters(tmp_path: Path, delimiter: str) -> None:
    text = '"a, b";y;c\n"x;1";no;5\n"y;\n2";yes;6\n'.replace(";", delimiter)
    batch, reader = read_all(write(tmp_path / "a.data", text.encode()), label="y", format="csv")
    assert reader.schema == {"a, b": "string", "c": "integer"}
    assert batch.keys[:, 0].tolist() == keys_of([f"x{delimiter}1", f"y{delimiter}\n2"], "a, b")


def numbers(**columns: Any) -> dict[str, list[int]]:
    return {"y": [i % 2 for i in range(1000)]} | {name: list(map(int, values)) for name, values in columns.items()}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_ids_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Amounts that rarely repeat are counts, even if most are 0; ids and small ranges are ids."""
    rng = np.random.default_rng(0)
    amounts = np.exp(rng.normal(12, 1, 1000))
    columns = numbers(
        income=amounts, gain=np.where(rng.random(1000) < 0.9, 0, amounts), age=rng.integers(17, 90, 1000),
        user=rng.zipf(1.3, 1000) % 10_000, code=rng.integers(0, 3, 1000), constant=np.full(1000, 7),
    )  # fmt: skip
    path = table_of(tmp_path / f"a.{suffix}", columns)
    guessed = {"income": "count", "gain": "count", "age": "integer", "user": "integer", "code": "integer"}
    with open_reader(path, label="y") as reader:
        assert reader.schema == guessed | {"constant": "integer"}
    with open_reader(path, label="y", numeric=["age"], categorical=["gain"]) as reader:
        assert reader.schema == guessed | {"age": "count", "gain": "integer", "constant": "integer"}
        keys = np.concatenate([batch.keys for batch in reader])
    assert keys[:20, 2].tolist() == keys_of(bucketize_counts(columns["age"][:20]).tolist(), "age")
    assert keys[:20, 1].tolist() == keys_of(columns["gain"][:20], "gain")
    monkeypatch.setattr(_kinds, "SMALL_FILE_BYTES", 100)  # in a large file an id repeats later
    with open_reader(path, label="y") as reader:
        assert set(reader.schema.values()) == {"integer"}


def test_kinds_that_are_asked_for(tmp_path: Path) -> None:
    path = table_of(tmp_path / "a.csv", {"label": [0, 1], "f": [0.5, 1.5], "s": ["a", "b"], "n": [1, 2]})
    with open_reader(path, numeric=["f", "n"], categorical=["s"]) as reader:
        assert reader.schema == {"f": "float", "s": "string", "n": "count"}
    batch, reader = read_all(path, categorical=["f"])
    assert reader.schema == {"f": "string", "s": "string", "n": "integer"}
    assert batch.keys[:, 0].tolist() == keys_of(["0.5", "1.5"], "f")
    with pytest.raises(ValueError, match="no column 'q', which categorical= names; it has"):
        open_reader(path, categorical=["q"])
    stored = table_of(tmp_path / "a.parquet", {"label": [0, 1], "f": [0.5, 1.5]})
    with pytest.raises(ValueError, match="categorical= takes text and integers, and 'f' holds float values"):
        open_reader(stored, categorical=["f"])


@pytest.mark.parametrize("block_bytes", [1 << 10, 1 << 12])
def test_blocks_that_follow_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """The inspected data is not passed on in small pieces, as Arrow rejects a block without the end of a line."""
    monkeypatch.setattr("hashemb.ctr.data.csv_source._HEAD_BYTES", block_bytes)
    monkeypatch.setattr("hashemb.ctr.data.csv_source._BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("hashemb.ctr.data.streams._READ_BYTES", block_bytes // 2)
    lines = "".join(f"{i % 2},{i},{'x' * (i % 300)}\n" for i in range(2000))
    batch, reader = read_all(write(tmp_path / "a.csv", f"label,n,s\n{lines}".encode()), categorical=["n"])
    assert reader.report.rows_bad == 0
    assert batch.keys[:, 0].tolist() == keys_of(list(range(2000)), "n")


def test_a_reader_that_is_left_in_the_middle(tmp_path: Path) -> None:
    """An error while Arrow's thread reads ahead ends Python normally, without a crash in that thread."""
    lines = "".join(f"{i % 2},{i},{'x' * 200}\n" for i in range(60_000))
    path = write(tmp_path / "a.csv", f"label,n,s\n{lines}".encode())
    program = (
        "from hashemb.ctr.data.readers import open_reader\n"
        f"with open_reader({str(path)!r}, batch_size=100) as reader:\n"
        "    next(reader)\n"
        "    raise RuntimeError('left')\n"
    )
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == "RuntimeError: left"
