"""The old name of `hashemb.ctr.data`."""

import warnings

from hashemb.ctr.data import BadLine, Batch, Reader, ReadReport, open_reader

__all__ = ["BadLine", "Batch", "ReadReport", "Reader", "open_reader"]

warnings.warn("hashemb.ctr.readers is now hashemb.ctr.data", DeprecationWarning, stacklevel=2)
