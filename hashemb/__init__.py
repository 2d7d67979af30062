"""Embedding tables as files: hashed keys, memory-mapped rows, fused lazy sparse Adagrad."""

from hashemb import errors
from hashemb.hashing import hash_fields, hash_keys
from hashemb.init import Normal, Uniform, Zeros
from hashemb.optim import FTRL, SGD, Adagrad, RowWiseAdagrad

__version__ = "0.1.0"

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "Normal",
    "RowWiseAdagrad",
    "Uniform",
    "Zeros",
    "errors",
    "hash_fields",
    "hash_keys",
]
