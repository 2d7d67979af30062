"""Embedding tables as files: hashed keys, memory-mapped rows, fused lazy sparse Adagrad.

`create`, `open` and `info` create, open and describe tables; `hash_keys` and `hash_fields` turn values into keys;
`hashemb.reference` implements the same algorithms in plain NumPy.
"""

from hashemb import errors, reference
from hashemb._files import SnapshotInfo
from hashemb._packages import show_versions
from hashemb._points import DeltaInfo, Problem, check_delta, delta_info
from hashemb._runtime import get_num_threads, set_num_threads
from hashemb._version import __version__
from hashemb.create import TableInfo, create, info, open
from hashemb.hashing import hash_fields, hash_keys, keys_of_rows
from hashemb.init import Normal, Uniform, Zeros
from hashemb.optim import FTRL, SGD, Adagrad, RowWiseAdagrad
from hashemb.replica import FollowStatus, apply_delta, follow
from hashemb.restore import restore
from hashemb.stats import RowSample, TableStats, sample_rows
from hashemb.table import EmbeddingTable
from hashemb.verify import verify

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "DeltaInfo",
    "EmbeddingTable",
    "FollowStatus",
    "Normal",
    "Problem",
    "RowSample",
    "RowWiseAdagrad",
    "SnapshotInfo",
    "TableInfo",
    "TableStats",
    "Uniform",
    "Zeros",
    "__version__",
    "apply_delta",
    "check_delta",
    "create",
    "delta_info",
    "errors",
    "follow",
    "get_num_threads",
    "hash_fields",
    "hash_keys",
    "info",
    "keys_of_rows",
    "open",
    "reference",
    "restore",
    "sample_rows",
    "set_num_threads",
    "show_versions",
    "verify",
]
