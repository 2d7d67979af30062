"""scikit-learn classifiers that keep their weights in a hashed table; they need no encoder and no vocabulary.

They need the extra: ``pip install 'hashemb[ctr]'``. docs/start/sklearn.md has examples.
"""

from __future__ import annotations

from typing import Any

import hashemb
from hashemb.ctr.models import FieldWeightedFM
from hashemb.sklearn._base import HashedClassifier
from hashemb.sklearn._layout import Layout

__all__ = ["HashedFMClassifier", "HashedFwFMClassifier", "HashedLogisticRegression"]


class HashedLogisticRegression(HashedClassifier):
    """Logistic regression on hashed features, trained online with an adaptive learning rate for every weight.

    Parameters
    ----------
    rows : int, default=2**20
        Number of rows of the table. Values that hash to the same row share a weight; `table_.stats()` returns how
        many do.
    max_iter : int, default=20
        Number of passes over the data in `fit`; with `early_stopping`, the maximum number.
    batch_size : int, default=32
        Number of examples per update.
    lr : float, optional
        Learning rate. Default: 0.05 with Adagrad, else as for `hashemb train`; an existing table keeps its own
        learning rate.
    weight_decay : float, default=0.0
        Each update multiplies all weights by ``1 - lr * weight_decay``, exactly, at no cost for weights that are not in
        the batch.
    optimizer : {"adagrad", "rowwise-adagrad", "sgd", "ftrl"}, default="adagrad"
        Optimiser of the table.
    initial_accumulator : float, optional
        Initial value of Adagrad's sums of squares; larger values make the first steps smaller. Default: 1 with Adagrad.
    num_hashes : int, default=1
        Number of rows per value; the weight of a value is the sum of its rows.
    dtype : {"float32", "float16", "bfloat16"}, default="float32"
        Data type of the weights in the table.
    categorical_features, numeric_features : list of column names or positions, optional
        Columns whose role cannot be inferred from their type; see Notes.
    shuffle : bool, default=True
        Whether `fit` shuffles the examples before each pass.
    early_stopping : bool or "auto", default="auto"
        Whether to hold out `validation_fraction` of the examples (of each class; without `shuffle`, the last ones),
        stop when their log loss has not fallen by more than `tol` in `n_iter_no_change` passes, and keep the weights of
        the best pass. "auto" enables early stopping if there are at least 10,000 examples.
    validation_fraction : float, default=0.1
        Share of the examples that early stopping holds out.
    n_iter_no_change : int, default=2
        Number of passes without improvement after which early stopping ends the training.
    tol : float, default=1e-4
        Tolerance of early stopping.
    random_state : int, RandomState instance or None, default=None
        Determines the table's seed (row hashing, initial values), the order of the examples and the held-out examples.
    table : str or path-like, optional
        Path of the table, existing or new. Default: a new temporary directory, which is removed with the estimator.
    warm_start : bool, default=False
        Whether `fit` continues from what this estimator or the table at `table` has already learned.
    verbose : int, default=0
        If 1, print a line for each pass.

    Attributes
    ----------
    classes_ : ndarray, shape (2,)
        The labels, sorted.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of str
        Names of the columns; defined only if X has names.
    n_iter_, best_iter_ : int
        Number of passes made by the last call, and the pass whose weights are kept.
    loss_curve_, validation_loss_curve_ : list of float
        For each pass of the last call: mean log loss of the examples, each scored before it was learned, and of the
        held-out examples.
    table_ : EmbeddingTable
        The table that holds the weights.

    Notes
    -----
    **X** is a pandas or polars DataFrame, an Arrow table, a mapping of columns, a matrix or a list of rows. The type
    of a column determines whether it holds categories (strings, bytes, categoricals), ids (integers, booleans, dates
    and times) or measured numbers (floats, decimals). Each category and id has a weight. So has each power of two, and
    the weight of a number is interpolated between the two powers around it. List integer columns that measure something
    in `numeric_features` and float columns that hold ids in `categorical_features`. A missing value has a weight like
    any other value. Columns without names are called x0, x1, …; the same values under the same name have the same keys
    in every type of container. The kind of each column is inferred from the first data; later data of another kind
    raise an error.

    **Sparse X**: column indices are keys and data are values; the logit is ``bias + sum_i w_i x_i``.

    **Processes and threads**: a table at a path is shared. `from_table` attaches to it, read-only until the estimator
    is trained. A pickle of an estimator with a path refers to the path, and predicts with the contents that the table
    has when it is used; a pickle of an estimator without a path includes the table's contents. Any number of threads
    may predict, also while another thread trains.

    The classifier supports two classes only. Losses are summed over a batch, not averaged.

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

    ``logit = bias + sum_i w_i + sum_{i<j} <v_i, v_j>``, where every value of every column has a weight w and a vector v
    of `rank` numbers; for sparse X, the terms are ``x_i w_i`` and ``x_i x_j <v_i, v_j>``.

    Parameters
    ----------
    rank : int, default=8
        Length of the vectors.
    init_scale : float, default=0.01
        The vectors are initialised uniformly in [-init_scale, init_scale).
    rows, max_iter, batch_size, lr, weight_decay, optimizer, initial_accumulator, num_hashes, dtype, \
categorical_features, numeric_features, shuffle, early_stopping, validation_fraction, n_iter_no_change, tol, \
random_state, table, warm_start, verbose
        As for `HashedLogisticRegression`; the attributes and the supported types of X are the same, too.

    Notes
    -----
    With many values and few examples, the model overfits within a few passes; use `early_stopping`.

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
    """Factorisation machine with a learned weight for each pair of columns; it does not accept sparse matrices.

    ``logit = bias + sum_i w_i + sum_{i<j} r_ij <v_i, v_j>``. The parameters and attributes are those of
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
