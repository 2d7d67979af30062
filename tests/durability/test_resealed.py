"""Files with correct checksums but invalid values raise the documented error at once, and nothing is written."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resealed import DOCUMENTED, TEXTS, Mutation, content_of, every_field, mutations, outcomes, places

import hashemb
from hashemb._files import arrays as _arrays
from hashemb._files import format as _format
from hashemb._files import sealed as _sealed
from hashemb.errors import CorruptTableError, DeltaError, FormatError, HashembError

KINDS = ["table", "snapshot", "deltas"]
ERRORS = DOCUMENTED - {"ok", "problems"}
SLOW_S = 1.0

Tree = dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a table with every file that a table can have, a snapshot of it, and a chain of two deltas."""
    place = tmp_path_factory.mktemp("resealed")
    optimizer = hashemb.Adagrad(lr=0.1, weight_decay=0.25)
    (place / "deltas").mkdir()
    with hashemb.create(place / "table", num_embeddings=1000, embedding_dim=4, optimizer=optimizer) as table:
        train(table)
        table.snapshot(place / "snapshot", extra={"position": [1, 2.5, {"file": "a"}]})
        first = table.export_delta(None, place / "deltas" / "0.delta", state=True)
        train(table)
        table.export_delta(first, place / "deltas" / "1.delta", state=True)
    return place


def train(table: hashemb.EmbeddingTable) -> None:
    table.update(np.arange(50), np.ones((50, table.embedding_dim), np.float32))


class Copies:
    """Makes fresh copies of a directory, one at a time."""

    def __init__(self, source: Path, place: Path) -> None:
        self._source, self.path = source, place / "copy"

    def fresh(self) -> Path:
        for path in (self.path, self.path.parent / "copy.replica"):
            shutil.rmtree(path, ignore_errors=True)
        return shutil.copytree(self._source, self.path)


def tree(directory: Path) -> Tree:
    """Return the contents of the files, or only the beginning if a forged size has made one large."""
    return {file.name: b"%d " % file.stat().st_size + beginning(file) for file in sorted(directory.iterdir())}


def beginning(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(1 << 20)


def check(mutation: Mutation, copy: Path, *, write: bool = True) -> dict[str, str]:
    """Check that every way to read the copy promptly gives a documented outcome, and that a table that cannot be
    opened is not written to.
    """
    before, start = tree(copy), time.process_time()
    found = outcomes(copy, write=write)
    taken = time.process_time() - start
    assert set(found.values()) <= DOCUMENTED, (mutation, found)
    assert taken < SLOW_S, (mutation, taken)
    if found.get("open r+", "ok") in ERRORS:
        assert tree(copy) == before, mutation
    if found.get("info", "ok") in ERRORS and mutation.file != "snapshot.json":  # `open` does not use it
        assert {found[name] for name in ("open r", "open r+") if name in found} <= ERRORS, (mutation, found)
        assert found["verify"] == "problems", (mutation, found)
    return found


# ---- at random ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seal", ["", "sum", "all"])
def test_mutations(made: Path, tmp_path: Path, kind: str, seal: Any) -> None:
    copies, refused, changed = Copies(made / kind, tmp_path), 0, 0
    for mutation in mutations(made / kind, random.Random(f"{kind} {seal}"), 40, seal=seal):
        copy = copies.fresh()
        assert Mutation.decode(mutation.encode()) == mutation
        if mutation.apply(copy):
            changed += 1
            refused += not {"ok"} >= set(check(mutation, copy).values())
    assert changed > 30
    assert refused > 15, "hardly anything was wrong"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_field_with_every_text(made: Path, tmp_path: Path, kind: str) -> None:
    copies = Copies(made / kind, tmp_path)
    for mutation in every_field(made / kind):
        copy = copies.fresh()
        if mutation.apply(copy):
            check(mutation, copy)


def json_values() -> st.SearchStrategy[Any]:
    numbers = st.one_of(st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.integers(0, 5000))
    scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=40), st.sampled_from(["0" * 32, "f" * 64]))
    return st.recursive(
        scalars, lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=8), parts, max_size=4)
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_any_value_of_any_field(made: Path, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([name for name in small_files(made / kind) if name != "control"]))
    where = data.draw(st.sampled_from(list(places(content_of((made / kind / file).read_bytes())))))
    text = json.dumps(data.draw(json_values()))
    mutation = Mutation("set", file, where, text, data.draw(st.sampled_from(["sum", "all"])))
    copy = Copies(made / kind, tmp_path).fresh()
    if mutation.apply(copy):
        check(mutation, copy)


def small_files(directory: Path) -> Iterator[str]:
    yield from (path.name for path in sorted(directory.iterdir()) if path.suffix in (".json", ".delta"))


