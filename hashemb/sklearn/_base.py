"""Implement scikit-learn's classifier protocol: what a classifier must accept, check, store and reject.

This module contains no mathematics. `_columns` encodes columns as keys, `_layout` records the columns of a fitted
model, `_training` makes the passes, and `_kept_table` manages the table's location.
"""

from __future__ import annotations

import os
from abc import ABCMeta, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit

import hashemb
from hashemb.ctr._types import Array, Float32Array
from hashemb.ctr.models import FactorizationMachine
from hashemb.ctr.training import ModelOptions, build_optimizer
from hashemb.errors import HashembError, MissingExtraError
from hashemb.sklearn._card import EstimatorCard
from hashemb.sklearn._kept_table import KeptTable
from hashemb.sklearn._layout import Examples, Layout
from hashemb.sklearn._training import Trained, Training, train

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted

    from hashemb.sklearn._checks import as_labels, check_classes, check_lengths, check_targets, check_weights
except ImportError as error:
    raise MissingExtraError("scikit-learn", "ctr") from error

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HashedClassifier"]


#: The steps are larger than for streams of clicks (`options.DEFAULT_RATES`) but smaller than is best for small data:
#: docs/start/sklearn.md has the measurements.
_ADAGRAD = {"lr": 0.05, "initial_accumulator": 1.0}
_PREDICTED_TOGETHER = 16384  # examples per look-up; bounds the memory of a prediction


