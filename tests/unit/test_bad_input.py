"""Bad arguments, one case per line: each is refused with the right error and its numbers, and nothing is written.

A case is a name, a call on an open table `t` (64 rows of 3 float32, row-wise Adagrad with weight decay, some rows
trained), the error, and a pattern for its message. The bytes of all files of the table are compared before and after.
Damaged tables are tested in test_bad_tables.py, bad lines of data files with their readers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import hashemb
from hashemb import errors

Case = tuple[str, Callable[[Any], object], type[Exception], str]

K = np.arange(6)
G = np.ones((6, 3), np.float32)
P = np.ones((2, 3), np.float32)
O = np.array([0, 4, 6])  # noqa: E741
NAN, INF = np.nan, np.inf
CSR = sparse.csr_matrix(np.eye(4, dtype=np.float32))


def with_value(array: Any, at: tuple[int, ...], value: float) -> Any:
    changed = array.copy()
    changed[at] = value
    return changed


# Keys: the error for a non-integer names the function that converts it to an integer.
KEYS: list[Case] = [
    ("float keys", lambda t: t.lookup([1.0, 2.0]), TypeError, r"keys must be integers, got dtype float64.*hash_keys"),
    ("float32 array", lambda t: t.lookup(K.astype("f4")), TypeError, r"got dtype float32.*hash_keys"),
    ("bool keys", lambda t: t.lookup([True, False]), TypeError, r"got dtype bool"),
    ("str keys", lambda t: t.lookup(["ann", "bob"]), TypeError, r"got dtype <U3.*hash_keys"),
    ("one str", lambda t: t.lookup("ann"), TypeError, r"got dtype <U3"),
    ("bytes keys", lambda t: t.lookup([b"ann"]), TypeError, r"got dtype \|S3"),
    ("None", lambda t: t.lookup(None), TypeError, r"got dtype object"),
    ("mixed keys", lambda t: t.lookup([1, None]), TypeError, r"got dtype object"),
    ("complex keys", lambda t: t.lookup([1j]), TypeError, r"got dtype complex128"),
    ("dates", lambda t: t.lookup(np.array(["2024-01-01"], "M8[D]")), TypeError, r"got dtype datetime64\[D\]"),
    ("past 64 bits", lambda t: t.lookup([2**64]), TypeError, r"got dtype object"),
    ("below 64 bits", lambda t: t.lookup([-(2**63) - 1]), TypeError, r"got dtype object"),
    ("float empty", lambda t: t.lookup(np.empty(0)), TypeError, r"got dtype float64"),
    ("ragged", lambda t: t.lookup([[1, 2], [3]]), ValueError, r"inhomogeneous"),
    ("rows of str", lambda t: t.rows(["ann"]), TypeError, r"keys must be integers, got dtype <U3"),
    ("rows of floats", lambda t: t.rows(K / 2), TypeError, r"keys must be integers, got dtype float64"),
    ("update str", lambda t: t.update(["a"] * 6, G), TypeError, r"keys must be integers, got dtype <U1"),
    ("update floats", lambda t: t.update(K / 1, G), TypeError, r"keys must be integers, got dtype float64"),
    ("update dict", lambda t: t.update({1: 2}, G), TypeError, r"got dtype object"),
    ("CSC", lambda t: t.lookup(CSR.tocsc()), TypeError, r"CSR format, got csc: convert with \.tocsr\(\)"),
    ("COO", lambda t: t.update(CSR.tocoo(), G[:4]), TypeError, r"CSR format, got coo"),
    ("CSR and offsets", lambda t: t.lookup(CSR, offsets=O), ValueError, r"CSR matrix brings its own offsets"),
    ("CSR and weights", lambda t: t.lookup(CSR, per_sample_weights=[1.0] * 4), ValueError, r"brings its own"),
    ("CSR and shape", lambda t: t.update(CSR, G), ValueError, r"grads must have shape \(4, 3\), got \(6, 3\)"),
]

# Bags.
BAGS: list[Case] = [
    ("offsets fall", lambda t: t.lookup(K, offsets=[0, 5, 3, 6]), ValueError, r"offsets\[1\] is 5, offsets\[2\] is 3"),
    ("offsets start", lambda t: t.lookup(K, offsets=[1, 6]), ValueError, r"offsets must start at 0, got 1"),
    ("offsets overrun", lambda t: t.lookup(K, offsets=[0, 7]), ValueError, r"number of keys, 6, got 7"),
    ("offsets fall short", lambda t: t.lookup(K, offsets=[0, 5]), ValueError, r"number of keys, 6, got 5"),
    ("negative offset", lambda t: t.lookup(K, offsets=[-1, 6]), ValueError, r"offsets must start at 0, got -1"),
    (
        "huge offset",
        lambda t: t.lookup(K, offsets=np.array([0, 2**63], "u8")),
        ValueError,
        r"6 keys, got 9223372036854",
    ),
    ("no offsets", lambda t: t.lookup(K, offsets=[]), TypeError, r"offsets must be integers, got dtype float64"),
    (
        "empty offsets",
        lambda t: t.lookup(K, offsets=np.empty(0, int)),
        ValueError,
        r"at least one entry, got shape \(0,\)",
    ),
    ("2-d offsets", lambda t: t.lookup(K, offsets=[[0, 6]]), ValueError, r"\(num_bags \+ 1,\).*got shape \(1, 2\)"),
    ("0-d offsets", lambda t: t.lookup(K, offsets=0), ValueError, r"got shape \(\)"),
    (
        "float offsets",
        lambda t: t.lookup(K, offsets=[0.0, 6.0]),
        TypeError,
        r"offsets must be integers, got dtype float64",
    ),
    (
        "bool offsets",
        lambda t: t.lookup(K[:1], offsets=[False, True]),
        TypeError,
        r"offsets must be integers, got dtype bool",
    ),
    ("str offsets", lambda t: t.lookup(K, offsets=["0", "6"]), TypeError, r"offsets must be integers, got dtype <U1"),
    ("2-d keys", lambda t: t.lookup(K.reshape(2, 3), offsets=O), ValueError, r"one-dimensional.*got shape \(2, 3\)"),
    ("0-d keys", lambda t: t.lookup(np.int64(1), offsets=[0, 1]), ValueError, r"one-dimensional.*got shape \(\)"),
    ("pooling max", lambda t: t.lookup(K, offsets=O, pooling="max"), ValueError, r"'sum', 'mean', 'sqrtn', got 'max'"),
    ("pooling Sum", lambda t: t.lookup(K, offsets=O, pooling="Sum"), ValueError, r"got 'Sum'"),
    ("pooling None", lambda t: t.lookup(K, offsets=O, pooling=None), ValueError, r"got None"),
    ("pooling 1", lambda t: t.update(K, P, offsets=O, pooling=1), ValueError, r"got 1"),
    ("mean alone", lambda t: t.lookup(K, pooling="mean"), ValueError, r"pooling='mean' needs offsets"),
    (
        "weights alone",
        lambda t: t.lookup(K, per_sample_weights=G[:, 0]),
        ValueError,
        r"per_sample_weights needs offsets",
    ),
    (
        "few weights",
        lambda t: t.lookup(K, offsets=O, per_sample_weights=G[:5, 0]),
        ValueError,
        r"shape \(6,\), got \(5,\)",
    ),
    ("2-d weights", lambda t: t.lookup(K, offsets=O, per_sample_weights=G), ValueError, r"shape \(6,\), got \(6, 3\)"),
    (
        "int weights",
        lambda t: t.lookup(K, offsets=O, per_sample_weights=K),
        TypeError,
        r"weights must be floats, got dtype int64",
    ),
    (
        "str weights",
        lambda t: t.lookup(K, offsets=O, per_sample_weights=["1"] * 6),
        TypeError,
        r"must be floats, got dtype <U1",
    ),
    (
        "NaN weight",
        lambda t: t.update(K, P, offsets=O, per_sample_weights=with_value(G[:, 0], (4,), NAN)),
        ValueError,
        r"per_sample_weights\[4\] is nan",
    ),
    (
        "weight past float32",
        lambda t: t.lookup(K, offsets=O, per_sample_weights=np.full(6, 1e39)),
        ValueError,
        r"per_sample_weights\[0\] is inf in float32",
    ),
    (
        "mean of weights near 0",
        lambda t: t.update(K, P, offsets=O, pooling="mean", per_sample_weights=np.full(6, 1e-45, np.float32)),
        ValueError,
        r"weight of key 0 in its bag must be finite",
    ),
]

# Gradients: their shape is that of the look-up, and their values are finite in float32.
GRADS: list[Case] = [
    ("few grads", lambda t: t.update(K, G[:5]), ValueError, r"grads must have shape \(6, 3\), got \(5, 3\)"),
    ("narrow grads", lambda t: t.update(K, G[:, :2]), ValueError, r"shape \(6, 3\), got \(6, 2\)"),
    ("transposed grads", lambda t: t.update(K, G.T), ValueError, r"shape \(6, 3\), got \(3, 6\)"),
    ("flat grads", lambda t: t.update(K, G.ravel()), ValueError, r"shape \(6, 3\), got \(18,\)"),
    ("scalar grads", lambda t: t.update(K, 1.0), ValueError, r"shape \(6, 3\), got \(\)"),
    ("no grads", lambda t: t.update(K, None), TypeError, r"grads must be floats, got dtype object"),
    ("grads of keys", lambda t: t.update(K, G, offsets=O), ValueError, r"shape \(2, 3\), got \(6, 3\)"),
    ("grads of bags", lambda t: t.update(K, P), ValueError, r"shape \(6, 3\), got \(2, 3\)"),
    ("2-d keys, flat grads", lambda t: t.update(K.reshape(2, 3), G), ValueError, r"shape \(2, 3, 3\), got \(6, 3\)"),
    ("0-d key, 2-d grads", lambda t: t.update(np.int64(1), G[:1]), ValueError, r"shape \(3,\), got \(1, 3\)"),
    ("int grads", lambda t: t.update(K, G.astype(int)), TypeError, r"grads must be floats, got dtype int64"),
    ("bool grads", lambda t: t.update(K, G > 0), TypeError, r"grads must be floats, got dtype bool"),
    ("str grads", lambda t: t.update(K, G.astype(str)), TypeError, r"grads must be floats, got dtype <U32"),
    ("complex grads", lambda t: t.update(K, G * 1j), TypeError, r"grads must be floats, got dtype complex64"),
    ("NaN", lambda t: t.update(K, with_value(G, (4, 1), NAN)), ValueError, r"finite: grads\[4, 1\] is nan"),
    ("inf", lambda t: t.update(K, with_value(G, (5, 2), INF)), ValueError, r"finite: grads\[5, 2\] is inf"),
    ("-inf", lambda t: t.update(K, with_value(G, (0, 0), -INF)), ValueError, r"finite: grads\[0, 0\] is -inf"),
    ("past float32", lambda t: t.update(K, np.full((6, 3), 1e39)), ValueError, r"grads\[0, 0\] is inf in float32"),
    (
        "NaN of a bag",
        lambda t: t.update(K, with_value(P, (1, 0), NAN), offsets=O, pooling="mean"),
        ValueError,
        r"grads\[1, 0\] is nan",
    ),
    (
        "NaN at the end of a big batch",
        lambda t: t.update(np.arange(50_000), with_value(np.ones((50_000, 3), "f4"), (49_999, 2), NAN)),
        ValueError,
        r"grads\[49999, 2\] is nan",
    ),
]

# The output array of a look-up, and the learning rate of the table.
OUT_AND_RATE: list[Case] = [
    (
        "out float64",
        lambda t: t.lookup(K, out=np.empty((6, 3))),
        TypeError,
        r"out must be a float32 array, got float64",
    ),
    ("out list", lambda t: t.lookup(K, out=[[0.0] * 3] * 6), TypeError, r"out must be a float32 array, got list"),
    ("out big-endian", lambda t: t.lookup(K, out=np.empty((6, 3), ">f4")), TypeError, r"float32 array, got >f4"),
    ("out shape", lambda t: t.lookup(K, out=np.empty((5, 3), "f4")), ValueError, r"shape \(6, 3\), got \(5, 3\)"),
    (
        "out of bags",
        lambda t: t.lookup(K, offsets=O, out=np.empty((6, 3), "f4")),
        ValueError,
        r"shape \(2, 3\), got \(6, 3\)",
    ),
    (
        "out strided",
        lambda t: t.lookup(K, out=np.empty((6, 6), "f4")[:, ::2]),
        ValueError,
        r"C-contiguous, aligned and writeable",
    ),
    ("out Fortran", lambda t: t.lookup(K, out=np.empty((3, 6), "f4").T), ValueError, r"aligned and writeable"),
    ("out is the table", lambda t: t.lookup(K, out=t.weight[:6]), ValueError, r"C-contiguous, aligned and writeable"),
    ("weight is a view", lambda t: t.weight.fill(0), ValueError, r"read-only"),
    ("state is a view", lambda t: t.state["accumulator"].fill(0), ValueError, r"read-only"),
    ("positional offsets", lambda t: t.lookup(K, O), TypeError, r"positional"),
    ("negative lr", lambda t: setattr(t, "lr", -0.1), ValueError, r"lr must be between 0 and 1e30 .*got -0.1"),
    ("NaN lr", lambda t: setattr(t, "lr", NAN), ValueError, r"lr must be between .*got nan"),
    ("infinite lr", lambda t: setattr(t, "lr", INF), ValueError, r"lr must be between .*got inf"),
    ("lr too large for the decay", lambda t: setattr(t, "lr", 4.0), ValueError, r"must be < 1, got 4.0 \* 0.25 = 1.0"),
    ("str lr", lambda t: setattr(t, "lr", "0.1"), TypeError, r"lr must be a float, got str '0.1'"),
    ("bool lr", lambda t: setattr(t, "lr", True), TypeError, r"lr must be a float, got bool True"),
    ("None lr", lambda t: setattr(t, "lr", None), TypeError, r"lr must be a float, got NoneType None"),
    ("step is counted", lambda t: setattr(t, "step", 7), AttributeError, r"step"),
    ("no threads", lambda t: hashemb.set_num_threads(0), ValueError, r"between 1 and 64, got 0"),
    ("many threads", lambda t: hashemb.set_num_threads(65), ValueError, r"between 1 and 64, got 65"),
    ("half a thread", lambda t: hashemb.set_num_threads(0.5), TypeError, r"must be an integer, got float 0.5"),  # type: ignore[arg-type]
    ("True threads", lambda t: hashemb.set_num_threads(True), TypeError, r"must be an integer, got bool True"),
]

CALLS = [*KEYS, *BAGS, *GRADS, *OUT_AND_RATE]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hashemb.EmbeddingTable]:
    path = tmp_path_factory.mktemp("bad") / "t.emb"
    optimizer = hashemb.RowWiseAdagrad(lr=0.1, weight_decay=0.25)
    with hashemb.create(path, num_embeddings=64, embedding_dim=3, optimizer=optimizer) as table:
        table.update(np.arange(20), np.ones((20, 3), np.float32))
        yield table


def test_there_are_enough_cases_and_no_name_twice() -> None:
    names = [name for name, *_ in CALLS]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_call(table: hashemb.EmbeddingTable, call: Callable[[Any], object], error: Any, message: str) -> None:
    before = file_bytes(Path(table.path))
    with pytest.raises(error, match=message):
        call(table)
    assert file_bytes(Path(table.path)) == before


def test_canary_a_good_call_changes_bytes(table: hashemb.EmbeddingTable) -> None:
    before = file_bytes(Path(table.path))
    table.update(K, G)
    changed = {name for name, data in file_bytes(Path(table.path)).items() if data != before[name]}
    assert changed >= {"weight.npy", "accumulator.npy", "paid.npy", "control"}


def test_an_error_leaves_the_table_usable(table: hashemb.EmbeddingTable) -> None:
    """A refused update does not affect the next one and is not counted as a step."""
    step, before = table.step, table.lookup(K)
    with pytest.raises(ValueError, match="finite"):
        table.update(K, with_value(G, (5, 2), NAN))
    np.testing.assert_array_equal(table.lookup(K), before)
    table.update(K, G)
    assert table.step == step + 1
    assert (table.lookup(K) < before).all()


# ---- tables that are read-only or closed ----

USES: list[tuple[str, Callable[[Any], object]]] = [
    ("lookup", lambda t: t.lookup(K)),
    ("rows", lambda t: t.rows(K)),
    ("update", lambda t: t.update(K, G)),
    ("lr", lambda t: t.lr),
    ("lr=", lambda t: setattr(t, "lr", 0.1)),
    ("weight", lambda t: t.weight),
    ("state", lambda t: t.state),
    ("step", lambda t: t.step),
    ("stats", lambda t: t.stats()),
    ("flush", lambda t: t.flush()),
    ("with", lambda t: t.__enter__()),
]


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_closed_table_says_so(table: hashemb.EmbeddingTable, mode: Any) -> None:
    closed = hashemb.open(table.path, mode)
    closed.close()
    closed.close()
    before = file_bytes(Path(table.path))
    for _, use in USES:
        with pytest.raises(errors.ClosedTableError, match=re.escape(f"{table.path} has been closed")):
            use(closed)
    assert "closed" in repr(closed)
    assert file_bytes(Path(table.path)) == before


@pytest.mark.parametrize("use", [use for name, use in USES if name in ("update", "lr=")], ids=["update", "lr="])
def test_a_read_only_table_says_how_to_open_it(table: hashemb.EmbeddingTable, use: Callable[[Any], object]) -> None:
    before = file_bytes(Path(table.path))
    with hashemb.open(table.path) as reader:
        with pytest.raises(errors.ReadOnlyTableError, match=r'open read-only; open it with mode="r\+"'):
            use(reader)
        reader.flush()
    assert file_bytes(Path(table.path)) == before


def test_ftrl_needs_a_rate_above_zero(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "t", num_embeddings=4, embedding_dim=1, optimizer=hashemb.FTRL()) as table:
        with pytest.raises(ValueError, match=r"alpha must be between 1e-30 and 1e30 .*, got 0"):
            table.lr = 0.0
        assert table.lr == 0.05
