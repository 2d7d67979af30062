"""The old name of `hashemb.ctr.models.deep`."""

import warnings

from hashemb.ctr.models.deep import DCNv2, DeepFM, predict_proba

__all__ = ["DCNv2", "DeepFM", "predict_proba"]

warnings.warn("hashemb.ctr.deep is now hashemb.ctr.models.deep", DeprecationWarning, stacklevel=2)
