"""Embedding tables as files: hashed keys, memory-mapped rows, fused lazy sparse Adagrad.

`create`, `open` and `info` make and open tables; `hash_keys` and `hash_fields` turn values into keys;
`hashemb.reference` holds the same algorithms in plain NumPy.
"""

__version__ = "0.1.0"

from hashemb import errors
from hashemb._core import get_num_threads, set_num_threads
from hashemb.init import Normal, Uniform, Zeros
from hashemb.optim import FTRL, SGD, Adagrad, RowWiseAdagrad
from hashemb.stats import TableStats
from hashemb.table import EmbeddingTable, TableInfo, create, info, open

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "EmbeddingTable",
    "Normal",
    "RowWiseAdagrad",
    "TableInfo",
    "TableStats",
    "Uniform",
    "Zeros",
    "create",
    "errors",
    "get_num_threads",
    "info",
    "open",
    "set_num_threads",
]
