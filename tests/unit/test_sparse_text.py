"""libsvm, libffm and Vowpal Wabbit text: the tokeniser against its slow twin, fields, labels, faults, and files."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from criteo_lines import compress, write
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_lines import Example, FaultError, parse_line

import hashemb
from hashemb.ctr.data import Batch, _tokens, open_reader
from hashemb.ctr.data import sparse_source as _sparse_text

pytest.importorskip("pyarrow")

FORMATS = ("libsvm", "libffm", "vw")
GOOD = {
    "libsvm": b"1 3:0.5 7:1\n-1 2:1 # a comment\n-1 1:-2e-3\n",
    "libffm": b"1 0:3:0.5 2:7:1\n-1 2:1:1\n-1 site:5:1\n",
    "vw": b"1 2.5 'tag|user ann age:0.5 |ad:2 shoes\n-1 |ad hats\n-1 tag| plain:3\n",
}


def read(path: Any, **options: Any) -> tuple[list[Batch], Any]:
    with open_reader(path, **options) as reader:
        return list(reader), reader


def key(field: bytes, name: bytes | int) -> int:
    return int(hashemb.hash_keys(name, field=field.decode()))


def expected(examples: list[Example], names: list[str]) -> dict[str, Any]:
    features = [feature for example in examples for feature in example.features]
    return {
        "keys": [key(field, name) for field, name, _ in features],
        "values": [float(np.float32(value)) for _, _, value in features],
        "fields": [names.index(field.decode()) for field, _, _ in features],
        "offsets": np.cumsum([0, *(len(example.features) for example in examples)]).tolist(),
        "labels": [example.label for example in examples],
        "weights": [float(np.float32(example.weight)) for example in examples],
    }


def as_lists(batch: Batch) -> dict[str, Any]:
    arrays = {name: array for name, array in batch._asdict().items() if name != "numbering"}
    return {name: None if array is None else array.tolist() for name, array in arrays.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_file_holds(tmp_path: Path, format: str) -> None:
    """The format is recognised by the contents of the file, and the examples are those of the slow twin."""
    (batch,), reader = read(write(tmp_path / "data.txt", GOOD[format]))
    examples = [parse_line(format, line) for line in GOOD[format].splitlines()]
    want = expected([example for example in examples if example is not None], reader.field_names)
    want |= {"weights": want["weights"] if format == "vw" else None}
    want |= {"fields": want["fields"] if format != "libsvm" else None}
    assert as_lists(batch) == want
    assert (reader.format, reader.label, reader.report.rows_bad) == (format, "label", 0)
    assert reader.schema == {
        "libsvm": {"": "integer"},
        "libffm": {"0": "integer", "2": "integer", "site": "integer"},
        "vw": {"user": "string", "ad": "string", "": "string"},
    }[format]
    assert [array.dtype for array in (batch.keys, batch.values, batch.offsets)] == ["uint64", "float32", "int64"]


PIECES = {
    "libsvm": [b"1", b"-1", b"0", b"2", b"+1", b" ", b"\t", b":", b"12", b"0.5", b"-", b"1e-3", b"#", b"x", b"9" * 19],
    "libffm": [b"1", b"0", b" ", b":", b"7", b"0:1:1", b"f:2:0.5", b"1:", b"#", b"1e40", b"\xff", b"1e-400"],
    "vw": [
        b"1", b"-1", b" ", b"|", b":", b"a", b"b c", b"'t", b"1.5", b"|u x", b"-2", b"\t", b"\xff", b"1e39", b"|n:2",
    ],
}  # fmt: skip


@settings(max_examples=700, deadline=None)
@given(st.data())
def test_tokeniser_equals_its_slow_twin(data: st.DataObject) -> None:
    """On lines composed of the tokens of the formats, both return the same examples and refuse the same lines."""
    format = data.draw(st.sampled_from(FORMATS))
    labelled = data.draw(st.booleans())
    pieces = st.lists(st.sampled_from(PIECES[format]), max_size=12).map(b"".join)
    starts = st.sampled_from([b"", b"1 ", b"1 |n f:1 ", b"0 1:1:1 ", b"1 2:3 "])
    lines = [data.draw(starts) + data.draw(pieces) for _ in range(data.draw(st.integers(1, 4)))]
    compare_with_twin(format, lines, labelled)


def compare_with_twin(format: str, lines: list[bytes], labelled: bool) -> None:
    examples, faulty = [], []
    for line_number, line in enumerate(lines):
        try:
            example = parse_line(format, line, labelled=labelled)
        except FaultError:
            faulty.append(line_number)
        else:
            examples += [example] if example is not None else []
    source = _sparse_text.ExampleSource.__new__(_sparse_text.ExampleSource)
    source.name, source.label_values, source._format, source.format = "lines", None, format, format  # type: ignore
    source._meanings = _sparse_text._MEANINGS if labelled else None
    schema: dict[str, Any] = {"": "integer"} if format == "libsvm" else {}
    bad: list[int] = []
    table = _sparse_text._field_table(schema)
    text = b"".join(line + b"\n" for line in lines)
    batch = source._parse(text, 0, schema, table, lambda line, reason: bad.append(line))
    assert sorted(bad) == faulty
    got = {name: [] if array is None else array for name, array in as_lists(batch).items()}
    want = expected(examples, list(schema))
    assert got["keys"] == want["keys"]
    assert got["values"] == want["values"]
    assert got["offsets"] == want["offsets"]
    assert got["labels"] == (want["labels"] if labelled else [])
    assert got["fields"] == (want["fields"] if format != "libsvm" else [])
    assert got["weights"] == (want["weights"] if format == "vw" else [])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(max_size=200), st.booleans())
def test_random_bytes_never_crash(format: str, text: bytes, labelled: bool) -> None:
    compare_with_twin(format, text.split(b"\n"), labelled)


NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.floats(allow_nan=False, allow_infinity=False, min_value=-3e38, max_value=3e38).map(lambda x: f"{x:.30g}"),
    st.from_regex(r"[-+]?[0-9]{1,25}(\.[0-9]{0,25})?([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.from_regex(r"[-+0-9.eEx]{0,8}", fullmatch=True),
)


@settings(max_examples=600, deadline=None)
@given(NUMBERS)
def test_numbers_are_those_of_float(text: str) -> None:
    """Numbers are correctly rounded, to double and then to float32; anything but a finite number is refused."""
    compare_with_twin("libsvm", [b"1 1:" + text.encode()], True)


REFUSED = {
    "libsvm": [
        (b"", "empty line"), (b" \t ", "empty line"),
        (b"2 1:1", "label must be -1, 0 or 1, found '2'"), (b"yes 1:1", "label must be -1, 0 or 1, found 'yes'"),
        (b"1:1 2:1", "no label"), (b"1 5", "expected index:value, found '5'"),
        (b"1 a:1", "index must be an integer of at most 18 digits, found 'a'"),
        (b"1 :1", "index must be an integer of at most 18 digits, found ''"),
        (b"1 1234567890123456789:1", "index must be an integer of at most 18 digits, found '1234567890123456789'"),
        (b"1 1:nan", "value must be a finite number, found 'nan'"),
        (b"1 1:", "value must be a finite number, found ''"),
        (b"1 1:1e39", "value must be a finite number, found '1e39'"),
        (b"1 qid:3 1:1", "index must be an integer of at most 18 digits, found 'qid'"),
    ],
    "libffm": [
        (b"1 1:2", "expected field:index:value, found '1:2'"), (b"1 :2:3", "expected field:index:value, found ':2:3'"),
        (b"1 a:b:3", "index must be an integer of at most 18 digits, found 'b'"),
        (b"1 a:1:3:4", "value must be a finite number, found '3:4'"),
        (b"1 \xff:1:3", r"not UTF-8 in the name of a field: '\\xff'"),
    ],
    "vw": [
        (b"1 a b", "no '|' in the line"), (b"|a b", "no label"), (b"1|a b", "no label"),
        (b"1 2 3 |a b", "expected a label and an importance before the first '|', found '1 2 3 '"),
        (b"1 -2 |a b", "importance must be a number >= 0, found '-2'"),
        (b"1 |a:x b", "scale of a namespace must be a finite number, found 'x'"),
        (b"1 |a b:c", "value must be a finite number, found 'c'"),
        (b"1 |a :2", "a feature without a name: ':2'"),
        (b"1 |a:1e30 b:1e30", "value must be a finite number, found 'b:1e30'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("format", "line", "reason"), [(f, *case) for f in FORMATS for case in REFUSED[f]])
def test_refused_lines(tmp_path: Path, format: str, line: bytes, reason: str) -> None:
    """They are counted, reported with number and reason, and don't affect their neighbours."""
    path = write(tmp_path / "a", GOOD[format] + line + b"\r\n" + GOOD[format])
    (batch,), reader = read(path, format=format)
    assert [str(bad) for bad in reader.report.bad_lines] == [f"{path}:4: {reason}"]
    (once,), _ = read(write(tmp_path / "b", GOOD[format]))
    assert np.array_equal(batch.keys, np.tile(once.keys, 2))
    with pytest.raises(ValueError, match="a:4: "):
        read(path, format=format, strict=True)


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    data = (GOOD[format] + REFUSED[format][-1][0] + b"\r\n") * 5
    path = write(tmp_path / "a", data)
    (whole,), reader = read(path, format=format)
    for block_bytes in [*range(1, 80), len(data)]:
        monkeypatch.setattr(_sparse_text, "_BLOCK_BYTES", block_bytes)
        (batch,), other = read(path, format=format)
        assert as_lists(batch) == as_lists(whole), block_bytes
        assert other.report == reader.report
        assert other.schema == reader.schema


