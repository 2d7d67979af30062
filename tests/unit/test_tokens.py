"""The Criteo tokeniser equals the careful path (line by line, Arrow columns, `fields.encode`) bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from criteo_lines import INTEGERS, criteo_rows, read_all, same, tsv, write
from hypothesis import given, settings
from hypothesis import strategies as st

from hashemb import _runtime
from hashemb.ctr.data import CRITEO_SCHEMA, Batch, Kind, ReadReport, _tokens, bucketize_counts
from hashemb.ctr.data import criteo_source as _criteo
from hashemb.ctr.data.fields import CountBuckets

pytest.importorskip("pyarrow")

INT64_MAX = 2**63 - 1
SCHEMAS: list[dict[str, Kind]] = [
    dict(CRITEO_SCHEMA),
    {"C26": "string", "I13": "integer", "C1": "string", "I1": "count"},
    {"I5": "count"},
    dict(reversed(CRITEO_SCHEMA.items())),
]


@pytest.fixture(autouse=True, scope="module", params=["baseline", "avx512"])
def isa(request: Any) -> Iterator[None]:
    if request.param not in _runtime.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = _runtime.get_isa()
    _runtime.set_isa(request.param)
    yield
    _runtime.set_isa(before)


class Lines:
    """A stream of bytes with the interface of `Stream`."""

    name = "lines"
    bytes_read = 0

    def __init__(self, data: bytes) -> None:
        self._data = data

    def peek(self, size: int) -> bytes:
        return self._data[:size]

    def read(self, size: int) -> bytes:
        data, self._data = self._data[:size], self._data[size:]
        return data


def fast(data: bytes, schema: dict[str, Kind], *, labelled: bool = True) -> tuple[Batch, list[tuple[int, str]]]:
    """Return what the source reads, and what it refuses."""
    source = _criteo.CriteoSource.__new__(_criteo.CriteoSource)
    source._stream, source._labelled = Lines(data), labelled  # type: ignore[assignment]
    bad: list[tuple[int, str]] = []
    parts = list(source.batches(schema, lambda line, reason: bad.append((line, reason))))
    labels = [part.labels for part in parts if part.labels is not None]
    keys = np.concatenate([np.empty((0, len(schema)), np.uint64), *(part.keys for part in parts)])
    return Batch(np.concatenate(labels) if labels else None, keys), sorted(bad)


def careful(data: bytes, schema: dict[str, Kind], *, labelled: bool = True) -> tuple[Batch, list[tuple[int, str]]]:
    """Return the same with `line_fault` and Arrow only."""
    text = data.removeprefix(b"\xef\xbb\xbf")
    text = (text if text.endswith(b"\n") or not text else text + b"\n").replace(b"\r\n", b"\n")
    good, bad = [], []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        fault = _criteo.line_fault(line, labelled=labelled)
        if fault is None:
            good.append(line.split(b"\t"))
        else:
            bad.append((number, fault))
    if not good:
        return Batch(None, np.empty((0, len(schema)), np.uint64)), bad
    labels = np.array([line[0] == b"1" for line in good], np.float32) if labelled else None
    return Batch(labels, _criteo._keys_of([line[labelled:] for line in good], schema)), bad


def compare(data: bytes, schema: dict[str, Kind], *, labelled: bool = True) -> None:
    (got, refused), (want, faults) = fast(data, schema, labelled=labelled), careful(data, schema, labelled=labelled)
    assert refused == faults
    assert np.array_equal(got.keys, want.keys)
    if want.labels is not None:
        assert got.labels is not None
        assert np.array_equal(got.labels, want.labels)


integers = st.one_of(
    st.sampled_from(["", "0", "-0", "007", "-1", "12345678", "123456789", "9" * 18, "9" * 19, "-", "+5", "5 ", "0x1f"]),
    st.integers(-(2**63) - 2, 2**63 + 1).map(str),
    st.integers(-10, 5000).map(str),
    st.text("0123456789-+. x", max_size=20),
)
categories = st.one_of(
    st.sampled_from(["", "05db9164", "x" * 15, "x" * 16, "x" * 17, "y" * 100, "ünï", "\ufffd", "😀", "a b", "0x10"]),
    st.text("0123456789abcdef", max_size=40),
    st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]), max_size=5),
)
lines = st.tuples(
    st.sampled_from(["0", "1", "0", "1", "", "2", "01"]),
    st.lists(integers, min_size=13, max_size=13),
    st.lists(categories, min_size=26, max_size=26),
)
ODD = [bytes([byte]) for byte in b"\t\n\r\0 x-09\x0b\x80\xff\xc3\xe2\xf0"] + [b"\r\n", b"\xef\xbb\xbf"]


@settings(max_examples=60, deadline=None)
@given(st.lists(lines, min_size=1, max_size=3), st.sampled_from(SCHEMAS), st.booleans())
def test_equals_the_careful_way(rows: list[Any], schema: dict[str, Kind], labelled: bool) -> None:
    data = "".join("\t".join([*([label] * labelled), *ints, *cats]) + "\n" for label, ints, cats in rows)
    compare(data.encode(), schema, labelled=labelled)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_good_lines_with_odd_bytes(data: st.DataObject) -> None:
    """Insert, remove and change bytes in good lines."""
    text = bytearray(tsv(criteo_rows(3, seed=data.draw(st.integers(0, 5)))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(ODD) | st.binary(max_size=3))
    compare(bytes(text), data.draw(st.sampled_from(SCHEMAS)))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_all_refused(data: bytes, labelled: bool) -> None:
    compare(data, SCHEMAS[0], labelled=labelled)


def test_blocks_cut_at_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = criteo_rows(4, seed=3)
    data = tsv(rows[:2]) + b"bad\n" + tsv(rows[2:]).replace(b"\n", b"\r\n") + b"\n" + tsv(rows[:1])[:-1]
    want = careful(data, SCHEMAS[0])
    assert [line for line, _ in want[1]] == [3, 6]
    for block_bytes in [*range(1, 300), *range(300, len(data), 37), len(data), len(data) + 1]:
        monkeypatch.setattr(_criteo, "_BLOCK_BYTES", block_bytes)
        got = fast(data, SCHEMAS[0])
        assert got[1] == want[1]
        assert same(got[0], want[0]), block_bytes


def test_every_width_of_line_and_place_of_a_tab() -> None:
    """Lines may end at any of the 64 bytes that are examined together, including the end of the text."""
    row = criteo_rows(1, seed=8)[0]
    for width in range(66):
        row[39] = "e" * width
        compare(tsv([row, row]), SCHEMAS[0])


def test_buckets_are_those_of_the_rule() -> None:
    """Compare with `bucketize_counts` on both sides of every edge, at every power of two, and at random."""
    tables = CountBuckets.all()
    rng = np.random.default_rng(0)
    edges = np.concatenate([tables.first[:-1], tables.first[1:] - 1, 2 ** np.arange(63), 2 ** np.arange(1, 63) - 1])
    random = rng.integers(0, INT64_MAX, 3000) >> rng.integers(0, 63, 3000)
    counts = np.unique(np.concatenate([edges, random, np.arange(-5, 5000), [INT64_MAX, -INT64_MAX]]))
    assert len(counts) > 10_000
    row = criteo_rows(1)[0]
    padded = np.append(counts, np.full(-len(counts) % 13, 7)).reshape(-1, 13)
    data = tsv([[row[0], *map(str, values), *row[14:]] for values in padded.tolist()])
    counted, _ = fast(data, dict.fromkeys(INTEGERS, "count"))
    buckets = bucketize_counts(padded)
    as_buckets = tsv([[row[0], *map(str, values), *row[14:]] for values in buckets.tolist()])
    plain, _ = fast(as_buckets, dict.fromkeys(INTEGERS, "integer"))
    assert np.array_equal(counted.keys, plain.keys)


def test_the_careful_way_is_rarely_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary lines and other alphabets never take it; an integer of 19 digits does, but its neighbours don't."""
    taken: list[int] = []
    monkeypatch.setattr(_criteo, "_keys_of", lambda lines, schema: taken.append(len(lines)) or 0)
    rows = criteo_rows(50)
    rows[7][20] = "Ελληνικά"
    fast(tsv(rows), SCHEMAS[0])
    assert taken == []
    rows[8][1] = str(INT64_MAX)
    fast(tsv(rows), SCHEMAS[0])
    assert taken == [1]


