"""Reference implementation of the table's algorithms in plain NumPy, operation by operation, in memory.

It is the oracle of the tests (the fast table must equal it bit for bit), the documentation of every formula, and
a way to check a table where the extension cannot be built. It never imports the extension and shares no code with
it. It uses only NumPy's float32 and float64 ``+``, ``-``, ``*``, ``/`` and ``sqrt``, which IEEE 754 makes the same
everywhere.

>>> import numpy as np
>>> from hashemb import reference
>>> table = reference.ReferenceTable(num_embeddings=1000, embedding_dim=4, seed=1)
>>> keys = reference.hash_keys(["cat", "dog", "cat"])
>>> table.update(keys, np.ones((3, 4), np.float32))
>>> table.lookup(keys).shape
(3, 4)
"""

from hashemb.reference.table import (
    ReferenceTable,
    adagrad_step,
    bags,
    fmix64,
    ftrl_step,
    hash_keys,
    initial_rows,
    mean_square,
    mulhi64,
    rows,
    splitmix64,
    sum_by_row,
)

__all__ = [
    "ReferenceTable",
    "adagrad_step",
    "bags",
    "fmix64",
    "ftrl_step",
    "hash_keys",
    "initial_rows",
    "mean_square",
    "mulhi64",
    "rows",
    "splitmix64",
    "sum_by_row",
]