@pytest.mark.parametrize("format", FORMATS)
def test_batches_compression_and_start(tmp_path: Path, format: str) -> None:
    plain = write(tmp_path / "a", GOOD[format] * 10)
    (whole,), _ = read(plain)
    stored = [plain, write(tmp_path / "a.gz", gzip.compress(GOOD[format] * 10))]
    stored += [write(tmp_path / f"a.{suffix}", compress(GOOD[format] * 10, codec))
               for suffix, codec in (("zst", "zstd"), ("bz2", "bz2"))]  # fmt: skip
    for path in stored:
        batches, reader = read(path, batch_size=7)
        assert [batch.num_examples for batch in batches] == [7, 7, 7, 7, 2]
        assert np.array_equal(np.concatenate([batch.keys for batch in batches]), whole.keys)
        assert [batch.offsets[0] for batch in batches] == [0] * 5
        lengths = np.concatenate([np.diff(batch.offsets) for batch in batches])
        assert np.array_equal(lengths, np.diff(whole.offsets))
        assert reader.bytes_read == os.path.getsize(path)
    (rest,), reader = read([plain, plain], start=40)
    assert as_lists(rest) == as_lists(whole.examples(10, 30))
    assert reader.report.rows_good == 60


def test_fields_keep_their_numbers(tmp_path: Path) -> None:
    """A second file, or one read with the schema of the first, gets the same numbers; new fields get the next ones."""
    first = write(tmp_path / "a.vw", b"1 |a x |b y\n-1 |b y\n")
    second = write(tmp_path / "b.vw", b"1 |c z |b y\n-1 |a x\n")
    (batch,), reader = read([first, second])
    assert batch.fields.tolist() == [0, 1, 1, 2, 1, 0]
    assert reader.schema == {"a": "string", "b": "string", "c": "string"}
    (batch,), reader = read(second, schema={"a": "string", "b": "string"})
    assert batch.fields.tolist() == [2, 1, 0]
    assert reader.field_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"a\.vw: column 'a' holds string values and can't be read as integer"):
        open_reader(first, schema={"a": "integer"}, format="vw")


