"""Damaged or misnamed data files: whatever PyArrow does with them, the error names the file and what to do."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from criteo_lines import read_all, write

from hashemb import cli
from hashemb.ctr.data import open_reader

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")

TEXT = "label,a\n1,2\n0,3\n"
UTF16 = ("utf-16-le", "utf-16-be")
CSV_FILES = {
    **{f"{name} {mark}": (b"\xff\xfe" if name == "utf-16-le" else b"\xfe\xff") * mark + TEXT.encode(name)
       for name in UTF16 for mark in (0, 1)},
    "latin-1": "label,\xe9t\xe9\n1,2\n0,3\n".encode("latin-1"),
    "NUL": b"label,a\0\n1,2\n",
}  # fmt: skip
REASONS = {
    "utf-16-le 1": "the text is UTF-16: convert it to UTF-8, for example with  iconv -f UTF-16 -t UTF-8",
    "utf-16-be 1": "the text is UTF-16: convert it",
    "latin-1": "not UTF-8 in the header, column '\ufffdt\ufffd': convert the file, for example with  iconv -f",
    "utf-16-le 0": "a NUL byte in the header, column ",
    "utf-16-be 0": "a NUL byte in the header, column ",
    "NUL": r"a NUL byte in the header, column 'a\x00': is it text, and in UTF-8?",
}


@pytest.mark.parametrize("name", CSV_FILES)
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_text_in_another_encoding(tmp_path: Path, capsys: Any, name: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path, gzip.compress(CSV_FILES[name]) if suffix.endswith("gz") else CSV_FILES[name])
    with pytest.raises(ValueError, match=re.escape(f"{path}: {REASONS[name]}")):
        open_reader(path)
    assert cli.main(["train", str(path), "-t", str(tmp_path / "T")]) == 1
    assert capsys.readouterr().err.startswith(f"hashemb: {path}: ")
    assert not (tmp_path / "T").exists()


def test_latin_1_below_a_header_of_ascii_makes_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,a\n1,x\n0,\xe9\n1,z\n".encode("latin-1"))
    batch, reader = read_all(path)
    assert len(batch.keys) == 2
    assert [(bad.line, bad.reason) for bad in reader.report.bad_lines] == [(3, "not UTF-8 in column a")]


def test_a_header_may_hold_any_character(tmp_path: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        text = "label,\ufdd0,\ufffd,ü\n1,2,3,4\n0,5,6,\xff\n".encode()
        _, reader = read_all(write(tmp_path / "a.csv", mark + text))
        assert reader.field_names == ["\ufdd0", "\ufffd", "ü"]
        assert reader.report.rows_bad == 0


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    columns = [pa.array([0, 1]), pa.array([1, 2]), pa.array([3, 4])]
    parquet.write_table(pa.Table.from_arrays(columns, ["label", "a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: two columns are named 'a'"):
        open_reader(tmp_path / "a.parquet")


def test_a_label_of_a_type_that_is_none(tmp_path: Path) -> None:
    table = pa.table({"label": pa.array([[0], [1]]), "a": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: "):
        open_reader(tmp_path / "a.parquet")


RAISED = [
    pa.ArrowInvalid("x"),
    pa.ArrowNotImplementedError("x"),
    pa.ArrowKeyError("x"),
    pa.ArrowIndexError("x"),
    pa.ArrowTypeError("x"),
    pa.ArrowMemoryError("x"),
    pa.ArrowCapacityError("x"),
    pa.ArrowSerializationError("x"),
    pa.ArrowException("x"),
    KeyError("x"),
    IndexError("x"),
    OverflowError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    MemoryError(),
    OSError("x"),
    ValueError("a length of -1"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["open_csv", "ParquetFile", "iter_batches", "CompressedInputStream"])
def test_every_exception_of_arrow_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    """Arrow raises these for the contents of files; which one it raises depends on its version."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    if place in ("ParquetFile", "iter_batches"):
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"label": [0, 1], "a": [1, 2]}), path)
    else:
        path = write(tmp_path / "a.csv.gz", gzip.compress(TEXT.encode()))
    owner = {"open_csv": csv, "ParquetFile": parquet, "iter_batches": parquet.ParquetFile}.get(place)
    if owner is None:
        monkeypatch.setattr(pa, place, lambda *arguments: type("Stream", (), {"read": fail, "closed": False})())
    else:
        monkeypatch.setattr(owner, place, fail)
    with pytest.raises(ValueError, match=r"^.*/a\.(csv.gz|parquet): not readable as (CSV|Parquet|gzip data) \("):
        read_all(path, schema={"a": "integer"}, label="label")


def test_damage_in_a_footer_does_not_end_the_process(tmp_path: Path) -> None:
    """PyArrow calls terminate() when asked for the metadata of a column with inconsistent statistics."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": ["x", None, "y"]}), path, store_schema=False)
    program = """
import sys
from hashemb.ctr.data import open_reader
path = sys.argv[1]
content = open(path, "rb").read()
first = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
for at in range(first, len(content) - 8):
    for step in (1, 255):
        damaged = bytearray(content)
        damaged[at] = (damaged[at] + step) % 256
        open(path, "wb").write(damaged)
        try:
            with open_reader(path, schema={"a": "string"}) as reader:
                list(reader)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
"""
    child = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_errors_of_the_system_keep_their_class_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", TEXT.encode())

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(csv, "open_csv", fail)
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: '.*a\.csv'"):
        open_reader(path)


def test_time_is_linear_in_the_number_of_columns(tmp_path: Path) -> None:
    """Names are not searched in a list for each column: the number of comparisons is linear, not quadratic."""
    compared = 0

    class Name(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    from hashemb.ctr.data.source import check_distinct

    check_distinct("a.csv", [Name(f"c{i}") for i in range(10_000)])
    assert compared < 1000
    columns = 3000
    header = ",".join(["label", *(f"c{i}" for i in range(columns))])
    rows = "".join(f"{i % 2}{',7' * columns}\n" for i in range(3))
    batch, _ = read_all(write(tmp_path / "a.csv", f"{header}\n{rows}".encode()))
    assert batch.keys.shape == (3, columns)
