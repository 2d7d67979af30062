"""Hyper-parameters that fit float64 but not float32 are refused. Those at the limits keep every row finite."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import FTRL, SGD, Adagrad, Normal, RowWiseAdagrad, Uniform, Zeros
from hashemb.optim import with_rate

NAMES = {
    Adagrad: ("lr", "eps", "initial_accumulator_value", "weight_decay"),
    RowWiseAdagrad: ("lr", "eps", "initial_accumulator_value", "weight_decay"),
    SGD: ("lr", "weight_decay"),
    FTRL: ("alpha", "beta", "l1", "l2"),
    Uniform: ("scale",),
    Normal: ("std",),
}
PARAMETERS: list[tuple[Any, str]] = [(cls, name) for cls, names in NAMES.items() for name in names]
DIVISORS = {"eps", "initial_accumulator_value", "alpha", "beta", "l2"}
ids = [f"{cls.__name__}-{name}" for cls, name in PARAMETERS]


@pytest.mark.parametrize(("cls", "name"), PARAMETERS, ids=ids)
@pytest.mark.parametrize("value", [1e308, 3.5e38, 1.1e30, 10**31, 10**400, np.float64(1e300), np.longdouble(1e300)])
def test_too_large(cls: Any, name: str, value: Any) -> None:
    message = rf"{cls.__name__}: {name} must be .*1e30 \(.*float32.*3.4e38\), got "
    with pytest.raises(ValueError, match=message) as caught:
        cls(**{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, name in PARAMETERS if name in DIVISORS])
@pytest.mark.parametrize("value", [1e-320, 5e-324, 1e-46, 9e-31])
def test_what_is_divided_by_is_not_next_to_zero(cls: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*between 1e-30 and 1e30 .*, got {value!r}"):
        cls(**{name: value})


@pytest.mark.parametrize("cls", [Adagrad, RowWiseAdagrad])
@pytest.mark.parametrize(("lr", "eps", "a"), [(1e30, 1e-10, 0.0), (10.0, 1e-30, 0.0), (1e30, 0.0, 0.25)])
def test_the_largest_step_of_adagrad(cls: Any, lr: float, eps: float, a: float) -> None:
    with pytest.raises(ValueError, match=r"lr / \(sqrt\(initial_accumulator_value\) \+ eps\) must be at most"):
        cls(lr=lr, eps=eps, initial_accumulator_value=a)


@pytest.mark.parametrize(("beta", "alpha"), [(1e30, 1e-30), (1e-30, 1e30), (1.0, 1e-31), (1e20, 1e-15)])
def test_the_ratio_of_ftrl(beta: float, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"FTRL: (beta / alpha must be 0 or between 1e-30 and 1e30|alpha must)"):
        FTRL(alpha=alpha, beta=beta)


@pytest.mark.parametrize(("cls", "name"), PARAMETERS, ids=ids)
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.int32, np.uint8])
def test_numbers_of_numpy(cls: Any, name: str, kind: Any) -> None:
    """NumPy numbers become Python numbers: equal, serializable as JSON, and with an ordinary repr."""
    value = getattr(cls(**{name: kind(1)}), name)
    assert type(value) is float
    assert value == 1.0
    assert "np." not in repr(cls(**{name: kind(1)}))
    assert getattr(cls(**{name: np.float32(0.1)}), name) == float(np.float32(0.1))
    json.dumps(value)


@pytest.mark.parametrize("value", [np.bool_(True), np.complex64(1), np.array(0.1), "0.1", None, 1j])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Adagrad: lr must be a float, got "):
        Adagrad(lr=value)


def test_integers_stay_integers() -> None:
    """Integers are kept, as files may contain them."""
    assert type(Adagrad(lr=1).lr) is int


@pytest.fixture
def table(tmp_path: Path) -> Any:
    optimizer = Adagrad(lr=0.1, weight_decay=0.25)
    with hashemb.create(tmp_path / "t", num_embeddings=8, embedding_dim=2, optimizer=optimizer) as table:
        yield table


@pytest.mark.parametrize("value", [1e308, 1e31, 10**400, np.float64(1e300), math.inf, math.nan, -1e-300])
def test_the_rate_of_a_table(table: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"Adagrad: lr must be between 0 and 1e30 \(.*\), got "):
        table.lr = value
    assert table.lr == 0.1


def test_rates_of_numpy(table: Any) -> None:
    table.lr = np.float32(0.5)
    assert table.lr == 0.5
    table.lr = 2
    assert table.lr == 2.0


def test_a_rate_knows_the_optimiser() -> None:
    assert with_rate(FTRL(beta=0.5), 0.25) == FTRL(alpha=0.25, beta=0.5)
    assert with_rate(RowWiseAdagrad(eps=0.5), 0.25) == RowWiseAdagrad(lr=0.25, eps=0.5)
    with pytest.raises(ValueError, match="beta / alpha"):
        with_rate(FTRL(beta=1e20), 1e-20)


@pytest.mark.parametrize("optimizer", [Adagrad(eps=0), RowWiseAdagrad(eps=0.0), FTRL(beta=0)], ids=repr)
def test_a_division_of_zero_by_zero(tmp_path: Path, optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"\w+: \w+ and \w+ must not both be 0: a first gradient of 0 would"):
        hashemb.create(tmp_path / "t", num_embeddings=8, embedding_dim=2, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


EXTREMES = [
    *(cls(lr=lr, eps=eps, initial_accumulator_value=a) for cls in (Adagrad, RowWiseAdagrad)
      for lr, eps, a in ((1.0, 1e-30, 0), (0.1, 1e-30, 0), (1e-320, 1e-30, 0), (1e15, 0, 1e-30), (1e30, 1e30, 0),
                         (1e30, 1e-10, 1e30), (0.1, 1e30, 0), (1e20, 1e-10, 0))),
    *(SGD(lr=lr) for lr in (1e30, 1e-320)),
    *(FTRL(alpha=alpha, beta=beta, l1=l1, l2=l2)
      for (alpha, beta), l1, l2 in itertools.product(
          ((1e-30, 1.0), (1e-30, 0.5), (1.0, 1e30), (1e29, 1.0), (1.0, 1e-30), (0.1, 1.0)),
          (0, 1e30), (0, 1e-30, 1e30))),
    FTRL(beta=0, l2=1e-30),
]  # fmt: skip


@pytest.mark.parametrize("init", [Zeros(), Uniform(0.5)], ids=repr)
@pytest.mark.parametrize("gradients", [[0], [1e-23], [1e-38], [1, 0, -1], [1e-20, 1, 1e-20], [100, -100]], ids=str)
def test_at_the_limits_rows_stay_finite(tmp_path: Path, gradients: list[float], init: Any) -> None:
    """Rows stay finite with gradients of any size that is not large."""
    for number, optimizer in enumerate(EXTREMES):
        options = {"num_embeddings": 8, "embedding_dim": 2, "optimizer": optimizer, "init": init}
        with hashemb.create(tmp_path / str(number), **options) as table:
            for gradient in gradients:
                table.update([1], np.full((1, 2), gradient, np.float32))
            assert np.isfinite(table.lookup([1])).all(), optimizer
            assert all(np.isfinite(array).all() for array in table.state.values()), optimizer