# ---- one by one ----


#: Values that must be refused: file, where, text, and the message.
REFUSED: list[tuple[str, tuple[str | int, ...], str, str]] = [
    ("meta.json", ("block_rows",), "1023", "block_rows to be 256 for its rows, found 1023"),
    ("meta.json", ("block_rows",), "128", "block_rows to be 256 for its rows, found 128"),
    ("meta.json", ("block_rows",), "0", "block_rows to be an integer from 1 to 4096, found 0"),
    ("meta.json", ("num_hashes",), str(10**30), r"num_hashes to be an integer from 1 to 16, found 1000"),
    ("meta.json", ("num_hashes",), "7" * 400, "num_hashes .* found an integer of 1329 bits"),
    ("meta.json", ("num_hashes",), "true", "num_hashes .* found True"),
    ("meta.json", ("num_hashes",), "1.0", "num_hashes .* found 1.0"),
    ("meta.json", ("num_embeddings",), str(2**63), r"num_embeddings to be an integer from 1 to \d+, found 92233"),
    ("meta.json", ("num_embeddings",), str(2**61), r"files of up to 9223372036854775807 bytes, found that \d+ rows"),
    ("meta.json", ("num_embeddings",), "999", "files to be what follows from the rest, found an object of 4 fields"),
    ("meta.json", ("files", "weight.npy", "bytes"), "20097", "files to be what follows from the rest"),
    ("meta.json", ("embedding_dim",), str(2**24 + 1), "embedding_dim to be an integer from 1 to 16777216"),
    ("meta.json", ("seed",), str(2**64), "seed to be an integer from 0 to 18446744073709551615"),
    ("meta.json", ("dtype",), '["float32"]', "dtype to be 'float32' or .*, found a list of 1"),
    ("meta.json", ("id",), '"' + "F" * 32 + '"', "id to be 32 hexadecimal digits"),
    ("meta.json", ("created_by",), '"\\u001b[31m"', r"created_by to be a printable text .* found '\\x1b\[31m'"),
    ("meta.json", ("hash",), '"md5"', "hash to be 'murmur3-x64-128.* found 'md5'"),
    ("meta.json", ("optimizer", "kind"), "[]", "optimizer.kind to be 'adagrad' or .* found a list of 0"),
    ("meta.json", ("optimizer", "lr"), "1e308", "lr must be between 0 and 1e30 .*, got 1e308"),
    ("meta.json", ("optimizer", "eps"), "1e-320", "eps must be 0 or between 1e-30 and 1e30 .*, got 1e-320"),
    ("meta.json", ("optimizer", "lr"), "7" * 400, "lr must be .* got an integer of 1329 bits"),
    ("meta.json", ("optimizer", "lr"), "[" * 900 + "]" * 900, "expected JSON nested up to 256 deep, found deeper"),
    ("meta.json", ("init", "scale"), "7" * 5000, "expected JSON, .* an integer of 5000 digits, more than 4300"),
    ("meta.json", ("init", "scale"), "NaN", "expected JSON, .* NaN is no number of JSON"),
    ("meta.json", ("init", "scale"), '"' + "a" * 70_000 + '"', "scale must be a float, got str 'aaa.* and 69960 more"),
    ("control", ("epoch",), "0000000001000000", "epoch to be an integer from 1 to 4294967295, found 4294967296"),
    ("control", ("step",), "ff" * 8, "step to be an integer from 0 to 9223372036854775807, found 18446744073709551615"),
    ("control", ("lr",), struct.pack("<d", 1e31).hex(), "lr to be a number from 0 to 1e30, found 1e31"),
    ("control", ("saving",), "0900000000000000", "a snapshot of an epoch up to 4 in progress, found 9"),
    ("control", ("save_errno",), "ff" * 8, "save_errno to be an integer from 0 to 4095"),
    ("control", ("gate_closing",), "ff" * 8, "gate_closing to be an integer from 0 to 1"),
    ("history.json", ("points", 1, "sequence"), "0", "expected points after Point.*, found Point"),
    ("history.json", ("points", 0, "epoch"), str(2**32), r"points\[0\].epoch to be an integer from 1 to 4294967295"),
    ("history.json", ("points", 0, "id"), '["x"]', r"points\[0\].id to be 32 hexadecimal digits, found a list of 1"),
    ("history.json", ("points", 0, "kind"), '"x"', r"points\[0\].kind to be 'snapshot' or 'delta', found 'x'"),
    ("history.json", ("points", 0), "null", r"points\[0\] to be an object, found None"),
    ("history.json", ("points",), "{}", "points to be a list of up to 1000 points, found an object of 0 fields"),
    ("history.json", ("applying",), '"x"', "applying to be 32 hexadecimal digits, or None, found 'x'"),
    ("history.json", ("format",), "2", "has format 2, this version reads up to 1"),
]


