"""scikit-learn classifiers whose weights are rows of a hashed table: no encoder, no vocabulary, any table as X.

Needs the extra: ``pip install 'hashemb[ctr]'``. docs/sklearn.md has examples.
"""

from __future__ import annotations

from typing import Any

import hashemb
from hashemb.ctr.models import FieldWeightedFM
from hashemb.sklearn._base import HashedClassifier
from hashemb.sklearn._layout import Layout

__all__ = ["HashedFMClassifier", "HashedFwFMClassifier", "HashedLogisticRegression"]


class HashedLogisticRegression(HashedClassifier):
    """Logistic regression on hashed features, trained online with an adaptive rate for every weight.

    Parameters
    ----------
    rows : int, default=2**20
        Of the table. Values that hash to one row share a weight: `table_.stats()` says how many do.
    max_iter : int, default=20
        Passes over the data in `fit`; the largest number of them with `early_stopping`.
    batch_size : int, default=32
        Examples per update.
    lr : float, optional
        Learning rate. Default: 0.05 with Adagrad, else as `hashemb train`; of a table that exists already, the one
        that it has.
    weight_decay : float, default=0.0
        Each update multiplies all weights by ``1 - lr * weight_decay``, exactly, at no cost for those not in the
        batch.
    optimizer : {"adagrad", "rowwise-adagrad", "sgd", "ftrl"}, default="adagrad"
    initial_accumulator : float, optional
        What Adagrad's sums of squares start at; the larger, the smaller the first steps. Default: 1 with Adagrad.
    num_hashes : int, default=1
        Rows per value; a value's weight is their sum.
    dtype : {"float32", "float16", "bfloat16"}, default="float32"
        Of the weights in the table.
    categorical_features, numeric_features : list of column names or positions, optional
        Columns whose type says the wrong thing; see below.
    shuffle : bool, default=True
        Whether `fit` takes the examples in another random order in each pass.
    early_stopping : bool or "auto", default="auto"
        Hold out `validation_fraction` of the examples (of each class; without `shuffle` the last ones), stop when
        their log loss has not fallen by more than `tol` in `n_iter_no_change` passes, and keep the weights of the
        best pass. "auto": from 10,000 examples on.
    validation_fraction : float, default=0.1
    n_iter_no_change : int, default=2
    tol : float, default=1e-4
    random_state : int, RandomState instance or None, default=None
        Of the table's seed (row hashing, initial values), of the order and of the held-out examples.
    table : str or path-like, optional
        Where the table is, or is to be. Default: in a directory of its own for temporary files, which is removed with
        the estimator.
    warm_start : bool, default=False
        Whether `fit` goes on with what was learned: by this estimator, or in the table at `table`.
    verbose : int, default=0
        1: a line for each pass.

    Attributes
    ----------
    classes_ : ndarray, shape (2,)
        The labels, sorted.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        If X has names.
    n_iter_, best_iter_ : int
        Passes made by the last call, and the one whose weights are kept.
    loss_curve_, validation_loss_curve_ : list of float
        By pass of the last call: mean log loss of examples scored before they are learned, and of those held out.
    table_ : EmbeddingTable

    Notes
    -----
    **X** is a pandas or polars DataFrame, an Arrow table, a mapping of columns, a matrix or a list of rows. A column
    is one of categories (strings, bytes, categoricals), of ids (integers, booleans, dates and times) or of measured
    numbers (floats, decimals), by its type. Each category and id has a weight; so has each power of two, and a number's
    weight is interpolated between the two that it lies between. `numeric_features` are integers that measure something,
    `categorical_features` floats that are ids. A missing value is a value, and has a weight. Columns without names are
    called x0, x1, …; the same values under the same name have the same keys whatever holds them. What a column holds
    is taken from the first data; another kind of values later is an error.

    **Sparse X**: column indices are keys and data are values; the logit is ``bias + sum_i w_i x_i``.

    **Processes and threads**: a table at a path is shared. `from_table` attaches to it, read-only until it learns; a
    pickle refers to the path, and predicts what the table holds by then. A pickle of an estimator without a path
    holds the table's contents. Predictions may be made from any number of threads, also beside one that learns.

    Two classes only. Losses are summed over a batch, not averaged.

    Examples
    --------
    >>> from hashemb.sklearn import HashedLogisticRegression
    >>> clicks = {"user": ["ann", "bob", "cy", "ann"] * 50, "hour": [9, 9, 21, 21] * 50}
    >>> clicked = ["yes", "no", "no", "yes"] * 50
    >>> model = HashedLogisticRegression(random_state=0).fit(clicks, clicked)
    >>> model.predict({"user": ["ann", "bob", "new"], "hour": [21, 9, 9]}).tolist()[:2]
    ['yes', 'no']
    """

    def __init__(
        self,
        *,
        rows: int = 2**20,
        max_iter: int = 20,
        batch_size: int = 32,
        lr: float | None = None,
        weight_decay: float = 0.0,
        optimizer: str = "adagrad",
        initial_accumulator: float | None = None,
        num_hashes: int = 1,
        dtype: str = "float32",
        categorical_features: Any = None,
        numeric_features: Any = None,
        shuffle: bool = True,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 2,
        tol: float = 1e-4,
        random_state: Any = None,
        table: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.rows = rows
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.initial_accumulator = initial_accumulator
        self.num_hashes = num_hashes
        self.dtype = dtype
        self.categorical_features = categorical_features
        self.numeric_features = numeric_features
        self.shuffle = shuffle
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.random_state = random_state
        self.table = table
        self.warm_start = warm_start
        self.verbose = verbose

    def _row(self) -> tuple[int, hashemb.Uniform | hashemb.Zeros]:
        return 1, hashemb.Zeros()


class HashedFMClassifier(HashedLogisticRegression):
    """Factorisation machine on hashed features: logistic regression with an interaction for every pair of columns.

    ``logit = bias + sum_i w_i + sum_{i<j} <v_i, v_j>``, with a weight w and a vector v of `rank` numbers for every
    value of every column; on sparse X, ``x_i w_i`` and ``x_i x_j <v_i, v_j>``.

    Parameters
    ----------
    rank : int, default=8
        Length of the vectors.
    init_scale : float, default=0.01
        They start uniformly distributed in [-init_scale, init_scale).
    rows, max_iter, batch_size, lr, weight_decay, optimizer, initial_accumulator, num_hashes, dtype, \
categorical_features, numeric_features, shuffle, early_stopping, validation_fraction, n_iter_no_change, tol, \
random_state, table, warm_start, verbose
        As for `HashedLogisticRegression`, and so are the attributes and what X may be.

    Notes
    -----
    It learns by heart in a few passes where values are many and examples few: `early_stopping` finds when to end.

    References
    ----------
    Rendle: Factorization Machines, ICDM 2010.

    Examples
    --------
    >>> from hashemb.sklearn import HashedFMClassifier
    >>> taste = {"user": ["ann", "ann", "bob", "bob"] * 50, "music": ["jazz", "punk", "jazz", "punk"] * 50}
    >>> HashedFMClassifier(random_state=0, init_scale=0.1).fit(taste, [1, 0, 0, 1] * 50).score(taste, [1, 0, 0, 1] * 50)
    1.0
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        init_scale: float = 0.01,
        rows: int = 2**20,
        max_iter: int = 20,
        batch_size: int = 32,
        lr: float | None = None,
        weight_decay: float = 0.0,
        optimizer: str = "adagrad",
        initial_accumulator: float | None = None,
        num_hashes: int = 1,
        dtype: str = "float32",
        categorical_features: Any = None,
        numeric_features: Any = None,
        shuffle: bool = True,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 2,
        tol: float = 1e-4,
        random_state: Any = None,
        table: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.rank = rank
        self.init_scale = init_scale
        super().__init__(
            rows=rows,
            max_iter=max_iter,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            optimizer=optimizer,
            initial_accumulator=initial_accumulator,
            num_hashes=num_hashes,
            dtype=dtype,
            categorical_features=categorical_features,
            numeric_features=numeric_features,
            shuffle=shuffle,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            random_state=random_state,
            table=table,
            warm_start=warm_start,
            verbose=verbose,
        )

    def _row(self) -> tuple[int, hashemb.Uniform | hashemb.Zeros]:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        return 1 + int(self.rank), hashemb.Uniform(float(self.init_scale))


class HashedFwFMClassifier(HashedFMClassifier):
    """Factorisation machine with a weight, learned too, for each pair of columns; for tables, not for sparse matrices.

    ``logit = bias + sum_i w_i + sum_{i<j} r_ij <v_i, v_j>``. Parameters and attributes are those of
    `HashedFMClassifier`.

    References
    ----------
    Pan et al.: Field-weighted Factorization Machines for Click-Through Rate Prediction in Display Advertising,
    WWW 2018.

    Examples
    --------
    >>> from hashemb.sklearn import HashedFwFMClassifier
    >>> taste = {"user": ["ann", "ann", "bob", "bob"] * 50, "music": ["jazz", "punk", "jazz", "punk"] * 50}
    >>> model = HashedFwFMClassifier(random_state=0, init_scale=0.1).fit(taste, [1, 0, 0, 1] * 50)
    >>> model.score(taste, [1, 0, 0, 1] * 50)
    1.0
    """

    _takes_sparse = False

    def _model_on(self, table: hashemb.EmbeddingTable, layout: Layout) -> Any:
        return FieldWeightedFM(table, num_fields=layout.num_keys or 0)
