"""Train a model on files: the trainer, progressive validation, the model directory, and scoring."""

from hashemb.ctr.training.checkpoints import Checkpoints
from hashemb.ctr.training.first_look import Plan, default_table, look, reading_text
from hashemb.ctr.training.learning_curve import LearningCurve, ProgressRow
from hashemb.ctr.training.model_dir import (
    MODEL_FILE,
    Format,
    ModelCard,
    SourcePosition,
    build_model,
    load_model,
    read_card,
    training_lock,
)
from hashemb.ctr.training.negatives import Correction, NegativeSampling, agreed_sampling
from hashemb.ctr.training.options import (
    DEFAULT_RATES,
    DEFAULTS,
    MODELS,
    ModelOptions,
    build_optimizer,
    open_or_create,
    parse_count,
)
from hashemb.ctr.training.progressive import EveryN, PowersOfTwo, ProgressiveValidator, Schedule
from hashemb.ctr.training.scoring import open_for_scoring, score, write_probabilities
from hashemb.ctr.training.trainer import BadLines, Columns, Trainer, TrainStep, check_paths

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
    "Format",
    "LearningCurve",
    "ModelCard",
    "ModelOptions",
    "NegativeSampling",
    "Plan",
    "PowersOfTwo",
    "ProgressRow",
    "ProgressiveValidator",
    "Schedule",
    "SourcePosition",
    "TrainStep",
    "Trainer",
    "agreed_sampling",
    "build_model",
    "build_optimizer",
    "check_paths",
    "default_table",
    "load_model",
    "look",
    "open_for_scoring",
    "open_or_create",
    "parse_count",
    "read_card",
    "reading_text",
    "score",
    "training_lock",
    "write_probabilities",
]