class HashedClassifier(ClassifierMixin, BaseEstimator, metaclass=ABCMeta):
    """Base class of the classifiers, which provides everything except their parameters and their model."""

    _takes_sparse: ClassVar[bool] = True

    @abstractmethod
    def _row(self) -> tuple[int, hashemb.Uniform | hashemb.Zeros]:
        """Return the length and the initial values of the table's rows."""

    def _model_on(self, table: hashemb.EmbeddingTable, layout: Layout) -> Any:
        """Return the model, one of `ctr.models`."""
        return FactorizationMachine(table)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._takes_sparse
        tags.input_tags.categorical = True
        tags.input_tags.allow_nan = True
        tags.classifier_tags.multi_class = False
        return tags

    # -- learning --

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the model to a table of examples, from scratch unless `warm_start` is set.

        Parameters
        ----------
        X : DataFrame, Arrow table, mapping of columns, array or scipy.sparse matrix, shape (n, n_features)
            Training data; see the class. Its keys are held in memory: 8 bytes per category (12 if there are also
            numbers) and 24 per number.
        y : array_like, shape (n,)
            Two distinct labels of any type.
        sample_weight : array_like of float, shape (n,), optional
            Factors of the examples' losses, >= 0. Examples of weight 0 are ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            `X` is not a table, `X` and `y` differ in length, `y` does not have exactly two classes, or a parameter is
            out of range. Everything is checked before anything is written.
        FileExistsError
            Something exists at the path `table`, and `warm_start` is not set.
        FloatingPointError
            The model has diverged and needs a smaller `lr`. A new table is removed.

        Notes
        -----
        A new table appears at its path atomically, at the end of the call. Until then it is in a temporary directory
        next to the path, which a killed process leaves behind.
        """
        training = self._training()
        going_on = bool(self.warm_start) and self._attach()
        examples, labels, weights, card = self._read(X, y, None, sample_weight, going_on=going_on, drop=True)
        random = check_random_state(self.random_state)
        kept = self._kept if going_on else self._new_table(card, random)
        model, path = self._model(kept, card.layout, "r+"), self._path()
        result = train(model, kept, examples, labels, weights, training, random, beside=path)
        if not going_on and path is not None:
            card.write(result.kept.path)
            result.kept.publish(path)
        return self._settle(card, result)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Update the model with one pass over more data, in the given order; suitable for streams.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`, but `y` may contain only one class, and examples of weight 0 count as part of their batch.
        classes : array_like, shape (2,), optional
            All labels; required in the first call if `y` does not contain both.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            As for `fit`; or the columns or classes differ from those that the model was fitted on.
        HashembError
            The path `table` exists and cannot be trained further.

        Notes
        -----
        A table at a path is trained in place: other processes that have it open see each batch at once, and several
        processes may train it at the same time (docs/explanation/concurrency.md). An existing table is trained further,
        whichever program created it. Calls with consecutive pieces whose lengths are multiples of `batch_size` give the
        same bits as one ``fit`` on all the data with ``max_iter=1, shuffle=False``.
        """
        training = self._training(max_iter=1, shuffle=False, early_stopping=False)
        going_on = self._attach()
        examples, labels, weights, card = self._read(X, y, classes, sample_weight, going_on=going_on, drop=False)
        random = check_random_state(self.random_state)
        if going_on:
            kept = self._kept
        elif self.table is None:
            kept = self._new_table(card, random)
        else:
            kept = self._table_at_path(card, random)
        result = train(self._model(kept, card.layout, "r+"), kept, examples, labels, weights, training, random)
        return self._settle(card, result)

    def _training(self, **changes: Any) -> Training:
        options = {name: getattr(self, name) for name in Training.__dataclass_fields__ if name != "name"}
        return Training(**(options | changes), name=type(self).__name__)

    def _read(
        self, X: Any, y: Any, classes: Any, sample_weight: Any, *, going_on: bool, drop: bool
    ) -> tuple[Examples, Float32Array, Float32Array | None, EstimatorCard]:
        """Check and encode the arguments of a call. With `drop`, leave out the examples of weight 0."""
        name = type(self).__name__
        targets = check_targets(y, name)
        if going_on:
            layout, examples = self._layout, self._layout.read(X, self)
        else:
            listed = {"categorical": self.categorical_features, "numeric": self.numeric_features}
            layout, examples = Layout.of(X, **listed)
        if layout.kinds is None and not self._takes_sparse:
            raise TypeError(f"{name} distinguishes columns: it takes tables and arrays, no sparse matrices")
        check_lengths(len(examples), len(targets), layout.num_columns)
        weights = check_weights(sample_weight, len(targets))
        if drop and weights is not None and not weights.all():
            rows = np.flatnonzero(weights)
            examples, targets, weights = examples.take(rows), targets[rows], weights[rows]
        known = check_classes(targets, self.classes_ if going_on else None, classes)
        return examples, as_labels(targets, known), weights, EstimatorCard(name, known, layout)

    def _settle(self, card: EstimatorCard, result: Trained) -> Self:
        """Store the result of training; until here the estimator is unchanged by the call."""
        self._know(card)
        self._kept = result.kept
        self.n_iter_, self.best_iter_ = len(result.losses), result.best_iteration
        self.loss_curve_, self.validation_loss_curve_ = result.losses, result.validation_losses
        return self

    def _know(self, card: EstimatorCard) -> None:
        self.classes_, self._layout = card.classes, card.layout
        self.n_features_in_ = card.layout.num_columns
        if card.layout.named:
            self.feature_names_in_ = np.array(list(card.layout.kinds or {}), dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    # -- the table --

    @property
    def table_(self) -> hashemb.EmbeddingTable:
        """The table that holds the weights; it is closed with the estimator."""
        check_is_fitted(self, "classes_")
        return self._kept.open()

    def _path(self) -> str | None:
        return None if self.table is None else os.path.abspath(os.fspath(self.table))

    def _model(self, kept: KeptTable, layout: Layout, mode: Any) -> Any:
        """Return a new model for each call: several threads may share the table but not a model's buffers."""
        table = kept.open(mode)
        if mode == "r+" and self.lr is not None and table.lr != self.lr:
            table.lr = float(self.lr)
        return self._model_on(table, layout)

    def _options(self, seed: int = 0) -> dict[str, Any]:
        """Return the arguments of `hashemb.create`."""
        dim, init = self._row()
        defaults = _ADAGRAD if self.optimizer == "adagrad" else {}
        rates: dict[str, Any] = {
            name: defaults.get(name) if (value := getattr(self, name)) is None else float(value)
            for name in ("lr", "weight_decay", "initial_accumulator")
        }
        return {
            "num_embeddings": self.rows,
            "embedding_dim": dim,
            "dtype": self.dtype,
            "optimizer": build_optimizer(ModelOptions(optimizer=self.optimizer, **rates).filled()),
            "init": init,
            "num_hashes": self.num_hashes,
            "seed": seed,
        }

    def _new_table(self, card: EstimatorCard, random: np.random.RandomState) -> KeptTable:
        options, path = self._options(int(random.randint(2**31 - 1))), self._path()
        if path is not None:
            card.as_json()  # fail now, not after hours of training
            if os.path.lexists(path):
                raise FileExistsError(
                    f"{path}: this path exists already, and fit starts from scratch: choose another path, train "
                    "further (partial_fit or warm_start=True), or remove it"
                )
        return KeptTable.create(options, beside=path)

    def _table_at_path(self, card: EstimatorCard, random: np.random.RandomState) -> KeptTable:
        """Create the new table of a stream, which is at its path from the start."""
        kept = self._new_table(card, random)
        card.write(kept.path)
        kept.publish(os.path.abspath(os.fspath(self.table)))
        return kept

    def _attach(self) -> bool:
        """Attach to an existing model, this estimator's own or the one at its path; return whether there is one."""
        path = self._path()
        own = getattr(self, "_kept", None)
        if own is not None and (own.is_private if path is None else own.path == path):
            return True
        if path is None or not os.path.lexists(path):
            return False
        self._check_agreement(hashemb.info(path))
        self._attach_to(path)
        return True

    def _attach_to(self, path: str) -> None:
        hashemb.info(path)  # raises the usual errors if there is no table
        card = EstimatorCard.read(path)
        if card.estimator != type(self).__name__:
            raise HashembError(f"{path} holds a {card.estimator}, not a {type(self).__name__}")
        self._know(card)
        self._kept = KeptTable(path)

    def _check_agreement(self, info: hashemb.TableInfo) -> None:
        """Check that the table at the path agrees with the parameters, except in learning rate and seed."""
        wanted = self._options()
        for name in ("num_embeddings", "embedding_dim", "num_hashes", "dtype", "init", "optimizer"):
            made, asked = getattr(info, name), wanted[name]
            if name == "optimizer" and type(made) is type(asked):
                rate = "alpha" if isinstance(made, hashemb.FTRL) else "lr"
                asked = replace(asked, **{rate: getattr(made, rate)})
            if made != asked:
                raise ValueError(
                    f"{info.path} was made with {name} {made}, not {asked}: {type(self).__name__}.from_table takes "
                    "the table's parameters"
                )

    @classmethod
    def from_table(cls, path: str | os.PathLike[str], **params: Any) -> Self:
        """Create an estimator on an existing table, to predict in another process or to train further.

        Parameters
        ----------
        path : str or path-like
            Path of a table that `fit` or `partial_fit` wrote at `table`, or of a model that `hashemb train` created.
        **params
            Parameters that the table does not determine, such as `batch_size` or `verbose`.

        Returns
        -------
        HashedLogisticRegression or HashedFMClassifier
            A fitted estimator. Its table is read-only until `partial_fit` or `fit` (with `warm_start`) is called.

        Raises
        ------
        FileNotFoundError, FormatError
            The path does not exist, is not a table, or is a table without an estimator.
        HashembError
            The table holds another kind of model.
        """
        path = os.path.abspath(os.fspath(path))  # a pickle may be opened elsewhere
        estimator = cls(table=path)
        estimator._attach_to(path)
        estimator.set_params(**(_params_of(hashemb.info(path), estimator.get_params()) | params))
        return estimator

    def __getstate__(self) -> dict[str, Any]:
        """Pickle a table at a path by reference to the path, and a private table with its contents."""
        state = dict(super().__getstate__())
        kept = state.pop("_kept", None)
        if kept is not None:
            state["_kept_at"] = kept.pack() if kept.is_private else kept.path
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare to open the table at its first use, or recreate the private one."""
        state = dict(state)
        kept = state.pop("_kept_at", None)
        super().__setstate__(state)
        if kept is not None:
            self._kept = KeptTable(kept) if isinstance(kept, str) else KeptTable.unpack(kept)

    # -- predicting --

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Predict the log-odds of ``classes_[1]``, shape (n,). Errors are those of `predict_proba`."""
        check_is_fitted(self, "classes_")
        examples = self._layout.read(X, self)
        model = self._model(self._kept, self._layout, "r")
        logits = np.empty(len(examples))
        for start in range(0, len(examples), _PREDICTED_TOGETHER):
            rows = slice(start, start + _PREDICTED_TOGETHER)
            logits[rows] = model.predict_logits(**examples.batch(rows))
        return logits

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Predict the probability of each class.

        Parameters
        ----------
        X : table or matrix, shape (n, n_features)
            Data with the same columns as in `fit`; unseen and missing values are allowed.

        Returns
        -------
        ndarray of float64, shape (n, 2)
            Probabilities in the order of `classes_`.

        Raises
        ------
        NotFittedError
            The estimator has not been fitted.
        ValueError, TypeError
            The columns differ from those that the model was fitted on.
        """
        logits = self.decision_function(X)
        return np.stack([expit(-logits), expit(logits)], axis=1)

    def predict_log_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Predict the logarithms of the probabilities, accurate even if a probability underflows."""
        logits = self.decision_function(X)
        return np.stack([log_expit(-logits), log_expit(logits)], axis=1)

    def predict(self, X: Any) -> Array:
        """Predict the more probable class of each example, shape (n,)."""
        positive = self.decision_function(X) > 0.0
        return np.asarray(self.classes_)[positive.astype(np.intp)]


def _params_of(info: hashemb.TableInfo, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that the table determines. `lr` stays with the table, which all processes share."""
    optimizer = info.optimizer
    found = {
        "rows": info.num_embeddings,
        "num_hashes": info.num_hashes,
        "dtype": info.dtype,
        "optimizer": optimizer.kind.replace("_", "-"),
        "weight_decay": optimizer.weight_decay,
        "initial_accumulator": getattr(optimizer, "initial_accumulator_value", None),
        "rank": info.embedding_dim - 1,
        "init_scale": getattr(info.init, "scale", None),
    }
    return {name: value for name, value in found.items() if name in params}
