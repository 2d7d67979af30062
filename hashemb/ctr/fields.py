"""The old name of `hashemb.ctr.data`."""

import warnings

from hashemb.ctr.data import (
    CRITEO_LABEL,
    CRITEO_SCHEMA,
    CountBuckets,
    Kind,
    Schema,
    bucketize_counts,
    bucketize_floats,
    encode,
)

__all__ = [
    "CRITEO_LABEL",
    "CRITEO_SCHEMA",
    "CountBuckets",
    "Kind",
    "Schema",
    "bucketize_counts",
    "bucketize_floats",
    "encode",
]

warnings.warn("hashemb.ctr.fields is now hashemb.ctr.data", DeprecationWarning, stacklevel=2)
