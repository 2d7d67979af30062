"""Click-through-rate models on hashed features: reading data, models, training, and metrics."""

from hashemb.ctr.data import Batch, Reader, encode, open_reader
from hashemb.ctr.metrics import StreamingMetrics, auc, calibration, gauc, logloss, normalized_entropy
from hashemb.ctr.models import FactorizationMachine, FieldAwareFM, FieldWeightedFM
from hashemb.ctr.synthetic import ImpressionStream
from hashemb.ctr.training import (
    NegativeSampling,
    ProgressiveValidator,
    Trainer,
    load_model,
    open_for_scoring,
    score,
)

__all__ = [
    "Batch",
    "FactorizationMachine",
    "FieldAwareFM",
    "FieldWeightedFM",
    "ImpressionStream",
    "NegativeSampling",
    "ProgressiveValidator",
    "Reader",
    "StreamingMetrics",
    "Trainer",
    "auc",
    "calibration",
    "encode",
    "gauc",
    "load_model",
    "logloss",
    "normalized_entropy",
    "open_for_scoring",
    "open_reader",
    "score",
]
