"""Malformed Criteo lines are refused one by one, with the line number and the reason, and never repaired."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from criteo_lines import CATEGORIES, INTEGERS, criteo_rows, expected_keys, read_all, tsv, write
from hypothesis import given
from hypothesis import strategies as st

from hashemb.ctr.data import CRITEO_SCHEMA, encode
from hashemb.ctr.data import criteo_source as _criteo

pa = pytest.importorskip("pyarrow")

GOOD = criteo_rows(3, seed=5)


def changed(column: int, text: str) -> list[str]:
    row = list(GOOD[0])
    row[column] = text
    return row


LONG = "f" * (_criteo.MAX_LINE_BYTES + 1)
MALFORMED: list[tuple[str, bytes, str]] = [
    ("too few columns", tsv([GOOD[0][:-1]]), "expected 40 columns, found 39"),
    ("one column", b"hello\n", "expected 40 columns, found 1"),
    ("too many columns", tsv([[*GOOD[0], ""]]), "expected 40 columns, found 41"),
    ("empty line", b"\n", "empty line"),
    ("empty line, CRLF", b"\r\n", "empty line"),
    ("label 2", tsv([changed(0, "2")]), "label must be 0 or 1, found '2'"),
    ("label missing", tsv([changed(0, "")]), "label must be 0 or 1, found ''"),
    ("label 01", tsv([changed(0, "01")]), "label must be 0 or 1, found '01'"),
    ("label 1.0", tsv([changed(0, "1.0")]), "label must be 0 or 1, found '1.0'"),
    ("label with a blank", tsv([changed(0, " 1")]), "label must be 0 or 1, found ' 1'"),
    ("label true", tsv([changed(0, "true")]), "label must be 0 or 1, found 'true'"),
    ("integer abc", tsv([changed(3, "abc")]), "I3 must be an integer, found 'abc'"),
    ("integer 1.5", tsv([changed(1, "1.5")]), "I1 must be an integer, found '1.5'"),
    ("integer 1e3", tsv([changed(13, "1e3")]), "I13 must be an integer, found '1e3'"),
    ("integer with a blank", tsv([changed(2, "5 ")]), "I2 must be an integer, found '5 '"),
    ("integer 0x1f", tsv([changed(2, "0x1f")]), "I2 must be an integer, found '0x1f'"),
    ("integer 0X1F", tsv([changed(2, "0X1F")]), "I2 must be an integer, found '0X1F'"),
    ("integer +5", tsv([changed(2, "+5")]), "I2 must be an integer, found '+5'"),
    ("integer -", tsv([changed(2, "-")]), "I2 must be an integer, found '-'"),
    ("integer 1_000", tsv([changed(2, "1_000")]), "I2 must be an integer, found '1_000'"),
    ("integer in other digits", tsv([changed(2, "٣")]), "I2 must be an integer, found '٣'"),
    ("integer NaN", tsv([changed(2, "NaN")]), "I2 must be an integer, found 'NaN'"),
    ("2**63", tsv([changed(4, str(2**63))]), f"I4 is outside the range of 64-bit integers: '{2**63}'"),
    ("-2**63 - 1", tsv([changed(4, "-9223372036854775809")]),
     "I4 is outside the range of 64-bit integers: '-9223372036854775809'"),
    ("very many digits", tsv([changed(4, "9" * 50)]), f"I4 is outside the range of 64-bit integers: '{'9' * 40}…'"),
    ("not UTF-8", tsv([GOOD[0]])[:-1] + b"\xff\n", "not UTF-8: byte 0xff in column C26"),
    ("a lone surrogate", tsv([GOOD[0]])[:-1] + b"\xed\xa0\x80\n", "not UTF-8: byte 0xed in column C26"),
    ("an integer not UTF-8", tsv([GOOD[0]]).replace(b"\t", b"\t\xfe", 1), "not UTF-8: byte 0xfe in column I1"),
    ("NUL in a category", tsv([changed(20, "a\0b")]), "a NUL byte in column C7"),
    ("NUL in an integer", tsv([changed(1, "1\0")]), "a NUL byte in column I1"),
    ("a carriage return", tsv([changed(39, "a\rb")]), "a carriage return in column C26"),
    ("two carriage returns", tsv([GOOD[0]])[:-1] + b"\r\r\n", "a carriage return in column C26"),
    ("too long", tsv([changed(39, LONG)]), f"line is longer than {_criteo.MAX_LINE_BYTES} bytes"),
    ("too long, no tabs", LONG.encode() * 40 + b"\n", f"line is longer than {_criteo.MAX_LINE_BYTES} bytes"),
    ("a byte-order mark inside", b"\xef\xbb\xbf" + tsv([changed(0, "1")]), "label must be 0 or 1, found '\\ufeff1'"),
    ("a header", b"\t".join([b"label", *(name.encode() for name in CRITEO_SCHEMA)]) + b"\n",
     "label must be 0 or 1, found 'label'"),
]  # fmt: skip


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A byte-order mark is allowed at the very start of a file, so it is not tested there (see test_readers.py).
PLACES = [
    pytest.param(line, reason, place, id=f"{name}-{place}")
    for name, line, reason in MALFORMED
    for place in range(4)
    if not (place == 0 and line.startswith(BYTE_ORDER_MARK))
]


@pytest.mark.parametrize(("line", "reason", "place"), PLACES)
def test_malformed_line(tmp_path: Path, line: bytes, reason: str, place: int) -> None:
    """It is counted, reported with its number and skipped; its neighbours are read as usual. Strict mode stops."""
    path = write(tmp_path / "a.tsv", tsv(GOOD[:place]) + line + tsv(GOOD[place:]))
    batch, reader = read_all(path, format="criteo")
    assert np.array_equal(batch.keys, expected_keys(GOOD))
    assert (reader.report.rows_good, reader.report.rows_bad) == (3, 1)
    assert [str(bad) for bad in reader.report.bad_lines] == [f"{path}:{place + 1}: {reason}"]
    with pytest.raises(ValueError, match=re.escape(f"{path}:{place + 1}: {reason}") + "$"):
        read_all(path, format="criteo", strict=True)


@pytest.mark.parametrize("text", ["-0", "007", str(2**63 - 1), str(-(2**63)), "-" + "0" * 30 + "5", "0" * 5000 + "5"])
def test_unusual_integers_that_are_good(tmp_path: Path, text: str) -> None:
    rows = [changed(1, text), GOOD[1]]
    batch, reader = read_all(write(tmp_path / "a.tsv", tsv(rows)))
    assert reader.report.rows_bad == 0
    assert np.array_equal(batch.keys, expected_keys(rows))


def test_categories_may_hold_anything_else(tmp_path: Path) -> None:
    rows = [changed(20, text) for text in (" ", 'x"y', "NA", "null", "\\N", "ünï", "a,b", "0x10", "\ufffd", "'")]
    batch, reader = read_all(write(tmp_path / "a.tsv", tsv(rows)))
    assert reader.report.rows_bad == 0
    assert np.array_equal(batch.keys, expected_keys(rows))


def test_the_first_20_bad_lines_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", tsv(GOOD) + b"bad\n" * 50)
    report = read_all(path)[1].report
    assert report.rows_bad == 50
    assert [bad.line for bad in report.bad_lines] == list(range(4, 24))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r\0"), max_size=8)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=13, max_size=13),
        st.lists(TEXT, min_size=26, max_size=26),
    ),
    min_size=1,
    max_size=4,
)


@given(ROWS)
def test_any_values_round_trip(rows: list[tuple[int, list[int | None], list[str]]]) -> None:
    """Values that are written as Criteo lines are read back with the same keys."""
    lines = [[str(y), *("" if x is None else str(x) for x in ints), *cats] for y, ints, cats in rows]
    columns = {name: pa.array([row[1][j] for row in rows], pa.int64()) for j, name in enumerate(INTEGERS)}
    columns |= {name: pa.array([row[2][j] or None for row in rows], pa.string()) for j, name in enumerate(CATEGORIES)}
    path = f"/dev/fd/{memory_file(tsv(lines))}"
    try:
        batch, reader = read_all(path, format="criteo", strict=True)
    finally:
        os.close(int(path.rsplit("/", 1)[1]))
    assert reader.report.rows_good == len(rows)
    assert np.array_equal(batch.keys, encode(columns, CRITEO_SCHEMA))
    assert batch.labels is not None
    assert batch.labels.tolist() == [row[0] for row in rows]


def memory_file(data: bytes) -> int:
    """Return a descriptor of an anonymous file with `data`: hypothesis makes too many for a directory."""
    descriptor = os.memfd_create("rows")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
