"""Optimisers: frozen dataclasses that hold and check hyper-parameters. The arithmetic is in the kernels.

Every class has the same small protocol, which `table.py` and `_format.py` rely on: `kind` (the name in
`meta.json`), `lr` (the rate a table starts with) and `state_files` (which arrays the optimiser keeps beside
the weights, and whether an array holds one value a row or one an element).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = ["FTRL", "SGD", "Adagrad", "Optimizer", "RowWiseAdagrad"]

Shape = Literal["row", "element"]


def _check(owner: str, name: str, value: float, *, above: float = 0.0, inclusive: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a float, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or value < above or (value == above and not inclusive):
        relation = ">=" if inclusive else ">"
        raise ValueError(f"{owner}: {name} must be finite and {relation} {above:g}, got {value!r}")


def _check_decay(owner: str, lr: float, weight_decay: float) -> None:
    _check(owner, "weight_decay", weight_decay)
    if lr * weight_decay >= 1.0:
        raise ValueError(
            f"{owner}: lr * weight_decay must be < 1, got {lr!r} * {weight_decay!r} = {lr * weight_decay!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """Element-wise Adagrad: ``a += g²; w -= lr * g / (sqrt(a) + eps)``, as `torch.optim.Adagrad`.

    Parameters
    ----------
    lr : float
        Learning rate, >= 0.
    eps : float
        Added to the root, >= 0.
    initial_accumulator_value : float
        What every accumulator starts at, >= 0. Stored as an offset: the file holds only the sum of squares.
    weight_decay : float
        Decoupled decay λ, >= 0: each step multiplies every weight of the table by ``1 - lr * λ``, exactly,
        though only the rows that a batch reads or writes are visited.

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
        owner = type(self).__name__
        _check(owner, "lr", self.lr)
        _check(owner, "eps", self.eps)
        _check(owner, "initial_accumulator_value", self.initial_accumulator_value)
        _check_decay(owner, self.lr, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(Adagrad):
    """Row-wise Adagrad, one accumulator a row: ``a += mean(g²); w -= lr / (sqrt(a) + eps) * g``.

    Parameters and decay as for `Adagrad`. The formula is FBGEMM's ``EXACT_ROWWISE_ADAGRAD``; the state takes
    ``1 / embedding_dim`` of the memory of `Adagrad`'s.

    References
    ----------
    Mudigere et al.: Software-Hardware Co-design for Fast and Scalable Training of Deep Learning
    Recommendation Models, ISCA 2022, section 4.1.4.
    """

    kind: ClassVar[str] = "rowwise_adagrad"
    state_files: ClassVar[dict[str, Shape]] = {"accumulator": "row"}


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent: ``w -= lr * g``; keeps no state. `weight_decay` as for `Adagrad`."""

    lr: float = 0.01
    weight_decay: float = 0.0

    kind: ClassVar[str] = "sgd"
    state_files: ClassVar[dict[str, Shape]] = {}

    def __post_init__(self) -> None:
        _check("SGD", "lr", self.lr)
        _check_decay("SGD", self.lr, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class FTRL:
    """FTRL-Proximal with per-coordinate rates.

    ``sigma = (sqrt(n + g²) - sqrt(n)) / alpha;  z += g - sigma * w;  n += g²;``
    ``w = 0 if |z| <= l1 else -(z - sign(z) * l1) / ((beta + sqrt(n)) / alpha + l2)``

    A row's `z` starts at the value for which the last line gives the row's initial weight (0 for `Zeros`), so
    that a random initialisation survives the first update.

    Parameters
    ----------
    alpha, beta : float
        Learning rate (the table's `lr`; > 0) and its smoothing (>= 0).
    l1, l2 : float
        Regularisation strengths, >= 0. FTRL has its own L2; there is no `weight_decay`.

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
        _check("FTRL", "alpha", self.alpha, inclusive=False)
        for name in ("beta", "l1", "l2"):
            _check("FTRL", name, getattr(self, name))

    @property
    def lr(self) -> float:
        """The rate a table starts with: `alpha`."""
        return self.alpha


Optimizer = Adagrad | RowWiseAdagrad | SGD | FTRL