def test_a_field_that_comes_late_and_very_many(tmp_path: Path) -> None:
    lines = b"".join(b"1 |f%d x |g y\n" % i for i in range(3000))
    (batch,), reader = read(write(tmp_path / "a.vw", lines), batch_size=5000)
    assert len(reader.schema) == 3001
    names = np.array(reader.field_names)
    assert names[batch.fields[::2]].tolist() == [f"f{i}" for i in range(3000)]
    assert batch.keys[2] == key(b"f1", b"x")


def seconds(work: Callable[[], Any], tries: int = 3) -> float:
    """Return the minimum of a few measurements: other work on the machine can only add time."""
    taken = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


MANY_FIELDS: dict[str, Callable[[int], bytes]] = {
    "one line.libffm": lambda n: b"1 " + b" ".join(b"f%d:1:1" % i for i in range(n)) + b"\n",
    "one line.vw": lambda n: b"1 " + b" ".join(b"|n%d a" % i for i in range(n)) + b"\n",
    "a line each.libffm": lambda n: b"".join(b"1 f%d:1:1\n" % i for i in range(n)),
    "a line each.vw": lambda n: b"".join(b"1 |n%d a\n" % i for i in range(n)),
    "a faulty line.vw": lambda n: GOOD["vw"] + b"1 " + b" ".join(b"|n%d a" % i for i in range(n)) + b" :\n",
}


@pytest.mark.parametrize("name", MANY_FIELDS)
def test_time_is_linear_in_the_number_of_fields(tmp_path: Path, name: str) -> None:
    """Four times as many names take four times as long; reading the line again for each name would take 16 times."""
    few, many = (write(tmp_path / f"{n} {name}", MANY_FIELDS[name](n)) for n in (4_000, 16_000))
    (batch,), reader = read(many, batch_size=16_000)
    assert len(reader.schema) >= 16_000
    assert batch.num_examples + reader.report.rows_bad == many.read_bytes().count(b"\n")
    assert seconds(lambda: read(many), tries=2) < 9 * seconds(lambda: read(few), tries=4)


