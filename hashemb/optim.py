"""Optimisers: frozen dataclasses that hold and check hyper-parameters. The arithmetic is in the kernels.

Every class has the same small protocol, which `table.py` and `_files/format.py` rely on: `kind` (the name in
`meta.json`), `lr` (the rate a table starts with) and `state_files` (which arrays the optimiser keeps in addition to
the weights, and whether each holds one value per row or per element).

The kernels compute in float32, where 1e308 is infinite and 1e-320 is 0. Hyper-parameters are therefore at most 1e30,
and divisors are 0 or at least 1e-30, so that gradients and weights of ordinary size stay finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from hashemb._rules import LARGEST, SMALLEST, hyper_parameter

__all__ = ["FTRL", "SGD", "Adagrad", "Optimizer", "RowWiseAdagrad"]

Shape = Literal["row", "element"]


def _check(optimizer: Any, name: str, low: float = 0.0, *, zero: bool = True) -> None:
    """Check that a hyper-parameter is in its range, and store it as a Python number."""
    value = hyper_parameter(type(optimizer).__name__, name, getattr(optimizer, name), low, zero=zero)
    object.__setattr__(optimizer, name, value)


def _check_decay(optimizer: Adagrad | SGD) -> None:
    _check(optimizer, "lr")
    _check(optimizer, "weight_decay")
    lr, weight_decay = optimizer.lr, optimizer.weight_decay
    if lr * weight_decay >= 1.0:
        owner = type(optimizer).__name__
        raise ValueError(
            f"{owner}: lr * weight_decay must be < 1, got {lr!r} * {weight_decay!r} = {lr * weight_decay!r}"
        )


def with_rate(optimizer: Optimizer, lr: Any) -> Optimizer:
    """Return the optimiser with another rate; raise `TypeError` or `ValueError` if the rate is invalid."""
    return replace(optimizer, alpha=lr) if isinstance(optimizer, FTRL) else replace(optimizer, lr=lr)


def check_divisor(optimizer: Optimizer) -> None:
    """Raise `ValueError` if a first gradient of 0, or close to 0, would be divided by 0."""
    if isinstance(optimizer, SGD):
        return
    one, other = ("beta", "l2") if isinstance(optimizer, FTRL) else ("eps", "initial_accumulator_value")
    if not getattr(optimizer, one) and not getattr(optimizer, other):
        owner = type(optimizer).__name__
        raise ValueError(f"{owner}: {one} and {other} must not both be 0: a first gradient of 0 would make a row NaN")


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """Element-wise Adagrad: ``a += g²; w -= lr * g / (sqrt(a) + eps)``, as `torch.optim.Adagrad`.

    Parameters
    ----------
    lr : float
        Learning rate, 0 to 1e30, and at most 1e30 times ``sqrt(initial_accumulator_value) + eps``.
    eps : float
        Term added to the square root: 0, or 1e-30 to 1e30.
    initial_accumulator_value : float
        Initial value of every accumulator: 0, or 1e-30 to 1e30. It is an offset, and the file holds only the sum of
        squares. `hashemb.create` rejects 0 for both this and `eps`, as a first gradient of 0 would give 0 / 0.
    weight_decay : float
        Decoupled decay λ, 0 to 1e30, with ``lr * λ < 1``. Each step multiplies every weight of the table by exactly
        ``1 - lr * λ``, although only the rows that a batch reads or writes are visited.

    Raises
    ------
    TypeError
        A parameter is not a number. NumPy numbers are accepted and stored as Python numbers.
    ValueError
        A parameter is out of range.

    References
    ----------
    Duchi, Hazan, Singer: Adaptive Subgradient Methods, JMLR 12 (2011). Decoupled decay: Loshchilov, Hutter,
    ICLR 2019.
    """

    lr: float = 0.01
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0
    weight_decay: float = 0.0

    kind: ClassVar[str] = "adagrad"
    state_files: ClassVar[dict[str, Shape]] = {"accumulator": "element"}

    def __post_init__(self) -> None:
        _check_decay(self)
        _check(self, "eps", SMALLEST)
        _check(self, "initial_accumulator_value", SMALLEST)
        divisor = math.sqrt(self.initial_accumulator_value) + self.eps
        if divisor and self.lr / divisor > LARGEST:
            ratio = "lr / (sqrt(initial_accumulator_value) + eps)"
            raise ValueError(f"{type(self).__name__}: {ratio} must be at most 1e30, got {self.lr / divisor!r}")


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(Adagrad):
    """Row-wise Adagrad, one accumulator per row: ``a += mean(g²); w -= lr / (sqrt(a) + eps) * g``.

    Parameters and decay are as for `Adagrad`. The formula is FBGEMM's ``EXACT_ROWWISE_ADAGRAD``; the state takes
    ``1 / embedding_dim`` of the memory that `Adagrad` needs.

    References
    ----------
    Mudigere et al.: Software-Hardware Co-design for Fast and Scalable Training of Deep Learning
    Recommendation Models, ISCA 2022, section 4.1.4.
    """

    kind: ClassVar[str] = "rowwise_adagrad"
    state_files: ClassVar[dict[str, Shape]] = {"accumulator": "row"}


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent without state: ``w -= lr * g``. `weight_decay` is as for `Adagrad`."""

    lr: float = 0.01
    weight_decay: float = 0.0

    kind: ClassVar[str] = "sgd"
    state_files: ClassVar[dict[str, Shape]] = {}

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclass(frozen=True, kw_only=True)
class FTRL:
    """FTRL-Proximal with per-coordinate rates.

    ``sigma = (sqrt(n + g²) - sqrt(n)) / alpha;  z += g - sigma * w;  n += g²;``
    ``w = 0 if |z| <= l1 else -(z - sign(z) * l1) / ((beta + sqrt(n)) / alpha + l2)``

    A row's `z` starts at the value for which the last line gives the row's initial weight (0 for `Zeros`), so
    that a random initialisation survives the first update.

    Parameters
    ----------
    alpha : float
        Learning rate (the table's `lr`), 1e-30 to 1e30.
    beta : float
        Smoothing of the learning rate: 0, or 1e-30 to 1e30, and likewise ``beta / alpha``. `hashemb.create` rejects 0
        for both this and `l2`, as a first gradient near 0 would be divided by 0.
    l1, l2 : float
        Regularisation strengths, 0 to 1e30; `l2` is 0 or at least 1e-30. FTRL has its own L2 and no `weight_decay`.

    References
    ----------
    McMahan et al.: Ad Click Prediction: a View from the Trenches, KDD 2013, Algorithm 1.
    """

    alpha: float = 0.05
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    kind: ClassVar[str] = "ftrl"
    state_files: ClassVar[dict[str, Shape]] = {"z": "element", "n": "element"}
    weight_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check(self, "alpha", SMALLEST, zero=False)
        _check(self, "beta", SMALLEST)
        _check(self, "l1")
        _check(self, "l2", SMALLEST)
        if self.beta and not SMALLEST <= (ratio := self.beta / self.alpha) <= LARGEST:
            raise ValueError(f"FTRL: beta / alpha must be 0 or between 1e-30 and 1e30, got {ratio!r}")

    @property
    def lr(self) -> float:
        """Learning rate that a table starts with: `alpha`."""
        return self.alpha


Optimizer = Adagrad | RowWiseAdagrad | SGD | FTRL
