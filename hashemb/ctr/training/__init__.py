"""Train a model on files: the trainer, progressive validation, the model directory, and scoring."""

from hashemb.ctr.training.checkpoints import Checkpoints
from hashemb.ctr.training.learning_curve import LearningCurve, ProgressRow
from hashemb.ctr.training.model_dir import (
    MODEL_FILE,
    ModelCard,
    SourcePosition,
    build_model,
    load_model,
    read_card,
    training_lock,
)
from hashemb.ctr.training.negatives import Correction, NegativeSampling
from hashemb.ctr.training.options import (
    DEFAULT_RATES,
    DEFAULTS,
    MODELS,
    ModelOptions,
    build_optimizer,
    open_or_create,
    parse_count,
)
from hashemb.ctr.training.plan import TrainOptions, TrainPlan
from hashemb.ctr.training.progressive import EveryN, PowersOfTwo, ProgressiveValidator, Schedule
from hashemb.ctr.training.scoring import open_for_scoring, score, write_probabilities
from hashemb.ctr.training.sources import Columns
from hashemb.ctr.training.trainer import BadLines, Trainer, TrainStep

__all__ = [
    "DEFAULTS",
    "DEFAULT_RATES",
    "MODELS",
    "MODEL_FILE",
    "BadLines",
    "Checkpoints",
    "Columns",
    "Correction",
    "EveryN",
    "LearningCurve",
    "ModelCard",
    "ModelOptions",
    "NegativeSampling",
    "PowersOfTwo",
    "ProgressRow",
    "ProgressiveValidator",
    "Schedule",
    "SourcePosition",
    "TrainOptions",
    "TrainPlan",
    "TrainStep",
    "Trainer",
    "build_model",
    "build_optimizer",
    "load_model",
    "open_for_scoring",
    "open_or_create",
    "parse_count",
    "read_card",
    "score",
    "training_lock",
    "write_probabilities",
]
