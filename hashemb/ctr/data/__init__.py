"""Read labelled examples from files: formats, kinds of columns, labels, and batches of keys."""

from hashemb.ctr.data.batches import Batch, number_keys
from hashemb.ctr.data.fields import (
    CRITEO_LABEL,
    CRITEO_SCHEMA,
    CountBuckets,
    Kind,
    Schema,
    bucketize_counts,
    bucketize_floats,
    encode,
)
from hashemb.ctr.data.formats import Format
from hashemb.ctr.data.read_report import BadLine, ReadReport
from hashemb.ctr.data.readahead import read_ahead
from hashemb.ctr.data.readers import Reader, open_reader
from hashemb.ctr.data.streams import STDIN, is_stream, without_compression_suffix

__all__ = [
    "CRITEO_LABEL",
    "CRITEO_SCHEMA",
    "STDIN",
    "BadLine",
    "Batch",
    "CountBuckets",
    "Format",
    "Kind",
    "ReadReport",
    "Reader",
    "Schema",
    "bucketize_counts",
    "bucketize_floats",
    "encode",
    "is_stream",
    "number_keys",
    "open_reader",
    "read_ahead",
    "without_compression_suffix",
]