def calls_of(file: str, path: Path) -> list[Callable[[], object]]:
    calls: list[Callable[[], object]] = [lambda: hashemb.open(path, "r"), lambda: hashemb.open(path, "r+")]
    return calls if file == "history.json" else [*calls, lambda: hashemb.info(path)]


@pytest.mark.parametrize(
    ("file", "where", "text", "message"), REFUSED, ids=[f"{c[0]} {c[1]} {c[2][:20]}" for c in REFUSED]
)
def test_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, where: Any, text: str, message: str
) -> None:
    """The value is refused before anything is mapped, by `info` and by `verify` too."""
    copy = Copies(made / "table", tmp_path).fresh()
    seal: Any = "all" if where == ("block_rows",) else "sum"
    assert Mutation("field" if file == "control" else "set", file, where, text, seal).apply(copy)
    before = tree(copy)
    monkeypatch.setattr(_arrays, "map_file", lambda *args: pytest.fail("something was mapped"))
    for call in calls_of(file, copy):
        with pytest.raises(FormatError, match=message):
            call()
    assert [problem for problem in hashemb.verify(copy) if problem.file == str(copy / file)]
    assert tree(copy) == before


def test_a_rate_that_the_optimiser_cannot_have(tmp_path: Path) -> None:
    """`verify` finds it, because it checks the page against the table."""
    with hashemb.create(tmp_path / "t", num_embeddings=8, embedding_dim=2, optimizer=hashemb.FTRL()):
        pass
    Mutation("field", "control", ("lr",), "00" * 8).apply(tmp_path / "t")
    (problem,) = hashemb.verify(tmp_path / "t")
    assert problem.found.startswith("that FTRL: alpha must be between 1e-30 and 1e30")


def test_a_header_of_npy_that_exhausts_a_parser(made: Path, tmp_path: Path) -> None:
    for header in (b"(" * 4000, b"-" * 4000 + b"1", b"{'shape': " + b"[" * 3000, b"'" * 4000, b"\xff" * 4000):
        copy = Copies(made / "table", tmp_path).fresh()
        data = bytearray((copy / "weight.npy").read_bytes())
        data[10 : 10 + len(header)] = header
        (copy / "weight.npy").write_bytes(data)
        with pytest.raises(CorruptTableError, match=r"unreadable \.npy header"):
            hashemb.open(copy)


# ---- deltas ----

DELTA_REFUSED: list[tuple[tuple[str, ...], str, str]] = [
    (("step",), str(2**64), "step to be an integer from 0 to 9223372036854775807, found 18446744073709551616"),
    (("rows_touched",), str(2**64), "rows_touched to be an integer"),
    (("rows_touched",), "7" * 400, "rows_touched .* found an integer of 1329 bits"),
    (("sequence",), "1.0", "sequence to be an integer"),
    (("sequence",), str(2**32), "sequence to be an integer from 0 to 4294967295"),
    (("to_epoch",), "0", "to_epoch to be an integer from 1"),
    (("from_epoch",), str(2**31), r"from_epoch below \d+, found 2147483648"),
    (("from_epoch",), "0", "from_epoch from 1 with a parent, found 0"),
    (("parent",), "null", "from_epoch 0 without a parent"),
    (("parent",), "[]", "parent to be 32 hexadecimal digits, or None"),
    (("parent_sequence",), "2", "parent_sequence from 0 and below"),
    (("parent_sequence",), "-1", "parent_sequence from 0 and below"),
    (("lr",), "1e31", "lr to be a number from 0 to 1e30"),
    (("lr",), "4.0", "a rate of the optimiser, found that Adagrad: lr \\* weight_decay must be < 1"),
    (("decay_total",), '"x"', "decay_total to be a finite number"),
    (("created",), "1e300", "created to be a number"),
    (("state",), "1", "state to be true or false"),
    (("id",), '"x"', "id to be 32 hexadecimal digits"),
    (("table", "num_hashes"), str(10**30), "table.num_hashes to be an integer from 1 to 16"),
    (("table", "block_rows"), "255", "table.block_rows to be 256 for its rows, found 255"),
    (("table",), "[]", "table to be an object, found a list of 0"),
    (("index_hash",), '"x"', "index_hash to be 64 hexadecimal digits"),
]


