"""The generator is a pure function of (seed, i), with the documented distributions and labels drawn from its truth."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from criteo_lines import read_all
from scipy import sparse
from scipy.sparse.linalg import lsqr

from hashemb.ctr._power_law import draws, log_normal, power_law
from hashemb.ctr.data import CRITEO_SCHEMA
from hashemb.ctr.metrics import auc, logloss, normalized_entropy
from hashemb.ctr.synthetic import Impressions, ImpressionStream, truth_path
from hashemb.ctr.synthetic import stream as synthetic

pa = pytest.importorskip("pyarrow")

N = 60_000


@pytest.fixture(scope="module")
def stream() -> ImpressionStream:
    return ImpressionStream(seed=7)


@pytest.fixture(scope="module")
def impressions(stream: ImpressionStream) -> Impressions:
    return stream.generate(0, N)


def as_lists(part: Impressions) -> dict[str, list[Any]]:
    columns = {name: column.to_pylist() for name, column in part.columns.items()}
    return columns | {"labels": part.labels.tolist(), "probabilities": part.probabilities.tolist()}


def joined(parts: list[Impressions]) -> dict[str, list[Any]]:
    lists = [as_lists(part) for part in parts]
    return {name: [value for part in lists for value in part[name]] for name in lists[0]}


def distinct(column: Any) -> int:
    return len(column.drop_null().unique())


# ---------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("cuts", [(1, 2, 3), (1000,), (64, 128, 1024, 1025), ()])
@pytest.mark.parametrize("start", [0, 12_345, 10**15])
def test_any_pieces_give_the_same_impressions(stream: ImpressionStream, cuts: tuple[int, ...], start: int) -> None:
    edges = [start, *(start + cut for cut in cuts), start + 2000]
    parts = [stream.generate(a, b - a) for a, b in pairwise(edges)]
    assert joined(parts) == as_lists(stream.generate(start, 2000))


def test_a_new_stream_of_the_same_seed_is_the_same() -> None:
    a, b, c = (as_lists(ImpressionStream(seed=seed).generate(500, 300)) for seed in (3, 3, 4))
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_the_stream_is_pinned() -> None:
    """A change of the generator changes every figure measured on it, and must be made here too, on purpose."""
    part = ImpressionStream(seed=0).generate(10**6, 3)
    assert part.columns["I5"].to_pylist() == [13326, 2276, None]
    assert part.columns["C21"].to_pylist() == ["02ceeb46", "cb20cbf3", "6a888fda"]
    expected = [0.06801298144991555, 0.060292696614844904, 0.1561536398982942]
    assert part.probabilities.tolist() == pytest.approx(expected, rel=1e-9)


# ----------------------------------------------------------------------------------------------------- shape


def test_columns_are_criteos(impressions: Impressions) -> None:
    assert list(impressions.columns) == list(CRITEO_SCHEMA)
    assert all(impressions.columns[f"I{j}"].type == pa.int32() for j in range(1, 14))
    for j in range(1, 27):
        values = impressions.columns[f"C{j}"].dictionary_decode().drop_null().unique().to_pylist()
        assert all(len(value) == 8 and int(value, 16) >= 0 for value in values)


def test_missing_values(impressions: Impressions) -> None:
    shares = {name: column.null_count / N for name, column in impressions.columns.items()}
    assert shares["C22"] == pytest.approx(0.76, abs=0.01)
    assert shares["I12"] == pytest.approx(0.75, abs=0.01)
    assert shares["C9"] == shares["I2"] == 0
    assert sum(share > 0 for share in shares.values()) == 19


def test_counts_are_log_normal(impressions: Impressions) -> None:
    """The share of counts above a power of two is the normal tail; every column reaches its smallest value."""
    for name, (_, log2_median, log2_std, smallest) in zip(impressions.columns, synthetic._INTEGERS, strict=False):
        ranks = impressions.columns[name].drop_null().to_numpy() - (smallest - 1)
        assert ranks.min() == 1, name
        for octave in range(1, 20):
            tail = 0.5 * math.erfc((octave - log2_median) / (log2_std * math.sqrt(2)))
            assert np.mean(ranks >= 2**octave) == pytest.approx(tail, abs=0.015), (name, octave)


def test_vocabularies(stream: ImpressionStream, impressions: Impressions) -> None:
    """Vocabularies have 4 to 10**8 values; small ones are seen completely, large ones barely, and none is exceeded."""
    sizes = stream.vocabularies
    assert sorted(sizes.values())[0] == 4
    assert sorted(sizes.values())[-1] == 10**8
    seen = {name: distinct(impressions.columns[name]) for name in sizes}
    assert all(seen[name] <= size for name, size in sizes.items())
    assert all(seen[name] == size for name, size in sizes.items() if size < 200)
    assert all(seen[name] > 8_000 for name, size in sizes.items() if size > 10**7)


def test_small_vocabularies_of_a_small_stream() -> None:
    stream = ImpressionStream(seed=1, max_vocabulary=50)
    part = stream.generate(0, 20_000)
    assert max(stream.vocabularies.values()) == 50
    assert {name: distinct(part.columns[name]) for name in stream.vocabularies} == stream.vocabularies
    assert distinct(ImpressionStream(max_vocabulary=4).generate(0, 999).columns["C21"]) == 4


def test_power_law_ranks() -> None:
    """Each octave has the weight given by the law; the largest rank is reached and not exceeded."""
    words = draws(99, 0, 200_000)
    for size, exponent in ((4, 1.04), (1000, 1.2), (10**8, 1.2)):
        ranks = power_law(size, exponent).ranks(words)
        assert ranks.min() == 1
        assert ranks.max() <= size
        assert ranks.max() > 0.6 * size
        octaves = np.bincount(np.floor(np.log2(ranks)).astype(int)) / len(ranks)
        whole = octaves[: size.bit_length() - 1]
        assert np.allclose(np.log2(whole[1:] / whole[:-1]), 1 - exponent, atol=0.25)
    shares = np.bincount(power_law(10, 1.0).ranks(words), minlength=11)[1:] / len(words)
    harmonic = 1 / np.arange(1, 11)
    assert np.allclose(shares, harmonic / harmonic.sum(), rtol=0.35)


def test_log_normal_weights_sum_up() -> None:
    ranks = log_normal(5.0, 2.0).ranks(draws(5, 0, 100_000))
    assert np.median(np.log2(ranks)) == pytest.approx(5.0, abs=0.1)
    assert np.std(np.log2(ranks)) == pytest.approx(2.0, abs=0.15)


def test_popularity_drifts() -> None:
    """The most popular value differs from that of a period ago, changes gradually, and stays the same without drift."""

    def top(stream: ImpressionStream, start: int) -> str:
        column = stream.generate(start, 4000).columns["C21"].dictionary_decode()
        counts = column.value_counts()
        return str(max(counts.to_pylist(), key=lambda pair: pair["counts"])["values"])

    drifting, still = ImpressionStream(drift_period=100_000), ImpressionStream(drift_period=None)
    assert len({top(drifting, start) for start in range(0, 10**6, 200_000)}) == 5
    assert len({top(still, start) for start in range(0, 10**6, 200_000)}) == 1
    column = [drifting.generate(start, 4000).columns["C21"].dictionary_decode() for start in range(0, 200_001, 25_000)]
    favourite = top(drifting, 0)
    shares = [np.mean([value == favourite for value in part.to_pylist()]) for part in column]
    assert shares[0] > 0.02
    assert shares[-1] == 0
    assert np.abs(np.diff(shares)).max() < 0.5 * max(shares)


# ----------------------------------------------------------------------------------------------------- truth


def test_labels_are_drawn_from_the_truth(impressions: Impressions) -> None:
    """Labels are calibrated overall and in every decile of the probabilities, within four standard errors."""
    y, p = impressions.labels, impressions.probabilities
    assert p.mean() == pytest.approx(0.22, abs=0.01)
    order = np.argsort(p)
    for tenth in [order, *np.array_split(order, 10)]:
        error = np.sqrt((p[tenth] * (1 - p[tenth])).sum()) / len(tenth)
        assert y[tenth].mean() == pytest.approx(p[tenth].mean(), abs=4 * error)
    assert 0.80 < auc(y, p) < 0.86


@pytest.mark.parametrize("base_ctr", [0.01, 0.5])
def test_base_ctr(base_ctr: float) -> None:
    assert ImpressionStream(base_ctr=base_ctr).generate(0, N).probabilities.mean() == pytest.approx(base_ctr, rel=0.05)


def one_hot(columns: list[npt.NDArray[np.uint64]]) -> Any:
    """Return a sparse matrix with a column for each value of each of `columns`."""
    codes, width = [], 0
    for column in columns:
        values, code = np.unique(column, return_inverse=True)
        codes.append(code + width)
        width += len(values)
    rows = np.tile(np.arange(len(columns[0])), len(columns))
    return sparse.csr_matrix((np.ones(len(rows)), (rows, np.concatenate(codes))), (len(columns[0]), width))


def with_crosses(keys: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.uint64]]:
    """Return the columns of `keys`, and one for each of the true pairs."""
    names = list(CRITEO_SCHEMA)
    pairs = [(keys[:, names.index(a)], keys[:, names.index(b)]) for a, b in synthetic._PAIRS]
    return [*keys.T, *(a * np.uint64(3) + b for a, b in pairs)]


def test_the_truth_is_a_function_of_the_keys() -> None:
    """The effects of values and pairs explain the whole logit; without the pairs much of it is unexplained."""
    part = ImpressionStream(max_vocabulary=12, drift_period=None).generate(0, 10_000)
    logits = np.log(part.probabilities / (1 - part.probabilities))
    left = {}
    for name, columns in (("values", [*part.keys().T]), ("values and pairs", with_crosses(part.keys()))):
        solution = lsqr(one_hot(columns), logits, atol=1e-10, btol=1e-10)
        left[name] = solution[3] ** 2 / len(logits) / logits.var()
    assert left["values and pairs"] < 1e-12
    assert left["values"] > 0.1


def test_linear_models_learn_and_fall_short(stream: ImpressionStream) -> None:
    """A logistic regression beats the constant, and one that also sees the true pairs of values beats it."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    part, cut = stream.generate(0, N), N * 5 // 6
    entropy = {}
    for name, columns in (("linear", [*part.keys().T]), ("crossed", with_crosses(part.keys()))):
        x = one_hot(columns)
        model = linear_model.SGDClassifier(
            loss="log_loss", alpha=1e-3, max_iter=5, tol=None, random_state=0, average=True
        ).fit(x[:cut], part.labels[:cut])
        entropy[name] = normalized_entropy(part.labels[cut:], model.predict_proba(x[cut:])[:, 1])
    truth = normalized_entropy(part.labels[cut:], part.probabilities[cut:])
    assert truth < entropy["crossed"] - 0.05
    assert entropy["crossed"] < entropy["linear"] - 0.02
    assert entropy["linear"] < 0.95


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.parquet", "a.tsv", "a.tsv.gz", "a.tsv.zst"])
def test_written_and_read_back(
    stream: ImpressionStream, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_WRITE_ROWS", 1000)
    done: list[int] = []
    stream.write(tmp_path / name, 500, 2500, progress=done.append)
    assert done == [1000, 2000, 2500]
    expected = stream.generate(500, 2500)
    batch, reader = read_all(tmp_path / name, strict=True)
    assert reader.schema == CRITEO_SCHEMA
    assert batch.labels is not None
    assert np.array_equal(batch.labels, expected.labels)
    assert np.array_equal(batch.keys, expected.keys())
    truth = np.load(tmp_path / "a.truth.npy")
    assert truth.dtype == np.float32
    assert np.array_equal(truth, expected.probabilities.astype(np.float32))
    assert sorted(os.listdir(tmp_path)) == sorted([name, "a.truth.npy"])
    assert truth_path(tmp_path / name) == tmp_path / "a.truth.npy"


def test_parquet_file_has_criteos_names_and_types(stream: ImpressionStream, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    stream.write(tmp_path / "a.parquet", 0, 100)
    file = parquet.ParquetFile(tmp_path / "a.parquet")
    assert file.schema_arrow.names == ["label", *CRITEO_SCHEMA]
    assert file.metadata.row_group(0).column(20).compression == "ZSTD"
    file.close()


def test_a_write_that_fails_leaves_what_was_there(
    stream: ImpressionStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tsv"
    stream.write(path, 0, 50)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    monkeypatch.setattr(synthetic, "_WRITE_ROWS", 10)

    def interrupt(done: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.write(path, 50, 50, progress=interrupt)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    with pytest.raises(ValueError, match=r"a\.csv: the suffix must be one of \.parquet, \.tsv, "):
        stream.write(tmp_path / "a.csv", 0, 10)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_vocabulary": 3}, r"max_vocabulary must be between 4 and 2\*\*31, got 3"),
        ({"max_vocabulary": 2**31 + 1}, "max_vocabulary must be between 4"),
        ({"base_ctr": 0.0}, "base_ctr must be between 0 and 1, got 0.0"),
        ({"base_ctr": 1.5}, "base_ctr must be between 0 and 1, got 1.5"),
        ({"drift_period": 0}, r"drift_period must be between 1 and 2\*\*31, got 0"),
    ],
)
def test_wrong_streams(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImpressionStream(**options)


@pytest.mark.parametrize(("start", "count"), [(-1, 5), (0, -1), (2**62, 1)])
def test_wrong_ranges(stream: ImpressionStream, start: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"a range of impressions lies in \[0, 2\*\*62\), got start"):
        stream.generate(start, count)


def test_no_impressions(stream: ImpressionStream, tmp_path: Path) -> None:
    part = stream.generate(5, 0)
    assert part.keys().shape == (0, 39)
    assert np.isnan(logloss(part.labels, part.probabilities))
    for name in ("a.tsv", "a.parquet"):
        stream.write(tmp_path / name, 0, 0)
        assert len(read_all(tmp_path / name)[0].keys) == 0