def test_strict_reading_stops_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", tsv(criteo_rows(3)) + b"\n" + tsv(criteo_rows(3)))
    with pytest.raises(ValueError, match=r"a\.tsv:4: empty line$"):
        read_all(path, strict=True)
    report: ReadReport = read_all(path)[1].report
    assert (report.rows_good, report.rows_bad) == (6, 1)


def test_a_block_of_nothing_but_line_ends() -> None:
    """A row is reserved only for a line that could be valid."""
    got, bad = fast(b"\n" * 5000, SCHEMAS[0])
    assert len(got.keys) == 0
    assert len(bad) == 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": [(0, 1, False)]}, "1 columns"),
        ({"num_keys": 3}, "a place past 3"),
        ({"first": np.zeros(3, np.int64)}, "a bucket past 3"),
        ({"small": np.zeros(10, np.int16)}, "10 and 64 buckets"),
    ],
)
def test_tokeniser_arguments(change: dict[str, Any], message: str) -> None:
    tables = CountBuckets.all()
    columns = [(i, i, i < 13) for i in range(39)]
    arguments = {"columns": columns, "num_keys": 39, **tables._asdict()} | change
    with pytest.raises(ValueError, match=message):
        _tokens.CriteoTokenizer(**arguments)


def test_tokeniser_wants_whole_lines() -> None:
    tables = CountBuckets.all()
    tokenizer = _tokens.CriteoTokenizer([(i, i, i < 13) for i in range(39)], 39, *tables)
    with pytest.raises(ValueError, match="the last of 3 bytes must end a line, found 0x63"):
        tokenizer.tokenize(b"abc", True)
    assert [len(array) for array in tokenizer.tokenize(b"", True)[:3]] == [0, 0, 0]