def test_time_to_recognise_a_format_is_linear() -> None:
    """Regression: a number that matched in several ways gave 2^n matches on a line of n features with a final fault."""
    few, many = (b"1 " + b"1:12 " * features + b"x\n" for features in (10, 22))
    assert seconds(lambda: _sparse_text.recognise(many), 1) < 50 * seconds(lambda: _sparse_text.recognise(few)) + 0.01
    assert _sparse_text.recognise(many) is None
    digits = [b"1" * n + b"x |a b\n" for n in (500, 4000)]
    short, long = (seconds(lambda text=text: _sparse_text._look_at(text, "vw")) for text in digits)
    assert long < 24 * short + 0.01, "8 times as many digits, 64 times as long"


def test_more_fields_than_there_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_text, "MAX_FIELDS", 2)
    with pytest.raises(ValueError, match=r"a\.vw:2: more than 2 fields, 'c' among them"):
        read(write(tmp_path / "a.vw", b"1 |a x |b y\n1 |c z\n"))


def test_lines_without_labels(tmp_path: Path) -> None:
    for format, line in (("libsvm", b"3:1 4:1\n"), ("libffm", b"0:3:1\n"), ("vw", b"'tag |a x\n")):
        (batch,), reader = read(write(tmp_path / f"a.{format}", line * 3))
        assert (batch.labels, batch.num_examples, reader.label) == (None, 3, None)
    with pytest.raises(ValueError, match=r"b\.vw has labels and .*a\.vw has none"):
        read([tmp_path / "a.vw", write(tmp_path / "b.vw", GOOD["vw"])])


def test_labels_of_other_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.libsvm", b"2 1:1\n1 1:1\n2 2:1\n")
    (batch,), reader = read(path)
    assert (batch.labels.tolist(), reader.label_values) == ([1, 0, 1], ("1", "2"))
    (batch,), reader = read(path, positive="1")
    assert batch.labels.tolist() == [0, 1, 0]
    (batch,), _ = read(write(tmp_path / "b.libsvm", b"1 1:1\n"), schema=reader.schema, label_values=reader.label_values)
    assert batch.labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"c\.svm: the label has more than two values: '1', '2', '3'"):
        open_reader(write(tmp_path / "c.svm", b"1 1:1\n2 1:1\n3 1:1\n" * 3))
    with pytest.raises(ValueError, match="labels of a libsvm file are numbers, not 'no' and 'yes'"):
        open_reader(path, label_values=("no", "yes"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "y"}, "a vw file has no column 'y' for the label"),
        ({"numeric": ["a"]}, "a vw file has no column 'a' to choose a kind for"),
    ],
)
def test_options_that_need_columns(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_reader(write(tmp_path / "a.vw", GOOD["vw"]), **options)


def test_forms_that_do_not_mix(tmp_path: Path) -> None:
    for format in FORMATS:
        write(tmp_path / f"a.{format}", GOOD[format])
    write(tmp_path / "a.csv", b"label,0,2,site\n1,3,7,5\n")
    with pytest.raises(ValueError, match=r"a\.libffm has examples of any number of features and .*a\.csv has none"):
        read([tmp_path / "a.csv", tmp_path / "a.libffm"])


def test_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line longer than a block is valid; one above the maximum length is a fault, however long it is."""
    monkeypatch.setattr(_sparse_text, "_BLOCK_BYTES", 100)
    long = b"1 " + b" ".join(b"%d:1" % i for i in range(1000)) + b"\n"
    (batch,), _ = read(write(tmp_path / "a.svm", GOOD["libsvm"] + long))
    assert np.diff(batch.offsets).tolist() == [2, 1, 1, 1000]
    monkeypatch.setattr(_sparse_text, "MAX_LINE_BYTES", 200)
    (batch,), reader = read(tmp_path / "a.svm")
    assert batch.num_examples == 3
    assert reader.report.bad_lines[0].line == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _tokens.tokenize_examples(b"1 1:1", "libsvm", _tokens.FieldTable(8), None, 99), "must end a line"),
        (lambda: _tokens.tokenize_examples(b"1\n", "libsvm", _tokens.FieldTable(8), None, 99), "needs one field"),
    ],
)
def test_tokeniser_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
