"""Metrics of predicted probabilities, of whole arrays and of streams."""

from hashemb.ctr.metrics.calibration_bins import CalibrationBin, expected_calibration_error
from hashemb.ctr.metrics.scores import auc, calibration, calibration_by_quantile, gauc, logloss, normalized_entropy
from hashemb.ctr.metrics.streaming import StreamingMetrics

__all__ = [
    "CalibrationBin",
    "StreamingMetrics",
    "auc",
    "calibration",
    "calibration_by_quantile",
    "expected_calibration_error",
    "gauc",
    "logloss",
    "normalized_entropy",
]