@pytest.mark.parametrize(
    ("where", "text", "message"), DELTA_REFUSED, ids=[f"{c[0]} {c[1][:20]}" for c in DELTA_REFUSED]
)
def test_a_delta_is_refused_before_a_row_is_written(
    made: Path, tmp_path: Path, where: Any, text: str, message: str
) -> None:
    copy = Copies(made / "deltas", tmp_path).fresh()
    assert Mutation("set", "1.delta", where, text).apply(copy)
    optimizer = hashemb.Adagrad(lr=0.1, weight_decay=0.25)
    with hashemb.create(tmp_path / "r", num_embeddings=1000, embedding_dim=4, optimizer=optimizer) as replica:
        hashemb.apply_delta(replica, copy / "0.delta")
        before = tree(tmp_path / "r")
        for call in (hashemb.delta_info, lambda path: hashemb.apply_delta(replica, path)):
            with pytest.raises(FormatError, match=message):
                call(copy / "1.delta")
        assert tree(tmp_path / "r") == before
    assert hashemb.check_delta(copy / "1.delta")
    status = hashemb.follow(tmp_path / "r", copy)
    assert list(status.skipped) == ["1.delta"]


def test_a_rate_that_a_replica_of_another_optimiser_cannot_have(tmp_path: Path) -> None:
    """Without state the optimisers may differ, and an alpha of 0 would cause a division by 0."""
    options: dict[str, Any] = {"num_embeddings": 100, "embedding_dim": 2}
    with hashemb.create(tmp_path / "s", **options, optimizer=hashemb.SGD(lr=0.0)) as source:
        train(source)
        source.export_delta(None, tmp_path / "0.delta")
    with hashemb.create(tmp_path / "r", **options, optimizer=hashemb.FTRL()) as replica:
        before = tree(tmp_path / "r")
        with pytest.raises(DeltaError, match=r"cannot take the delta's learning rate: FTRL: alpha must be"):
            hashemb.apply_delta(replica, tmp_path / "0.delta")
        assert tree(tmp_path / "r") == before


# ---- saving.json, which a writer reads while a snapshot is taken ----


def test_the_note_of_a_snapshot_in_progress(made: Path) -> None:
    meta = _format.decode_meta((made / "table" / "meta.json").read_bytes(), "meta.json")
    good = {"directory": "/tmp/x", "names": ["weight", "paid"], "since": 0, "until": 3}
    assert _format.decode_saving(json.dumps(good).encode(), "saving.json", meta) == good
    for name in good:
        for text in TEXTS:
            data = json.dumps(good | {name: "@"}).replace('"@"', text).encode()
            if (name, text) not in {("names", "[]"), ("since", "0"), ("since", "-0"), ("since", "1"), ("since", "2")}:
                is_fine = name == "until" and text.isdigit() and 1 <= int(text[:40]) < 2**32
                if not is_fine:
                    with pytest.raises(FormatError, match=r"saving.json: "):
                        _format.decode_saving(data, "saving.json", meta)
    for wrong in ({"names": ["blocks"]}, {"names": ["../x"]}, {"since": 3}, {"directory": "x"}, {"more": 1}):
        with pytest.raises(FormatError):
            _format.decode_saving(json.dumps(good | wrong).encode(), "saving.json", meta)


def test_what_is_written_is_what_is_read(made: Path) -> None:
    """The checks refuse nothing that the package itself writes."""
    for kind in KINDS:
        for file in small_files(made / kind):
            data = (made / kind / file).read_bytes()
            if not file.endswith(".delta"):
                assert _sealed.dump_checked(_sealed.load_checked(data, file, 1)) == data
    assert hashemb.verify(made / "table") == hashemb.verify(made / "snapshot") == []


@pytest.mark.parametrize("call", ["snapshot", "export_delta", "apply_delta"])
def test_a_table_whose_epochs_are_used_up(tmp_path: Path, call: str) -> None:
    """It says so, still looks up and updates, and nothing is left where the snapshot or delta would have been."""
    with hashemb.create(tmp_path / "s", num_embeddings=1000, embedding_dim=4) as source:
        source.export_delta(None, tmp_path / "x.delta")
    with hashemb.create(tmp_path / "t", num_embeddings=1000, embedding_dim=4) as table:
        control = table._files.control  # type: ignore[union-attr]
        control["epoch"] = 2**32 - 1
        before = {path.name for path in tmp_path.iterdir()}
        calls: dict[str, Callable[[], Any]] = {
            "snapshot": lambda: table.snapshot(tmp_path / "new"),
            "export_delta": lambda: table.export_delta(None, tmp_path / "new"),
            "apply_delta": lambda: hashemb.apply_delta(table, tmp_path / "x.delta"),
        }
        with pytest.raises(HashembError, match="all 4294967295 epochs of the table are used up"):
            calls[call]()
        assert {path.name for path in tmp_path.iterdir()} == before
        table.update([1], np.ones((1, 4), np.float32))
        assert table.step == 1
