"""Factorisation machines and logistic regression on the rows of a table; `deep` has networks, and needs torch."""

from hashemb.ctr.models.hashed_model import BIAS_FIELD, HashedModel
from hashemb.ctr.models.shallow import PAIR_FIELD, FactorizationMachine, FieldAwareFM, FieldWeightedFM, logistic_loss

__all__ = [
    "BIAS_FIELD",
    "PAIR_FIELD",
    "FactorizationMachine",
    "FieldAwareFM",
    "FieldWeightedFM",
    "HashedModel",
    "logistic_loss",
]
