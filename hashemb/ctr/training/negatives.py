"""Negative sampling: learn from all positives and a share of the negatives, and still predict calibrated probabilities.

Whether a negative is kept is a function of (seed, number of the example), so a resumed run keeps the same ones. A model
that learns from the kept examples without correction predicts odds that are too high by a factor of 1 / rate; either
every kept negative therefore weighs 1 / rate in the loss, or the predictions are corrected afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from hashemb.ctr._power_law import draws, splitmix
from hashemb.ctr._types import Float32Array

if TYPE_CHECKING:
    from hashemb.ctr.data import Batch

__all__ = ["Correction", "NegativeSampling", "agreed_sampling"]

Correction = Literal["predictions", "weights"]


@dataclass(frozen=True)
class NegativeSampling:
    """Selects the examples to learn from, and corrects for the selection.

    Parameters
    ----------
    rate : float
        Share of the negatives to keep, in (0, 1].
    correction : {"predictions", "weights"}
        ``"predictions"``: the model learns the kept examples unweighted, and a prediction p is corrected to
        ``p / (p + (1 - p) / rate)``. ``"weights"``: a kept negative's loss is multiplied by 1 / rate, so that the
        gradient is an unbiased but noisier estimate of that of all examples; predictions are not changed.
    seed : int
        Seed of the selection.

    References
    ----------
    He et al.: Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 6.3.

    Examples
    --------
    >>> negatives = NegativeSampling(0.1)
    >>> labels = np.array([1, 0, 0, 1] * 1000, np.float32)
    >>> kept = negatives.keep(labels, start=0)
    >>> bool(kept[labels == 1].all()), 150 < int(kept[labels == 0].sum()) < 250
    (True, True)
    >>> round(float(negatives.corrected(np.array([0.5], np.float32))[0]), 4)
    0.0909
    """

    rate: float
    correction: Correction = "predictions"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"the rate of negatives must be in (0, 1], got {self.rate}")
        if self.correction not in get_args(Correction):
            raise ValueError(f"correction must be one of {', '.join(get_args(Correction))}, got {self.correction!r}")

    def keep(self, labels: npt.ArrayLike, start: int) -> npt.NDArray[np.bool_]:
        """Return a mask, (n,), of the examples to keep; they have numbers `start`, `start` + 1, … and these labels."""
        y = np.asarray(labels)
        uniform = draws(next(splitmix(self.seed)), start, len(y)) >> np.uint64(11)
        kept: npt.NDArray[np.bool_] = (y != 0.0) | (uniform.astype(np.float64) < self.rate * 2.0**53)
        return kept

    def select(self, batch: Batch, start: int) -> Batch:
        """Return the kept examples of the batch; `start` is the number of its first example."""
        assert batch.labels is not None
        kept = self.keep(batch.labels, start)
        return batch if kept.all() else _selected(batch, kept)

    def importance(self, batch: Batch) -> Float32Array:
        """Return the number of examples that each kept one represents, times its own weight: (n,)."""
        assert batch.labels is not None
        weights = np.where(batch.labels == 0.0, 1.0 / self.rate, 1.0)
        return (weights if batch.weights is None else weights * batch.weights).astype(np.float32)

    def corrected(self, probabilities: npt.NDArray[np.float32]) -> Float32Array:
        """Convert the predictions of a model of the kept examples to probabilities among all examples: (n,)."""
        if self.correction == "weights":
            return probabilities
        p = probabilities.astype(np.float64)
        return (p / (p + (1.0 - p) / self.rate)).astype(np.float32)


def agreed_sampling(
    learned_with: NegativeSampling | None, rate: float | None, correction: Correction | None
) -> NegativeSampling:
    """Return the sampling to use, from that of the trained model (None: not trained yet) and the requested one.

    Raises
    ------
    ValueError
        The requested sampling differs from that of the model, so its predictions could not be corrected.
    """
    known = learned_with or NegativeSampling(1.0)
    asked = NegativeSampling(
        known.rate if rate is None else rate, correction or known.correction, seed=known.seed
    )
    if learned_with is not None and asked != known:
        raise ValueError(
            f"the model has learned {known.rate:.6g} of the negatives, corrected by {known.correction}; that can't "
            f"become {asked.rate:.6g}, corrected by {asked.correction}: leave the option out, or name another table"
        )
    return asked


def _selected(batch: Batch, kept: npt.NDArray[np.bool_]) -> Batch:
    """Return the examples of the mask; in a ragged batch, with all their keys."""
    of_keys, offsets = kept, None
    if batch.offsets is not None:
        lengths = np.diff(batch.offsets)
        of_keys = np.repeat(kept, lengths)
        offsets = np.concatenate(([0], np.cumsum(lengths[kept])))
    return batch._replace(
        labels=None if batch.labels is None else batch.labels[kept],
        keys=batch.keys[of_keys],
        offsets=offsets,
        values=None if batch.values is None else batch.values[of_keys],
        fields=None if batch.fields is None else batch.fields[of_keys],
        weights=None if batch.weights is None else batch.weights[kept],
        numbering=None,
    )
