"""The numerics of the reference against independent ones: libm, exact integers, expectations of random rounding.

The kernels are compared with the reference in test_fast_equals_slow.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

import hashemb
from hashemb import reference
from hashemb.reference import numerics


def max_ulps(values, expected):
    return np.max(np.abs(values - expected) / np.spacing(np.abs(expected)))


def test_logarithm():
    x = np.concatenate([np.exp(np.random.default_rng(1).uniform(-700, 700, 20_000)), np.linspace(0.5, 2, 20_000)])
    x = x[x != 1.0]
    assert max_ulps(numerics.log(x), np.log(x)) <= 1.0
    assert numerics.log(np.array([1.0]))[0] == 0.0


def test_exponential():
    x = -np.exp(np.random.default_rng(2).uniform(-40, math.log(690), 20_000))
    assert max_ulps(numerics.exp(x), np.exp(x)) <= 1.0
    assert numerics.exp(np.array([0.0]))[0] == 1.0
    assert numerics.exp(np.array([-701.0, -1e300]))[1] == 0.0


def test_log1p_of_tiny_numbers():
    x = -np.exp(np.random.default_rng(3).uniform(-60, -0.001, 2000))
    values = np.array([numerics.log1p(float(v)) for v in x])
    assert max_ulps(values, np.log1p(x)) <= 2.0


def test_normal_quantile():
    p = np.concatenate([(np.arange(20_000) + 0.5) / 20_000, 2.0 ** -np.arange(2, 33), 1 - 2.0 ** -np.arange(2, 33)])
    np.testing.assert_allclose(numerics.normal_quantile(p), special.ndtri(p), rtol=1e-14, atol=1e-15)


def test_splitmix64_known_answers():
    """The first outputs for seed 1234567 are those published with the reference implementation of the generator."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert reference.splitmix64(1234567, np.arange(3, dtype=np.uint64)).tolist() == expected


def test_fmix64_known_answers():
    """0 is the fixed point of the function, and the value for 1 is that of MurmurHash3.cpp."""
    assert reference.fmix64(np.array([0, 1], np.uint64)).tolist() == [0, 0xB456BCFC34C2CB2C]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_is_unbiased_and_between_neighbours(name):
    rng = np.random.default_rng(4)
    for value in np.float32([1.001, -3.14159, 6.1e-5, 3e-6, -4e-8, 1e-7, 60_000.5, 0.0]):
        x, random = np.full(200_000, value, np.float32), rng.integers(0, 2**32, 200_000, dtype=np.uint32)
        if name == "bfloat16":
            rounded = numerics.from_bfloat16(numerics.to_bfloat16(x, random))
        else:
            rounded = numerics.to_float16(x, random).astype(np.float32)
        found = np.unique(rounded)
        assert len(found) <= 2, value
        assert found[0] <= value <= found[-1]
        error = (found[-1] - found[0]) * 0.5 / math.sqrt(200_000) * 5
        assert abs(rounded.mean(dtype=np.float64) - value) <= error + 1e-12


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_representable_values_are_kept(name):
    rng = np.random.default_rng(5)
    random = rng.integers(0, 2**32, 4000, dtype=np.uint32)
    bits = rng.integers(0, 2**16, 4000).astype(np.uint16)
    if name == "bfloat16":
        values = numerics.from_bfloat16(bits)
        keep = ~np.isnan(values)
        assert (numerics.to_bfloat16(values, random)[keep] == bits[keep]).all()
    else:
        values = bits.view(np.float16).astype(np.float32)
        keep = ~np.isnan(values)
        assert (numerics.to_float16(values, random).view(np.uint16)[keep] == bits[keep]).all()


@pytest.mark.parametrize("num_hashes", [1, 4])
def test_initial_values_are_distributed_as_said(tmp_path, num_hashes):
    """Check the vectors of keys, through the compiled core, for any number of hashes."""
    keys = hashemb.hash_keys(range(20_000))
    options = {"num_embeddings": 2**36, "embedding_dim": 8, "num_hashes": num_hashes, "optimizer": hashemb.SGD()}
    with hashemb.create(tmp_path / "n", init=hashemb.Normal(0.5), **options) as table:
        values = table.lookup(keys)
    assert values.std() == pytest.approx(0.5, rel=0.01)
    assert stats.kstest(values[::7].reshape(-1) / 0.5, "norm").pvalue > 1e-4
    correlation = np.corrcoef(values.T)
    assert np.abs(correlation - np.eye(8)).max() < 0.05
    with hashemb.create(tmp_path / "u", init=hashemb.Uniform(0.2), **options) as table:
        values = table.lookup(keys)
    assert values.std() == pytest.approx(0.2 / math.sqrt(3), rel=0.01)
    if num_hashes == 1:
        assert stats.kstest((values.reshape(-1) / 0.2 + 1) / 2, "uniform").pvalue > 1e-4
        assert values.min() >= -np.float32(0.2)
        assert values.max() < np.float32(0.2)


def test_rows_are_uniform_and_hashes_independent(tmp_path):
    with hashemb.create(tmp_path / "t", num_embeddings=1000, embedding_dim=1, num_hashes=2) as table:
        rows = table.rows(np.arange(200_000))
    for h in range(2):
        counts = np.bincount(rows[:, h], minlength=1000)
        assert stats.chisquare(counts).pvalue > 1e-4
    same = (rows[:, 0] == rows[:, 1]).mean()
    assert 0.0005 < same < 0.0015


def test_a_row_that_becomes_zero_is_not_an_untouched_row(tmp_path):
    """W = init - init = 0 is stored as -0.0 in its first element, and reads as 0, not as init."""
    for dtype in ("float32", "float16", "bfloat16"):
        options = {"num_embeddings": 10, "embedding_dim": 3, "dtype": dtype, "init": hashemb.Uniform(0.5)}
        with hashemb.create(tmp_path / dtype, optimizer=hashemb.SGD(lr=1.0), **options) as table:
            table.update([7], table.lookup([7]))
            assert (table.lookup([7]) == 0.0).all()
            assert np.signbit(table.lookup([7])[0, 0])
            assert table.stats(exact=True).rows_touched == 1
