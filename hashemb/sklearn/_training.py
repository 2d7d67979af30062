"""Make passes over examples in memory, with optional shuffling and early stopping."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hashemb.ctr._types import Float32Array, Int64Array
from hashemb.ctr.models import logistic_loss
from hashemb.sklearn._kept_table import KeptTable
from hashemb.sklearn._layout import Examples

__all__ = ["Trained", "Training", "train"]


_SCORED_TOGETHER = 16384
_MANY = 10_000  # examples from which "auto" enables early stopping, as in scikit-learn's gradient boosting
_LEAST_PROBABILITY = 2.0**-52


@dataclass(frozen=True)
class Training:
    """Training options; the fields are parameters of the estimators in `hashemb.sklearn` and documented there."""

    max_iter: int
    batch_size: int
    shuffle: bool
    early_stopping: bool | Literal["auto"]
    validation_fraction: float
    n_iter_no_change: int
    tol: float
    verbose: int
    name: str

    def __post_init__(self) -> None:
        for parameter in ("max_iter", "batch_size", "n_iter_no_change"):
            value = getattr(self, parameter)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{parameter} must be an int, got {type(value).__name__} {value!r}")
            if value < 1:
                raise ValueError(f"{parameter} must be at least 1, got {value}")
        if self.early_stopping not in (True, False, "auto"):
            raise ValueError(f'early_stopping must be True, False or "auto", got {self.early_stopping!r}')
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if not self.tol >= 0.0:
            raise ValueError(f"tol must be at least 0, got {self.tol}")


@dataclass
class Trained:
    """Result of training.

    Attributes
    ----------
    kept : KeptTable
        The given table, or another one with the weights of the best pass.
    losses : list of float
        Mean log loss of each pass; every example was scored before it was learned.
    validation_losses : list of float
        Mean log loss of the held-out examples after each pass; empty without early stopping.
    best_iteration : int
        The pass, counted from 1, whose weights `kept` holds.
    """

    kept: KeptTable
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_iteration: int = 0


def train(
    model: Any,
    kept: KeptTable,
    examples: Examples,
    labels: Float32Array,
    weights: Float32Array | None,
    training: Training,
    random: np.random.RandomState,
    *,
    beside: str | None = None,
) -> Trained:
    """Train a model on examples.

    Parameters
    ----------
    model : FactorizationMachine or another model of `ctr`
        A model on the table of `kept`, which is open for writing.
    labels, weights : ndarray of float32, shape (n,)
        Labels and weights of the examples.
    random : RandomState
        Source of randomness for the held-out examples and the order of the others.
    beside : str, optional
        Path next to which a private table is kept.

    Notes
    -----
    With early stopping, a private table keeps the weights of the best pass. A table that other processes may have open
    cannot be restored and keeps the weights of the last pass.
    """
    learned, held_out = _split(labels, training, random)
    result, best = Trained(kept), np.inf
    for iteration in range(1, training.max_iter + 1):
        began = time.perf_counter()
        order = random.permutation(learned) if training.shuffle else learned
        result.losses.append(_learn(model, examples, labels, weights, order, training.batch_size))
        if len(held_out):
            result.validation_losses.append(_loss(model, examples, labels, weights, held_out))
        _report(training, iteration, len(learned), result, time.perf_counter() - began)
        if not len(held_out):
            result.best_iteration = iteration
        elif result.validation_losses[-1] < best - training.tol:
            result.best_iteration, best = iteration, result.validation_losses[-1]
            kept.checkpoint()
        elif iteration - result.best_iteration == training.n_iter_no_change:
            break
    if result.best_iteration < len(result.losses):
        result.kept = kept.at_checkpoint(beside=beside)
    return result


def _split(labels: Float32Array, training: Training, random: np.random.RandomState) -> tuple[Int64Array, Int64Array]:
    """Split the examples into those to learn and those to hold out.

    The held-out examples are a random part of each class or, without shuffling, the last examples. This is not
    `train_test_split`, which draws others from the same `random_state`, and with them learns another model.
    """
    rows = np.arange(len(labels))
    early_stopping = len(rows) >= _MANY if training.early_stopping == "auto" else training.early_stopping
    if not early_stopping:
        return rows, rows[:0]
    fraction = training.validation_fraction
    if training.shuffle:
        parts = [random.permutation(np.flatnonzero(labels == label)) for label in (0.0, 1.0)]
        held_out = np.concatenate([part[: round(len(part) * fraction)] for part in parts])
    else:
        held_out = rows[len(rows) - round(len(rows) * fraction) :]
    if len(held_out) == 0 or len(held_out) == len(rows):
        raise ValueError(
            f"validation_fraction={fraction} of {len(rows)} examples leaves {len(held_out)} to validate with and "
            f"{len(rows) - len(held_out)} to learn: give more data, or early_stopping=False"
        )
    return np.setdiff1d(rows, held_out), np.sort(held_out)


def _learn(
    model: Any,
    examples: Examples,
    labels: Float32Array,
    weights: Float32Array | None,
    order: Int64Array,
    batch_size: int,
) -> float:
    """Make one pass; return the mean loss of the probabilities from before each update."""
    probabilities = np.empty(len(order), np.float64)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        weighting = {} if weights is None else {"weights": weights[rows]}
        probabilities[start : start + batch_size] = model.learn(
            labels=labels[rows], **weighting, **examples.batch(rows)
        )
    given = np.where(labels[order] > 0.0, probabilities, 1.0 - probabilities)
    return _mean(-np.log(np.maximum(given, _LEAST_PROBABILITY)), weights, order)


def _loss(
    model: Any, examples: Examples, labels: Float32Array, weights: Float32Array | None, rows: Int64Array
) -> float:
    parts = [rows[start : start + _SCORED_TOGETHER] for start in range(0, len(rows), _SCORED_TOGETHER)]
    logits = np.concatenate([model.predict_logits(**examples.batch(part)) for part in parts])
    return _mean(logistic_loss(logits, labels[rows]), weights, rows)


def _mean(losses: npt.NDArray[np.float64], weights: Float32Array | None, rows: Int64Array) -> float:
    if weights is None:
        return float(np.mean(losses))
    total = float(np.sum(weights[rows], dtype=np.float64))
    return float(np.dot(losses, weights[rows].astype(np.float64))) / total if total else 0.0


def _report(training: Training, iteration: int, learned: int, result: Trained, seconds: float) -> None:
    if not training.verbose:
        return
    line = f"[{training.name}] pass {iteration}/{training.max_iter}: log loss {result.losses[-1]:.6f}"
    if result.validation_losses:
        line += f", held out {result.validation_losses[-1]:.6f}"
    print(f"{line}, {learned / seconds:,.0f} examples/s", flush=True)
